"""What converted modules have in common, whichever library they come from.

A converted module keeps its `__dict__`, and so its parameters, buffers, hooks and children. Only
its class is exchanged, for one of `adapters` that inherits from the library's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.blocks import synchronized
from densenet_fast.blocks.dense_block import released
from densenet_fast.conversion import tensor_subclasses
from densenet_fast.modules import eligibility, fusing, input_checks
from densenet_fast.modules.dimensions import CONVS
from densenet_fast.modules.eligibility import routed
from densenet_fast.modules.layers import FusedBlock, FusedChain, FusedModule
from densenet_fast.modules.layers import Transition as FusedTransition
from densenet_fast.modules.steps import Step
from densenet_fast.operators.rows import channels_last_format, is_channels_last


def _fused_forward(library: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that fuses, with the signature, annotations and source of the library's.

    These are what torch.jit.script compiles and torch.fx asks for: both find what they would find
    in the library's module.
    """
    route, argument = routed, list(inspect.signature(library).parameters)[1]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            if args or list(kwargs) != [argument]:
                return library(self, *args, **kwargs)  # whose error it is
            args = (kwargs[argument],)
        return route(self, args[0], self.plain)

    # torch.jit.script looks names of the source up among the function's own global ones, and
    # torch.compile counts for each code how often it had to compile it.
    code = forward.__code__.replace()
    fused = FunctionType(code, library.__globals__, closure=forward.__closure__)
    return functools.update_wrapper(fused, library)


# By a library's class: the one that its modules get.
ADAPTERS: dict[type[nn.Module], type[Converted]] = {}


class Converted(nn.Module):
    """A module of a library, whose class `convert` has exchanged for this one.

    Its adapters are `class Network(Converted, TheirNetwork)`, and go by the library's name.
    """

    converted_from: type[nn.Module]

    def __init_subclass__(cls, *, registered: bool = True) -> None:
        """Dress an adapter as what it is converted from; and register it."""
        super().__init_subclass__()
        library: Any = cls.__bases__[-1]
        if issubclass(library, (Converted, FusedModule)):
            return
        cls.converted_from = library
        cls.__name__ = library.__name__
        cls.forward = _fused_forward(library.forward)
        if not registered:
            return
        ADAPTERS[library] = cls
        if issubclass(cls, ConvertedPart):
            eligibility.KINDS[cls] = "block" if issubclass(cls, FusedBlock) else "transition"

    def plain(self, input: Any) -> Any:
        """The library's own forward."""
        return self.converted_from.forward(self, input)

    def released_format(self, input: Tensor) -> torch.memory_format:
        """The layout of what the library gives for `input`: channels last only if that is."""
        return _layout(input, is_channels_last(input))


def _layout(input: Tensor, channels_last: bool) -> torch.memory_format:
    # On CPUs oneDNN computes no float64, and PyTorch's own convolution of volumes has one layout.
    contiguous = input.dim() == 5 and input.dtype == torch.float64 and input.device.type == "cpu"
    if channels_last and not contiguous:
        return channels_last_format(input.dim())
    return torch.contiguous_format


def given_format(input: Tensor, conv: Any) -> torch.memory_format:
    """The layout of what a convolution, and the modules behind it, make of `input`."""
    weight: Any = conv._parameters.get("weight") if isinstance(conv, CONVS) else None
    known = type(weight) in eligibility.PLAIN_TENSORS
    return _layout(input, is_channels_last(input) or (known and is_channels_last(weight)))


class ConvertedPart(Converted):
    """A block or transition of a library, run as ours."""

    def run(self, input: Tensor) -> Tensor:
        """The forward outside any graph, checked and fused where nothing is in the way."""
        if isinstance(input, Tensor) and not input.numel():
            return self.plain(input)  # ours refuse what holds nothing; the libraries' need not
        output = super().run(tensor_subclasses.plain(input))  # type: ignore[misc]
        return tensor_subclasses.restored(output, input)


class ConvertedBlock(ConvertedPart, FusedBlock):
    """A library's dense block. The layers stay what they are."""


class ConvertedTransition(ConvertedPart, FusedTransition):
    """A library's transition."""

    def released_format(self, input: Tensor) -> torch.memory_format:
        """The layout of what the library gives for `input`."""
        conv = self._modules.get("conv")
        return fusing.averaged_format(given_format(input, conv), input.dim() - 2)


