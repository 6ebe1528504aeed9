"""Philox-4x32-10, the counter-based generator of dropout masks, in plain PyTorch.

Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_LARGEST_SEED = 2**63 - 1


def draw_seeds(count: int) -> Tensor:
    """Seeds of so many streams, from torch's default generator on the host.

    Whatever the default device is: to read numbers of a GPU would be to wait for it.
    """
    return torch.randint(_LARGEST_SEED, (count,), dtype=torch.int64, device="cpu")


def _wide_product(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of constant * words; in 16-bit halves, as int64 has no 64 unsigned bits."""
    low = words * (constant & 0xFFFF)
    high = words * (constant >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox(count: int, seed: int, device: torch.device) -> Tensor:
    """The first `count` words of the stream of `seed`, as int64: word i % 4 of counter i // 4."""
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    zero = torch.zeros_like(counters)
    c0, c1, c2, c3 = counters & _WORD, counters >> 32, zero, zero
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _wide_product(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)[:count]
