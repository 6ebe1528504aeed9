"""Modules of any class that are chains of dense layers and transitions, run fused."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast.blocks import synchronized
from densenet_fast.blocks.dense_block import released
from densenet_fast.conversion import tensor_subclasses
from densenet_fast.conversion.chains import (
    Chain,
    ChainLayer,
    ChainTail,
    Dropout,
    NoChainError,
    Stage,
    chain,
)
from densenet_fast.conversion.parts import Converted, given_format, original
from densenet_fast.conversion.traces import at, facts
from densenet_fast.modules import eligibility, fusing, input_checks
from densenet_fast.modules.dimensions import DROPOUTS, MODULES
from densenet_fast.modules.eligibility import Expected, named
from densenet_fast.modules.kept_plans import kept
from densenet_fast.modules.layer_parts import LayerParts, TailParts, transition_obstacle
from densenet_fast.modules.layers import FusedChain
from densenet_fast.modules.steps import DenseStep, MaxTransitionStep


class Found(NamedTuple):
    """What a module's forward has been found to be, and the facts that this depends on."""

    facts: list[Any]
    chain: Chain | str  # or why it is none


class ConvertedChain(Converted, FusedChain):
    """A module that `convert` has found to be a chain; `chain_class` makes its class."""

    def run(self, input: Any) -> Any:
        """The forward outside any graph, fused where nothing is in the way."""
        if isinstance(input, Tensor) and not input.numel():
            return self.plain(input)
        images = tensor_subclasses.plain(input)
        input_checks.images(self, images)
        steps = eligibility.input(images) or self._kept(eligibility.expected(images))
        if isinstance(steps, str):
            input_checks.parameters(self, self, images)
            return self.plain(input)
        synchronized.check_modules(self, images.device)
        dims = images.dim() - 2
        input_checks.chain(type(self).__name__, _readers(steps, dims), images)
        memory_format = self.released_format(images)
        for step in steps:
            if isinstance(step, MaxTransitionStep):
                memory_format = given_format(images, step.conv)
            elif step.tail is not None:
                memory_format = fusing.averaged_format(given_format(images, step.tail.conv), dims)
        output = released(fusing.run(steps, images, hold=False), memory_format)
        return tensor_subclasses.restored(output, input)

    def _kept(self, expected: Expected) -> list[DenseStep | MaxTransitionStep] | str:
        return kept(self, expected, lambda: self.chain(expected))

    def chain(self, expected: Expected) -> list[DenseStep | MaxTransitionStep] | str:
        """Its steps, one for each transition and the layers before it, or why there are none."""
        found = self.__dict__.get("_found")
        now = facts(self)
        if found is None or found.facts != now:
            if torch.compiler.is_compiling():
                return "has changed since it was converted or called outside torch.compile"
            found = self._found = _look(self, now)
        if isinstance(found.chain, str):
            return f"is no chain of dense layers any more: {found.chain}"
        return steps(self, found.chain, expected, self._checkpoint)

    def averages(self) -> bool:
        """Whether there is a transition in it that averages."""
        found = self.__dict__["_found"].chain
        tails = [stage.tail for stage in found.stages] if isinstance(found, Chain) else []
        return any(tail is not None and not tail.maximum for tail in tails)

    def rows(self, expected: Expected) -> Iterator[tuple[str, str | None]]:
        """The name of every layer and transition, and why it does not run fused."""
        planned = self.chain(expected)
        found = self._found.chain
        if isinstance(found, str):
            yield "", str(planned)
            return
        own = "forward" in self.__dict__
        obstacle = "has its own forward" if own else planned if isinstance(planned, str) else None
        for stage in found.stages:
            for part in stage.parts():
                within = obstacle and obstacle.removeprefix(f"{_name(part)}: ")
                if obstacle is not None and within == obstacle:
                    within = f"what it belongs to runs plain: {obstacle}"
                yield _name(part), within

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As its own class pickles, which is made for what it is converted from."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return function, args, *rest
        return _new, (self.converted_from, *args[1:]), *rest


def _new(kind: type[nn.Module], *args: Any) -> Any:
    made: Any = chain_class(kind)
    return made.__new__(made, *args)


_CLASSES: dict[type[nn.Module], type[ConvertedChain]] = {}


def chain_class(kind: type[nn.Module]) -> type[ConvertedChain]:
    """The class that chains of exactly this class get."""
    if kind not in _CLASSES:
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        make: Any = type(kind)
        _CLASSES[kind] = make(kind.__name__, (ConvertedChain, kind), names, registered=False)
        eligibility.KINDS[_CLASSES[kind]] = "chain"
    return _CLASSES[kind]


def _look(module: nn.Module, now: list[Any]) -> Found:
    try:
        return Found(now, chain(module))
    except NoChainError as error:
        return Found(now, str(error))


def become_chain(module: nn.Module, found: Chain) -> None:
    """Give `module`, which has been found to be this chain, the class that runs it fused."""
    module.__class__ = chain_class(original(module))
    module.__dict__["_found"] = Found(facts(module), found)


# A chain as steps


def steps(
    root: nn.Module, chain: Chain, expected: Expected, checkpoint: Any
) -> list[DenseStep | MaxTransitionStep] | str:
    """The steps of the chain that `root` is, or what is in the way of computing them."""
    for path in chain.entered:
        found = eligibility.touched(at(root, path))
        if found is not None:
            return f"{'.'.join(path)} {found}"
    planned: list[DenseStep | MaxTransitionStep] = []
    for stage in chain.stages:
        of_stage = _steps(root, stage, expected, checkpoint)
        if isinstance(of_stage, str):
            return of_stage
        planned += of_stage
    if isinstance(planned[-1], DenseStep):
        planned[-1].order = chain.order
    return planned