class ConvertedFeatures(Converted, nn.Sequential):
    """A network's chain of stem, blocks and transitions, fused across their borders."""

    def run(self, input: Tensor) -> Tensor:
        """[N, C, *size] to [N, C', *size'], outside any graph."""
        images = tensor_subclasses.plain(input)
        planned = self.planned(images, None)
        if planned is None:
            return self.plain(input)
        memory_format = self.released_format(images)
        if any(
            isinstance(module, FusedTransition)
            or (isinstance(module, FusedChain) and module.averages())
            for module in self._modules.values()
        ):
            memory_format = fusing.averaged_format(memory_format, images.dim() - 2)
        output = released(fusing.run(planned[0], images), memory_format)
        return tensor_subclasses.restored(output, input)

    def released_format(self, input: Tensor) -> torch.memory_format:
        """The layout of what the library gives for `input`, up to the first transition."""
        return given_format(input, next(iter(self._modules.values()), None))

    def planned(self, input: Tensor, head: fusing.Head) -> tuple[Sequence[Step], bool] | None:
        """What `fusing.steps` says, or None where the modules must be called one by one."""
        if not isinstance(input, Tensor) or eligibility.input(input) is not None:
            return None
        synchronized.check_modules(self, input.device)
        modules: list[Any] = list(self._modules.values())
        memory_format = self.released_format(input)
        return fusing.planned(self, modules, input, head=head, memory_format=memory_format)[:2]


del ADAPTERS[nn.Sequential]  # only one with a converted block in it is such a chain


class ConvertedNetwork(Converted):
    """A library's network whose head is known to be the average over all pixels, and the rest."""

    pooling: fusing.Head = "relu and average"

    def run(self, input: Tensor) -> Tensor:
        """What the library's own forward gives, outside any graph."""
        pooled = self.pooled(input)
        return self.plain(input) if pooled is None else self.head(pooled)

    def relu_in_place(self) -> bool:
        """Whether a ReLU that the library's forward calls as a function may write in place."""
        return bool(self.__dict__.get("_inplace_relu", True))

    def known_head(self) -> fusing.Head:
        """What is known to happen behind the last norm of converted features."""
        features = self._modules.get("features")
        if not isinstance(features, ConvertedFeatures) or eligibility.touched(features):
            return None
        return self.pooling if self.head_is_known() else None

    def pooled(self, input: Tensor) -> Tensor | None:
        """The pooled features [N, C]. None, and nothing computed, where the library makes them."""
        images = tensor_subclasses.plain(input)
        found = self.inference_steps(images)
        return found and tensor_subclasses.restored(fusing.run(found[0], images), input)

    def inference_steps(
        self, x: Tensor
    ) -> tuple[Sequence[Step], Callable[[Tensor], Tensor]] | None:
        """The steps to the pooled features and what follows them; None: not all of it is fused."""
        head, features = self.known_head(), self._modules.get("features")
        planned: Any = head and features.planned(x, head)  # type: ignore[union-attr, operator]
        return (planned[0], self.head) if planned and planned[1] else None

    def head_is_known(self) -> bool:
        """Whether the modules between the features and what `head` does are what they were.

        Where there are none, the library's forward pools images of two dimensions.
        """
        features: Any = self._modules["features"]
        return input_checks.dimensions(features) == 2

    def head(self, pooled: Tensor) -> Tensor:
        """The library's forward behind the pooling."""
        raise NotImplementedError


# Attributes of a converted module that its own class does not have.
OWN_ATTRIBUTES = ("_checkpoint", "_found", "_inplace_relu")


def is_converted(module: nn.Module) -> bool:
    """Whether the module's exact class is one of the adapters."""
    return "converted_from" in type(module).__dict__


def original(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether it is converted or not."""
    kind = type(module)
    own: type[nn.Module] = kind.__dict__.get("converted_from", kind)
    return own


def averages(features: nn.Module, pool: Any, flatten: nn.Module | None) -> bool:
    """Whether these two give the flattened average over all pixels behind `features`."""
    dims = input_checks.dimensions(features)
    return (
        dims is not None
        and eligibility.whole_average(pool, dims) is None
        and type(flatten) is nn.Flatten
        and not eligibility.touched(flatten)
        and (flatten.start_dim, flatten.end_dim) == (1, -1)
    )
