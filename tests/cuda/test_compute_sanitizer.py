"""The script around compute-sanitizer, with a program that only says what it was given."""

from __future__ import annotations

from pathlib import Path

import compute_sanitizer
import pytest

from densenet_fast.operators import cuda_device


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer on PATH that notes its arguments; racecheck finds something."""
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    program.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $PWD $*" >> {log}\n'
        'case "$*" in *racecheck*) exit 86;; *synccheck*) exit 1;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_device, "obstacle", lambda: None)
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    return log


def test_all_tools(sanitizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compute_sanitizer.main([]) == 1
    lines = sanitizer.read_text().splitlines()
    root = str(compute_sanitizer.REPOSITORY)
    assert [line.split(" ", 2)[:2] for line in lines] == [
        ["1", root],
        ["", root],
        ["1", root],
        ["", root],
    ]
    for line, tool in zip(lines, compute_sanitizer.TOOLS, strict=True):
        assert f"--tool {tool} --error-exitcode 86" in line
        assert f"-m pytest -o addopts= -m cuda -q {compute_sanitizer.TESTS} -k conv1x1 or " in line
        assert ("kernel_substring=densenet_fast" in line) == (tool != "initcheck")
    assert "racecheck has findings\nsynccheck: exit 1\n" in capfd.readouterr().out


def test_one_tool_and_arguments_of_pytest(sanitizer: Path) -> None:
    assert compute_sanitizer.main(["--tool", "memcheck", "--", "-x", "-k", "conv1x1"]) == 0
    (line,) = sanitizer.read_text().splitlines()
    assert line.endswith(f"{compute_sanitizer.TESTS} -x -k conv1x1")


def test_the_default_selection_has_tests() -> None:
    root = compute_sanitizer.REPOSITORY
    assert (root / compute_sanitizer.TESTS).is_file()
    text = (root / compute_sanitizer.TESTS).read_text()
    for word in compute_sanitizer.SELECTION[1].split(" or "):
        assert any(word in line for line in text.splitlines() if line.startswith("def test_")), word


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        compute_sanitizer.main(["--tool", "leakcheck"])
    monkeypatch.setattr(compute_sanitizer.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="part of the CUDA toolkit"):
        compute_sanitizer.main([])
    monkeypatch.setattr(compute_sanitizer.shutil, "which", lambda name: name)
    monkeypatch.setattr(cuda_device, "obstacle", lambda: "there is no GPU")
    with pytest.raises(SystemExit, match="cannot run here: there is no GPU"):
        compute_sanitizer.main([])
