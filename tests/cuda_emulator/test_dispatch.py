"""The dispatch on CUDA tensors, compiled for CPU tensors and with emulated kernels behind it.

A process of its own: there the dispatch replaces the CPU kernels of the operators.
"""

from __future__ import annotations

import pytest
from block_operator_cases import CASES
from dispatched import Run
from ops_arguments import ARGUMENTS

TYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("dtype", TYPES)
def test_every_operator_agrees_with_its_definition(run: Run, dtype: str) -> None:
    code = f"""
dtype = torch.{dtype}
eps = torch.finfo(dtype).eps
for op in ARGUMENTS:
    given, expected = arguments(op, dtype), arguments(op, dtype)
    getattr(operators, op)(*given.values())
    definition(op)(*expected.values())
    results = dict(tensors(given))
    for name, value in tensors(expected):
        size = max(value.double().abs().flatten().tolist(), default=0) + 1
        text = f"{{op}} {{name}}: {{results[name]}} should be {{value}}"
        torch.testing.assert_close(results[name], value, rtol=0, atol=40 * eps * size, msg=text)
    print(op)
"""
    assert len(run(code).split()) == len(ARGUMENTS)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks(run: Run, dtype: str, direction: str) -> None:
    """C++'s loop launches what Python's does, and the definition agrees in float64."""
    code = f"""
for name, case in CASES.items():
    check(replace(case, dtype=torch.{dtype}), "{direction}", same_bits=False)
    print(name)
"""
    assert len(run(code).splitlines()) == len(CASES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_weights_go_with_narrower_features(run: Run, dtype: str) -> None:
    code = f"""
for op in ARGUMENTS:
    given, rounded = wide(arguments(op, torch.{dtype})), arguments(op, torch.{dtype})
    if given.keys().isdisjoint({{"weight", "parameters"}}) or op == "norm_coefficients":
        continue
    getattr(operators, op)(*given.values())
    getattr(operators, op)(*rounded.values())
    results = dict(tensors(given))
    for name, value in tensors(rounded):
        assert torch.equal(results[name].to(value.dtype), value), (op, name)
    print(op)
"""
    assert len(run(code).split()) == 8


def test_absent_results(run: Run) -> None:
    run(
        """
for op, absent in (
    ("conv1x1_forward", ["mean", "var"]),
    ("conv3x3_forward", ["mean", "var"]),
    ("transition_forward", ["mean", "var"]),
    ("conv1x1_backward", ["grad_features", "grad_gamma", "grad_beta"]),
    ("conv1x1_backward", ["grad_features"]),
    ("conv1x1_backward", ["grad_weight"]),
    ("conv3x3_backward", ["grad_norm", "grad_gamma", "grad_beta"]),
    ("conv3x3_backward", ["grad_weight"]),
    ("transition_backward", ["grad_weight"]),
    ("norm_coefficients", ["weight"]),
    ("norm_coefficients", ["bias"]),
):
    given, expected = arguments(op), arguments(op)
    for name in absent:
        given[name] = expected[name] = None
    getattr(operators, op)(*given.values())
    getattr(reference, op)(**expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(given[name], value, rtol=1e-4, atol=1e-4, msg=f"{op} {name}")
""",
    )


def test_wrong_arguments_are_errors(run: Run) -> None:
    code = """
def attempt(op, **wrong):
    given = {**arguments(op), **wrong}
    try:
        getattr(kernel, op)(*given.values())
    except RuntimeError as error:
        print(error)
    else:
        print(op, "was accepted")

x = arguments("conv1x1_forward")
attempt("conv1x1_forward", features=x["features"].permute(0, 2, 1, 3))
attempt("conv1x1_forward", features=x["features"][0])
attempt("conv1x1_forward", scale=x["scale"][1:])
attempt("conv1x1_forward", scale=x["scale"].double())
attempt("conv1x1_forward", weight=x["weight"].double())
attempt("conv1x1_forward", weight=x["weight"][:, 1:])
attempt("conv1x1_forward", bottleneck=x["features"])
attempt("conv1x1_forward", bottleneck=x["bottleneck"][:1])
attempt("conv1x1_forward", mean=None)
attempt("conv1x1_backward", grad_gamma=None)
attempt("update_running_statistics_", count=1)
attempt("dense_block_forward_", last=5)
attempt("dense_block_backward_", gradients=[])
attempt("transition_forward", out=torch.empty(2, 3, 3, 8))
attempt("norm_relu_maxpool_forward", argmax=torch.empty(2, 3, 3, 9))
attempt("channel_statistics", features=torch.empty(1, 1, 1, 9, dtype=torch.int32))
attempt("dropout_", growth=torch.empty(1, 65536, 32768, 1, dtype=torch.float16))
attempt("dropout_", growth=torch.empty(1, 2048, 2048, 512, 1, dtype=torch.float16))
attempt("dropout_", growth=torch.empty(1, 1, 1, 1 << 20))
attempt("conv1x1_forward", weight=torch.empty(1).expand(1 << 20, 9))
"""
    expected = [
        "one pitch apart",
        "`bottleneck` should have shape [6, 5, 8], got [2, 6, 5, 8]",
        "`scale` should have 9 elements, got 8",
        "`scale` should have type Float, got Double",
        "`weight` should have type Float, or float32, got Double",
        "`weight` should have 9 input channels",
        "`bottleneck` should have shape [2, 6, 5, 8], got [2, 6, 5, 9]",
        "got [1, 6, 5, 8]",
        "`mean` and `var` should both",
        "`grad_gamma` and `grad_beta` should both",
        "more than one value",
        "half-layers [0, 5) of 4",
        "every parameter has a slot",
        "`out` should have shape [2, 3, 2, 8]",
        "`argmax` should have type Byte, got Float",
        "float16, bfloat16, float32 and float64",
        "at most 2^31 - 1 pixels for the CUDA kernels, got 1 x 65536 x 32768",
        "got 1 x 2048 x 2048 x 512: use smaller batches",
        "at most 1048560 channels",
        "weights of at most 1048560 channels",
    ]
    lines = run(code).splitlines()
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        assert words in line, line


def test_no_memory_for_the_workspace_is_said(run: Run) -> None:
    """A product that needs 64 GiB for its packed weight, of which one number exists."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))
wide, vector = torch.empty(1, 1, 1, 1 << 17), torch.empty(1 << 17)
weight = torch.empty(1).expand(1 << 17, 1 << 17)
try:
    kernel.conv1x1_forward(wide, vector, vector, weight, wide, None, None)
except RuntimeError as error:
    print(error)
"""
    assert "CUDA out of memory: no room for a workspace of 68719476736 bytes" in run(code)
