"""The command line: flags of torchvision's references/classification where they mean the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from densenet_fast._version import __version__
from densenet_fast.blocks.specs import NETWORK_MODES
from densenet_fast.train.architecture import BC, MODELS, MOST_GROWTH, MOST_LAYERS
from densenet_fast.train.entries import INTERPOLATIONS
from densenet_fast.train.flag_types import PIXELS, SHARE, path, real, whole
from densenet_fast.train.sources import DIGITS, SOURCES

OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop", "adamw")
SCHEDULERS = ("steplr", "cosineannealinglr", "exponentiallr")
WARMUPS = ("constant", "linear")
AUGMENTATIONS = ("imagenet", "ra", "ta_wide", "augmix")
AMP_TYPES = ("bfloat16", "float16")
ON_CORRUPT = ("error", "skip")
UNCERTAIN = ("ignore", "zeros", "ones")
MISSING = ("ignore", "zeros")
CLASS_WEIGHTS = ("balanced",)
AUTO = "auto"  # of --resume
CHECKPOINT_MODES = tuple(NETWORK_MODES)
BYTE = 2**-20  # in MiB
MOST_PROCESSES = 1024  # and threads: the operating system ends others without a word


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="densenet-fast",
        description="Train, evaluate, use and export DenseNets.",
        epilog="exit status: 0 done, 1 failed, 2 wrong input, 130 and 143 stopped by SIGINT and "
        "SIGTERM with everything saved for --resume",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser
    train = add("train", help="train or fine-tune; also under torchrun", allow_abbrev=False)
    _model(train)
    _memory(train)
    _train_data(_data(train))
    _augmentation(train)
    _optimization(train)
    _run(train)
    evaluate = add("evaluate", help="loss and accuracy, also of each class", allow_abbrev=False)
    _trained(evaluate)
    _labels(_data(evaluate))
    _sizes(evaluate)
    evaluate.add_argument("-b", "--batch-size", type=whole(1), default=32, metavar="N")
    _device(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one line of JSON")
    predict = add("predict", help="the likeliest classes of images, or labels", allow_abbrev=False)
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|-",
        help="files, folders (searched through), or -: one image's bytes, or paths line by line, "
        "on standard input",
    )
    _trained(predict)
    _sizes(predict)
    predict.add_argument("-b", "--batch-size", type=whole(1), default=32, metavar="N")
    predict.add_argument(
        "--top", type=whole(1), metavar="K", help="classes to print (default: 5, or all labels)"
    )
    _on_corrupt(predict)
    _device(predict)
    predict.add_argument("--json", action="store_true", help="print one line of JSON per image")
    export = add("export", help="an ONNX file or a torch.export program", allow_abbrev=False)
    _trained(export)
    _sizes(export)
    export.add_argument(
        "-o", "--output", type=path, required=True, metavar="FILE", help="NAME.onnx or NAME.pt2"
    )
    export.add_argument("--overwrite", action="store_true", help="also a file that is there")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=MODELS, help=f"default: {BC} for {DIGITS}, densenet121")
    group.add_argument(
        "--depth",
        type=whole(1, MOST_LAYERS),
        metavar="L",
        help=f"layers of {BC}, 6n + 4 (default: 40)",
    )
    group.add_argument(
        "--growth-rate",
        type=whole(1, MOST_GROWTH),
        metavar="K",
        help=f"of {BC} (default: 12)",
    )
    group.add_argument("--drop-rate", type=real(0, 1), default=0.0, metavar="P")
    group.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="start from these, such as IMAGENET1K_V1; with another number of classes the "
        "classifier is new",
    )
    group.add_argument(
        "--freeze",
        metavar="PREFIX",
        help="do not train the parameters below this module, such as features.denseblock1; "
        '"features" or "all-but-classifier": train the classifier alone. Statistics of batch '
        "norms still follow the data",
    )
    group.add_argument("--sync-bn", action="store_true", help="batch statistics of all processes")


def _memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--checkpoint-mode", choices=CHECKPOINT_MODES, default="bottleneck")
    group.add_argument(
        "--memory-budget",
        type=real(BYTE),
        metavar="MIB",
        help="what a step may take beyond parameters and images, for --checkpoint-mode auto",
    )
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--compile", action="store_true", help="through torch.compile")
    group.add_argument("--amp", action="store_true", help="automatic mixed precision")
    group.add_argument("--amp-dtype", choices=AMP_TYPES, help="default: bfloat16")
    group.add_argument(
        "--threads", type=whole(1, MOST_PROCESSES), metavar="N", help="default: PyTorch's choice"
    )


def _data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="NAME|FOLDER",
        help=f"one of {', '.join(SOURCES)}, or as --data-path; default: {DIGITS}",
    )
    group.add_argument(
        "--data-path",
        type=path,
        metavar="FOLDER",
        help="a folder with train/ and val/, each with one folder of images per class; or where "
        "the files of a named data set are, or the images of --labels",
    )
    group.add_argument(
        "--class-map",
        type=path,
        metavar="FILE",
        help="the folders' names in the order of the classes, one a line (default: sorted)",
    )
    group.add_argument("--download", action="store_true", help="fetch a named data set")
    group.add_argument(
        "-j",
        "--workers",
        type=whole(0, MOST_PROCESSES),
        metavar="N",
        help="processes that load images",
    )
    _on_corrupt(group)
    group.add_argument(
        "--no-image-check",
        action="store_true",
        help="do not decode a folder's images first: a corrupt one is an error when it is read",
    )
    return group


def _labels(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels",
        type=path,
        metavar="CSV",
        help="several labels an image: a table with a column of files and one for each label "
        "(1, 0, -1 uncertain, empty), or with NIH's Finding Labels",
    )
    group.add_argument("--uncertain", choices=UNCERTAIN, help="labels of -1 (default: ignore)")
    group.add_argument("--missing", choices=MISSING, help="empty labels (default: ignore)")


def _train_data(group: argparse._ArgumentGroup) -> None:
    _labels(group)
    group.add_argument(
        "--label-names", nargs="+", metavar="NAME", help="the labels, in order (default: all)"
    )
    group.add_argument("--val-labels", type=path, metavar="CSV", help="the labels of validation")
    group.add_argument(
        "--val-split",
        type=real(0, 0.99, above=True),
        metavar="SHARE",
        help="hold out so much of the images, and of each class or label, for validation, where "
        "there is no other",
    )
    group.add_argument(
        "--group-column",
        metavar="NAME",
        help="of --labels: training and validation share none of its values, such as patients "
        "(default: Patient ID, or the folders patientNNNNN, where there are some)",
    )
    group.add_argument(
        "--in-chans", type=int, choices=(1, 3), help="channels (default: the data's)"
    )
    for name, least in (("--mean", False), ("--std", True)):
        group.add_argument(
            name,
            type=real(0, above=least),
            nargs="+",
            metavar="VALUE",
            help="of pixels from 0 to 1, by channel (default: ImageNet's, or the data's)",
        )


def _on_corrupt(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--on-corrupt",
        choices=ON_CORRUPT,
        default="error",
        help="images that cannot be decoded: refuse to begin, or leave out and count "
        "(default: error)",
    )


def _sizes(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--val-resize-size", type=PIXELS, metavar="PIXELS")
    parser.add_argument("--val-crop-size", type=PIXELS, metavar="PIXELS")
    parser.add_argument(
        "--crop-pct",
        type=real(0.01, 1),
        metavar="SHARE",
        help="the crop's share of the resized image, instead of --val-resize-size",
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="default: bilinear")


def _augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument("--no-aug", action="store_true", help="none")
    group.add_argument(
        "--scale",
        type=real(0, 1, above=True),
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="shares of the image's area that are cut out (default: 0.08 1; images of one small "
        "size are shifted instead)",
    )
    group.add_argument(
        "--ratio",
        type=real(0, above=True),
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="width / height of what is cut out (default: 3/4 and 4/3), also of images of one "
        "small size then",
    )
    group.add_argument(
        "--hflip", type=SHARE, metavar="P", help="default: 0.5, 0 for digits and for IDX files"
    )
    group.add_argument("--vflip", type=SHARE, default=0.0, metavar="P")
    group.add_argument(
        "--color-jitter",
        type=SHARE,
        default=0.0,
        metavar="C",
        help="by how much brightness, contrast and saturation vary",
    )
    group.add_argument("--auto-augment", choices=AUGMENTATIONS)
    group.add_argument("--random-erase", type=real(0, 1), default=0.0, metavar="P")
    group.add_argument("--mixup-alpha", type=real(0), default=0.0, metavar="ALPHA")
    group.add_argument("--cutmix-alpha", type=real(0), default=0.0, metavar="ALPHA")
    group.add_argument("--train-crop-size", type=PIXELS, metavar="PIXELS")
    _sizes(group)


def _optimization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "-b", "--batch-size", type=whole(1), default=32, metavar="N", help="of each process"
    )
    group.add_argument(
        "--grad-accum-steps",
        type=whole(1, MOST_PROCESSES),
        default=1,
        metavar="N",
        help="batches of each step",
    )
    group.add_argument("--epochs", type=whole(1), default=90, metavar="N")
    group.add_argument("--opt", choices=OPTIMIZERS, default="sgd")
    group.add_argument("--lr", type=real(0, above=True), default=0.1, metavar="RATE")
    group.add_argument("--momentum", type=real(0, 1), metavar="M", help="default: 0.9")
    group.add_argument("--weight-decay", "--wd", type=real(0), default=1e-4, metavar="W")
    for name, which in (("norm", "of norms"), ("bias", "of biases, those of norms too")):
        group.add_argument(
            f"--{name}-weight-decay",
            type=real(0),
            metavar="W",
            help=f"{which} (default: --weight-decay)",
        )
    group.add_argument(
        "--class-weights",
        choices=CLASS_WEIGHTS,
        help="balanced: rare classes, and positives of rare labels, weigh more in the loss",
    )
    group.add_argument("--label-smoothing", type=real(0, 1), default=0.0, metavar="S")
    group.add_argument("--clip-grad-norm", type=real(0, above=True), metavar="NORM")
    group.add_argument(
        "--patience",
        type=whole(1),
        metavar="EPOCHS",
        help="stop after so many without a better validation",
    )
    group.add_argument("--lr-scheduler", choices=SCHEDULERS, default="steplr")
    group.add_argument("--lr-step-size", type=whole(1), metavar="EPOCHS", help="default: 30")
    group.add_argument("--lr-gamma", type=real(0, above=True), metavar="G", help="default: 0.1")
    group.add_argument("--lr-min", type=real(0), metavar="RATE", help="default: 0")
    group.add_argument("--lr-warmup-epochs", type=whole(0), default=0, metavar="N")
    group.add_argument("--lr-warmup-method", choices=WARMUPS, help="default: constant")
    group.add_argument("--lr-warmup-decay", type=real(0, 1), metavar="D", help="default: 0.01")
    group.add_argument("--model-ema", action="store_true", help="average of the weights as well")
    group.add_argument("--model-ema-steps", type=whole(1), metavar="N", help="default: 32")
    group.add_argument("--model-ema-decay", type=real(0, 1), metavar="D", help="default: 0.99998")


def _run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    _device(group)
    group.add_argument("--seed", type=whole(0), default=0, metavar="N")
    group.add_argument("--use-deterministic-algorithms", action="store_true")
    group.add_argument("--output-dir", type=path, default=Path("output"), metavar="FOLDER")
    group.add_argument("--overwrite", action="store_true", help="also where a training is saved")
    group.add_argument(
        "--resume",
        metavar="FILE|auto",
        help="go on from a checkpoint; auto: from last.pt of the output folder, if there is one",
    )
    group.add_argument(
        "--save-steps",
        type=whole(1),
        metavar="N",
        help="save last.pt every N steps besides at each epoch's end",
    )
    group.add_argument(
        "--steps", type=whole(1), metavar="N", help="stop when N steps are done, saved"
    )
    group.add_argument("--test-only", action="store_true", help="validate once, do not train")
    group.add_argument("--print-freq", type=whole(1), default=10, metavar="STEPS")
    group.add_argument("--no-progress", action="store_true", help="lines instead of a bar")
    group.add_argument(
        "--rendezvous-timeout",
        type=real(0, 1e9, above=True),
        default=600.0,
        metavar="SECONDS",
        help="how long processes wait for each other (default: %(default)g)",
    )


def _device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", help="default: cuda where PyTorch sees a GPU, else cpu")


def _trained(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trained network")
    group.add_argument("--checkpoint", type=path, metavar="FILE", help="of densenet-fast train")
    group.add_argument("--no-ema", action="store_true", help="the weights, not their average")
    group.add_argument(
        "--weights", metavar="NAME|FILE", help="ImageNet's instead, such as IMAGENET1K_V1"
    )
    group.add_argument("--model", choices=MODELS, help="of --weights")
