"""Batches in an order that only the seed, the epoch and the number of processes decide.

What is random in an image's augmentation is drawn from its own seed, made of the run's seed, the
epoch and the image's index: it does not depend on the number of workers, nor on where a run was
interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torchvision.transforms import v2

from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError, lack_of_memory
from densenet_fast.train.signals import leave_signals_to_parent
from densenet_fast.train.sources import Samples
from densenet_fast.train.transforms import Transform

Batch = tuple[Tensor, Tensor]


class Draw(NamedTuple):
    """An image of an epoch."""

    epoch: int
    image: int


def mixed_seed(*parts: int | str) -> int:
    """A seed of 63 bits that all parts decide."""
    text = "/".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """PyTorch's generator of the CPU, seeded by the parts and put back at the end."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(mixed_seed(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Augmented:
    """Transformed images for training, by `Draw`."""

    def __init__(self, samples: Samples, transform: Transform, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        """How many images."""
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Any]:
        """The image as it looks in that epoch, and its label."""
        image, label = _read(self.samples, draw.image)
        with seeded(self.seed, "image", draw.epoch, draw.image):
            return self.transform(image), label


class Plain:
    """Transformed images for validation: every `count`-th from `rank` on."""

    def __init__(self, samples: Samples, transform: Transform, processes: Processes) -> None:
        self.samples, self.transform = samples, transform
        self.indices = range(processes.rank, len(samples), processes.count)

    def __len__(self) -> int:
        """How many images."""
        return len(self.indices)

    def __getitem__(self, at: int) -> tuple[Tensor, Any]:
        """An image and its label."""
        image, label = _read(self.samples, self.indices[at])
        return self.transform(image), label


def _read(samples: Samples, index: int) -> tuple[Any, Any]:
    try:
        return samples[index]
    except Exception as error:
        if lack_of_memory(error):
            raise
        paths = getattr(samples, "paths", None)
        name = f"image {index}" if paths is None else paths[index]
        raise DataError(f"{name} cannot be read: {error}") from error


class Draws(Sampler[list[Draw]]):
    """Batches of one epoch after another for one of the processes, from `start` on.

    Every process has equally many: the last ones begin again where images run out.
    """

    def __init__(self, count: int, batch_size: int, seed: int, processes: Processes) -> None:
        self._order: DistributedSampler[int] = DistributedSampler(
            range(count),  # type: ignore[arg-type]
            num_replicas=processes.count,
            rank=processes.rank,
            shuffle=True,
            seed=seed,
        )
        self.batch_size = batch_size
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self._order) // self.batch_size)

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[list[Draw]]:
        """The batches from `start` on."""
        self._order.set_epoch(self.epoch)
        order = list(self._order)
        for at in range(self.start, len(self)):
            chosen = order[at * self.batch_size : (at + 1) * self.batch_size]
            yield [Draw(self.epoch, index) for index in chosen]


class Mixing:
    """MixUp and CutMix of whole batches, drawn for each step anew."""

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int, rank: int) -> None:
        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self._transform = v2.RandomChoice(chosen) if chosen else None
        self._key = (seed, "mix", rank)

    def __call__(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Images, and labels or, where there is mixing, their shares [N, classes]."""
        if self._transform is None:
            return batch
        with seeded(*self._key, epoch, step):
            images, labels = self._transform(*batch)
        return images, labels

    def hard(self, labels: Tensor) -> Tensor:
        """Labels; of mixed ones [N, classes], the classes [N] with the largest shares."""
        return labels if self._transform is None else labels.argmax(1)


def loader(dataset: Augmented | Plain, workers: int, device: torch.device, **kind: Any) -> Any:
    """A `DataLoader`; its own generator leaves PyTorch's alone."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_parent,
        **kind,
    )


def read_batches(loader: Any) -> Iterator[Any]:
    """A loader's batches; an error of a worker loses the worker's traceback.

    Raises:
        DataError: an image cannot be read.
    """
    try:
        yield from loader
    except Exception as error:
        if loader.num_workers == 0:
            raise
        # PyTorch's frame in the traceback refers to the error: such a circle would keep the loader,
        # and its workers, for which Python waits at its end.
        error.__traceback__ = None
        if isinstance(error, DataError):
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        raise error.with_traceback(None) from None
