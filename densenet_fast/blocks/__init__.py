"""A dense block, a stem and a transition on tensors: autograd over the operators, and memory."""
