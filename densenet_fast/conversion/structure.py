"""Modules of any class that are chains of dense layers and transitions, run fused."""

from __future__ import annotations

import copyreg
from collections.abc import Collection, Iterator, Sequence
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
from densenet_fast.conversion.parts import OWN_ATTRIBUTES, Converted, is_converted
from densenet_fast.conversion.traces import UntraceableError, at, bare_copy
from densenet_fast.modules import eligibility, fusing, input_checks
from densenet_fast.modules.dimensions import AVERAGES, CONVS, DROPOUTS, MAXIMA, MODULES, OF_TYPE
from densenet_fast.modules.eligibility import Expected, named
from densenet_fast.modules.kept_plans import kept
from densenet_fast.modules.layer_parts import LayerParts, TailParts, transition_obstacle
from densenet_fast.modules.layers import FusedChain
from densenet_fast.modules.steps import DenseStep
from densenet_fast.operators.torch_internals import BatchNorm


class Found(NamedTuple):
    """What a module's forward has been found to be, and the facts that this depends on."""

    facts: list[Any]
    chain: Chain | str  # or why it is none


class ConvertedChain(Converted, FusedChain):
    """A module that `convert` has found to be a chain; `chain_class` makes its class."""

    def run(self, input: Any) -> Any:
        """The forward outside any graph, fused where nothing is in the way."""
        if not isinstance(input, Tensor) or not input.numel():
            return self.plain(input)
        images = tensor_subclasses.plain(input)
        steps = eligibility.input(images) or self._kept(eligibility.expected(images))
        if isinstance(steps, str):
            return self.plain(input)
        synchronized.check_modules(self, images.device)
        dims = images.dim() - 2
        input_checks.chain(type(self).__name__, _readers(steps, dims), images)
        memory_format = self.released_format(images)
        if any(step.tail is not None for step in steps):
            memory_format = fusing.averaged_format(memory_format, dims)
        output = released(fusing.run(steps, images, hold=False), memory_format)
        return tensor_subclasses.restored(output, input)

    def _kept(self, expected: Expected) -> list[DenseStep] | str:
        return kept(self, expected, lambda: self.chain(expected))

    def chain(self, expected: Expected) -> list[DenseStep] | str:
        """Its steps, one for each transition and the layers before it, or why there are none."""
        found = self.__dict__.get("_found")
        facts = _facts(self)
        if found is None or found.facts != facts:
            found = self._found = _look(self, facts)
        if isinstance(found.chain, str):
            return f"is no chain of dense layers any more: {found.chain}"
        return steps(self, found.chain, expected, self._checkpoint)

    def rows(self, expected: Expected) -> Iterator[tuple[str, str | None]]:
        """The name of every layer and transition, and why it does not run fused."""
        planned = self.chain(expected)
        found = self._found.chain
        if isinstance(found, str):
            yield "", f"its forward is no chain of dense layers any more: {found}"
            return
        for part in (part for stage in found.stages for part in (*stage.layers, stage.tail)):
            if part is not None:
                obstacle = planned if isinstance(planned, str) else None
                if obstacle is not None:
                    own = obstacle.removeprefix(f"{_name(part)}: ")
                    obstacle = own if own != obstacle else f"runs as the modules around it: {own}"
                yield _name(part), obstacle

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As its own class pickles, which is made for what it is converted from."""
        function, args, *rest = super().__reduce_ex__(protocol)
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


# Names that a chain's class must not have, as it would lose them.
_OWN = {name for kind in ConvertedChain.__mro__[:-2] for name in kind.__dict__}
_OWN = {name for name in _OWN if not name.startswith("__")} - set(dir(nn.Module))
_OWN |= {*OWN_ATTRIBUTES}


def _facts(root: nn.Module) -> list[Any]:
    """What forwards below `root` may depend on: classes, names, and all plain attributes.

    Of norms, convolutions and the like their classes alone: the rest is asked at every forward.
    """
    facts: list[Any] = []
    for module in root.modules():
        kind, state = type(module), module.__dict__
        facts += (kind, *state["_modules"])
        if kind not in _LEAVES:
            facts.append(id(kind.forward))
            facts += [(key, _fact(state[key])) for key in state if key not in _NO_FACTS]
    return facts


_NO_FACTS = {*nn.Module().__dict__, *OWN_ATTRIBUTES}
_LEAVES = {
    *(kind for kinds in (CONVS, AVERAGES, MAXIMA, DROPOUTS) for kind in kinds),
    *(OF_TYPE.keys()),
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.Dropout,
    nn.Identity,
}


def _fact(value: Any) -> Any:
    """A value that stays what it is while `value` may change, and is equal to that of an equal."""
    if isinstance(value, (list, tuple)):
        return type(value), [_fact(part) for part in value]
    if isinstance(value, dict):
        return [(key, _fact(part)) for key, part in value.items()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)


def _look(module: nn.Module, facts: list[Any]) -> Found:
    try:
        return Found(facts, chain(module))
    except NoChainError as error:
        return Found(facts, str(error))


# A chain as steps


def steps(
    root: nn.Module, chain: Chain, expected: Expected, checkpoint: Any
) -> list[DenseStep] | str:
    """The steps of the chain that `root` is, or what is in the way of computing them."""
    for path in chain.entered:
        found = eligibility.touched(at(root, path))
        if found is not None:
            return f"{'.'.join(path)} {found}"
    planned = []
    for stage in chain.stages:
        step = _step(root, stage, expected, checkpoint)
        if isinstance(step, str):
            return step
        planned.append(step)
    planned[-1].order = chain.order
    return planned


def _step(root: nn.Module, stage: Stage, expected: Expected, checkpoint: Any) -> DenseStep | str:
    channels: int | None = None
    layers: list[LayerParts] = []
    group = synchronized.OneGroup()
    for layer in stage.layers:
        parts = _layer_parts(root, layer, expected)
        found = parts if isinstance(parts, str) else parts.obstacle(channels, expected)
        if found is not None:
            return _of(layer, found)
        assert not isinstance(parts, str)
        if not group.admits(parts.norm1):
            return _of(layer, "takes statistics over other ranks than the layers before")
        read, growth = map(eligibility.weight_shape, (parts.conv1, parts.conv2))
        channels = read[1] + growth[0]
        layers.append(parts)
    step = DenseStep([layers] if layers else [], checkpoint)
    if stage.tail is None:
        return step
    tail = _tail_parts(root, stage.tail, channels, expected)
    if isinstance(tail, str):
        return _of(stage.tail, tail)
    if not group.admits(tail.norm):
        return _of(stage.tail, "takes statistics over other ranks than the layers before")
    step.tail = tail
    return step


def _name(part: ChainLayer | ChainTail) -> str:
    """The module that a layer or transition is, or the convolution that it ends with."""
    last = part.conv2 if isinstance(part, ChainLayer) else part.conv
    first = part.norm1 if isinstance(part, ChainLayer) else part.norm
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
    parts: Any = [at(root, path) for path in layer[:4]]
    relus = [(".".join(path), at(root, path)) for path in layer.relus]
    return LayerParts(*parts, relus, *dropping, layer.order)


def _tail_parts(
    root: nn.Module, tail: ChainTail, channels: int | None, expected: Expected
) -> TailParts | str:
    norm: Any = at(root, tail.norm)
    conv: Any = at(root, tail.conv)
    found = transition_obstacle(norm, conv, channels, expected)
    for path in tail.relus:
        found = found or named(".".join(path), eligibility.exactly(at(root, path), nn.ReLU))
    if tail.pool is not None:
        pool = at(root, tail.pool)
        found = found or named("pool", eligibility.average_pool(pool, expected.dims))
    dropping = _dropping(root, tail.between, expected.dims)
    if isinstance(dropping, str) or dropping[0] > 0:
        found = found or "it drops out in front of its pooling"
    return found or TailParts(norm, conv, tail.order)


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


def _readers(steps: Sequence[DenseStep], dims: int) -> list[nn.Module]:
    """The modules that decide which inputs fit."""
    readers: list[nn.Module] = []
    for step in steps:
        for segment in step.segments:
            assert isinstance(segment, list)
            readers += [norm for layer in segment for norm in (layer.norm1, layer.norm2)]
        if step.tail is not None:
            readers += (step.tail.norm, MODULES[dims].average(2))
    return readers


# Finding chains


class Match(NamedTuple):
    """A module that is a chain, or one like it that is not fused, for which `reason` says why."""

    name: str
    module: nn.Module
    reason: str | None
    dense: bool  # whether there are dense layers in it, not a transition alone


def find(model: nn.Module, known: Collection[nn.Module]) -> list[Match]:
    """The largest chains in `model`, each as the smallest module that it is all of.

    Nothing is looked for in modules that are `known`. Transitions are only found with dense layers.
    """
    found = _find("", model, known)
    return found if any(match.dense for match in found) or known else []


def _find(name: str, module: nn.Module, known: Collection[nn.Module]) -> list[Match]:
    if module in known:
        return []
    children = [
        (f"{name}.{part}" if name else part, child)
        for part, child in module._modules.items()
        if child is not None
    ]
    match = _match(name, module) if _promising(module, known) else None
    if match is not None and match.reason is None:
        whole = [child for child in children if _convs(child[1]) == _convs(module)]
        inner = _find(*whole[0], known) if whole else []
        same = len(inner) == 1 and inner[0].reason is None and inner[0].dense == match.dense
        return inner if same else [match]
    within = [found for child in children for found in _find(*child, known)]
    if match is None or any(found.reason is None and found.dense for found in within):
        return within
    blocks = [found for found in within if found.dense and _several(found.module)]
    return within if blocks else [match]


def _several(module: nn.Module) -> bool:
    """Whether there is more than a single layer in `module`."""
    return sum(isinstance(part, CONVS) for part in module.modules()) > 2


def _match(name: str, module: nn.Module) -> Match | None:
    """What the module is itself; None: nothing of interest."""
    try:
        found = chain(module)
    except NoChainError as error:
        return Match(name, module, str(error), error.dense) if error.like else None
    dense = any(stage.layers for stage in found.stages)
    return Match(name, module, _refusal(module, found), dense)


def _promising(module: nn.Module, known: Collection[nn.Module]) -> bool:
    """Whether `module` holds norms, convolutions and nothing that dense layers have not."""
    parts = list(module.modules())
    if isinstance(module, torch.jit.ScriptModule) or any(part in known for part in parts):
        return False
    leaves = [part for part in parts if not part._modules]
    return (
        all(isinstance(part, _KNOWN) for part in leaves)
        and any(isinstance(part, BatchNorm) for part in parts)
        and _convs(module) > 0
    )


_KNOWN = (*CONVS, *AVERAGES, *MAXIMA, *DROPOUTS, BatchNorm, nn.ReLU, nn.Dropout, nn.Identity)


def _convs(module: nn.Module) -> int:
    return sum(isinstance(part, CONVS) for part in module.modules())


def _refusal(module: nn.Module, found: Chain) -> str | None:
    """Why a chain is not converted: what fused steps do not have, or other results than its own."""
    taken = sorted(name for name in _OWN if hasattr(module, name) and not is_converted(module))
    if taken:
        return f"it has an attribute {taken[0]!r}, which converted modules have for themselves"
    first = found.stages[0]
    path = first.layers[0].norm1 if first.layers else first.tail.norm  # type: ignore[union-attr]
    norm: Any = at(module, path)
    try:
        copied = bare_copy(module, tensors=True).eval()
    except UntraceableError as error:
        return str(error)
    meta = any(tensor.is_meta for tensor in copied.parameters())
    copied.to("meta" if meta else "cpu", torch.float64)
    expected = Expected(
        torch.float64, torch.device("meta" if meta else "cpu"), _dims(copied, found)
    )
    planned = steps(copied, found, expected, "bottleneck")
    if isinstance(planned, str) or meta:
        return planned if isinstance(planned, str) else None
    generator = torch.Generator().manual_seed(0)
    size = 2 ** sum(stage.tail is not None for stage in found.stages) * 3
    images = torch.empty(2, norm.num_features, *[size] * expected.dims, dtype=torch.float64)
    with torch.no_grad():
        # Fresh norms are the identity, which hides mistakes.
        for name, tensor in (("", images), *copied.named_parameters(), *copied.named_buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
            elif tensor.dim() > 1 and name:
                tensor.div_(tensor[0].numel() ** 0.5)
        try:
            wanted = type(copied).forward(copied, images)
        except Exception as error:
            return f"its forward raises {type(error).__name__} for images of {size} pixels"
        actual = fusing.run(planned, images, hold=False)
    if wanted.shape != actual.shape or not torch.allclose(wanted, actual, rtol=1e-9, atol=1e-9):
        return "fused it gives another output than its own forward"
    return None


def _dims(root: nn.Module, found: Chain) -> int:
    stage = found.stages[-1]
    last = stage.layers[-1].conv2 if stage.tail is None else stage.tail.conv
    return OF_TYPE.get(type(at(root, last)), 2)
