"""Published figures of GPUs, for predictions. Rates are dense: without structured sparsity."""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One GPU as its vendor describes it."""

    name: str
    bandwidth: float  # bytes per second
    half_rate: float  # FLOP/s of tensor cores, float16 or bfloat16, float32 accumulation
    tf32_rate: float  # FLOP/s of tensor cores
    float32_rate: float  # FLOP/s of plain multiply-adds
    memory: int  # bytes
    l2: int  # bytes
    multiprocessors: int
    sources: tuple[str, ...]
    # Share of the tensor rate that `mma.sync` reaches, the instruction of our products. Vendors'
    # libraries use the architecture's newest instruction and are given the whole rate.
    mma_sync: float = 1.0

    def rate(self, tensor: str, *, ours: bool) -> float:
        """FLOP/s of products in "half" or "tf32"."""
        rate = self.half_rate if tensor == "half" else self.tf32_rate
        return rate * (self.mma_sync if ours else 1.0)


DEVICES: tuple[Device, ...] = (
    Device(
        name="A100 SXM 80 GB",
        bandwidth=2_039 * GIGA,
        half_rate=312 * TERA,
        tf32_rate=156 * TERA,
        float32_rate=19.5 * TERA,
        memory=80 * 10**9,
        l2=40 * 2**20,
        multiprocessors=108,
        sources=(
            "NVIDIA A100 Tensor Core GPU, datasheet (rates, bandwidth, memory)",
            "NVIDIA A100 Tensor Core GPU Architecture, white paper (L2, multiprocessors)",
        ),
    ),
    Device(
        name="H100 SXM",
        bandwidth=3_350 * GIGA,
        half_rate=989.4 * TERA,
        tf32_rate=494.7 * TERA,
        float32_rate=66.9 * TERA,
        memory=80 * 10**9,
        l2=50 * 2**20,
        multiprocessors=132,
        sources=(
            "NVIDIA H100 Tensor Core GPU, datasheet (bandwidth, memory)",
            "NVIDIA H100 Tensor Core GPU Architecture, white paper (rates, L2, multiprocessors)",
            "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv "
            "2402.13499 (mma.sync reaches 62.9 % of the tensor rate on average)",
        ),
        mma_sync=0.629,
    ),
    Device(
        name="RTX 4090",
        bandwidth=1_008 * GIGA,
        half_rate=165.2 * TERA,
        tf32_rate=82.6 * TERA,
        float32_rate=82.6 * TERA,
        memory=24 * 2**30,
        l2=72 * 2**20,
        multiprocessors=128,
        sources=("NVIDIA Ada GPU Architecture, white paper (all figures)",),
    ),
)
