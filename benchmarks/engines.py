"""Other programs that run a trained network: ONNX Runtime and OpenVINO, on the CPU in float32.

Both get torchvision's network as ONNX, and as many threads as PyTorch has.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

# What a network in evaluation mode becomes, made for images like these.
Deploy = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def exported(model: nn.Module, images: Tensor) -> bytes:
    """The network as ONNX, for images of this size."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "network.onnx"
        # The newer exporter takes ten times as long and needs onnxscript; both engines optimize.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, (images,), file, dynamo=False)
        return file.read_bytes()


def onnxruntime(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network in a session of ONNX Runtime."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads would go on spinning while the next implementation is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(
        exported(model, images), options, providers=["CPUExecutionProvider"]
    )
    (name,) = (argument.name for argument in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network compiled by OpenVINO."""
    core: Any = importlib.import_module("openvino").Core()
    compiled = core.compile_model(
        core.read_model(exported(model, images)),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])
