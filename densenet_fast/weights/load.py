"""Weights from checkpoint files of any library's DenseNet into a model of any library."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from densenet_fast import arguments
from densenet_fast.weights import by_order, checkpoint_files, key_layouts
from densenet_fast.weights.comparison import Comparison, Conversion, WeightsError, compare

__all__ = ["WeightsError", "WeightsReport", "load_into", "load_weights"]

Match = Literal["name", "order"]
MATCHES = get_args(Match)

# No weights, and not in every model: torchxrayvision's thresholds of its outputs.
_OPTIONAL = ("op_threshs", "*.op_threshs")


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did; `str()` gives lines to print.

    Attributes:
        source: the file, or what else the weights came from.
        entry: where in the file they were, None if they are all of it.
        layout: whose names the file uses: "torchvision" (also timm, torchxrayvision and this
            package), "torchvision's first files", "MONAI", "efficient_densenet_pytorch",
            "pretrainedmodels", "CheXNet" or "unknown".
        model_layout: whose names the model uses.
        prefix: what stood before these names in the file.
        loaded: the model's own names of all tensors that were loaded.
        matched: with `match="order"`, the file's name and the model's of each of them.
        converted: those of another dtype in the file.
        kept_counters: `num_batches_tracked` of the model, which files of before 2018 do not have.
        ignored: what `ignore` left out: missing in the file, unexpected or not fitting. Also
            torchxrayvision's `op_threshs`, without being named.
        outside: keys of the file that do not begin with the given `prefix`.
    """

    source: str
    entry: str | None
    layout: str
    model_layout: str
    prefix: str
    loaded: tuple[str, ...]
    matched: tuple[tuple[str, str], ...]
    converted: tuple[Conversion, ...]
    kept_counters: tuple[str, ...]
    ignored: tuple[str, ...]
    outside: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loaded)

    def __str__(self) -> str:
        where = "" if self.entry is None else f", entry {self.entry!r}"
        lines = [
            f"{len(self.loaded)} tensors loaded from {self.source}{where}",
            f"layout: {self.layout}, model: {self.model_layout}",
        ]
        if self.prefix:
            lines.append(f"prefix: {self.prefix}")
        pairs = Counter((change.found, change.expected) for change in self.converted)
        lines += [f"converted: {n} from {found} to {to}" for (found, to), n in pairs.items()]
        if self.kept_counters:
            lines.append(f"not in the file, kept: {len(self.kept_counters)} num_batches_tracked")
        lines += [f"ignored: {text}" for text in self.ignored]
        if self.outside:
            lines.append(f"outside the prefix: {', '.join(self.outside)}")
        lines += [f"matched: {theirs} -> {ours}" for theirs, ours in self.matched]
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    ignore: str | Sequence[str] = (),
    prefix: str | None = None,
    entry: str | None = None,
    rename: Mapping[str, str] | None = None,
    match: Match = "name",
    cast: bool = False,
) -> WeightsReport:
    """Load a checkpoint file of any DenseNet into `model`, all of it or nothing.

    The file may come from torchvision, timm, MONAI, torchxrayvision, efficient_densenet_pytorch,
    pretrainedmodels, CheXNet or this package, or with `rename` or `match` from anywhere, through
    `torch.save` or safetensors, bare or as an entry of a training script's checkpoint, saved from a
    network as it is, compiled, under DistributedDataParallel or in a LightningModule, as a state
    dict or as the whole network. The model may be any such network too, whichever library its names
    are of. No code from the file is run, and nothing is made of what it holds beside tensors. The
    model's tensors keep their device and dtype.

    Args:
        model: what is loaded into. Also a network with a DenseNet in it, as a U-Net's encoder.
        path: the file.
        ignore: a pattern or several (as `classifier.*`) of names that may be missing in the file,
            unexpected in it or of another shape; the model's tensors of these names stay as they
            are unless the file's fit. Matched against the model's own names and the file's. A
            DenseNet's norm that the file has under another name is not left out.
        prefix: reads the keys that begin with this alone, without it. For files with several
            networks; usual prefixes are found without it.
        entry: the state dict to take, for files with several (`"model_ema"`).
        rename: parts of the file's names, between dots, and what they are called in the model, as
            `{"fc": "classifier"}`; "" leaves them out.
        match: "order" takes the tensors of file and model in pairs as they come, whatever they are
            called, all of the same shapes and kinds (`weight`, `running_mean`), `ignore` aside.
            It cannot see in which order a network's layers read the features: compare outputs.
        cast: permits conversions that lose precision, as from float32 to bfloat16. Those that do
            not, as from float16 to float32, need no permission and are reported.

    Returns:
        What was found and done (`WeightsReport`).

    Raises:
        WeightsError: the file does not fit: every tensor that is missing, unexpected, or of
            another shape or type, by its name in the file and in the model; or nothing of the file
            is left to load. A RuntimeError.
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, needs code, is empty, or holds several
            state dicts; a pattern of `ignore` or a part of `rename` matches nothing; no key begins
            with `prefix`; tensors of the model have no values yet (meta device, lazy modules).
        ImportError: the file needs safetensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights expects a module, got {type(model).__name__}")
    patterns = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"ignore must be a pattern or a sequence of patterns, got {ignore!r}")
    cast = arguments.flag("cast", cast)
    match = arguments.one_of("match", match, MATCHES)
    if rename is not None and not (
        isinstance(rename, Mapping)
        and all(isinstance(part, str) and part for part in rename)
        and all(isinstance(part, str) for part in rename.values())
    ):
        raise TypeError(f"rename must be a dict from parts of names to others, got {rename!r}")
    for name, value in (("prefix", prefix), ("entry", entry)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string or None, got {value!r}")
    state = checkpoint_files.read(path, entry)
    return load_into(
        model, state, ignore=patterns, prefix=prefix, rename=rename, match=match, cast=cast
    )


def load_into(
    model: nn.Module,
    state: checkpoint_files.StateDict,
    *,
    ignore: Sequence[str] = (),
    prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
    match: Match = "name",
    cast: bool = False,
) -> WeightsReport:
    """`load_weights` of a state dict that was read already."""
    start = f"{prefix.removesuffix('.')}." if prefix else ""
    values = {k.removeprefix(start): v for k, v in state.values.items() if k.startswith(start)}
    if start and not values:
        known = ", ".join(map(repr, key_layouts.roots(state.values))) or "none"
        raise ValueError(
            f"no key of {state.path} begins with prefix={start!r}; DenseNets are under {known}"
        )
    own: dict[str, Any] = model.state_dict()
    _check_values(model, own)

    def ignored(*names: str) -> bool:
        patterns = (*ignore, *_OPTIONAL)
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    misfit = None
    try:
        if rename:
            renamed = key_layouts.renamed(values, rename)
            values = {name: values[key] for name, key in renamed.items()}
        if match == "order":
            file_names, model_names, misfit = by_order.names(values, own, ignored)
        else:
            file_names, model_names = key_layouts.names(list(values), list(own))
    except ValueError as error:
        raise ValueError(f"{state.path}: {error}") from None
    _check_patterns(ignore, file_names, model_names)
    if misfit is not None:  # all others behind it are misfits too
        raise WeightsError(
            f"{state.path} does not fit {type(model).__name__}, which is unchanged: the first "
            f"{len(file_names.own)} tensors do in this order, then",
            Comparison(pairs=file_names.own, shapes=[misfit]),
        )
    found = compare(file_names, values, model_names, own, ignored, cast)
    if not found.pairs or any(found.misfits.values()):
        lines = [
            f"{state.path} does not fit {type(model).__name__}, which is unchanged",
            f"  file: {_kind(file_names, state.entry)}; model: {_kind(model_names, None)}",
        ]
        several = key_layouts.roots(values)
        if len(several) > 1 and len(key_layouts.roots(own)) < 2:
            where = ", ".join(map(repr, several))
            lines.append(f"  the file holds several networks: prefix= must be one of {where}")
        raise WeightsError("\n".join(lines), found)
    # What is not loaded is "loaded" from the model itself, so that torch checks every key again.
    own.update({ours: values[theirs] for ours, theirs in found.pairs.items()})
    with _unchanged_after_errors(model, own):
        model.load_state_dict(own)
    return WeightsReport(
        source=state.path,
        entry=state.entry,
        layout=file_names.layout.name,
        model_layout=model_names.layout.name,
        prefix=start + file_names.prefix,
        loaded=tuple(found.pairs),
        matched=tuple((theirs, ours) for ours, theirs in found.pairs.items() if match == "order"),
        converted=tuple(found.converted),
        kept_counters=tuple(found.kept_counters),
        ignored=tuple(found.ignored),
        outside=tuple(key for key in state.values if not key.startswith(start)),
    )


def _check_patterns(
    patterns: Sequence[str], file: key_layouts.Names, model: key_layouts.Names
) -> None:
    """A pattern without any effect is a mistake in it."""
    every = [names.spelled(one) for names in (file, model) for one in (*file.own, *model.own)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            examples = ", ".join([*model.own.values()][-2:]) or "none"
            raise ValueError(
                f"ignore: {pattern!r} matches no tensor of the model or the file "
                f"(the model's last names are {examples})"
            )


def _check_values(model: nn.Module, own: Mapping[str, Any]) -> None:
    empty = [
        name
        for name, value in own.items()
        if nn.parameter.is_lazy(value) or getattr(value, "is_meta", False)
    ]
    if empty:
        raise ValueError(
            f"{len(empty)} tensors of {type(model).__name__} have no values to load into "
            f"({empty[0]}, ...): a model on the meta device needs model.to_empty(device=...) "
            "first, a lazy one its first input"
        )


def _kind(names: key_layouts.Names, entry: str | None) -> str:
    known = names.layout is not key_layouts.OTHER
    kind = f"{names.layout.name} layout" if known else "no DenseNet's names"
    within = "" if entry is None else f" in entry {entry!r}"
    return kind + within + (f" under {names.prefix}" if names.prefix else "")


def _surely_loads(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether PyTorch finds every key, all it does is to copy values, and those fit."""
    for part in module.modules():
        theirs = type(part)._load_from_state_dict.__module__
        hooks = part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks
        if hooks or not theirs.startswith(("torch.nn.modules.", "densenet_fast.modules.")):
            return False
    own = module.state_dict()
    return (
        isinstance(state, Mapping)
        and state.keys() == own.keys()
        and all(_copies(value, own[key]) for key, value in state.items())
    )


