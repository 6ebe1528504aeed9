"""Dense layers and transitions found in what a module's forward does: a chain, as plain data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from densenet_fast.conversion.traces import (
    INPUT,
    KINDS,
    Operation,
    Path,
    Trace,
    UntraceableError,
    trace,
)

Order = tuple[int, ...] | None  # of the features' pieces; None: as they are stored


class Dropout(NamedTuple):
    """One dropout: `path` of its module, or None for a function that asks the modules `within`."""

    share: float
    dims: int
    path: Path | None
    within: tuple[Path, ...]


class ChainLayer(NamedTuple):
    """Paths of a layer's modules, and the order of the pieces that it reads.

    Without a bottleneck norm1 and conv1 are None.
    The block's input is piece 0, the output of layer i piece i. `between` are dropouts that fused
    layers do not have.
    """

    norm1: Path | None
    conv1: Path | None
    norm2: Path
    conv2: Path
    relus: tuple[Path, ...]
    between: tuple[Dropout, ...]
    dropouts: tuple[Dropout, ...]
    order: Order

    @property
    def first(self) -> Path:
        """The norm over the features."""
        return self.norm1 or self.norm2


class ChainTail(NamedTuple):
    """Paths of a transition's modules; of the pooling None where it is a function.

    Its pooling is an average or a `maximum`. A `linear` one has no ReLU. Without a convolution
    there are norm, ReLU and the average over all pixels of images of `averaged` dimensions, which
    stay where they are `kept`.
    """

    norm: Path
    conv: Path | None
    pool: Path | None
    maximum: bool
    linear: bool
    relus: tuple[Path, ...]
    dropouts: tuple[Dropout, ...]
    order: Order
    averaged: int = 0
    kept: bool = False


class Stage(NamedTuple):
    """Layers on one feature buffer, and the transition behind them."""

    layers: tuple[ChainLayer, ...]
    tail: ChainTail | None

    def parts(self) -> Sequence[ChainLayer | ChainTail]:
        """The layers, and the transition if there is one."""
        return self.layers if self.tail is None else (*self.layers, self.tail)


class Chain(NamedTuple):
    """All that a forward does. `order` are the pieces of the last stage that it returns."""

    stages: tuple[Stage, ...]
    order: Order
    entered: tuple[Path, ...]


class NoChainError(Exception):
    """A forward that is no chain.

    `dense` says whether there is a dense connection in it, `like` also whether it is a transition
    of another kind.
    """

    dense = False
    like = False


_LAYER = re.compile("nrc(d*)nrc(d*)")
_WITHOUT_BOTTLENECK = re.compile("nrc(d*)$")
_TRANSITION = re.compile("nrcd*[am]|ncd*a")
_AVERAGE = re.compile("nrgf?$")
# What is of the family, and not fused.
_OTHERS = (
    (re.compile("ncd*m"), "it has no ReLU between its norm and its convolution"),
    (re.compile("nr?$"), "it has a norm without a convolution behind it"),
    (
        re.compile("c?nr?c?n?r?"),
        "its operations come in another order than norm, ReLU, convolution",
    ),
)


def chain(module: nn.Module) -> Chain:
    """What `module` is as a chain, in training and evaluation alike.

    Raises:
        NoChainError: it is none.
    """
    try:
        evaluating = trace(module, training=False)
    except UntraceableError as error:
        raise NoChainError(str(error)) from error
    try:
        found = _chain(evaluating)
        matched = _chain(trace(module, training=True))
    except (NoChainError, UntraceableError) as error:
        failed = NoChainError(str(error))
        failed.dense = _is_dense(evaluating)
        failed.like = failed.dense or (isinstance(error, NoChainError) and error.like)
        raise failed from error
    if any(
        op.dropping is not None and op.dropping.active and op.path is None
        for op in evaluating.operations
    ):
        raise NoChainError("it drops out in evaluation too")
    if _without_dropout(found) != _without_dropout(matched):
        raise NoChainError("it computes something else in training than in evaluation")
    return matched


def _without_dropout(chain: Chain) -> Chain:
    stages = [
        Stage(
            tuple(layer._replace(between=(), dropouts=()) for layer in stage.layers),
            stage.tail and stage.tail._replace(dropouts=()),
        )
        for stage in chain.stages
    ]
    return chain._replace(stages=tuple(stages))


def _chain(traced: Trace) -> Chain:
    """The operations as stages; every one of them has its place there."""
    operations = traced.operations
    readers = Counter(piece for op in operations for piece in set(op.input))
    readers.update(set(traced.output))
    pieces = [INPUT]
    stages: list[Stage] = []
    layers: list[ChainLayer] = []
    at = 0
    taken: set[int] = set()
    while at < len(operations):
        if at in taken:
            at += 1
            continue
        if stages and stages[-1].tail is not None and stages[-1].tail.conv is None:
            raise NoChainError("it goes on behind its average over all pixels")
        run = _run(operations, readers, at)
        kinds = "".join(operations[place].kind for place in run)
        layer, transition = _LAYER.match(kinds), _TRANSITION.match(kinds)
        layer = layer or _WITHOUT_BOTTLENECK.match(kinds)
        match = layer or transition or _AVERAGE.match(kinds)
        if match is None:
            raise _no_chain(operations[at], kinds)
        run = run[: match.end()]
        parts = [operations[place] for place in run]
        order = _order(parts[0].input, pieces)
        taken.update(run)
        if layer:
            layers.append(_layer(parts, layer, order))
            pieces.append(run[-1])
        else:
            tail = _tail(parts, order) if transition else _average(parts, order)
            stages.append(Stage(tuple(layers), tail))
            layers, pieces = [], [run[-1]]
    if layers:
        stages.append(Stage(tuple(layers), None))
    if not stages:
        raise NoChainError("it computes nothing")
    order = _order(traced.output, pieces, all_of_them=False)
    if pieces[-1] not in traced.output:
        raise NoChainError("what its last layer adds is not used")
    return Chain(tuple(stages), order, tuple(traced.entered))


def _is_dense(traced: Trace) -> bool:
    """Whether what convolutions, norms and ReLUs give is concatenated to what they have read."""
    for value in (*(op.input for op in traced.operations), traced.output):
        for piece in value if len(value) > 1 else ():
            if piece == INPUT or traced.operations[piece].kind not in "cdnr":
                continue
            source: tuple[int, ...] = (piece,)
            while len(source) == 1 and source[0] != INPUT:
                operation = traced.operations[source[0]]
                if operation.kind in "am":
                    break  # what was pooled is no part of the same features
                source = operation.input
                if set(source) < set(value):
                    return True
    return False


def _run(operations: Sequence[Operation], readers: Counter[int], start: int) -> list[int]:
    """Places of operations that each read what the one before gives, and nobody else does."""
    run = [start]
    for place in range(start + 1, len(operations)):
        if operations[place].input == (run[-1],) and readers[run[-1]] == 1:
            run.append(place)
    return run


def _order(value: tuple[int, ...], pieces: list[int], *, all_of_them: bool = True) -> Order:
    """The places of a value's pieces among the features."""
    if any(piece not in pieces for piece in value) or len(set(value)) < len(value):
        raise NoChainError("something is read that is not among the features")
    if all_of_them and len(value) < len(pieces):
        raise NoChainError("a layer does not read all the features before it")
    order = tuple(map(pieces.index, value))
    return None if order == tuple(range(len(pieces))) else order


