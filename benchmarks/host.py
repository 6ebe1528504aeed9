"""The host's share of a training step: its time when every operator of ours returns at once.

What remains is Python, PyTorch's dispatcher and autograd, allocations, and the few operators of
PyTorch's own that compute. Results are whatever was in memory, and nothing depends on them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import densenet_fast  # noqa: F401  registers the operators
from benchmarks.calls import make_call
from benchmarks.children import call_in_child
from benchmarks.measure import MeasurementError, interleave
from benchmarks.networks import NetworkSpec
from benchmarks.peers import initial_state

CPU = torch.device("cpu")
NAMESPACE = "densenet_fast"
# Type in a schema → type of a kernel's argument.
ARGUMENTS = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "std::optional<Tensor>",
    "List[Tensor]": "std::vector<Tensor>",
    "int": "int64_t",
    "List[int]": "std::vector<int64_t>",
    "float": "double",
    "List[float]": "std::vector<double>",
    "bool": "bool",
    "List[bool]": "std::vector<bool>",
    "str": "std::string",
}
# Arguments are unboxed as for the kernels that this replaces.
SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
template <typename... Arguments>
void nothing(Arguments...) {{}}
STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{
{kernels}
}}
"""
WARM_UP = 3  # steps


def source() -> str:
    """C++ that overrides each operator with a kernel for the CPU, whatever their schemas are."""
    kernels = []
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        # What returns something makes it once for many steps, and is no part of one.
        writes = not schema.returns
        if namespace == NAMESPACE and writes and has_kernel(schema.name, "CPU"):
            types = ", ".join(ARGUMENTS[str(argument.type)] for argument in schema.arguments)
            kernels.append(f'  m.impl("{name}", TORCH_BOX((&nothing<{types}>)));')
    if not kernels:
        raise MeasurementError("densenet_fast has no compiled module")
    return SOURCE.format(namespace=NAMESPACE, kernels="\n".join(kernels))


def disable_operators() -> None:
    """Make every operator on CPU tensors do nothing, for the rest of this process."""
    from torch.utils import cpp_extension  # looks for CUDA, and says so

    with TemporaryDirectory() as folder:
        file = Path(folder) / "nothing.cpp"
        file.write_text(source(), encoding="utf-8")
        cpp_extension.load(
            "nothing",
            [str(file)],
            extra_cflags=["-std=c++20"],
            build_directory=folder,
            is_python_module=False,
        )


def child(
    spec: dict[str, Any], peers: list[str], rounds: int, threads: int, seed: int
) -> list[dict[str, Any]]:
    """What `measure` returns, measured in this process, which is good for nothing else after."""
    torch.set_num_threads(threads)
    disable_operators()
    network = NetworkSpec.from_json(spec)
    state = initial_state(network, seed)
    steps = {name: make_call("time", network, name, state, CPU, seed) for name in peers}
    calls = {}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        calls[name] = {
            prefix: sum(e.count for e in recorded.key_averages() if e.key.startswith(f"{prefix}::"))
            for prefix in (NAMESPACE, "aten")
        }
    seconds: dict[str, list[float]] = {}
    interleave(steps, rounds, CPU, times=seconds)
    return [{"peer": name, "seconds": seconds[name], "calls": calls[name]} for name in peers]


def measure(
    spec: NetworkSpec, peers: list[str], rounds: int, threads: int, seed: int
) -> list[dict[str, Any]]:
    """Seconds of each implementation's steps, and calls of operators in one of them."""
    arguments = {"spec": spec.to_json(), "peers": peers, "rounds": rounds, "seed": seed}
    figures: list[dict[str, Any]] = call_in_child(
        "benchmarks.host:child", {**arguments, "threads": threads}, threads=threads
    )
    return figures
