"""A module's forward as operations on features, whatever classes and containers it is written with.

`torch.fx` calls the forward with a stand-in. Concatenations are no operations here: a value is the
tuple of the pieces that it consists of, each what an operation gives.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from densenet_fast.conversion.parts import OWN_ATTRIBUTES, original
from densenet_fast.modules import eligibility
from densenet_fast.modules.dimensions import AVERAGES, CONVS, DROPOUTS, MAXIMA, MODULES, NORMS
from densenet_fast.modules.eligibility import HOOKS
from densenet_fast.operators.torch_internals import BatchNorm

Path = tuple[str, ...]  # of a module below the one that is traced
Value = tuple[int, ...]  # pieces: places of operations, or INPUT
INPUT = -1


class UntraceableError(Exception):
    """A forward that is more than operations on one tensor; the text says why."""


class Dropping(NamedTuple):
    """What a dropout does: `dims` are those of the channels it drops whole, 0 if elements."""

    share: float
    dims: int
    active: bool


class Operation(NamedTuple):
    """`kind` is one of the letters of `KINDS`; `path` is of the module that computes it, if any.

    `within` are the modules whose forwards have called it, from the outermost on.
    """

    kind: str
    input: Value
    path: Path | None
    within: Sequence[Path]
    words: str
    dropping: Dropping | None = None
    dims: int = 0  # of the images that an average over all pixels is of


class Trace(NamedTuple):
    """The operations in order, what is returned, and the modules whose forwards were run."""

    operations: Sequence[Operation]
    output: Value
    entered: Sequence[Path]


# Letters, for patterns of operations.
KINDS = {
    "n": "norm",
    "r": "ReLU",
    "c": "convolution",
    "d": "dropout",
    "a": "2-fold average",
    "m": "maximum pooling",
    "g": "average over all pixels",
    "f": "flattening",
    "?": "anything else",
}
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "n": (BatchNorm,),
    "r": (nn.ReLU,),
    "c": CONVS,
    "d": (nn.Dropout, *DROPOUTS),
    "a": AVERAGES,
    "m": MAXIMA,
    "": (nn.Identity,),
}
# Called as what they compute, with settings that are facts of theirs.
_ENTERED = (nn.Flatten, *(kinds.whole for kinds in MODULES.values()))
_LEAVES = tuple(kind for kinds in _MODULES.values() for kind in kinds)
_EXACT_LEAVES = {*_LEAVES, *NORMS}
_DROPOUTS = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_WHOLE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), "r"),
    **dict.fromkeys(_AVERAGES, "a"),
    **dict.fromkeys(_MAXIMA, "m"),
    **dict.fromkeys(_DROPOUTS, "d"),
    **dict.fromkeys((*_WHOLE, torch.mean), "g"),
    torch.flatten: "f",
}
_METHODS = {"relu": "r", "relu_": "r", "contiguous": "", "clone": "", "mean": "g", "flatten": "f"}
_CATS = (torch.cat, torch.concat, torch.concatenate)
_POOLING = {
    "a": ("input", "kernel_size", "stride", "padding", "ceil_mode", "", "divisor_override"),
    "m": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
}


class _Proxy(fx.Proxy):
    """Stands for a tensor without a gradient: with one, layers may checkpoint what they compute."""

    requires_grad = False


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.entered: dict[str, None] = {}
        self.within: dict[fx.Node, Sequence[Path]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _ENTERED:
            return False
        known = isinstance(m, _LEAVES) or eligibility.is_norm(m)
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.entered[name] = None
        self.stack.append(name)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.within[node] = ((), *(_path(name) for name in self.stack))
        return node


def _path(name: str) -> Path:
    return tuple(name.split("."))


def at(root: nn.Module, path: Path) -> nn.Module:
    """The module at `path` below `root`; KeyError if there is none."""
    for name in path:
        found = root.__dict__["_modules"][name]
        if found is None:
            raise KeyError(name)
        root = found
    return root


def bare_copy(module: nn.Module, *, tensors: bool) -> nn.Module:
    """A copy of its own class and without hooks, with its own `tensors` or the same.

    Raises:
        UntraceableError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    if not tensors:
        memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise UntraceableError(f"it cannot be copied: {_first_line(error)}") from error
    for part in copied.modules():
        part.__class__ = original(part)
        for name in HOOKS:
            getattr(part, name).clear()
    return copied


