"""Files with Python objects: nothing is made of them, and the tensors are read."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import functools
import io
import pickle
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from library_networks import torchvision_network
from torch import nn
from weight_files import LIBRARIES, State, ours, refused, saved, trained

from densenet_fast import convert, load_weights
from densenet_fast.weights import inert_pickle

FORMATS = [True, False]  # zip archives, and files of before torch 1.6


class Mode(enum.Enum):
    FAST = "fast"


class Settings(dict[str, Any]):
    """As the dictionaries with attributes of configuration libraries."""


class Slotted:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.1


Point = collections.namedtuple("Point", "x y")

BESIDE: dict[str, Any] = {
    "number": np.float64(0.9),
    "flag": np.bool_(True),
    "array": np.arange(3.0),
    "array of objects": np.array(["a", None], dtype=object),
    "random states": (np.random.get_state(), np.random.RandomState(0)),  # noqa: NPY002
    "generator": np.random.default_rng(0),
    "dtypes": (np.dtype("f4"), np.float32, torch.float32),
    "paths": (Path("a"), PureWindowsPath("a")),
    "dates": (datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1)),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "collections": (collections.deque([1]), collections.Counter("aa"), Point(1, 2)),
    "uuid": uuid.uuid4(),
    "ranges": (slice(1, 2), range(3), frozenset({1})),
    "decimal": decimal.Decimal(1),
    "namespaces": (argparse.Namespace(a=1), types.SimpleNamespace(a=1)),
    "keys": {Mode.FAST: 1, Path("a"): 2},
    "settings": Settings(rate=0.1),
    "slots": Slotted(),
    "classes and functions": (nn.Linear, nn.functional.relu, print, type(None), ...),
    "partial": functools.partial(nn.ReLU, inplace=True),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
}


def assert_loaded(path: Path, expected: State, **kwargs: Any) -> Any:
    model = trained(ours, seed=1)
    report = load_weights(model, path, **kwargs)
    for value, theirs in zip(model.state_dict().values(), expected.values(), strict=True):
        assert torch.equal(value, theirs)
    return report


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("kind", BESIDE)
def test_objects_beside_the_weights(kind: str, zipped: bool, protocol: int, tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    content = {"first": BESIDE[kind], "state_dict": state, "nested": [{"last": BESIDE[kind]}]}
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    path = saved(tmp_path / "file.pth", content, **options)
    assert assert_loaded(path, state).entry == "state_dict"


@pytest.mark.parametrize("name", [b"numpy.core", b"numpy._core"])
def test_names_of_both_numpys(name: bytes, tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    content = {"best": np.float64(0.9), "state": np.arange(3), "model": state}
    path = saved(tmp_path / "file.pth", content, _use_new_zipfile_serialization=False)
    written = path.read_bytes().replace(b"numpy._core", name).replace(b"numpy.core", name)
    assert name + b".multiarray\nscalar" in written
    path.write_bytes(written)
    assert_loaded(path, state)


@pytest.mark.parametrize("make", [Settings, functools.partial(collections.defaultdict, list)])
def test_weights_in_other_mappings(make: Callable[[State], Any], tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    assert assert_loaded(saved(tmp_path / "1.pth", make(state)), state).entry is None
    path = saved(tmp_path / "2.pth", make({"model": make(state), "epoch": 1}))
    assert assert_loaded(path, state).entry == "model"


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_pickled_networks(library: str, zipped: bool, tmp_path: Path) -> None:
    network = trained(LIBRARIES[library])
    state = network.state_dict()
    networks = {"as it is": network, "parallel": nn.DataParallel(network)}
    for at, (kind, wrapped) in enumerate(networks.items()):
        for entry, content in ((None, wrapped), ("net", {"net": wrapped, "epoch": 1})):
            path = tmp_path / f"{at}.pth"
            saved(path, content, _use_new_zipfile_serialization=zipped)
            report = assert_loaded(path, state)
            assert (report.entry, report.prefix) == (entry, "module." * (kind == "parallel"))
    if library != "densenet_fast":
        convert(network)
        assert_loaded(saved(tmp_path / "converted.pth", network), state)


def test_pickled_networks_of_old_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch 1.4 and older pickled, and without what came later."""
    backend = types.ModuleType("torch.nn.backends.thnn")
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    code = "class Backend:\n def __reduce__(self): return (_get_thnn_function_backend, ())\n"
    exec(f"{code}def _get_thnn_function_backend(): return Backend()", vars(backend))
    network = trained(torchvision_network)
    for module in network.modules():
        del module._non_persistent_buffers_set
        module._backend = backend.Backend()
    path = saved(tmp_path / "file.pth", network, _use_new_zipfile_serialization=False)
    monkeypatch.setitem(sys.modules, backend.__name__, None)
    assert_loaded(path, trained(ours).state_dict())