def _layer(parts: Sequence[Operation], match: re.Match[str], order: Order) -> ChainLayer:
    bottleneck = match.re is _LAYER
    between, behind = match.span(1) if bottleneck else (0, 0), match.span(match.re.groups)
    norm2, relu2, conv2 = parts[between[1] : behind[0]]
    relus = [parts[1], relu2] if bottleneck else [relu2]
    return ChainLayer(
        _path(parts[0]) if bottleneck else None,
        _path(parts[2]) if bottleneck else None,
        _path(norm2),
        _path(conv2),
        relus=tuple(relu.path for relu in relus if relu.path is not None),
        between=_dropouts(parts[slice(*between)]),
        dropouts=_dropouts(parts[slice(*behind)]),
        order=order,
    )


def _tail(parts: Sequence[Operation], order: Order) -> ChainTail:
    relus, dropouts = ([part for part in parts if part.kind == kind] for kind in "rd")
    norm, conv, pool = (part for part in parts if part.kind not in "rd")
    return ChainTail(
        _path(norm),
        _path(conv),
        pool.path,
        maximum=pool.kind == "m",
        linear=not relus,
        relus=tuple(relu.path for relu in relus if relu.path is not None),
        dropouts=_dropouts(dropouts),
        order=order,
    )


def _average(parts: Sequence[Operation], order: Order) -> ChainTail:
    norm, relu, average, *flattened = parts
    if order is not None:
        raise NoChainError("its last norm reads the features in another order")
    relus = () if relu.path is None else (relu.path,)
    return ChainTail(
        _path(norm),
        None,
        None,
        maximum=False,
        linear=False,
        relus=relus,
        dropouts=(),
        order=None,
        averaged=average.dims,
        kept=not flattened,
    )


def _path(operation: Operation) -> Path:
    assert operation.path is not None  # of a norm or convolution
    return operation.path


def _dropouts(operations: Sequence[Operation]) -> tuple[Dropout, ...]:
    """Those that do something in the mode of the trace; a module's own mode is asked later."""
    return tuple(
        Dropout(op.dropping.share, op.dropping.dims, op.path, tuple(op.within))
        for op in operations
        if op.dropping is not None and (op.path is not None or op.dropping.active)
    )


def _no_chain(operation: Operation, kinds: str) -> NoChainError:
    """Why these operations are no layer and no transition."""
    for pattern, reason in _OTHERS:
        if pattern.match(kinds):
            error = NoChainError(reason)
            error.like = pattern.pattern.endswith("m")
            return error
    if "?" in kinds:
        return NoChainError(f"it calls {operation.words}")
    return NoChainError(f"it is {', '.join(KINDS[kind] for kind in kinds)}")
