"""When a module may be computed without being called: the obstacles to fusing it, in words.

Fusing skips the module's own call, so it is allowed only where nobody could tell the difference:
the exact type, nothing hooked or overridden, ordinary tensors. Every function returns the obstacle
or None. They run for every layer of every forward, hence the direct reading of `__dict__`:
`nn.Module.__getattr__` would cost ten times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn.modules.lazy import LazyModuleMixin

from densenet_fast.blocks.autocast import CAST_TYPES
from densenet_fast.blocks.autocast import enabled as autocast_enabled
from densenet_fast.modules.dimensions import AVERAGES, CONVS, MAXIMA, MODULES, NORMS, Conv, Norm
from densenet_fast.operators import torch_internals
from densenet_fast.operators.backends import backend_for, get_backend

# Tensors of a FakeTensorMode have shapes and no values: fused nodes know what to make of them.
PLAIN_TENSORS = (Tensor, nn.Parameter, torch_internals.FakeTensor)

_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
# Of convolutions that keep the size, by their taps in each dimension and the dimensions.
_KEEPING: dict[tuple[int, int], list[tuple[Any, ...]]] = {
    (taps, dims): [
        ((taps,) * dims, (1,) * dims, padding, (1,) * dims, 1, "zeros")
        for padding in ((taps // 2,) * dims, "same")
    ]
    for taps in (1, 3)
    for dims in MODULES
}

_AVERAGE: dict[str, Any] = {"kernel_size": 2, "stride": 2, "padding": 0}
_AVERAGE |= {"ceil_mode": False, "divisor_override": None}
_MAXIMUM: dict[str, Any] = {"stride": 2, "dilation": 1, "ceil_mode": False}
_MAXIMUM |= {"return_indices": False}

_FORWARDS = tuple(
    (kind, kind.forward) for kind in (*NORMS, nn.ReLU, *CONVS, *AVERAGES, *MAXIMA, nn.Sequential)
)
_CALL = nn.Module.__call__
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Expected(NamedTuple):
    """What parameters have to be, and the number of the images' dimensions."""

    dtype: torch.dtype
    device: torch.device
    dims: int


def touched(module: nn.Module) -> str | None:
    """What makes calling `module` more than running its class's forward."""
    state = module.__dict__
    if "forward" in state:
        return "has its own forward"
    if state.get("_compiled_call_impl") is not None:
        return "is compiled by itself"
    for name in HOOKS:
        if state[name]:
            return f"has a {name[1:-6]} hook"
    return None


def named(name: str, obstacle: str | None) -> str | None:
    """The obstacle as one of the part of that name."""
    return None if obstacle is None else f"{name} {obstacle}"


def other_type(module: nn.Module | None, kind: type[nn.Module]) -> str:
    """Words for a module that is not exactly a `kind`."""
    if module is None:
        return "is missing"
    if hasattr(module, "parametrizations"):
        return "is parametrised"
    if isinstance(module, LazyModuleMixin):
        return f"is a {type(module).__name__} without parameters yet: call the network once before"
    if isinstance(module, kind):
        return f"is a subclass of {kind.__name__} ({type(module).__name__})"
    return f"is a {type(module).__name__}, not a {kind.__name__}"