def _steps(
    root: nn.Module, stage: Stage, expected: Expected, checkpoint: Any
) -> Sequence[DenseStep | MaxTransitionStep] | str:
    channels: int | None = None
    layers: list[LayerParts] = []
    group = synchronized.OneGroup()
    for layer in stage.layers:
        parts = _layer_parts(root, layer, expected)
        found = parts if isinstance(parts, str) else parts.obstacle(channels, expected)
        if found is not None:
            return _of(layer, found)
        assert not isinstance(parts, str)
        if not group.admits(parts.of_features):
            return _of(layer, "takes statistics over other ranks than the layers before")
        channels = parts.emitted
        layers.append(parts)
    step = DenseStep([layers] if layers else [], checkpoint)
    if stage.tail is None:
        return [step]
    tail = _tail_step(root, stage.tail, channels, expected)
    if isinstance(tail, str):
        return _of(stage.tail, tail)
    if isinstance(tail, MaxTransitionStep):
        step.order = stage.tail.order
        return [step, tail] if layers else [tail]
    if not group.admits(tail.norm):
        return _of(stage.tail, "takes statistics over other ranks than the layers before")
    step.tail = tail
    return [step]


def _name(part: ChainLayer | ChainTail) -> str:
    """The module that a layer or transition is, or the convolution or norm that it ends with."""
    last = part.conv2 if isinstance(part, ChainLayer) else part.conv or part.norm
    first = part.first if isinstance(part, ChainLayer) else part.norm
    shared = 0
    while last[shared] == first[shared] and shared < min(len(last), len(first)) - 1:
        shared += 1
    return ".".join(last[:shared] or last)


def _of(part: ChainLayer | ChainTail, obstacle: str) -> str:
    return f"{_name(part)}: {obstacle}"


def _layer_parts(root: nn.Module, layer: ChainLayer, expected: Expected) -> LayerParts | str:
    dropping = _dropping(root, layer.between, expected.dims)
    if isinstance(dropping, str) or dropping[0] > 0:
        return "it drops out between its convolutions"
    dropping = _dropping(root, layer.dropouts, expected.dims)
    if isinstance(dropping, str):
        return dropping
    parts: list[Any] = [path and at(root, path) for path in layer[:4]]
    norm1, conv1, norm2, conv2 = parts
    relus = [(".".join(path), at(root, path)) for path in layer.relus]
    return LayerParts(norm1, conv1, norm2, conv2, relus, *dropping, layer.order)


def _tail_step(
    root: nn.Module, tail: ChainTail, channels: int | None, expected: Expected
) -> TailParts | MaxTransitionStep | str:
    norm: Any = at(root, tail.norm)
    conv: Any = tail.conv and at(root, tail.conv)
    if conv is None:
        found = named("norm", eligibility.norm(norm, channels, expected))
        if tail.averaged != expected.dims:
            found = f"it averages images of {tail.averaged} dimensions"
    else:
        found = transition_obstacle(norm, conv, channels, expected)
    for path in tail.relus:
        found = found or named(".".join(path), eligibility.exactly(at(root, path), nn.ReLU))
    if tail.pool is not None:
        pool, dims = at(root, tail.pool), expected.dims
        of_pool = eligibility.average_pool(pool, dims)
        if tail.maximum:
            of_pool = eligibility.max_pool(pool, 2, dims)
        found = found or named("pool", of_pool)
    if found is not None:
        return found
    dropping = _dropping(root, tail.dropouts, expected.dims)
    if isinstance(dropping, str):
        return dropping
    if tail.maximum:
        return MaxTransitionStep(norm, conv, *dropping)
    if dropping[0] > 0:
        return "it drops out in front of its pooling"
    return TailParts(norm, conv, tail.order, tail.linear, tail.kept)


def _dropping(root: nn.Module, dropouts: Sequence[Dropout], dims: int) -> tuple[float, bool] | str:
    """With which probability these drop something now, and whether that is whole channels."""
    active: list[tuple[float, bool]] = []
    for dropout in dropouts:
        share = dropout.share
        if dropout.path is not None:
            module: Any = at(root, dropout.path)
            kinds = (nn.Dropout, *DROPOUTS)
            kind = kinds[dropout.dims]
            if (found := eligibility.exactly(module, kind)) is not None:
                return f"{'.'.join(dropout.path)} {found}"
            share, modes = module.p, {module.training}
        else:
            modes = {at(root, path).training for path in dropout.within}
        if len(modes) > 1:
            return "one of its modules is in training and one in evaluation"
        if True in modes and share > 0:
            if dropout.dims not in (0, dims):
                return f"it drops whole channels of images of {dropout.dims} dimensions"
            active.append((share, dropout.dims > 0))
    if len(active) > 1:
        return "it drops out twice"
    return active[0] if active else (0.0, False)


def _readers(steps: Sequence[DenseStep | MaxTransitionStep], dims: int) -> list[nn.Module]:
    """The modules that decide which inputs fit."""
    readers: list[nn.Module] = []
    for step in steps:
        if isinstance(step, MaxTransitionStep):
            readers += (step.norm, MODULES[dims].maximum(2))
            continue
        for segment in step.segments:
            assert isinstance(segment, list)
            readers += [norm for layer in segment for norm in layer.norms]
        if step.tail is not None:
            readers.append(step.tail.norm)
            if step.tail.conv is not None:
                readers.append(MODULES[dims].average(2))
    return readers
