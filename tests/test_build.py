"""The build and what it installs: loading, shadowing, build information, ABI, instruction sets."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import Done, forking

import densenet_fast
from densenet_fast.build_info import build_info
from densenet_fast.operators import extension
from densenet_fast.operators.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[1]
STRICT = "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
SHOW = (
    "import densenet_fast, densenet_fast._C as c; print(densenet_fast.__file__); print(c.__file__)"
)
MAIN = "import runpy; runpy.run_module('densenet_fast', run_name='__main__')"


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


Fresh = Callable[..., Done]


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """Runs code in a process that has PyTorch, but nothing of the package: `paths` come first."""
    with forking("import torch") as forks:

        def run(code: str, *paths: Path, **environment: str) -> Done:
            names = [str(path) for path in paths]
            return forks(
                f"import os\nos.environ.update({environment!r})\nsys.path[:0] = {names!r}\n{code}"
            )

        yield run


def module_file() -> Path:
    assert extension.C is not None, extension.LOAD_ERROR
    return Path(str(extension.C.__file__))


# ---- loading ----------------------------------------------------------------------------------


def test_extension_is_loaded_and_current():
    assert extension.LOADED, extension.LOAD_ERROR
    assert extension.LOAD_ERROR is None
    assert extension.CURRENT is not False, "csrc/ changed since the last `pip install .`"
    assert torch.ops.densenet_fast.channel_statistics is not None


@pytest.fixture
def source_and_installed(tmp_path: Path) -> tuple[Path, Path]:
    """A repository without compiled modules and a folder holding the package as pip installs it."""
    if extension.CURRENT is False:
        pytest.skip("the compiled module is older than csrc/, which has a test of its own")
    source, site = tmp_path / "repository", tmp_path / "site"
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "densenet_fast", source / "densenet_fast", ignore=no_binaries)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(ROOT / "densenet_fast", site / "densenet_fast", ignore=no_binaries)
    shutil.copy(module_file(), site / "densenet_fast")
    return source, site


def test_source_folder_borrows_the_installed_module(
    fresh: Fresh, source_and_installed: tuple[Path, Path]
):
    source, site = source_and_installed
    result = fresh(STRICT + SHOW, source, site)
    assert result.status == 0, result.errors
    package, module = map(Path, result.printed.split())
    assert package.is_relative_to(source)
    assert module.is_relative_to(site)


def test_other_sources_than_the_compiled_ones_warn(
    fresh: Fresh, source_and_installed: tuple[Path, Path]
):
    source, site = source_and_installed
    with (source / "csrc" / "ops.cpp").open("a") as file:
        file.write("// edited after the installation\n")
    result = fresh(MAIN, source, site)
    assert result.status == 0, result.errors
    assert "compiled from other sources" in result.errors
    assert re.search(r"extension_is_current:\s+False", result.printed)


def test_installed_package_works_elsewhere(fresh: Fresh, source_and_installed: tuple[Path, Path]):
    _, site = source_and_installed
    result = fresh(STRICT + SHOW, site)
    assert result.status == 0, result.errors
    assert all(Path(line).is_relative_to(site) for line in result.printed.split())


def test_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extension.PathFinder, "find_spec", lambda *_: None)
    module, reason = extension._load("_C")
    assert module is None
    assert reason is not None
    assert "pip install ." in reason


def test_broken_module_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
    broken.write_bytes(b"not a shared library")
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
    module, reason = extension._load("_C")
    assert module is None
    assert reason is not None
    assert str(broken) in reason


def test_fingerprint_sees_every_cpp_file(tmp_path: Path):
    assert fingerprint(tmp_path) is None
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = fingerprint(tmp_path)
    assert before == fingerprint(ROOT)
    (tmp_path / "csrc" / "cpu" / "new.h").write_text("#pragma once\n")
    assert fingerprint(tmp_path) != before


# ---- build information ------------------------------------------------------------------------


def test_build_info():
    info = build_info()
    assert info["version"] == densenet_fast.__version__
    assert info["torch"] == torch.__version__
    assert Path(info["extension"]).samefile(module_file())
    assert info["built_with_torch"]
    assert info["compiler"]
    assert "baseline" in info["cpu_isa_compiled"]
    assert info["cpu_isa"] in info["cpu_isa_usable"]
    assert set(info["cpu_isa_usable"]) <= set(info["cpu_isa_compiled"])
    assert info["cpu_threads"] == torch.get_num_threads()
    assert info["cuda"] or info["cuda_reason"]
    assert all(re.search(rf"^{key}:\s+\S", str(info), re.MULTILINE) for key in info)


def test_build_info_without_the_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extension, "C", None)
    monkeypatch.setattr(extension, "LOAD_ERROR", "no module here")
    info = build_info()
    assert info["extension"] is None
    assert info["cpu_isa"] is None
    assert "no module here" in str(info)


# ---- instruction sets -------------------------------------------------------------------------


@pytest.mark.parametrize("isa", build_info()["cpu_isa_usable"])
def test_instruction_set_can_be_forced(fresh: Fresh, isa: str):
    code = "import densenet_fast; print(densenet_fast.build_info()['cpu_isa'])"
    result = fresh(code, DENSENET_FAST_ISA=isa)
    assert result.status == 0, result.errors
    assert result.printed.strip() == isa


def test_unknown_instruction_set_is_an_error(fresh: Fresh):
    result = fresh(MAIN, DENSENET_FAST_ISA="mmx")
    assert result.status != 0
    last = result.errors.strip().splitlines()[-1]
    assert "mmx" in last
    assert all(isa in last for isa in build_info()["cpu_isa_usable"])


# ---- what is shipped --------------------------------------------------------------------------


def test_source_distribution(tmp_path: Path):
    """A wheel can be built from it: every file of csrc/, headers and includes too."""
    pytest.importorskip("setuptools", minversion="77")  # older ones do not know the license field
    root = tmp_path / "repository"
    no_outputs = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "*.egg-info")
    shutil.copytree(ROOT, root, ignore=no_outputs)
    # MANIFEST.in and pyproject.toml alone: setup.py would need the build requirements.
    code = "import setuptools; setuptools.setup()"
    result = run_python("-c", code, "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=root)
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        shipped = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {f.relative_to(root).as_posix() for f in (root / "csrc").rglob("*") if f.is_file()}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"}
    wanted |= {
        "densenet_fast/py.typed",
        "densenet_fast/operators/fingerprint.py",
        "benchmarks/cli.py",
    }
    assert {Path(f).suffix for f in wanted} >= {".cpp", ".h", ".inc"}
    assert wanted <= shipped, sorted(wanted - shipped)
    assert not [name for name in shipped if name.endswith((".so", ".pyc"))]


def test_typed_marker():
    assert (Path(densenet_fast.__file__).parent / "py.typed").is_file()


def test_installed_files(tmp_path: Path):
    code = (
        "import importlib.metadata as m\n"
        "dist = m.distribution('densenet_fast')\n"
        "print(dist.read_text('direct_url.json') or '')\n"
        "print(*dist.files, sep='\\n')"
    )
    result = run_python("-c", code, cwd=tmp_path)
    if result.returncode != 0 or '"editable": true' in result.stdout:
        pytest.skip("needs `pip install .`")
    files = result.stdout.splitlines()[1:]
    assert any(re.fullmatch(r"densenet_fast/_C\..*so", file) for file in files)
    assert "densenet_fast/py.typed" in files
    commands = [file for file in files if file.startswith("..")]
    assert [Path(file).name for file in commands] == ["densenet-fast"]
    folders = {file.split("/")[0] for file in files if file not in commands}
    assert all(f == "densenet_fast" or f.endswith(".dist-info") for f in folders), folders


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_only_the_stable_abi_of_torch_is_used():
    """C++ symbols of libtorch change from release to release; its C shims are kept."""
    symbols = subprocess.run(
        ["nm", *(["-D"] if sys.platform == "linux" else []), "-u", str(module_file())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert any(symbol.lstrip("_").startswith("aoti_torch_") for symbol in symbols)
    unstable = [s for s in symbols if re.match(r"_+Z.*?(3c10|2at|5torch|6caffe2)\d", s)]
    assert not unstable
