"""Images held out: labels keep their shares, and patients stay together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from densenet_fast.train.errors import DataError
from densenet_fast.train.splits import Split


def shares_of(labels: Tensor, chosen: Sequence[bool]) -> list[float]:
    """Of the images and of each label's positives, what is held out."""
    held = torch.tensor(chosen)
    positives = labels == 1
    return [held.double().mean().item(), *(positives[held].sum(0) / positives.sum(0)).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_every_label_keeps_its_share(seed: int) -> None:
    """Labels as rare as Hernia in NIH's; more nearly than images drawn by lot."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.tensor([0.3, 0.1, 0.02, 0.005])
    labels = (torch.rand(4000, 4, generator=generator) < rates).float()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = math.nan
    names = [f"{n}.png" for n in range(len(labels))]
    chosen = Split(0.2, seed).held_out(names, labels)
    counts = [4000, *(labels == 1).sum(0).tolist()]
    for share, count in zip(shares_of(labels, chosen), counts, strict=True):
        assert share == pytest.approx(0.2, abs=1 / count)  # to an image
    assert Split(0.2, seed).held_out(names[::-1], labels.flip(0)) == chosen[::-1]
    assert Split(0.2, seed + 1).held_out(names, labels) != chosen


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_patients_stay_together_and_labels_keep_their_shares(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 12, (600,), generator=generator)
    ill = torch.rand(600, 3, generator=generator) < torch.tensor([0.3, 0.1, 0.03])
    patients = [f"{n}" for n, count in enumerate(images.tolist()) for _ in range(count)]
    labels = ill.float().repeat_interleave(images, 0)
    chosen = Split(share, 0).held_out(patients, labels)
    assert len(set(zip(patients, chosen, strict=True))) == 600
    for found, count in zip(shares_of(labels, chosen), (600, *ill.sum(0).tolist()), strict=True):
        assert found == pytest.approx(share, abs=2 / count)  # to two patients
    largest = [float(images[n]) for n in range(600) if chosen[patients.index(f"{n}")]]
    if share > 0.05:  # patients of many images are in both parts
        assert np.mean(largest) == pytest.approx(images.double().mean().item(), rel=0.15)


def test_neither_part_is_without_images() -> None:
    for share in (0.001, 0.5, 0.99):
        for labels in (torch.empty(3, 0), torch.ones(3, 2)):
            chosen = Split(share, 0).held_out(["a", "b", "b"], labels)
            assert chosen[0] != chosen[1] == chosen[2]
    with pytest.raises(DataError, match="cannot share a alone: expected two at least"):
        Split(0.5, 0).held_out(["a", "a"], torch.ones(2, 1))
