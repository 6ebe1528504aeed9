"""What a first run on a GPU looks at, case by case; `first_run.py` runs them.

A case is a name and a call that returns figures, or raises. With `tiny` there are as many kinds of
cases with the smallest shapes, which test this file on the CPU.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import devices
import test_cuda_networks as network_tests
import torch
from comparison import assert_same_steps, networks
from kernel_calls import KINDS, LAYOUTS, STORED, Calls, Kind
from kernel_cases import conv1x1_backward, conv3x3_backward, forward, transition_backward
from kernel_checks import check
from test_cuda_kernels import Operators
from test_cuda_runtime import test_a_training_step_in_a_graph as check_step_in_a_graph
from test_cuda_runtime import test_blocks_in_a_graph as check_blocks_in_a_graph
from test_kernels_conv import SHAPES_1X1, SHAPES_3X3, SHAPES_TRANSITION
from test_kernels_orders import OTHERS, PRODUCTS
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import cases as kernel_cases
from benchmarks.kernels import machine
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, shapes
from benchmarks.measure import release_cached, sample_memory, synchronize, timed, tuned_libraries
from benchmarks.memory import make_batch, training_step
from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc, imagenet
from benchmarks.peers import PEERS, build, initial_state
from densenet_fast.blocks.specs import CHECKPOINT_MODES

Figures = dict[str, Any]
Case = tuple[str, Callable[[], Figures | None]]
OURS = ("ours-none", "ours-bottleneck", "ours-block")
BOTH = ("naive-channels-last", "ours-bottleneck")
# Label → autocast's type and whether float32 products may be tf32.
PRECISIONS = {"bfloat16": ("bfloat16", True), "tf32": ("none", True), "float32": ("none", False)}
HOST_OPERATIONS = 15


# ---- 1: operators


def operators(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Every operator and type against its reference twin, in all layouts, with tails."""
    ops = Operators()
    every = (SHAPES_1X1, SHAPES_3X3, SHAPES_TRANSITION)
    # The first and the last ones: single pixels, and volumes.
    pointwise, wide, pooled = ((s[0], s[-1]) for s in every) if tiny else every
    by_shape: dict[str, list[Calls]] = {
        "conv1x1_forward": [forward("conv1x1_forward", *s) for s in pointwise],
        "conv1x1_backward": [conv1x1_backward(*s) for s in pointwise],
        "conv3x3_forward": [forward("conv3x3_forward", *s) for s in wide],
        "conv3x3_backward": [conv3x3_backward(*s) for s in wide],
        "transition_forward": [forward("transition_forward", *s) for s in pooled],
        "transition_backward": [transition_backward(*s) for s in pooled],
    }
    for kind in KINDS:
        for name, calls in by_shape.items():
            more = [make for key, make in PRODUCTS.items() if key.startswith(name) and not tiny]
            yield f"{name}, {kind}", partial(_check, ops, kind, [*calls, *more])
        for name in OTHERS if kind in STORED else ():
            yield f"{name}, {kind}", partial(_check, ops, kind, [OTHERS[name]])


def _check(ops: Any, kind: Kind, calls: list[Calls]) -> Figures:
    failures = []
    for number, (make, layout) in enumerate(product(calls, LAYOUTS)):
        try:
            check(ops, kind, make, number, layout)
        except AssertionError as error:
            failures.append(f"call {number}, rows {layout}: {error}")
    calls_made = len(calls) * len(LAYOUTS)
    assert not failures, f"{len(failures)} of {calls_made} wrong\n" + "\n".join(failures[:4])
    return {"calls": calls_made}


# ---- 2: small networks


