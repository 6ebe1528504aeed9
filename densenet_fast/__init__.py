"""Exact DenseNets in a fraction of the memory."""

from densenet_fast import memory
from densenet_fast._version import __version__
from densenet_fast.build_info import build_info
from densenet_fast.conversion import ConversionReport, convert, revert
from densenet_fast.fusion import fusion_report
from densenet_fast.inference import OptimizedNetwork, optimize_for_inference
from densenet_fast.modules.densenet import (
    EfficientDenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
)
from densenet_fast.modules.fc_densenet import (
    FCDenseNet,
    fcdensenet56,
    fcdensenet67,
    fcdensenet103,
)
from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition
from densenet_fast.operators.backends import get_backend, set_backend, use_backend
from densenet_fast.operators.winograd import enable_winograd, winograd_enabled
from densenet_fast.weights.load import load_weights

__all__ = [
    "ConversionReport",
    "DenseBlock",
    "DenseLayer",
    "EfficientDenseNet",
    "FCDenseNet",
    "OptimizedNetwork",
    "Transition",
    "__version__",
    "build_info",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "enable_winograd",
    "fcdensenet56",
    "fcdensenet67",
    "fcdensenet103",
    "fusion_report",
    "get_backend",
    "load_weights",
    "memory",
    "optimize_for_inference",
    "revert",
    "set_backend",
    "use_backend",
    "winograd_enabled",
]