def facts(root: nn.Module) -> list[Any]:
    """What forwards below `root` may depend on: classes, names, and all plain attributes.

    Of norms, convolutions and the like their classes alone: the rest is asked at every forward.
    """
    found: list[Any] = []
    for module in root.modules():
        kind, state = original(module), module.__dict__
        found += (kind, *state["_modules"])
        if kind not in _EXACT_LEAVES:
            found.append(id(kind.forward))
            found += [(key, _fact(state[key])) for key in state if key not in _NO_FACTS]
    return found


# What every module has, is asked for at every forward, or tells replicas apart.
_NO_FACTS = {*nn.Module().__dict__, *OWN_ATTRIBUTES, "_is_replica", "_former_parameters"}


def _fact(value: Any) -> Any:
    """A value that stays what it is while `value` may change, and is equal to that of an equal."""
    if isinstance(value, (list, tuple)):
        return type(value), [_fact(part) for part in value]
    if isinstance(value, dict):
        return [(key, _fact(part)) for key, part in value.items()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)


def trace(module: nn.Module, *, training: bool) -> Trace:
    """What the forward of `module` does in this mode; neither computed nor anything changed.

    Raises:
        UntraceableError: it does more than that, or nobody can tell.
    """
    for name, part in module.named_modules():
        if "forward" in part.__dict__:
            raise UntraceableError(f"{name or 'it'} has its own forward")
    copied = bare_copy(module, tensors=False)
    for part in copied.modules():
        part.training = training
    tracer = _Tracer()
    before = facts(copied)
    generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (
            lambda: torch.get_rng_state().tolist(),
            lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8, device="cpu")),
        ),
    ]
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"].random
        generators.append((numpy.get_state, numpy.set_state))
    states = [get() for get, _ in generators]
    try:
        graph = tracer.trace(copied)
    except Exception as error:
        # Whatever a forward raises that is called with something that is no tensor.
        raise UntraceableError(f"torch.fx cannot trace it: {_first_line(error)}") from error
    finally:
        drawn = pickle.dumps([get() for get, _ in generators]) != pickle.dumps(states)
        for (_, restore), state in zip(generators, states, strict=True):
            restore(state)
    if facts(copied) != before:
        raise UntraceableError("its forward changes attributes of modules: use a hook for that")
    if drawn:
        raise UntraceableError("its forward draws random numbers")
    return _canonical(copied, graph, tracer)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}"[:160]


def _canonical(root: nn.Module, graph: fx.Graph, tracer: _Tracer) -> Trace:
    values: dict[fx.Node, Value] = {}
    operations: list[Operation] = []
    output: Any = None

    def value(found: Any) -> Value:
        if not isinstance(found, fx.Node) or found not in values:
            raise UntraceableError("it computes with more than one tensor")
        return values[found]

    def add(kind: str, source: Value, node: fx.Node, path: Path | None, words: str) -> Value:
        dropping = _dropping(root, node, path) if kind == "d" else None
        dims = _averaged(node)[0] if kind == "g" else 0
        within = tracer.within[node]
        operations.append(Operation(kind, source, path, within, words, dropping, dims))
        return (len(operations) - 1,)

    for node in graph.nodes:
        if node.op == "placeholder":
            if not values:
                values[node] = (INPUT,)
            elif not node.args and not str(node.target).startswith("*"):
                raise UntraceableError("its forward takes more than one input")
            continue
        if node.op == "output":
            output = value(node.args[0])
            continue
        if node.op == "get_attr":
            raise UntraceableError(f"its forward reads {node.target} itself")
        if _is_cat(node):
            pieces = node.args[0] if node.args else node.kwargs["tensors"]
            values[node] = tuple(piece for part in pieces for piece in value(part))
            continue
        source = value(node.args[0] if node.args else node.kwargs.get("input"))
        if any(other is not node.args[0] for other in node.all_input_nodes if node.args):
            raise UntraceableError(f"{_words(root, node)} computes with several values")
        kind, path = _kind(root, node)
        if kind == "":
            values[node] = source
            if path is not None:
                tracer.entered[str(node.target)] = None
            continue
        result = add(kind, source, node, path, _words(root, node))
        if kind == "g" and not _averaged(node)[1]:
            result = add("f", result, node, None, "its flattening")
        if kind == "n" and path is not None and eligibility.norm_with_relu(at(root, path)):
            result = add("r", result, node, None, "its ReLU")
        values[node] = result
    entered = [_path(name) for name in tracer.entered]
    return Trace(operations, output, entered)