def test_buffers_that_no_state_dict_has(tmp_path: Path) -> None:
    network = trained(ours)
    state = dict(network.state_dict())
    network.register_buffer("mask", torch.ones(3, 3), persistent=False)
    network.register_buffer("empty", None)
    assert_loaded(saved(tmp_path / "file.pth", network), state)


def test_classes_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = types.ModuleType("library")
    monkeypatch.setitem(sys.modules, "library", library)
    library.Network = type("Network", (type(ours()),), {"__module__": "library"})
    network = trained(ours)
    state = network.state_dict()
    network.__class__ = library.Network
    path = saved(tmp_path / "file.pth", network)
    monkeypatch.delitem(sys.modules, "library")
    assert_loaded(path, state)


class Touch:
    """Makes a file wherever code of it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, state: Path) -> None:
        state.touch()


class Reduced:
    """Pickled as a call."""

    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


@pytest.mark.parametrize("zipped", FORMATS)
def test_nothing_of_a_file_runs(zipped: bool, tmp_path: Path) -> None:
    trace, state = tmp_path / "trace", trained(ours).state_dict()
    called, made = Reduced(Touch, (trace,)), Touch(trace)
    trace.unlink()
    for beside in (called, made, {called: 1}):
        path = tmp_path / "file.pth"
        content = {"state_dict": state, "more": beside}
        saved(path, content, _use_new_zipfile_serialization=zipped)
        assert_loaded(path, state)
        assert not trace.exists()
        torch.load(path, weights_only=False)
        assert trace.exists()  # it would have
        trace.unlink()


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Reduced(open, ("trace", "w")), r"_?io\.open"),
        (Reduced(eval, ("open('trace', 'w')",)), r"builtins\.eval"),
        (Reduced(getattr, (Path("trace"), "touch")), r"builtins\.getattr"),
        (Reduced(exec, ("",)), r"builtins\.exec"),
    ],
)
def test_files_that_call_functions(
    call: Any, name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": ours().state_dict(), "more": call}
    path = saved(tmp_path / "file.pth", content, _use_new_zipfile_serialization=zipped)
    refused(path, ValueError, rf"Python objects \({name}\) beside tensors.*weights_only=False")
    assert not Path("trace").exists()


def test_weights_that_are_objects(tmp_path: Path) -> None:
    """A tensor that only code of the file could make is none."""
    state = {**trained(ours).state_dict(), "classifier.bias": Reduced(Settings, ())}
    path = saved(tmp_path / "file.pth", state)
    refused(path, RuntimeError, r"classifier\.bias: \(Settings, not a tensor\) in the file")
    refused(saved(path, Slotted()), ValueError, "holds a Slotted, expected a state dict")
    refused(saved(path, {"a": Slotted()}), ValueError, r"no state dict; it has 'a' \(a Slotted\)")


def test_networks_that_are_their_own_part(tmp_path: Path) -> None:
    network = ours()
    network.features.add_module("again", network)
    refused(saved(tmp_path / "file.pth", network), ValueError, r"file\.pth holds Python objects")


def test_torch_is_told_to_refuse_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    state = trained(ours).state_dict()
    assert_loaded(saved(tmp_path / "1.pth", state), state)
    path = saved(tmp_path / "2.pth", {"model": state, "path": Path("a")})
    refused(path, ValueError, r"Python objects \(pathlib\.\S*PosixPath\)")


STATE = b"}X\x01\x00\x00\x00aK\x01s"  # {"a": 1}


@pytest.mark.parametrize(
    "pickled",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n" + STATE + b"b.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(N" + STATE + b"tb.",
        b"ctorch\nTensor\n(N" + STATE + b"tb.",
        b"cany\nClass\n" + STATE + b"b.",
        b"cany\nClass\n(N" + STATE + b"tb.",
    ],
)
def test_states_of_classes_and_functions(pickled: bytes) -> None:
    """The process may share them."""
    with pytest.raises(pickle.UnpicklingError, match="gives a state to a"):
        inert_pickle.load(io.BytesIO(b"\x80\x02" + pickled))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "a")
    assert not hasattr(torch.Tensor, "a")


def test_extension_codes() -> None:
    copyreg.add_extension("builtins", "eval", 200)
    try:
        with pytest.raises(KeyError):
            inert_pickle.load(io.BytesIO(b"\x80\x02\x82\xc8."))
    finally:
        copyreg.remove_extension("builtins", "eval", 200)