def exactly(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """An untouched module of exactly this type."""
    if type(module) is not kind:
        return other_type(module, kind)
    return touched(module)


# What modules of exactly these types run fused as; their subclasses may do anything.
KINDS: dict[type[nn.Module], Literal["layer", "block", "transition", "chain"]] = {}


def of_kind(module: nn.Module, kind: str, expected: type[nn.Module]) -> str | None:
    """An untouched module whose exact type runs fused as a `kind`."""
    if KINDS.get(type(module)) != kind:
        return other_type(module, expected)
    return touched(module)


# Subclasses of batch norms with a ReLU of their own, and what may be in the way of taking one of
# exactly this type for such a norm and ReLU.
NORMS_WITH_RELU: dict[type[nn.Module], Callable[[Any], str | None]] = {}


def norm_with_relu(module: nn.Module | None) -> bool:
    """Whether the module is of a type with a ReLU of its own."""
    return type(module) in NORMS_WITH_RELU


# Norms in two dimensions, of other classes than batch norms, that always normalise with their
# running statistics. All that they hold are buffers.
FROZEN_NORMS: set[type[nn.Module]] = set()


def takes_statistics(norm: Norm) -> bool:
    """Whether the norm would take the batch's statistics if it was called now."""
    kept = type(norm) in FROZEN_NORMS
    return not kept and (norm.training or norm.__dict__["_buffers"].get("running_mean") is None)


def channels_of(norm: Norm) -> int:
    """How many channels a norm is for."""
    state = norm.__dict__
    known: int | None = state.get("num_features")
    return len(state["_buffers"]["running_mean"]) if known is None else known


# The forwards that neither write to their input nor return it or a view of it.
OUT_OF_PLACE = {
    torch_internals.BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    torch_internals.InstanceNorm.forward,
    nn.GroupNorm.forward,
    *(kind.forward for kind in (*CONVS, *AVERAGES, *MAXIMA)),
}


def leaves_input(module: nn.Module | None) -> bool:
    """Whether nobody gets at the module's input, to write to it, by calling the module."""
    if module is None or touched(module) is not None:
        return False
    kind = KINDS.get(type(module))
    if type(module) is nn.Sequential or kind == "transition":
        return leaves_input(next(iter(module._modules.values()), None))
    return kind == "layer" or type(module).forward in OUT_OF_PLACE


def _tensor(tensor: Tensor, expected: Expected) -> str | None:
    if type(tensor) not in PLAIN_TENSORS:
        return f"holds a {type(tensor).__name__}"
    if tensor.dtype is not expected.dtype:
        return f"is {tensor.dtype}, not {expected.dtype}"
    if tensor.device != expected.device:
        return f"is on {tensor.device}, not {expected.device}"
    return None


def parameter(state: dict[str, Any], name: str) -> Any:
    """A parameter from a module's `__dict__`; KeyError if it is not an ordinary one."""
    for held in (state["_parameters"], state["_buffers"]):  # of frozen norms buffers
        if name in held:
            return held[name]
    return state[name]  # the replicas of DataParallel hold their parameters as ordinary attributes


# What modules did before they had these settings: those unpickled from old files have not.
_BEFORE: dict[str, Any] = {
    "ceil_mode": False,
    "dilation": 1,
    "divisor_override": None,
    "drop_rate": 0.0,
    "padding_mode": "zeros",
    "return_indices": False,
    "track_running_stats": True,
}


def setting(state: dict[str, Any], name: str) -> Any:
    """A setting from a module's `__dict__`, where it may be missing."""
    return state[name] if name in state else _BEFORE[name]


def is_norm(module: nn.Module | None) -> TypeGuard[Norm]:
    """Whether fused blocks know this type of norm."""
    return type(module) in NORMS or type(module) in FROZEN_NORMS or norm_with_relu(module)


def norm(module: nn.Module, channels: int | None, expected: Expected) -> str | None:
    """Obstacle to computing a norm of this many channels (a ReLU behind it is harmless)."""
    kind = MODULES[expected.dims].norm
    frozen = expected.dims == 2 and type(module) in FROZEN_NORMS
    if not is_norm(module) or not (frozen or isinstance(module, (kind, nn.SyncBatchNorm))):
        return other_type(module, kind)
    with_relu = NORMS_WITH_RELU.get(type(module))
    obstacle = touched(module) or (None if with_relu is None else with_relu(module))
    if obstacle is not None:
        return obstacle
    state = module.__dict__
    if channels is not None and channels_of(module) != channels:
        return f"normalises {channels_of(module)} channels, not {channels}"
    if not state["eps"] > 0:
        return f"has eps={state['eps']}"
    if not frozen and state["momentum"] is None and torch.compiler.is_compiling():
        return "averages over all steps, whose number is not known to torch.compile"
    buffers = state["_buffers"]
    try:
        weight, bias = parameter(state, "weight"), parameter(state, "bias")
        mean, var = buffers["running_mean"], buffers["running_var"]
        if not frozen:
            buffers["num_batches_tracked"]
    except KeyError as missing:
        return f"has no registered {missing.args[0]}"
    if (mean is None) is not (var is None):
        return "has only one of running_mean and running_var"
    for tensor in (weight, bias, mean, var):
        if tensor is not None and (found := _tensor(tensor, expected)) is not None:
            return found
    return None


def conv(module: nn.Module, taps: int, expected: Expected) -> str | None:
    """Obstacle to computing a convolution of this width that keeps the size."""
    obstacle = exactly(module, MODULES[expected.dims].conv)
    if obstacle is not None:
        return obstacle
    state = module.__dict__
    try:
        weight, bias = parameter(state, "weight"), parameter(state, "bias")
    except KeyError as missing:
        return f"has no registered {missing.args[0]}"
    if bias is not None and (found := _tensor(bias, expected)) is not None:
        return found
    actual = tuple(setting(state, name) for name in _SETTINGS)
    if actual not in _KEEPING[taps, expected.dims]:
        return "has " + ", ".join(map("{} {}".format, _SETTINGS, actual))
    return _tensor(weight, expected)


def any_conv(module: nn.Module) -> str | None:
    """Obstacle to computing a convolution of any kind with a copy of its weight."""
    kind = type(module)
    obstacle = exactly(module, kind if kind in CONVS else nn.Conv2d)
    if obstacle is None:
        parameters = module.__dict__["_parameters"]
        for name in ("weight", "bias"):
            if name not in parameters:
                return f"has no registered {name}"
            if parameters[name] is not None and type(parameters[name]) not in PLAIN_TENSORS:
                return f"holds a {type(parameters[name]).__name__}"
    return obstacle


def zero_padded(conv: Conv) -> bool:
    """Whether the padding is a number of zeros, not a word or another kind of border."""
    state = conv.__dict__
    return setting(state, "padding_mode") == "zeros" and not isinstance(state["padding"], str)


def weight_shape(module: nn.Module | None) -> torch.Size:
    """The shape of the weight of an eligible convolution."""
    return parameter(module.__dict__, "weight").shape


def average_pool(module: nn.Module, dims: int) -> str | None:
    """Obstacle to computing a transition's 2×2 average pooling."""
    what = f"a plain {'×'.join('2' * dims)} average"
    return exactly(module, MODULES[dims].average) or _pool(module, _AVERAGE, dims, what)


def whole_average(module: nn.Module, dims: int) -> str | None:
    """Obstacle to computing an average over all pixels."""
    found = exactly(module, MODULES[dims].whole)
    size = module.__dict__.get("output_size")
    size = tuple(size) if isinstance(size, list) else size
    return found or (None if size in (1, (1,) * dims) else f"has output_size={size}, not 1")


def max_pool(module: nn.Module, width: int, dims: int) -> str | None:
    """Obstacle to computing the max-pooling of stride 2 of a stem (3×3) or transition (2×2)."""
    what = f"a {'×'.join(str(width) * dims)} maximum of stride 2"
    settings = {**_MAXIMUM, "kernel_size": width, "padding": width - 2}
    return exactly(module, MODULES[dims].maximum) or _pool(module, settings, dims, what)


def stem_pool(module: nn.Module, dims: int) -> str | None:
    """Obstacle to computing a stem's max-pooling."""
    return max_pool(module, 3, dims)


def _pool(module: nn.Module, settings: dict[str, Any], dims: int, what: str) -> str | None:
    for name, wanted in settings.items():
        found = setting(module.__dict__, name)
        if (tuple(found) if isinstance(found, list) else found) not in (wanted, (wanted,) * dims):
            return f"has {name}={found}, not that of {what}"
    return None


def surroundings() -> str | None:
    """Obstacle in the state of the process: hooks on all modules, tracing, transforms."""
    if torch.compiler.is_exporting():
        return "torch.export is tracing"
    if is_tracing():
        return "torch.jit is tracing"
    if (found := torch_internals.altered()) is not None:
        return found
    if nn.Module.__call__ is not _CALL:
        return "nn.Module.__call__ is patched"
    for kind, forward in _FORWARDS:
        if kind.forward is not forward:
            return f"{kind.__name__}.forward is patched"
    return None


def routed(module: Any, input: Any, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of a fused module: `plain` into a graph that records it, else its `run`.

    In such a graph, of torch.export, torch.jit or torch.fx, shapes may stand for any shape.
    """
    recorded = torch.compiler.is_exporting() or isinstance(input, fx.Proxy) or is_tracing()
    output: Tensor = plain(input) if recorded else module.run(input)
    return output


def autocast(device: torch.device) -> str | None:
    """Obstacle in automatic mixed precision: a type that PyTorch computes faster than our twins."""
    if not autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    if get_backend() == "reference" or backend_for(device, dtype).backend != "reference":
        return None
    return f"autocast is active on {device.type}, where there are no kernels for {dtype}"


def expected(input: Tensor) -> Expected:
    """What parameters should be for this input [N, C, *size]: under autocast float32."""
    cast = autocast_enabled(input.device.type) and input.dtype in CAST_TYPES
    return Expected(torch.float32 if cast else input.dtype, input.device, input.dim() - 2)


def input(tensor: Tensor) -> str | None:
    """Obstacle in the tensor that a network or block is called with, or around it."""
    if type(tensor) not in PLAIN_TENSORS:
        return f"the input is a {type(tensor).__name__}"
    if tensor.device.type == "meta":
        return "the input is on the meta device"
    if tensor.layout is not torch.strided:
        return f"the input's layout is {tensor.layout}"
    if not tensor.is_floating_point():
        return f"the input is {tensor.dtype}"
    if tensor.dim() - 2 not in MODULES:
        return f"the input is {tensor.dim()}-D"
    found = autocast(tensor.device) or surroundings()
    # Last: where a graph is recorded, nothing may depend on the size.
    return found or (None if tensor.numel() else "the input is empty")
