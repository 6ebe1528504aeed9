"""weights=: torchvision's enums and torch.hub's download, with files that are made here."""

from __future__ import annotations

import hashlib
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from torch import nn
from weight_files import first_files, saved

import densenet_fast
from densenet_fast import densenet121, densenet161, densenet264
from densenet_fast.weights.load import WeightsError

models = pytest.importorskip("torchvision.models")
api = pytest.importorskip("torchvision.models._api")

CLASSES = [f"class {number}" for number in range(7)]


def enum_of(url: str, name: str = "DenseNet121_Weights") -> Any:
    """An enum as torchvision's, with one file at `url`."""
    entry = api.Weights(url=url, transforms=nn.Identity, meta={"categories": CLASSES})
    return api.WeightsEnum(name, {"IMAGENET1K_V1": entry, "DEFAULT": entry})


def hashed(path: Path) -> Path:
    """`path`, renamed as torch.hub's files are."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"densenet121-{digest[:8]}.pth"))


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(7)
    return models.densenet121(num_classes=len(CLASSES)).eval()


@pytest.fixture(scope="module")
def folder(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network's file as torchvision has it: old names, old format."""
    folder = tmp_path_factory.mktemp("weights")
    state = first_files(source.state_dict())
    hashed(saved(folder / "file.pth", state, _use_new_zipfile_serialization=False))
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    (path,) = folder.glob("densenet121-*.pth")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def offered(monkeypatch: pytest.MonkeyPatch, url: str) -> Any:
    """torchvision's enum of DenseNet-121 has its weights at `url`."""
    enum = enum_of(url)
    monkeypatch.setattr(models, "DenseNet121_Weights", enum)
    return enum


@pytest.fixture
def enum(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return offered(monkeypatch, file.as_uri())


def nothing_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(api, "load_state_dict_from_url", refuse)


@pytest.mark.parametrize("how", ["IMAGENET1K_V1", "DEFAULT", "full name", "enum"])
def test_weights_by_name_and_enum(
    how: str, enum: Any, source: nn.Module, file: Path, cache: Path, capfd: Any
) -> None:
    names = {"full name": "DenseNet121_Weights.IMAGENET1K_V1", "enum": enum.IMAGENET1K_V1}
    network = densenet121(weights=names.get(how, how), progress=how == "enum")
    assert network.classifier.out_features == len(CLASSES)
    assert (cache / file.name).read_bytes() == file.read_bytes()
    assert ("100%" in capfd.readouterr().err) == (how == "enum")
    found = network.state_dict()
    for key, value in source.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], value), key
    if how == "DEFAULT":
        images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        expected = source.double()(images)
        source.float()
        assert_close(network.double().eval()(images), expected, "output")


