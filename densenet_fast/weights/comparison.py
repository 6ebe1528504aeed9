"""A checkpoint's tensors beside a model's: what fits, and all that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from densenet_fast.weights.key_layouts import Names

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Conversion:
    """A tensor that has another dtype in the file (`found`) than in the model (`expected`)."""

    name: str
    found: torch.dtype
    expected: torch.dtype


@dataclass(frozen=True)
class Misfit:
    """One tensor that does not fit, by its name in the file and in the model.

    `found` describes what the file has, `expected` what the model has; one of them is empty if the
    tensor is unexpected or missing.
    """

    file_name: str
    model_name: str
    found: str
    expected: str


@dataclass
class Comparison:
    """`pairs` are the model's names of what can be loaded, with the file's."""

    pairs: dict[str, str] = field(default_factory=dict)
    converted: list[Conversion] = field(default_factory=list)
    kept_counters: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[Misfit] = field(default_factory=list)
    unexpected: list[Misfit] = field(default_factory=list)
    shapes: list[Misfit] = field(default_factory=list)
    types: list[Misfit] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # norms of the file, with the model's
    castable: bool = False  # whether `cast` would permit some of the types

    @property
    def fits(self) -> bool:
        """Whether something can be loaded and nothing is in the way."""
        return bool(self.pairs) and not (
            self.missing or self.unexpected or self.shapes or self.types
        )


class WeightsError(RuntimeError):
    """A checkpoint that does not fit a model; the message names every tensor in the way.

    Attributes:
        missing: what the model has and the file does not.
        unexpected: what the file has and the model does not.
        shapes: tensors of another shape.
        types: tensors of another dtype, and what is no tensor in the file.
    """

    def __init__(self, headline: str, found: Comparison) -> None:
        self.missing = tuple(found.missing)
        self.unexpected = tuple(found.unexpected)
        self.shapes = tuple(found.shapes)
        self.types = tuple(found.types)
        self._arguments = (headline, found)
        lines = [headline]
        if not found.pairs:
            lines.append("  no tensor of the file can be loaded into the model")
        lines += _section(
            "missing in the file",
            [
                f"{one.model_name} {one.expected}{_other('in the file: ', one.file_name, one)}"
                for one in self.missing
            ],
        )
        lines += _section(
            "unexpected in the file",
            [
                f"{one.file_name} {one.found}{_other('in the model: ', one.model_name, one)}"
                for one in self.unexpected
            ],
        )
        lines += _section("of another shape", [_both(one) for one in self.shapes])
        lines += _section("of another type", [_both(one) for one in self.types])
        lines += [
            f"  {theirs} in the file may be {ours}: ignore= does not leave out a renamed norm"
            for theirs, ours in found.renamed.items()
        ]
        lines.append("  ignore= takes patterns of names that may differ, as 'classifier.*'")
        if found.castable:
            lines.append("  cast=True permits conversions that lose precision")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> Any:
        return type(self), self._arguments


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"  {title} ({len(lines)}):", *(f"    {line}" for line in lines)] if lines else []


def _other(where: str, name: str, one: Misfit) -> str:
    """The tensor's name on the side where it is not, if it is another one there."""
    return "" if one.file_name == one.model_name else f" ({where}{name})"


def _both(one: Misfit) -> str:
    if one.file_name == one.model_name:
        return f"{one.file_name}: {one.found} in the file, {one.expected} in the model"
    return f"{one.file_name} {one.found} in the file, {one.model_name} {one.expected} in the model"


def compare(
    file: Names,
    values: Mapping[str, Any],
    model: Names,
    own: Mapping[str, Any],
    ignored: Callable[[str, str], bool],
    cast: bool,
) -> Comparison:
    """Every tensor of the file and of the model, in the model's order.

    `ignored` is asked with both names of what does not fit.
    """
    result = Comparison(renamed=_renamed(file, values, model, own))
    renamed = {*result.renamed, *result.renamed.values()}

    def left_out(common: str, *names: str) -> bool:
        return common.rpartition(".")[0] not in renamed and ignored(*names)

    old = not any(name.rpartition(".")[2] == _COUNTER for name in file.own)
    for common, name in model.own.items():
        theirs = file.own.get(common)
        if theirs is not None:
            _compare_pair(result, Misfit(theirs, name, "", ""), values, own, ignored, cast)
        elif old and name.rpartition(".")[2] == _COUNTER:
            result.kept_counters.append(name)
        elif left_out(common, name, file.spelled(common)):
            result.ignored.append(f"{name} {_shape(own[name])}, missing in the file")
        else:
            misfit = Misfit(file.spelled(common), name, "", _shape(own[name]))
            result.missing.append(misfit)
    for common, theirs in file.own.items():
        if common in model.own:
            continue
        name = model.spelled(common)
        if left_out(common, name, theirs):
            result.ignored.append(f"{theirs} {_shape(values[theirs])}, not in the model")
        else:
            result.unexpected.append(Misfit(theirs, name, _shape(values[theirs]), ""))
    return result


