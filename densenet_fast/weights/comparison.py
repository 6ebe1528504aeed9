"""A checkpoint's tensors beside a model's: what fits, and all that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from densenet_fast.weights.key_layouts import Names

COUNTER = "num_batches_tracked"


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

    def __str__(self) -> str:
        file, model = self.file_name, self.model_name
        if self.found and self.expected:
            if file == model:
                return f"{file}: {self.found} in the file, {self.expected} in the model"
            return f"{file} {self.found} in the file, {model} {self.expected} in the model"
        if self.found:
            return f"{file} {self.found}" + ("" if file == model else f" (in the model: {model})")
        return f"{model} {self.expected}" + ("" if file == model else f" (in the file: {file})")


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
    def misfits(self) -> dict[str, list[Misfit]]:
        """All that is in the way, by headings."""
        return {
            "missing in the file": self.missing,
            "unexpected in the file": self.unexpected,
            "of another shape": self.shapes,
            "of another type": self.types,
        }


class WeightsError(RuntimeError):
    """A checkpoint that does not fit a model; the message names every tensor in the way.

    Attributes:
        missing: what the model has and the file does not.
        unexpected: what the file has and the model does not.
        shapes: tensors of another shape.
        types: tensors of another dtype, and what is no tensor in the file.
    """

    def __init__(self, headline: str, found: Comparison) -> None:
        self._arguments = (headline, found)
        misfits = found.misfits
        self.missing, self.unexpected, self.shapes, self.types = map(tuple, misfits.values())
        lines = [headline]
        if not found.pairs:
            lines.append("  no tensor of the file can be loaded into the model")
        for title, some in misfits.items():
            if some:
                lines += [f"  {title} ({len(some)}):", *(f"    {one}" for one in some)]
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
    theirs, ours = _norms(file, model, values), _norms(model, file, own)
    renamed = {norm: ours[place] for place, norm in theirs.items() if place in ours}
    norms = {*renamed, *renamed.values()}
    result = Comparison(renamed=renamed)
    old = not any(name.rpartition(".")[2] == COUNTER for name in file.own)
    for common in (*model.own, *(name for name in file.own if name not in model.own)):
        mine, norm = model.own.get(common), common.rpartition(".")[0]
        pair = Misfit(file.spelled(common), model.spelled(common), "", "")
        left_out = norm not in norms and ignored(pair.model_name, pair.file_name)
        if common in file.own and mine is not None:
            _compare_pair(result, pair, values, own, ignored, cast)
        elif mine is None:
            found = shape(values[pair.file_name])
            if left_out:
                result.ignored.append(f"{pair.file_name} {found}, not in the model")
            else:
                result.unexpected.append(replace(pair, found=found))
        elif old and mine.rpartition(".")[2] == COUNTER:
            result.kept_counters.append(mine)
        elif left_out:
            result.ignored.append(f"{mine} {shape(own[mine])}, missing in the file")
        else:
            result.missing.append(replace(pair, expected=shape(own[mine])))
    return result


def _norms(side: Names, other: Names, tensors: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The norms of a DenseNet that the other side lacks, by what they are part of and channels."""
    found: dict[tuple[str, str], str] = {}
    for name, own in side.own.items():
        norm, _, tensor = name.rpartition(".")
        part = norm.rpartition(".")[0]
        if name not in other.own and tensor == "running_mean" and "features" in part.split("."):
            found[part, shape(tensors[own])] = norm
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
    problems, shown, lossy = result.types, _type, False
    if isinstance(value, Tensor) and isinstance(mine, Tensor):
        fits = _type(value) == _type(mine)
        if value.shape != mine.shape:
            problems, shown, fits = result.shapes, shape, False
        elif not fits and _plain(value) and _plain(mine):
            fits, lossy = _conversion(value.dtype, mine.dtype)
            if lossy and cast:
                fits = bool((value.to(mine.dtype).isfinite() | ~value.isfinite()).all())
        if fits and value.dtype != mine.dtype:
            result.converted.append(Conversion(pair.model_name, value.dtype, mine.dtype))
    else:
        fits = type(value) is type(mine)  # extra states, which the module itself reads
    if fits:
        result.pairs[pair.model_name] = pair.file_name
        return
    found, expected = shown(value), shown(mine)
    if lossy:
        result.castable |= not cast
        found += " with values beyond its range" if cast else ""
    if ignored(pair.model_name, pair.file_name):
        result.ignored.append(f"{pair.model_name} {expected}, {found} in the file")
    else:
        problems.append(replace(pair, found=found, expected=expected))


def _conversion(found: torch.dtype, wanted: torch.dtype) -> tuple[bool, bool]:
    """Whether every value has its like in the other type; if not, whether it has one nearby."""
    if found.is_floating_point and wanted.is_floating_point:
        a, b = torch.finfo(found), torch.finfo(wanted)
        kept = b.eps <= a.eps and b.max >= a.max and b.smallest_normal <= a.smallest_normal
        return kept, not kept
    if any(one.is_floating_point or one.is_complex or one is torch.bool for one in (found, wanted)):
        return False, False
    narrow, wide = torch.iinfo(found), torch.iinfo(wanted)
    return wide.min <= narrow.min and wide.max >= narrow.max, False


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def shape(value: Any) -> str:
    """Words for a tensor's shape, or for what is no tensor."""
    return str(list(value.shape)) if isinstance(value, Tensor) else _no_tensor(value)


def _type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _no_tensor(value)
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return f"{kind} without values (meta device)"
    return kind if value.layout == torch.strided else f"{kind} of layout {value.layout}"


def _no_tensor(value: Any) -> str:
    return f"({type(value).__name__}, not a tensor)"
