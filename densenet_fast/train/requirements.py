"""The extras' libraries, asked for before anything that needs them is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from densenet_fast.train.errors import UsageError

# Module to import → distribution that has it.
DISTRIBUTIONS = {
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}
PREDICT = ("numpy", "PIL", "torchmetrics", "torchvision")
EVALUATE = (*PREDICT, "tqdm")
TRAIN = (*EVALUATE, "tensorboard")
ONNX = ("onnx", "onnxscript")


def require(modules: Iterable[str], purpose: str, extra: str = "train") -> None:
    """Refuse with the extra's name what cannot work without its libraries.

    Raises:
        UsageError: some module cannot be found.
    """
    missing = [DISTRIBUTIONS[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{purpose} needs {', '.join(missing)}, not installed here: the extra `{extra}` has "
            f'what it needs, `pip install "densenet_fast[{extra}]"`'
        )
