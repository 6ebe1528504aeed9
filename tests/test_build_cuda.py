"""What the CUDA kernels are compiled for: environment, GPUs and toolkit decide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import setup_cuda
from densenet_fast.operators.cuda_device import covers
from setup_cuda import BadSettingError, CudaMissingError, Toolkit

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CODES = ("75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")
TOOLKIT = Toolkit(Path("/toolkit"), "13.0.88", tuple(f"sm_{code}" for code in CODES))
OLDER = Toolkit(
    Path("/toolkit"), "12.2.0", tuple(f"sm_{code}" for code in ("50", "70", *CODES[:7]))
)
# Compute capabilities of devices there are, and of one there is not yet.
DEVICES = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0"]


def chosen(toolkit: Toolkit = TOOLKIT, **environment: str) -> str:
    return " ".join(map(str, setup_cuda.choose({"PATH": "", **environment}, toolkit).architectures))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the PATH, with an nvidia-smi that prints what its file says."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ntest "$1" = --query-gpu=compute_cap && cat {tmp_path}/gpus\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "toolkit", "expected"),
    [
        ("9.0", TOOLKIT, "9.0"),
        ("8.6\n8.6\n7.5", TOOLKIT, "7.5 8.6"),
        ("6.1\n12.0", TOOLKIT, "12.0"),  # the older one has the reference implementation
        ("12.0", OLDER, "9.0+PTX"),
        ("8.9\n12.0", OLDER, "8.9 9.0+PTX"),
        ("[N/A]", TOOLKIT, "7.5 8.0+PTX 9.0 10.0 12.0"),
        ("", OLDER, "7.5 8.0+PTX 9.0"),
    ],
)
def test_gpus_decide(folder: Path, gpus: str, toolkit: Toolkit, expected: str) -> None:
    (folder / "gpus").write_text(gpus + "\n")
    path = f"{folder}:/usr/bin:/bin"
    assert chosen(toolkit, PATH=path) == expected
    assert chosen(toolkit, PATH=path, TORCH_CUDA_ARCH_LIST="8.0;9.0") == "8.0 9.0"


def test_gpus_that_no_kernel_runs_on(folder: Path) -> None:
    (folder / "gpus").write_text("6.1\n7.0\n")
    with pytest.raises(CudaMissingError, match=r"6\.1, 7\.0: the kernels need 7\.5"):
        chosen(OLDER, PATH=f"{folder}:/usr/bin:/bin")


def test_an_nvidia_smi_that_fails_sees_no_gpu(folder: Path) -> None:
    path = f"{folder}:/usr/bin:/bin"  # no file to print
    choice = setup_cuda.choose({"PATH": path}, TOOLKIT)
    assert choice.reason == "one of each generation, as nvidia-smi sees no GPU"


def test_environment_decides() -> None:
    every = "7.5 8.0+PTX 8.6 8.9 9.0 10.0 12.0"
    assert chosen(DENSENET_FAST_CUDA="all") == every
    assert chosen(DENSENET_FAST_CUDA="all", TORCH_CUDA_ARCH_LIST="9.0a 12.0+PTX") == "9.0a 12.0+PTX"
    for value in ("", "0", "1", "all"):
        assert setup_cuda.setting({"DENSENET_FAST_CUDA": value}) == value
    with pytest.raises(BadSettingError, match="0, 1, all or unset, got 'yes'"):
        setup_cuda.setting({"DENSENET_FAST_CUDA": "yes"})


@pytest.mark.parametrize("value", ["", "all"])
def test_what_is_compiled_without_a_gpu_runs_on_all(value: str) -> None:
    compiled = chosen(DENSENET_FAST_CUDA=value).split()
    for device in DEVICES:
        major, minor = map(int, device.split("."))
        assert any(covers(architecture, (major, minor)) for architecture in compiled), device


def test_ptx_is_made_once_for_all_that_the_sources_tell_apart() -> None:
    flags = setup_cuda.code_flags([setup_cuda.parse(a) for a in ("7.5", "8.0+PTX", "9.0a", "12.0")])
    assert [flag.removeprefix("-gencode=arch=compute_") for flag in flags] == [
        "75,code=sm_75",
        "80,code=sm_80",
        "80,code=compute_80",
        "90a,code=sm_90a",
        "80,code=sm_120",
    ]
    text = "".join(file.read_text() for file in sorted((CSRC / "cuda").glob("*.cu*")))
    compared = set(re.findall(r"(?:__CUDA_ARCH__|kArchitecture)\s*[<>]=?\s*(\d+)", text))
    assert compared
    assert compared <= {f"{10 * major + minor}0" for major, minor in setup_cuda.SOURCES_KNOW}