def _copies(value: Any, to: Any) -> bool:
    """Whether one plain tensor with values can be copied to another one."""
    return (
        {type(value), type(to)} <= {Tensor, nn.Parameter}
        and value.shape == to.shape
        and value.layout == to.layout
        and not value.is_meta
        and (value.dtype == to.dtype or (value.is_floating_point() and to.is_floating_point()))
    )


@contextmanager
def _unchanged_after_errors(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Puts all parameters and buffers back if the `with` block, which loads `state`, raises.

    `nn.Module.load_state_dict` copies what fits before it complains about the rest: a network
    would be left with half of another one's parameters. Where all fits nothing is kept aside.
    """
    if _surely_loads(module, state):
        yield
        return
    held: list[Any] = [
        one for part in module.modules() for one in (part._parameters, part._buffers)
    ]
    registered: list[dict[str, Tensor | None]] = [{**one} for one in held]
    tensors = {id(t): t for one in registered for t in one.values() if t is not None}
    values = [
        (t, t.detach(), t.detach().clone()) for t in tensors.values() if not nn.parameter.is_lazy(t)
    ]
    try:
        yield
    except BaseException:
        # Loading with assign=True replaces the tensors, otherwise their values change.
        for one, before in zip(held, registered, strict=True):
            one.update(before)
        with torch.no_grad():
            for tensor, memory, value in values:
                if torch.__future__.get_swap_module_params_on_conversion():
                    tensor.data = memory  # not the given tensor's
                tensor.copy_(value)
        raise


class LoadedWhole(nn.Module):
    """A network into which a state dict is loaded as a whole or not at all."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`, but a state dict that does not fit changes nothing."""
        with _unchanged_after_errors(self, state_dict):
            return super().load_state_dict(state_dict, strict, assign)
