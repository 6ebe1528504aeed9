"""Short check of an installed wheel under another torch than the one it was built with."""

import sys

import torch

import densenet_fast

running, built_with = sys.argv[1:]
info = densenet_fast.build_info()
print(info)
assert info["torch"].split("+")[0] == running
assert info["built_with_torch"] == built_with
assert info["extension_error"] is None

torch.manual_seed(0)
model = densenet_fast.EfficientDenseNet(8, (3, 2), 16, num_classes=5).double()
images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
results = {}
for backend in ("cpu", "reference"):
    model.zero_grad()
    with densenet_fast.use_backend(backend):
        logits = model(images)
        logits.square().sum().backward()
    results[backend] = [logits.detach(), *(p.grad.clone() for p in model.parameters())]
for fast, plain in zip(results["cpu"], results["reference"], strict=True):
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
print(f"outputs and {len(results['cpu']) - 1} gradients agree with the reference")