def test_over_http_once(
    folder: Path, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(folder) as (address, requests):
        offered(monkeypatch, f"{address}/{file.name}")
        first = densenet121(weights="DEFAULT", progress=False)
        again = densenet121(weights="DEFAULT", progress=False)
    assert requests == [f"/{file.name}"]
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert torch.equal(first.classifier.weight, again.classifier.weight)


class served:  # noqa: N801
    """A server of the files in a folder: its address and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        requests = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                requests.append(self.path)

            def log_error(self, *args: Any) -> None:
                pass

        handler = partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> tuple[str, list[str]]:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}", self.requests

    def __exit__(self, *args: Any) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_arguments_that_need_not_be_the_weights(enum: Any) -> None:
    network = densenet121(
        weights="DEFAULT", progress=False, num_classes=7, drop_rate=0.1, checkpoint="none"
    )
    assert network.checkpoint == "none"
    assert network.features.denseblock1.denselayer1.drop_rate == 0.1
    densenet121(weights=None, progress=False, num_classes=3)


ARGUMENTS: list[tuple[str, Any, str]] = [
    ("num_classes", 10, "need num_classes=7; for other classes, replace model.classifier"),
    ("in_channels", 1, "need in_channels=3"),
    ("small_inputs", True, "need small_inputs=False"),
    ("growth_rate", 12, "need growth_rate=32"),
    ("block_config", [6, 12, 24], "need block_config=(6, 12, 24, 16)"),
    ("num_init_features", 32, "need num_init_features=64"),
    ("bn_size", 2, "need bn_size=4"),
    ("compression", 1.0, "need compression=0.5"),
]


@pytest.mark.parametrize(("name", "value", "match"), ARGUMENTS, ids=[a[0] for a in ARGUMENTS])
def test_arguments_that_contradict_the_weights(
    name: str, value: Any, match: str, enum: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_downloaded(monkeypatch)
    expected = f"{name}={value!r} does not fit the weights"
    with pytest.raises(ValueError, match=f"{re.escape(expected)}.*{re.escape(match)}"):
        densenet121(weights="DEFAULT", **{name: value})


def test_other_bad_arguments_come_before_the_download(
    enum: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_downloaded(monkeypatch)
    with pytest.raises(TypeError, match="colour"):
        densenet121(weights="DEFAULT", colour="blue")
    with pytest.raises(ValueError, match="drop_rate must be between 0 and 1"):
        densenet121(weights="DEFAULT", drop_rate=2)
    with pytest.raises(TypeError, match="pretrained=True is torchvision's old argument"):
        densenet121(pretrained=True)
    with pytest.raises(TypeError, match="progress must be True or False, got 1"):
        densenet121(weights="DEFAULT", progress=1)


def test_names_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_downloaded(monkeypatch)
    for name in ("IMAGENET1K_V2", "DenseNet161_Weights.IMAGENET1K_V1", "", "default"):
        with pytest.raises(ValueError, match=f"no weights '{name}'.*'IMAGENET1K_V1', 'DEFAULT'"):
            densenet121(weights=name)
    other = models.DenseNet161_Weights.IMAGENET1K_V1
    with pytest.raises(TypeError, match=r"torchvision's DenseNet121_Weights, got DenseNet161_W"):
        densenet121(weights=other)
    for value in (True, 3, models.DenseNet121_Weights):
        with pytest.raises(TypeError, match="weights must be a name as 'DEFAULT'"):
            densenet121(weights=value)
    with pytest.raises(ValueError, match="densenet264 has no pretrained weights"):
        densenet264(weights="DEFAULT")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_torchvisions_own_weights_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real enums: their address, hash and arguments, up to the download."""
    asked: list[Any] = []

    def record(url: str, *args: Any, **kwargs: Any) -> Any:
        asked.append((url, kwargs))
        return models.get_model(name, weights=None).state_dict()

    monkeypatch.setattr(api, "load_state_dict_from_url", record)
    network = getattr(densenet_fast, name)(weights="IMAGENET1K_V1", progress=False)
    assert network.classifier.out_features == 1000
    ((url, options),) = asked
    assert url == models.get_model_weights(name).IMAGENET1K_V1.url
    assert options["check_hash"] is True
    assert options["progress"] is False
    assert options["weights_only"] is True


def test_torchvision_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'densenet_fast\[weights\]'"):
        densenet161(weights="DEFAULT")
    with pytest.raises(ValueError, match="densenet264 has no pretrained weights"):
        densenet264(weights="DEFAULT")  # type: ignore[arg-type]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens at, held for the time of the test."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_no_network(closed_port: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{closed_port}/densenet121-a639ec97.pth"
    offered(monkeypatch, url)
    with pytest.raises(RuntimeError) as caught:
        densenet121(weights="DEFAULT")
    place = cache / "densenet121-a639ec97.pth"
    assert f"put the file from {url} to {place}" in str(caught.value)
    assert "its SHA-256 begins with a639ec97" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert not place.exists()


def test_no_such_file_on_the_server(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(folder) as (address, _):
        offered(monkeypatch, f"{address}/none-12345678.pth")
        with pytest.raises(
            RuntimeError, match=r"could not be downloaded .*404.*none-12345678\.pth"
        ):
            densenet121(weights="DEFAULT", progress=False)
    assert not list(cache.iterdir())


def test_download_of_another_content(
    file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "densenet121-12345678.pth"
    other.write_bytes(file.read_bytes())
    offered(monkeypatch, other.as_uri())
    with pytest.raises(
        RuntimeError, match=r'was damaged and has not been kept.*"12345678"'
    ) as found:
        densenet121(weights="DEFAULT", progress=False)
    assert found.value.__cause__ is not None
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_file_in_the_cache(
    damage: str, enum: Any, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_downloaded(monkeypatch)
    cache.mkdir(parents=True)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[-100:]
    else:
        content[-100] ^= 1  # one bit of a weight, which torch.load would not notice
    place = cache / file.name
    place.write_bytes(content)
    expected = file.stem.partition("-")[2]
    with pytest.raises(RuntimeError, match=rf"expected {expected}\. Delete the file") as caught:
        densenet121(weights="DEFAULT")
    assert str(place) in str(caught.value)
    assert file.as_uri() in str(caught.value)
    assert place.read_bytes() == content


def test_damaged_file_without_a_hash(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered(monkeypatch, (tmp_path / "plain.pth").as_uri())
    cache.mkdir(parents=True)
    (cache / "plain.pth").write_bytes(b"no such format")
    with pytest.raises(RuntimeError, match=r"cached weights .*plain\.pth are damaged") as caught:
        densenet121(weights="DEFAULT")
    assert caught.value.__cause__ is not None


def test_file_of_another_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hashed(saved(tmp_path / "file.pth", nn.Linear(3, 4).state_dict()))
    offered(monkeypatch, path.as_uri())
    with pytest.raises(WeightsError, match="file: no DenseNet's names") as caught:
        densenet121(weights="DEFAULT", progress=False)
    assert str(cache / path.name) in str(caught.value)
