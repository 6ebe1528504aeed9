"""What each library calls the tensors of a DenseNet, and what stands before these names.

Names are compared in torchvision's layout, which this package, timm and torchxrayvision share:
`features.denseblock1.denselayer1.norm1.weight`, ..., `classifier.bias`. Every rule looks at one
name alone, so it also holds for DenseNets inside other networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_START = r"(?<![^.])"  # of a name between dots
_LAYER = _START + r"(denselayer\d+)\."

Rules = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True)
class Layout:
    """Names of one library: `common` translates them to torchvision's, `own` back."""

    name: str
    common: Rules = ()
    own: Rules = ()

    def to_common(self, name: str) -> str:
        """torchvision's name for this layout's `name`."""
        return _substituted(name, self.common)

    def to_own(self, name: str) -> str:
        """The layout's own name for torchvision's `name`."""
        return _substituted(name, self.own)


def _substituted(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _renaming(own: str, common: str) -> tuple[Rules, Rules]:
    """Rules from a layout's part of names to torchvision's, and back."""

    def rules(old: str, new: str) -> Rules:
        return ((re.compile(_START + re.escape(old) + r"\."), f"{new}."),)

    return rules(own, common), rules(common, own)


OTHER = Layout("unknown")
TORCHVISION = Layout("torchvision")
_CLASS_LAYERS = _renaming("class_layers.out", "classifier")
MONAI = Layout(
    "MONAI",
    ((re.compile(_LAYER + r"layers\.((?:norm|conv)[12]\.)"), r"\1.\2"), *_CLASS_LAYERS[0]),
    ((re.compile(_LAYER + r"((?:norm|conv)[12]\.)"), r"\1.layers.\2"), *_CLASS_LAYERS[1]),
)
FIRST_FILES = Layout(
    "torchvision's first files",
    ((re.compile(_LAYER + r"(norm|conv)\.([12]\.)"), r"\1.\2\3"),),
    ((re.compile(_LAYER + r"(norm|conv)([12]\.)"), r"\1.\2.\3"),),
)
EFFICIENT = Layout(
    "efficient_densenet_pytorch", *_renaming("features.norm_final", "features.norm5")
)
PRETRAINED_MODELS = Layout("pretrainedmodels", *_renaming("last_linear", "classifier"))
# Whose classifier is a linear layer and a sigmoid.
CHEXNET = Layout("CheXNet", *_renaming("classifier.0", "classifier"))
_OTHERS = (MONAI, FIRST_FILES, EFFICIENT, PRETRAINED_MODELS, CHEXNET)

_PART = r"(?:conv0|norm0|norm5|norm_final|denseblock\d+|transition\d+)\."
_DENSENET = re.compile(_START + r"(?:features\." + _PART + r"|denselayer\d+\.)")
_ROOT = re.compile(r"((?:[^.]+\.)*?)features\." + _PART)
_WRAPPED = re.compile(r"((module|model|net)\.)*")  # DistributedDataParallel, LightningModules
_ADVICE = {
    "file": "prefix= takes the keys under one prefix alone",
    "model": "load into the part of the model that the file is for",
}
_COMPILED = re.compile(_START + r"_orig_mod\.")  # torch.compile, of a network or of its parts


@dataclass(frozen=True)
class Names:
    """The keys of a file or of a model. `own` holds each of them by its common name."""

    layout: Layout
    prefix: str
    own: dict[str, str]

    def spelled(self, common: str) -> str:
        """What the tensor `common` is called here, or would be if it were here."""
        return self.own.get(common, self.prefix + self.layout.to_own(common))


def roots(keys: Iterable[str]) -> list[str]:
    """What stands before `features.` in each DenseNet among `keys`: "" or a name and a dot."""
    matches = (_ROOT.match(_COMPILED.sub("", key)) for key in keys)
    return list(dict.fromkeys(match[1] for match in matches if match))


def names(file: Sequence[str], model: Sequence[str]) -> tuple[Names, Names]:
    """The keys of a file and of the model that it is for, by names that can be compared.

    What wraps a network is taken away on both sides. If what is left before `features.` differs,
    as with a U-Net's `encoder.` and a file of the encoder alone, it is taken away as well.

    Raises:
        ValueError: two keys of one side stand for the same tensor.
    """
    (outer, inner), (model_outer, model_inner) = _prefix(file), _prefix(model)
    if inner != model_inner:
        outer, model_outer = outer + inner, model_outer + model_inner
    return _names("file", file, outer), _names("model", model, model_outer)


def renamed(keys: Iterable[str], parts: Mapping[str, str]) -> dict[str, str]:
    """The keys by what they are called once `parts` of them, between dots, have other names.

    Raises:
        ValueError: a part is in no key, or two keys become one.
    """
    found = {key: key for key in keys}
    for old, new in parts.items():
        pattern = re.compile(_START + re.escape(old) + r"(\.|$)")
        replacement = new.replace("\\", r"\\") + r"\1" if new else ""
        before, found = found, {}
        for name, key in before.items():
            changed = pattern.sub(replacement, name)
            if changed in found:
                raise ValueError(f"rename: {found[changed]} and {key} both become {changed!r}")
            found[changed] = key
        if found == before:
            first = ", ".join(list(before)[:3])
            raise ValueError(f"rename: no key has the part {old!r}; the first ones are {first}")
    return found


def _prefix(keys: Sequence[str]) -> tuple[str, str]:
    """The wrappers before the only DenseNet, and the rest of what stands before it.

    With no or several DenseNets: the wrappers before all keys.
    """
    found = roots(keys)
    if len(found) == 1:
        wrappers = _wrappers(found)
        return wrappers, found[0][len(wrappers) :]
    return _wrappers([_COMPILED.sub("", key) for key in keys]), ""


def _wrappers(keys: Sequence[str]) -> str:
    match = _WRAPPED.match(keys[0]) if keys else None
    prefix = match[0] if match else ""
    while not all(key.startswith(prefix) for key in keys):
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    return prefix


def _names(side: str, keys: Sequence[str], prefix: str) -> Names:
    inner = {key: _COMPILED.sub("", key).removeprefix(prefix) for key in keys}
    own: dict[str, str] = {}
    used = set()
    for key, common in inner.items():
        for layout in _OTHERS:
            name, common = common, layout.to_common(common)
            used |= {layout} if name != common else set()
        if common in own:
            raise ValueError(
                f"{own[common]} and {key} of the {side} both stand for {common}; {_ADVICE[side]}"
            )
        own[common] = key
    usual = TORCHVISION if any(map(_DENSENET.search, inner.values())) else OTHER
    found = next((layout for layout in _OTHERS if layout in used), usual)
    return Names(found, _written(inner, prefix), own)


def _written(inner: Mapping[str, str], prefix: str) -> str:
    """The prefix as it stands in the keys, with torch.compile's part of it."""
    for key, name in inner.items():
        before = key.removesuffix(name)
        if _COMPILED.sub("", before) == prefix and before + name == key:
            return before
    return prefix
