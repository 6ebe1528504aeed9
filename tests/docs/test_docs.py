"""The documentation's code runs, its commands are such that programs take them, its links lead
somewhere; and the checks of that find what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("markdown_it")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from documentation import ROOT, SHELLS, Page, pages
from documented_commands import flag_problems, inline_problems, script_problems

PAGES = pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))


def checked(path: Path, problems: list[str]) -> None:
    assert not problems, "\n".join([f"{path.name}:", *problems])


# ---- the pages --------------------------------------------------------------------------------


@PAGES
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    page = Page(path)
    missing = page.missing_modules()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    assert (problem := page.run(tmp_path)) == "", problem


@PAGES
def test_commands(path: Path) -> None:
    blocks = [block for block in Page(path).blocks() if block.language in SHELLS]
    checked(path, [p for block in blocks for p in script_problems(block.text, block.line)])


@PAGES
def test_inline_code(path: Path) -> None:
    code = Page(path).inline_code()
    checked(path, [f"line {c.line}: {p}" for c in code for p in inline_problems(c.text)])


@PAGES
def test_no_block_is_unchecked(path: Path) -> None:
    page = Page(path)
    texts = [block for block in page.blocks() if block.language == "text"]
    flags = [f"line {block.line}: {p}" for block in texts for p in flag_problems(block.text)]
    checked(path, [*page.block_problems(), *flags])


@PAGES
def test_links(path: Path) -> None:
    checked(path, Page(path).link_problems())


def test_there_is_something_to_check() -> None:
    blocks = [block for path in pages() for block in Page(path).blocks()]
    languages = [block.language for block in blocks if block.reason is None]
    assert languages.count("python") >= 5
    assert languages.count("bash") >= 8
    assert sum(len(Page(path).links()) for path in pages()) >= 8


# ---- the checks -------------------------------------------------------------------------------


def make_page(folder: Path, text: str, name: str = "page.md") -> Page:
    (folder / name).write_text(text, encoding="utf-8")
    return Page(folder / name)


def test_blocks_share_names_and_failures_show_their_line(tmp_path: Path) -> None:
    first = "# A\n\n```python\nx = 1\n```\n\n- item\n\n  ```python\n  assert x == 1\n  ```\n"
    assert make_page(tmp_path, first).run(tmp_path) == ""
    broken = make_page(tmp_path, first + "\n```python\ny = x\nassert y == 2, y\n```\n")
    problem = broken.run(tmp_path)
    assert "AssertionError: 1" in problem
    assert 'page.md", line 15' in problem
    assert "assert y == 2" in problem


def test_blocks_that_are_not_run_must_be_python(tmp_path: Path) -> None:
    marked = "<!-- not run: needs a GPU -->\n```python\nraise SystemExit(3)\n```\n"
    page = make_page(tmp_path, marked)
    assert page.run(tmp_path) == ""
    assert page.block_problems() == []
    assert page.blocks()[0].reason == "needs a GPU"
    problem = make_page(tmp_path, "text\n\n" + marked.replace("(3)", "(3")).run(tmp_path)
    assert "page.md" in problem
    assert "line 5" in problem


def test_programs_that_end_early_fail(tmp_path: Path) -> None:
    assert "status 3" in make_page(tmp_path, "```python\nraise SystemExit(3)\n```").run(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```console\n$ ls\n```\n", "line 2: nothing checks a block of language 'console'"),
        ("```\nls\n```\n", "language ''"),
        ("text\n\n    indented\n", "language ''"),
        ("<!-- not run: -->\n```python\n1\n```\n", "needs a reason"),
        ("<!-- not run: far away -->\n\n```python\n1\n```\n", "not directly before a block"),
    ],
)
def test_unchecked_blocks_are_found(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = make_page(tmp_path, text).block_problems()
    assert problem in found


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("densenet-fast train --epoch 3", "unrecognized arguments: --epoch"),
        ("densenet-fast train --epochs 0", "expected a whole number of at least 1"),
        ("densenet-fast train --model densenet121 --depth 40", "--depth 40 applies to"),
        ("densenet-fast predict photo.jpg", "expected --checkpoint FILE"),
        ("cat a | densenet-fast predict --checkpoint b.pt", "IMAGE|FOLDER|-"),
        ("densenet-fast tune", "invalid choice: 'tune'"),
        ("python -m densenet_fast tune", "invalid choice: 'tune'"),
        ("X=1 python -m densenet_fast.train --lr -1", "--lr"),
        ("torchrun --nproc-per-node 2 -m densenet_fast.train --bogus", "--bogus"),
        ("torchrun --nproc-per-nod 2 -m densenet_fast.train", "--nproc-per-nod"),
        ("python -m benchmarks grwth", "unknown suite 'grwth'"),
        ("python -m benchmarks step \\\n  --growth 12", "--growth 12"),
        ("python -m benchmarks growth --parts tme", "unknown part: 'tme'"),
        ("python -m benchmarks growth --budgets 512", "--budgets does not apply"),
        ("python -m benchmarks all --rounds 3", "--rounds: not with 'all'"),
        ("python -m benchmark", "unknown module 'benchmark'"),
        ('pip install ".[bench,tset]"', "unknown extra 'tset'"),
        ("pip install 'densenet_fast[trian]'", "unknown extra 'trian'"),
        ("python -c 'import'", "in 'import'"),
        ("python examples/missing.py", "there is no file 'examples/missing.py'"),
        ("ruff check tests/missing_*.py", "there is no file 'tests/missing_*.py'"),
        ("tests/missing.sh", "there is no file 'tests/missing.sh'"),
        ("pytest -m fast", "unknown markers fast"),
        ("pytest --dst loadfile", "unknown flag '--dst'"),
        ("pytest tests/test_missing.py::test", "there is no file"),
        ("true && frobnicate", "unknown program"),
        ("echo 'open", "No closing quotation"),
        ("echo \\", "nothing follows"),
    ],
)
def test_wrong_commands_are_found(script: str, problem: str) -> None:
    found = script_problems(f"echo fine  # a comment\n\n{script}", line=10)
    assert found
    assert problem in found[-1]
    assert found[-1].startswith("line 12:")


def test_right_commands_pass() -> None:
    script = (
        "pip install '.[test]' && python -m pytest -n 2 -m 'not slow' tests/docs/test_docs.py # x\n"
        "python -m benchmarks growth --device cuda:1 \\\n    --parts time,memory > log.txt 2>&1\n"
        "find . -name '*.jpg' | densenet-fast predict --checkpoint a/best.pt -\n"
        "OMP_NUM_THREADS=1 torchrun --nproc-per-node 8 -m densenet_fast.train --amp\n"
    )
    assert script_problems(script) == []


@pytest.mark.parametrize(
    "code",
    ["python -m benchmarks stp", "densenet-fast evaluate --jsn", "--epoch 3", "tests/nothing.py"],
)
def test_wrong_inline_code_is_found(tmp_path: Path, code: str) -> None:
    (inline,) = make_page(tmp_path, "See `" + code.replace(" ", "\n") + "`.\n").inline_code()
    assert len(inline_problems(inline.text)) == 1


def test_other_inline_code_is_left_alone() -> None:
    for code in ("densenet-fast", "densenet-fast train", "model.eval()", "train/", "--epochs 3"):
        assert inline_problems(code) == []


def test_links_are_checked(tmp_path: Path) -> None:
    make_page(tmp_path, "# Two *words*\n\n## `a_b`: c\n\n## Two words\n", "other.md")
    good = "[a](other.md#two-words) [b](other.md) [c](#here) [d](https://x.org/#y)\n\n# Here\n"
    assert make_page(tmp_path, good + "[e](other.md#a_b-c)").link_problems(tmp_path) == []
    bad = "[a](other.md#two)\n\n[b](missing.md)\n\n![c](c.png)\n\n<img src='d.png'>\n\n[e](#e)\n"
    found = make_page(tmp_path, bad).link_problems(tmp_path)
    assert len(found) == 5
    assert "no anchor 'two'; there are a_b-c, two-words" in found[0]
    missing = {3: "missing.md", 5: "c.png", 7: "d.png"}
    assert found[1:4] == [f"line {n}: there is no file {name!r}" for n, name in missing.items()]
    assert "no anchor 'e'" in found[4]
    outside = make_page(tmp_path, "[a](../)").link_problems(tmp_path)
    assert len(outside) == 1
