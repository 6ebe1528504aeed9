"""Which images are held out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.train.batches import mixed_seed
from densenet_fast.train.errors import DataError


class Split(NamedTuple):
    """A share of the images, held out for validation; the seed and their names choose them."""

    share: float
    seed: int

    def held_out(self, keys: Sequence[str], labels: Tensor) -> list[bool]:
        """Which ones are, stratified; those of one key stay together.

        Both parts get their shares of the images and of each label's positives, as nearly as the
        keys allow, by iterative stratification (Sechidis, Tsoumakas and Vlahavas, On the
        Stratification of Multi-Label Data, ECML PKDD 2011): the keys with the label of which the
        fewest positives are left go, one after another, to the part that lacks most of them.

        Args:
            keys: of the images.
            labels: [images, labels], 1 for a positive.

        Raises:
            DataError: there is one key alone.
        """
        order = sorted(set(keys), key=lambda key: mixed_seed(self.seed, "split", key))
        if len(order) < 2:
            raise DataError(f"--val-split cannot share {order[0]} alone: expected two at least")
        places = {key: at for at, key in enumerate(order)}
        ones = torch.ones(len(keys), 1)
        # By key its images, which are as many at least as any label's positives, and those.
        counted = torch.cat((ones, (labels == 1).to(ones)), 1).double()
        counts = counted.new_zeros(len(order), counted.shape[1])
        counts.index_add_(0, torch.tensor([places[key] for key in keys]), counted)
        shares = torch.tensor([[1 - self.share], [self.share]], dtype=counts.dtype)
        lacking = shares * counts.sum(0)
        chosen, rest = [False] * len(order), torch.arange(len(order))
        while len(rest):
            left = counts[rest].sum(0)
            label = int(left.where(left > 0, torch.inf).argmin())
            having = counts[rest, label] > 0
            for at in rest[having].tolist():
                train, held = lacking[:, [label, 0]].tolist()
                chosen[at] = held > train
                lacking[int(chosen[at])] -= counts[at]
            rest = rest[~having]
        if all(chosen) or not any(chosen):
            chosen[0] = not chosen[0]
        inside = dict(zip(order, chosen, strict=True))
        return [inside[key] for key in keys]
