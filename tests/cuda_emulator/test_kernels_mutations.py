"""Deliberate faults in the kernels: the tests must notice every one of them.

Each is a build of its own. A run takes a sixth of them, other ones whenever the kernels' sources
change; all with DENSENET_FAST_FAULTS=all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator

import host_build
import pytest
from dispatched import Run, build_dispatch, serving
from emulation import build_kernels
from forks import Forks, forking
from host_build import Patch
from kernel_faults import BLOCK_FAULTS, FAULTS

from densenet_fast.operators.fingerprint import CUDA_FOLDERS, fingerprint

# Faulty kernels are built for one type only: a fifth of the work.
_CASES = """    case Dtype::kBfloat16:
      return body(BfloatPolicy{});
    case Dtype::kFloat32:
      return context.allow_tf32 ? body(Tf32Policy{}) : body(FloatPolicy{});
    case Dtype::kFloat64:
      return body(DoublePolicy{});
  }"""
_HALF = """    case Dtype::kFloat16:
      return body(HalfPolicy{});
"""
ONLY = {
    "float16": Patch("cuda/arguments.cuh", _HALF + _CASES, f"{_HALF}    default: break;\n  }}"),
    "tf32": Patch(
        "cuda/arguments.cuh",
        _HALF + _CASES,
        "    case Dtype::kFloat32: return body(Tf32Policy{});\n    default: break;\n  }",
    ),
}


def some(names: Iterable[str]) -> list[str]:
    """A sixth of the faults, chosen by the sources."""
    names = list(names)
    if os.environ.get("DENSENET_FAST_FAULTS") == "all":
        return names
    sources = str(fingerprint(host_build.CSRC.parent, CUDA_FOLDERS))
    order = sorted(names, key=lambda name: hashlib.sha256((sources + name).encode()).digest())
    return order[: -(-len(names) // 6)]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Runs code behind the imports of the selection of tests."""
    with forking("import selection") as function:
        yield function


def verdict(forks: Forks, kind: str, *patches: Patch) -> str:
    """The first failure of the selection of tests with these faults; empty without any."""
    library = build_kernels(patches=(ONLY[kind], *patches), flags=("-g0",))
    done = forks(f"print(selection.failure({str(library)!r}, {kind!r}))")
    if done.status < 0:
        return f"ended by signal {-done.status}"
    assert done.status == 0, done.errors
    return done.printed.strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLY)
def test_kernels_without_faults_pass(forks: Forks, kind: str) -> None:
    assert verdict(forks, kind) == ""


@pytest.mark.parametrize("name", [*FAULTS, *BLOCK_FAULTS])
def test_faults_are_of_lines_that_are_there(name: str) -> None:
    file, old, _ = FAULTS[name].patch if name in FAULTS else BLOCK_FAULTS[name]
    assert (host_build.CSRC / file).read_text().count(old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", some(FAULTS))
def test_fault_is_noticed(forks: Forks, name: str) -> None:
    patch, kind = FAULTS[name]
    found = verdict(forks, kind, patch)
    print(f"{name}: {found}")
    assert found


BLOCKS = """
for direction in ("forward", "backward"):
    for name, case in CASES.items():
        check(case, direction, same_bits=False)
print("passed")
"""


@pytest.mark.slow
def test_blocks_without_faults_pass(run: Run) -> None:
    assert run(BLOCKS) == "passed\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", some(BLOCK_FAULTS))
def test_fault_is_noticed_by_a_block(name: str) -> None:
    library = build_dispatch(patches=(BLOCK_FAULTS[name],))
    with serving(library) as run, pytest.raises(AssertionError):
        run(BLOCKS)
