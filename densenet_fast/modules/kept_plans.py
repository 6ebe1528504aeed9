"""Plans of fused forwards, kept between calls while nothing that they depend on has changed.

Planning reads hundreds of modules, which at small images takes as long as computing. Whether they
are what they were is asked without a line of Python for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from densenet_fast.blocks import synchronized
from densenet_fast.modules.eligibility import HOOKS
from densenet_fast.operators import extension

T = TypeVar("T")

_MOST = 64  # networks and blocks whose plans are kept; more take turns
_MISSES = 4  # in a row, after which a network is known to change between its calls


class _Facts:
    """What a network is: its modules' types, attributes and hooks, and which tensors they hold.

    Whether those have still the types and places to be used is asked where they are.
    """

    def __init__(self, root: nn.Module) -> None:
        """Note them. The root itself is not held."""
        modules = [module for module in root.modules() if module is not root]
        states: list[Any] = [root.__dict__, *(module.__dict__ for module in modules)]
        held = [state[name] for state in states for name in ("_parameters", "_buffers")]
        dicts = [*states, *(state["_modules"] for state in states), *held]
        hooks = [state[name] for state in states for name in HOOKS]
        self._root = type(root)
        assert extension.C is not None
        self._noted = extension.C.Facts(modules, dicts, hooks)

    def hold(self, root: nn.Module) -> bool:
        """Whether all is as it was."""
        return type(root) is self._root and bool(self._noted.hold())


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
    if torch.compiler.is_compiling() or extension.C is None:
        return make()
    key = (key, synchronized.world())  # whose statistics a SyncBatchNorm takes
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
