"""The machine code of the product kernels: tensor cores, asynchronous copies, wide accesses."""

from __future__ import annotations

import pytest
from compiled import ARCHITECTURES, PRODUCTS, Kernel, kernels, loops, machine_code

pytestmark = pytest.mark.slow

KERNELS = [(s, a) for s in (*PRODUCTS, "transition") for a in ARCHITECTURES]
HMMA = {"HalfPolicy": "HMMA.16816.F32", "BfloatPolicy": "HMMA.16816.F32.BF16"}
HMMA["Tf32Policy"] = "HMMA.1688.F32.TF32"
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
