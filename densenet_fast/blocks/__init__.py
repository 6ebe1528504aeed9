"""A dense block and a stem on tensors: autograd over the operators, and the memory they take."""
