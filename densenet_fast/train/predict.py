"""`densenet-fast predict`: probabilities of classes for images from files, folders or a pipe."""

from __future__ import annotations

import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError

from densenet_fast.inference import optimize_for_inference
from densenet_fast.train import trained
from densenet_fast.train.errors import DataError, UsageError
from densenet_fast.train.images import decoding_error, image_files, left_out, mode_of, read_image
from densenet_fast.train.networks import check_images
from densenet_fast.train.rules import device, one_of_checkpoint_and_weights
from densenet_fast.train.tasks import Multilabel

PIPE = "-"


class Item(NamedTuple):
    """An image by its name; `content` is None for a file of that name."""

    name: str
    content: bytes | None = None

    def open(self) -> str | BinaryIO:
        """The image, for PIL."""
        return self.name if self.content is None else io.BytesIO(self.content)


def run(arguments: Namespace) -> int:
    """Print every image's classes, the likeliest first; returns the exit status.

    Raises:
        UsageError: no such network or images, or an image cannot be decoded.
    """
    one_of_checkpoint_and_weights(arguments)
    where = device(arguments.device)
    network = trained.load(arguments, where)
    check_images(network.model, 1, network.channels, network.plain.crop)
    model = optimize_for_inference(network.model)
    items = _decodable(_items(arguments.images), arguments.on_corrupt)
    transform = network.plain.transform()
    mode = mode_of(network.channels)
    all_classes = len(network.classes)
    # Every label has its own answer; of classes, the likeliest say enough.
    count = all_classes if isinstance(network.task, Multilabel) else 5
    count = min(arguments.top or count, all_classes)
    for start in range(0, len(items), arguments.batch_size):
        chosen = items[start : start + arguments.batch_size]
        images = torch.stack([transform(_read(item, mode)) for item in chosen])
        with torch.inference_mode():
            shares = network.task.probabilities(model(images.to(where)))
        best = shares.topk(count, dim=1)
        for item, values, indices in zip(
            chosen, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            rows = [(network.classes[i], i, p) for i, p in zip(indices, values, strict=True)]
            print(_line(item.name, rows, as_json=arguments.json), flush=True)
    return 0


def _line(name: str, rows: Sequence[tuple[str, int, float]], *, as_json: bool) -> str:
    if as_json:
        found = [{"class": c, "index": i, "probability": p} for c, i, p in rows]
        return json.dumps({"image": name, "predictions": found})
    return f"{name}: " + ", ".join(f"{c} {100 * p:.2f} %" for c, _, p in rows)


def _items(names: Sequence[str]) -> list[Item]:
    if list(names).count(PIPE) > 1:
        raise UsageError(f"{PIPE} is standard input, which can be read once; it is given twice")
    items: list[Item] = []
    count = 0
    for name in names:
        given = from_pipe(sys.stdin.buffer.read()) if name == PIPE else [name]
        if isinstance(given, Item):
            items.append(given)
            continue
        for found in (image_files(Path(path)) for path in given):
            items += map(Item, found.files)
            count += found.left_out
    if count:
        print(left_out(count), file=sys.stderr)
    return items


def from_pipe(content: bytes) -> Item | list[str]:
    """What came on standard input: an image where PIL knows its format, else paths line by line.

    Raises:
        UsageError: it is neither.
    """
    if not content.strip():
        raise UsageError(f"{PIPE}: nothing on standard input; expected an image or paths")
    try:
        with Image.open(io.BytesIO(content)):
            return Item(PIPE, content)
    except UnidentifiedImageError:
        pass
    except Exception:
        return Item(PIPE, content)
    if b"\0" in content:  # no path has it
        raise UsageError(
            f"{PIPE}: standard input is neither an image of a known format nor a list of paths"
        )
    return [os.fsdecode(line) for line in map(bytes.strip, content.splitlines()) if line]


def _decodable(items: Sequence[Item], on_corrupt: str) -> list[Item]:
    """All items, every one of which has been decoded once; or those that can be."""
    good: list[Item] = []
    for item in items:
        reason = decoding_error(item.open())
        if reason is None:
            good.append(item)
        elif on_corrupt == "error":
            raise DataError(
                f"corrupt image {item.name} ({reason}); --on-corrupt skip leaves such files out"
            )
    if len(good) < len(items):
        print(f"{len(items) - len(good)} corrupt images left out", file=sys.stderr)
    return good


def _read(item: Item, mode: str) -> Any:
    try:
        return read_image(item.open(), mode)
    except DataError as error:  # the file is not what it was when it was decoded first
        raise DataError(f"{item.name} cannot be read: {error}") from error