def _is_cat(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _CATS:
        return False
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(dim == 1) and isinstance(tensors, (list, tuple))


def _kind(root: nn.Module, node: fx.Node) -> tuple[str, Path | None]:
    if node.op == "call_module":
        path = _path(str(node.target))
        module = at(root, path)
        found = [kind for kind, types in _MODULES.items() if isinstance(module, types)]
        if eligibility.is_norm(module):
            found = ["n"]
        if found == [""] and type(module) is not nn.Identity:
            found = []
        return (found[0] if found else "?"), path
    table: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
    kind = table.get(node.target, "?")
    if kind in _POOLING and not _is_transitions_pooling(node, kind):
        kind = "?"
    if (kind == "g" and not _averaged(node)[0]) or (kind == "f" and not _flattens(node)):
        kind = "?"
    return kind, None


def _is_transitions_pooling(node: fx.Node, kind: str) -> bool:
    functions: Any = _AVERAGES if kind == "a" else _MAXIMA
    dims = functions.index(node.target) + 1
    given = _given(node, *_POOLING[kind])
    return bool(
        _each(given.get("kernel_size"), dims) == (2,) * dims
        and _each(given.get("stride") or 2, dims) == (2,) * dims
        and _each(given.get("padding", 0), dims) == (0,) * dims
        and _each(given.get("dilation", 1), dims) == (1,) * dims
        and not given.get("return_indices", False)
        and not given.get("ceil_mode", False)
        and given.get("divisor_override") is None
    )


def _averaged(node: fx.Node) -> tuple[int, bool]:
    """Of how many dimensions it averages all pixels, or 0, and whether these dimensions stay."""
    if node.target in _WHOLE:
        dims = 1 + _WHOLE.index(node.target)
        size = _each(_given(node, "input", "output_size")["output_size"], dims)
        return dims * (size == (1,) * dims), True
    given = {"keepdim": False, **_given(node, "input", "dim", "keepdim")}
    axes = _each(given.get("dim"), 1)
    whole = axes in (tuple(range(2, 2 + len(axes))), tuple(range(-len(axes), 0)))
    known = whole and len(axes) in MODULES and given.keys() == {"input", "dim", "keepdim"}
    return len(axes) * known, bool(given["keepdim"])


def _flattens(node: fx.Node) -> bool:
    """Whether it flattens all but the images."""
    given = {"start_dim": 0, "end_dim": -1, **_given(node, "input", "start_dim", "end_dim")}
    return (given["start_dim"], given["end_dim"]) == (1, -1)


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """What a function of these arguments is called with."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * dims


def _dropping(root: nn.Module, node: fx.Node, path: Path | None) -> Dropping:
    if path is not None:
        module: Any = at(root, path)
        dims = 0 if isinstance(module, nn.Dropout) else 1 + _place(module, DROPOUTS)
        return Dropping(module.p, dims, module.training)
    given = _given(node, "input", "p", "training")
    function: Any = node.target
    return Dropping(given.get("p", 0.5), _DROPOUTS[function], given.get("training", True))


def _place(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> int:
    return next(place for place, kind in enumerate(kinds) if isinstance(module, kind))


def _words(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(root.get_submodule(str(node.target))).__name__})"
    target = node.target
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))
