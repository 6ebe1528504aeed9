"""Tables (CSV) of images with several labels each, in CheXpert's style or NIH's.

The first column has the images' files, below a folder. Every other column is a label: 1 where it
applies, 0 where not, -1 where that is uncertain, empty where nobody said. A column "Finding Labels"
has the names of all labels that apply instead, with | between them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from densenet_fast.train.entries import MULTILABEL
from densenet_fast.train.errors import DataError
from densenet_fast.train.folders import FileSamples, ImageCheck
from densenet_fast.train.images import find_images
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD, Source
from densenet_fast.train.splits import Split

FINDINGS, NO_FINDING, BETWEEN = "Finding Labels", "No Finding", "|"
PATIENT = "Patient ID"  # NIH's column; CheXpert's files are in a folder for each patient
PATIENT_FOLDER = re.compile(r"patient\d+")
# CheXpert's columns that say something of the image or the patient, not what is seen.
NO_LABELS = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
# What --uncertain and --missing make of a label; nan does not count.
MEANING = {"ignore": math.nan, "zeros": 0.0, "ones": 1.0}


class Reading(NamedTuple):
    """How a table is read: where its images are, and what becomes of labels that are not known."""

    root: Path | None  # None: the table's folder
    uncertain: str
    missing: str
    group: str | None = None  # a column: training and validation share none of its values
    others: bool = False  # whether findings may be there that are no labels

    def values(self) -> Mapping[str, float]:
        """Labels by what is written."""
        found = {"": MEANING[self.missing]}
        for text, value in (("0", 0.0), ("1", 1.0), ("-1", MEANING[self.uncertain])):
            found[text] = found[f"{text}.0"] = value
        return found


class Table(NamedTuple):
    """What a table says: its classes; of each row the file, the labels and the group.

    `grouped` says what the groups go by; "" where each image is one by itself.
    """

    path: Path
    classes: tuple[str, ...]
    files: list[str]
    labels: Tensor
    groups: list[str]
    grouped: str

    def part(self, chosen: Sequence[bool]) -> Table:
        """Some of the rows."""
        at = [n for n, inside in enumerate(chosen) if inside]
        files, groups = [self.files[n] for n in at], [self.groups[n] for n in at]
        return self._replace(files=files, labels=self.labels[at], groups=groups)


def read_table(path: Path, reading: Reading, classes: Sequence[str] | None = None) -> Table:
    """A table with labels, all of whose files are there.

    Args:
        path: the table.
        reading: how it is read.
        classes: the labels in order; None for all that the table has.

    Raises:
        DataError: what is wrong, with the line and the value.
    """
    rows = _rows(path)
    line, header = next(rows, (1, []))
    columns, group = _columns(path, line, header, reading, classes)
    listed, values = columns == [FINDINGS], reading.values()
    lines: dict[str, int] = {}  # of the files
    groups: list[str] = []
    named: list[list[str]] = []
    marked: list[list[float]] = []
    for line, row in rows:
        if len(row) != len(header):
            _refuse(path, line, f"expected {len(header)} values, got {len(row)}")
        if row[0] in lines:
            _refuse(path, line, f"{row[0]!r} is in line {lines[row[0]]} already")
        lines[row[0]] = line
        cells = dict(zip(header, row, strict=True))
        groups.append(_patient(row[0]) if group is None else cells[group])
        if listed:
            named.append([name.strip() for name in cells[FINDINGS].split(BETWEEN)])
            continue
        if wrong := [name for name in columns if cells[name] not in values]:
            _refuse(
                path,
                line,
                f"expected 1, 0, -1 or nothing in column {wrong[0]!r}, got {cells[wrong[0]]!r}; "
                "--label-names chooses the columns that are labels",
            )
        marked.append([values[cells[name]] for name in columns])
    if not lines:
        _refuse(path, line, "no image follows the names of the columns")
    if listed:
        every = sorted({name for names in named for name in names} - {"", NO_FINDING})
        columns = every if classes is None else list(classes)
        known = {NO_FINDING, *columns, *(every if reading.others else ())}
        for line, names in zip(lines.values(), named, strict=True):
            if odd := [name for name in names if name not in known]:
                _refuse(path, line, f"{odd[0]!r} is none of the labels {', '.join(columns)}")
        marked = [[float(name in names) for name in columns] for names in named]
    files = _files(path, reading.root or path.parent, lines)
    grouped = f"column {group!r}"
    if group is None:
        grouped = "" if groups == list(lines) else "folders patientNNNNN"
    return Table(path, tuple(columns), files, torch.tensor(marked), groups, grouped)


def _patient(file: str) -> str:
    """The folder of a patient that the file is in, or else the file."""
    return next(filter(PATIENT_FOLDER.fullmatch, Path(file).parts), file)


def _columns(
    path: Path, line: int, header: Sequence[str], reading: Reading, classes: Sequence[str] | None
) -> tuple[list[str], str | None]:
    """The columns with labels, and that of the groups if there is one, by the first line."""
    if len(header) < 2:
        _refuse(path, line, f"expected a column of files and columns of labels, got {header}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        _refuse(path, line, f"two columns are called {twice[0]!r}")
    group = reading.group or (PATIENT if PATIENT in header else None)
    columns = [name for name in header[1:] if name not in (*NO_LABELS, PATIENT, group)]
    if FINDINGS in header:
        columns = [FINDINGS]
    elif classes is not None:
        columns = list(classes)
    if not columns:
        _refuse(path, line, f"no column is a label: there are {', '.join(header)}")
    for name in (*columns, group):
        if name is not None and name not in header:
            _refuse(path, line, f"there is no column {name!r}, but {', '.join(header)}")
    return columns, group


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines by their number, without empty ones; blanks around values do not count."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, [value.strip() for value in row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path} is no table (CSV, UTF-8): {error}") from error


def _files(path: Path, root: Path, lines: Mapping[str, int]) -> list[str]:
    """Where the images are; those named without a folder may be anywhere below the root."""
    below: dict[str, list[str]] | None = None
    found = []
    for name, line in lines.items():
        file = root / name
        if not file.is_file() and Path(name).name == name:
            if below is None:
                below = {}
                for other in find_images(root).files:
                    below.setdefault(Path(other).name, []).append(other)
            places = below.get(name, [])
            if len(places) > 1:
                _refuse(path, line, f"{name!r} may be {places[0]} or {places[1]}")
            file = Path(places[0]) if places else file
        if not file.is_file():
            _refuse(path, line, f"no file {name!r} in {root}; --data-path says where images are")
        found.append(str(file))
    return found


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")


def open_labels(
    path: Path,
    reading: Reading,
    check: ImageCheck,
    *,
    classes: Sequence[str] | None,
    val: Path | Split | None,
    mode: str,
) -> Source:
    """The images of a table, with its labels.

    Args:
        path: the table.
        reading: how it is read.
        check: looks for images that cannot be decoded.
        classes: the labels in order; None for all that the table has.
        val: the table of validation, or what is held out for it; None where the first is for it.
        mode: PIL's "RGB" or "L", what images are converted to.

    Raises:
        DataError: what is wrong, with the line and the value; a label that no image of training
            has; an image or a patient of both tables; an image of no patient where others are; no
            label of validation of which some images have it and some not.
    """
    train = held = read_table(path, reading, classes)
    if isinstance(val, Path):
        held = read_table(val, reading, train.classes)
    for table in (train, held) if val is not None else ():
        if "" in table.groups:
            file = table.files[table.groups.index("")]
            raise DataError(f"{table.path}: expected a value in {table.grouped}, {file} has none")
    if isinstance(val, Path):
        if both := sorted(set(held.files).intersection(train.files)):
            raise DataError(f"{both[0]} is in {path} and in {val}: expected other images in each")
        if train.grouped and (both := sorted(set(held.groups).intersection(train.groups))):
            raise DataError(
                f"{both[0]!r} (by {train.grouped}) is in {path} and in {val}: expected others in "
                "each; --group-column names what they must not share"
            )
    elif val is not None:
        chosen = val.held_out(train.groups, train.labels)
        train, held = train.part([not inside for inside in chosen]), train.part(chosen)
    tables = [held] if val is None else [train, held]
    corrupt = check.corrupt([file for table in tables for file in table.files])
    train, held = (
        table.part([file not in corrupt for file in table.files]) for table in (train, held)
    )
    positives, negatives = ((held.labels == value).sum(0) for value in (1, 0))
    if not bool(((positives > 0) & (negatives > 0)).any()):
        raise DataError(
            f"{held.path}: no label has both positives and negatives among {len(held.files)} "
            "images of validation, the AUROC needs them"
        )
    if val is not None:
        for name, count in zip(train.classes, (train.labels == 1).sum(0).tolist(), strict=True):
            if not count:
                raise DataError(
                    f"{path}: none of {len(train.files)} images of training is positive for "
                    f"{name!r}; --label-names chooses other labels"
                )
    return Source(
        name=str(path),
        train=FileSamples(train.files, train.labels, mode),
        val=FileSamples(held.files, held.labels, mode),
        classes=train.classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=None,
        flip=True,
        task=MULTILABEL,
        skipped=len(corrupt),
        note="" if val is None else _separated(train, held),
    )


def _separated(train: Table, held: Table) -> str:
    """What training and validation do not share."""
    if not train.grouped:
        return (
            f"{train.path}: nothing tells patients apart, training and validation may share some; "
            "--group-column names a column that does"
        )
    counts = [len(set(table.groups)) for table in (train, held)]
    return (
        f"{train.path}: by {train.grouped}, {counts[0]} in training and {counts[1]} others in "
        "validation"
    )