def small_networks(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """A step against torchvision's, repeated bits, and captured graphs."""
    torch.backends.cudnn.deterministic = True  # the first convolution is PyTorch's
    for mode in CHECKPOINT_MODES:
        yield f"float64 as torchvision's, {mode}", partial(_same_steps, mode)
    autocast = partial(torch.autocast, device.type)
    half, single, wide = torch.float16, torch.float32, torch.bfloat16
    for label, context, tf32 in (
        ("float32", nullcontext, False),
        ("tf32", nullcontext, True),
        ("bfloat16 autocast", partial(autocast, wide), True),
        ("float16 autocast", partial(autocast, half), True),
    ):
        for mode in CHECKPOINT_MODES[: 1 if tiny else None]:
            against = partial(_accuracy, context, tf32, mode)
            yield f"{label} against float64, {mode}", against
    for mode in CHECKPOINT_MODES:
        repeat = partial(network_tests.test_networks_repeat_their_bits, mode)
        yield f"a step repeats its bits, {mode}", repeat
    for dims, mode in product((1, 3), CHECKPOINT_MODES):
        of_modules = partial(network_tests.test_sequences_and_volumes, dims, mode)
        yield f"float64 as PyTorch's modules in {dims}-D, {mode}", of_modules
    for dtype in (half, wide, single):
        same = partial(network_tests.test_modes_have_the_same_bits, dtype, "transition")
        yield f"modes have the same bits, {dtype}", same
    for mode in CHECKPOINT_MODES if device.type == "cuda" else ():
        yield f"a step in a graph, {mode}", partial(check_step_in_a_graph, mode)
        for dtype in (half, wide, single):
            in_graph = partial(check_blocks_in_a_graph, dtype, mode, "transition")
            yield f"a block in a graph, {dtype}, {mode}", in_graph


def _same_steps(mode: Any) -> None:
    assert_same_steps(networks(checkpoint=mode), (3, 3, 33, 31))


def _accuracy(context: Callable[[], Any], tf32: bool, mode: Any) -> Figures:
    with devices.tf32(tf32):
        theirs, ours = network_tests.assert_as_accurate(torch.float32, context(), mode)
    return {"ours": ours, "torchvision": theirs}


# ---- 4: memory and time


def steps(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Memory and time of a training step, eager and as a graph; compiled networks last."""
    if tiny:
        specs = [densenet_bc(10, 4, batch_size=2, image_size=8)]
    else:
        sizes = (("densenet121", (8, 64, 256)), ("densenet-bc-100", (64, 512)))
        specs = [replace(NETWORKS[n], batch_size=b) for n, batches in sizes for b in batches]
    peers = (*BOTH, "memory-efficient", *OURS[::2])
    for precision, spec in product(PRECISIONS, specs):
        for peer in peers:
            name = f"{spec.title}, {precision}, {peer}"
            yield name, partial(_step, spec, peer, precision, device)
    for spec in () if tiny else specs[::3]:  # DenseNet-121 at 8, BC-100 at 64
        name = f"{spec.title}, bfloat16, compiled-naive"
        yield name, partial(_step, spec, "compiled-naive", "bfloat16", device)


def _training(
    spec: NetworkSpec, peer: str, amp: str, device: torch.device
) -> Callable[..., object]:
    model = build(PEERS[peer], spec, initial_state(spec, 0), device=device).train()
    images, labels = make_batch(spec, PEERS[peer].memory_format, device, 0)

    def step(*, freed: bool = True) -> None:
        model.zero_grad(set_to_none=freed)
        training_step(model, images, labels, amp)

    return step


def _step(spec: NetworkSpec, peer: str, precision: str, device: torch.device) -> Figures:
    amp, tf32 = PRECISIONS[precision]
    figures: Figures = {"network": spec.title, "precision": precision, "peer": peer}
    with devices.tf32(tf32), tuned_libraries(device):
        step = _training(spec, peer, amp, device)
        step()
        memory = sample_memory(partial(step, freed=False), device)
        figures["peak"] = memory.peak_above_rest
        figures["seconds"] = _times(step, device)
        if device.type == "cuda":
            try:
                figures |= _graph(step, device)
            except Exception as error:
                figures["graph_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return figures


def _graph(step: Callable[..., object], device: torch.device) -> Figures:
    release_cached(device)
    before = torch.cuda.memory_reserved(device)
    graph = devices.captured(step, warm_up=1)
    release_cached(device)  # what the warm-up took
    pool = torch.cuda.memory_reserved(device) - before
    return {"graph_pool": pool, "graph_seconds": _times(graph.replay, device)}


def _times(call: Callable[[], object], device: torch.device) -> list[float]:
    """Half a second of times, at least three; one more before them."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 20):
        times.append(timed(call, device))
    return times


# ---- 5: kernels


def kernels(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Every operator on a network's shapes, kernel by kernel, and what the device can do."""
    network = "densenet121"
    layers = NETWORKS[network].block_config
    types = {"bfloat16": (torch.bfloat16, True), "tf32": (torch.float32, True)}
    types["float32"] = (torch.float32, False)
    yield "the device", partial(_peaks, device, types, tiny)
    for label, kernel in product(types, (*CONVOLUTIONS, *MEMORY_BOUND)):
        if label == "float32" and kernel not in CONVOLUTIONS:
            continue  # as with tf32
        for index, shape in enumerate(shapes(kernel, network)):
            given = replace(shape, images=1, size=7) if tiny else replace(shape, images=64)
            # Shapes are those of a layer in the middle of each block.
            times = layers[index] if kernel.startswith("conv") else 1
            call = partial(_kernel, kernel, given, times, types[label], label, device)
            yield f"{kernel}, {given.label}, {label}", call
            if tiny:
                break


def _peaks(device: torch.device, types: dict[str, Any], tiny: bool) -> Figures:
    sizes = (64,) if tiny else (2048, 4096, 8192)
    rates = {}
    for label, (dtype, tf32) in types.items():
        with devices.tf32(tf32):
            rates[label] = machine.matmul_peak(sizes, device, dtype=dtype)
    return {"bandwidth": machine.copy_bandwidth(4096 if tiny else 1 << 30, device), "rates": rates}


def _kernel(
    kernel: str, shape: Any, times: int, how: Any, label: str, device: torch.device
) -> Figures:
    dtype, tf32 = how
    with devices.tf32(tf32):
        case = kernel_cases.make(kernel, shape, 0, device, dtype)
        seconds = min(_times(case.ours, device))
        found, _ = _profiled(case.ours, device)
    return {
        "kernel": kernel,
        "shape": shape.label,
        "type": label,
        "times": times,  # a step
        "flops": case.flops,
        "moved": case.moved,
        "seconds": seconds,  # with the gaps between its kernels
        "kernels": found,
    }


def _profiled(call: Callable[[], object], device: torch.device) -> tuple[list[Any], list[Any]]:
    """Kernels and host operations of a call: name, number and own seconds, longest first."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    host, kernels = [], []
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            host.append((event.key, event.count, event.self_cpu_time_total / 1e6))
        else:
            kernels.append((_short(event.key), event.count, event.self_device_time_total / 1e6))
    by_time = lambda entry: -entry[2]  # noqa: E731
    host.sort(key=by_time)
    return (sorted(kernels, key=by_time) if on_cuda else host), host


def _short(name: str) -> str:
    for part in ("void ", "densenet_fast::cuda::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    return re.sub(r"\(\w+\)(?=-?\d)", "", name).split("(")[0][:120]  # (Into)0, (bool)1


# ---- 6: where the host is in front


def host(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """One step under PyTorch's profiler: the device's work, the host's, and the longest of it."""
    if tiny:
        specs = [replace(imagenet(10, 4, (1, 1)), batch_size=2, image_size=32)]
    else:
        specs = [NETWORKS["densenet121"], NETWORKS["densenet-bc-100"]]
    for spec, peer in product(specs, BOTH):
        yield f"{spec.title}, {peer}", partial(_host, spec, peer, device)


def _host(spec: NetworkSpec, peer: str, device: torch.device) -> Figures:
    step = _training(spec, peer, "bfloat16", device)
    seconds = _times(step, device)
    found, operations = _profiled(step, device)
    return {
        "network": spec.title,
        "peer": peer,
        "seconds": statistics.median(seconds),
        "device_seconds": sum(entry[2] for entry in found),
        "kernels": sum(entry[1] for entry in found),
        "longest_kernels": found[:HOST_OPERATIONS],
        "longest_operations": operations[:HOST_OPERATIONS],
    }


PARTS = {1: operators, 2: small_networks, 4: steps, 5: kernels, 6: host}


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """All cases make their tensors there, and forced kernels run them on a GPU."""
    with devices.on("cuda" if device.type == "cuda" else "auto"):
        yield
