"""Plans of fused forwards, kept between calls while nothing that they depend on has changed.

Planning reads hundreds of modules, which at small images takes as long as computing. Whether they
are what they were is asked in a few passes over all of them, without a line of Python for each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from densenet_fast.blocks import synchronized

T = TypeVar("T")

_MOST = 16  # networks whose plans are kept; more take turns
_MISSES = 4  # in a row, after which a network is known to change between its calls
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _all_values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


class _Facts:
    """What a network is: types, attributes, hooks, and the types and places of its tensors."""

    def __init__(self, root: nn.Module) -> None:
        """Note them. The root itself is not held."""
        modules = [module for module in root.modules() if module is not root]
        self._modules = modules
        self._states: list[Any] = [root.__dict__, *(module.__dict__ for module in modules)]
        self._children = [state["_modules"] for state in self._states]
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        self._held = [state[name] for state in self._states for name in ("_parameters", "_buffers")]
        tensors = [tensor for tensor in _all_values(self._held) if tensor is not None]
        self._tensors = tensors
        self._root = type(root)
        self._were = self._now()
        self._objects = _all_values(self._children), _all_values(self._held)

    def _now(self) -> list[Any]:
        return [
            list(map(type, self._modules)),
            list(map(tuple, map(dict.values, self._states))),
            list(chain.from_iterable(self._children)),
            list(map(len, self._hooks)),
            list(map(operator.attrgetter("dtype", "device"), self._tensors)),
        ]

    def hold(self, root: nn.Module) -> bool:
        """Whether all is as it was."""
        objects = _all_values(self._children), _all_values(self._held)
        try:
            return (
                type(root) is self._root
                and all(
                    len(now) == len(were) and all(map(operator.is_, now, were))
                    for now, were in zip(objects, self._objects, strict=True)
                )
                and self._now() == self._were
            )
        except Exception:
            return False


class _Entry:
    def __init__(self, facts: _Facts) -> None:
        self.facts: _Facts | None = facts
        self.plans: dict[Hashable, Any] = {}
        self.misses = 0


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_called: WeakSet[nn.Module] = WeakSet()


def kept(root: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, or what it has given before for this key of an unchanged network.

    Nothing is kept at a network's first call: replicas have no second one.
    """
    if torch.compiler.is_compiling() or synchronized.active():
        return make()
    entry = _entries.get(root)
    if entry is None:
        if root not in _called:
            _called.add(root)
            return make()
        if len(_entries) >= _MOST:
            _entries.pop(next(iter(_entries)), None)
        entry = _entries[root] = _Entry(_Facts(root))
    elif entry.facts is None:
        return make()
    elif entry.facts.hold(root):
        entry.misses = 0
    else:
        entry.misses += 1
        entry.plans = {}
        entry.facts = None if entry.misses == _MISSES else _Facts(root)
    if key not in entry.plans:
        plan = make()
        if len(entry.plans) < _MOST:
            entry.plans[key] = plan
        return plan
    found: T = entry.plans[key]
    return found
