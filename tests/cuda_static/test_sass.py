"""The machine code of the product kernels: tensor cores, asynchronous copies, wide accesses."""

from __future__ import annotations

import pytest
from compiled import MACHINE_CODE, PRODUCTS, Instruction, Kernel, kernels, loops, machine_code

pytestmark = pytest.mark.slow

KERNELS = [(s, a) for s in (*PRODUCTS, "transition") for a in MACHINE_CODE]
HMMA = {"HalfPolicy": "HMMA.16816.F32", "BfloatPolicy": "HMMA.16816.F32.BF16"}
HMMA["Tf32Policy"] = "HMMA.1688.F32.TF32"
# Instructions of a step for each HMMA, bfloat16 on sm_90, where pieces are whole and aligned.
MOST_INSTRUCTIONS = {
    ("conv3x3_forward", "StoreStatistics<BfloatPolicy>, 128, 32, false>"): 8,
    ("conv1x1_forward", "StoreStatistics<BfloatPolicy>, 128, 128>"): 10,
    ("conv1x1_backward", "MaskedGradient<BfloatPolicy, (Into)0>, 128, 128>"): 14,
}
Text = list[str]


def products(source: str, architecture: int) -> list[tuple[Kernel, Text, Text]]:
    """Kernels with products; their instructions, and those of their loops."""
    code = machine_code(source, architecture)
    found = []
    for kernel in kernels(source):
        if kernel.architecture == architecture and kernel.template.endswith("_product"):
            instructions = code[kernel.mangled]
            looped = {i for loop in loops(instructions) for i in loop}
            texts = [i.text for i in instructions]
            found.append((kernel, texts, [i.text for i in looped]))
    assert found
    return found


def count(texts: Text, *parts: str) -> int:
    return sum(all(part in text for part in parts) for text in texts)


def policy(kernel: Kernel) -> str:
    return next(p for p in (*HMMA, "FloatPolicy", "DoublePolicy") if f"<{p}" in kernel.name)


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_products_run_on_tensor_cores(source: str, architecture: int) -> None:
    for kernel, code, looped in products(source, architecture):
        wanted = HMMA.get(policy(kernel))
        if wanted is None:
            assert count(code, "HMMA") == 0, kernel
            assert count(looped, "DFMA" if policy(kernel) == "DoublePolicy" else "FFMA"), kernel
        else:
            assert count(looped, wanted) >= 8, kernel
            if policy(kernel) != "Tf32Policy":
                assert count(looped, "LDSM.16.M"), kernel  # ldmatrix


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_operands_arrive_by_asynchronous_copies_of_16_bytes(source: str, architecture: int) -> None:
    for kernel, _, looped in products(source, architecture):
        assert count(looped, "LDGSTS", ".128"), kernel
        assert count(looped, "LDGDEPBAR"), kernel


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_results_are_stored_16_bytes_at_a_time(source: str, architecture: int) -> None:
    for kernel, code, _ in products(source, architecture):
        if kernel.template in ("pixel_product", "tap_product"):
            continue  # partial results in the accumulators' layout
        assert count(code, "STG.E.128"), kernel
        if "Gradient<" in kernel.name.split("Source<", 1)[1]:
            assert count(code, "LDG.E.128"), kernel  # the features, and the gradient so far


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_nothing_is_in_local_memory(source: str, architecture: int) -> None:
    for kernel, code, _ in products(source, architecture):
        assert count(code, "LDL") == 0, kernel
        assert count(code, "STL") == 0, kernel


def main_path(code: tuple[Instruction, ...]) -> list[Text]:
    """The loops with a product in them, without loops inside that have none.

    These bring pieces that are not whole, or not aligned, in parts.
    """
    found = loops(code)
    aside = [loop for loop in found if not _multiplies(loop)]
    paths = []
    for loop in found:
        if _multiplies(loop):
            inner = {i for other in aside if set(other) < set(loop) for i in other}
            paths.append([i.text for i in loop if i not in inner])
    return paths


def _multiplies(loop: tuple[Instruction, ...]) -> bool:
    return any("HMMA" in i.text for i in loop)


@pytest.mark.parametrize(("source", "part"), MOST_INSTRUCTIONS)
def test_few_instructions_a_product(source: str, part: str) -> None:
    code = machine_code(source, 90)
    named = [k for k in kernels(source) if k.architecture == 90 and k.name.endswith(part)]
    (kernel,) = [k for k in named if k.template.endswith("_product")]
    path = max((p for p in main_path(code[kernel.mangled]) if count(p, "HMMA")), key=len)
    assert len(path) <= MOST_INSTRUCTIONS[source, part] * count(path, "HMMA")
    assert count(path, "LDG.") == 0  # coefficients come through shared memory, 16 bytes at a time
    assert count(path, "LDS.128") >= 4


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_no_division_in_a_loop_with_products(source: str, architecture: int) -> None:
    """Dividing integers takes a reciprocal, and numbers converted to and from integers."""
    code = machine_code(source, architecture)
    for kernel, _, _ in products(source, architecture):
        for loop in filter(_multiplies, loops(code[kernel.mangled])):
            texts = [i.text for i in loop]
            assert not count(texts, "MUFU.RCP"), kernel
            assert not count(texts, "I2F"), kernel


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_tf32_is_rounded_once(source: str, architecture: int) -> None:
    """By whoever finishes a piece: never between ldmatrix and product."""
    for kernel, code, _ in products(source, architecture):
        rounded = [i for i, text in enumerate(code) if "F2FP.TF32" in text or "F2F.TF32" in text]
        if policy(kernel) != "Tf32Policy":
            assert not rounded, kernel
            continue
        first = [i for i, text in enumerate(code) if "HMMA" in text]
        assert not any(first[0] < i < first[-1] for i in rounded), kernel


@pytest.mark.parametrize(("source", "architecture"), KERNELS)
def test_partial_sums_are_stored_in_pairs(source: str, architecture: int) -> None:
    for kernel, code, _ in products(source, architecture):
        if kernel.template in ("pixel_product", "tap_product"):
            assert count(code, "STG.E.128" if policy(kernel) == "DoublePolicy" else "STG.E.64"), (
                kernel
            )