def _renamed(
    file: Names, values: Mapping[str, Any], model: Names, own: Mapping[str, Any]
) -> dict[str, str]:
    """Norms of a DenseNet that file and model have at the same place, under different names."""
    theirs = _norms(file.own.keys() - model.own.keys(), file, values)
    ours = _norms(model.own.keys() - file.own.keys(), model, own)
    return {norm: ours[place] for place, norm in theirs.items() if place in ours}


def _norms(names: Set[str], side: Names, tensors: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The norms among `names`, by what they are part of and their channels."""
    found: dict[tuple[str, str], str] = {}
    for name, own in side.own.items():
        norm, _, tensor = name.rpartition(".")
        part = norm.rpartition(".")[0]
        if name in names and tensor == "running_mean" and "features" in part.split("."):
            found[part, _shape(tensors[own])] = norm
    return found


def _compare_pair(
    result: Comparison,
    pair: Misfit,
    values: Mapping[str, Any],
    own: Mapping[str, Any],
    ignored: Callable[[str, str], bool],
    cast: bool,
) -> None:
    value, mine = values[pair.file_name], own[pair.model_name]
    problems, shown = result.types, _type
    if isinstance(value, Tensor) and isinstance(mine, Tensor):
        if value.shape != mine.shape:
            problems, shown = result.shapes, _shape
        elif _type(value) == _type(mine) or _convertible(value, mine, cast):
            if value.dtype != mine.dtype:
                change = Conversion(pair.model_name, value.dtype, mine.dtype)
                result.converted.append(change)
            result.pairs[pair.model_name] = pair.file_name
            return
    elif type(value) is type(mine):  # extra states, which the module itself reads
        result.pairs[pair.model_name] = pair.file_name
        return
    found, expected = shown(value), shown(mine)
    if problems is result.types and _lossy(value, mine):
        result.castable |= not cast
        found += " with values beyond its range" if cast else ""
    if ignored(pair.model_name, pair.file_name):
        result.ignored.append(f"{pair.model_name} {expected}, {found} in the file")
    else:
        problems.append(Misfit(pair.file_name, pair.model_name, found, expected))


def _convertible(value: Tensor, mine: Tensor, cast: bool) -> bool:
    """Whether copying keeps every value, or what it loses is permitted and none overflows."""
    if not _plain(value) or not _plain(mine):
        return False
    if _lossy(value, mine):
        return cast and bool((value.to(mine.dtype).isfinite() | ~value.isfinite()).all())
    if value.dtype.is_floating_point and mine.dtype.is_floating_point:
        return True
    if _integer(value.dtype) and _integer(mine.dtype):
        narrow, wide = torch.iinfo(value.dtype), torch.iinfo(mine.dtype)
        return wide.min <= narrow.min and wide.max >= narrow.max
    return False


def _lossy(value: Any, mine: Any) -> bool:
    """Whether both are floating-point tensors and not every value has its like in `mine`'s type."""
    if not isinstance(value, Tensor) or not isinstance(mine, Tensor) or not _plain(value):
        return False
    if not value.dtype.is_floating_point or not mine.dtype.is_floating_point:
        return False
    found, wanted = torch.finfo(value.dtype), torch.finfo(mine.dtype)
    kept = wanted.eps <= found.eps and wanted.max >= found.max
    return not kept or wanted.smallest_normal > found.smallest_normal


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    return f"({type(value).__name__}, not a tensor)"


def _type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"({type(value).__name__}, not a tensor)"
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return f"{kind} without values (meta device)"
    if value.layout != torch.strided:
        return f"{kind} of layout {value.layout}"
    return kind
