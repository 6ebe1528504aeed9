"""`densenet-fast export`: a trained network as a file that runs without this package."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path

import torch

from densenet_fast.train import requirements, trained
from densenet_fast.train.errors import UsageError
from densenet_fast.train.networks import check_images
from densenet_fast.train.rules import one_of_checkpoint_and_weights
from densenet_fast.train.storage import write_atomically

INPUT, OUTPUT = "images", "logits"


def run(arguments: Namespace) -> int:
    """Write the network as the suffix of the output says; returns the exit status.

    Inputs are float32 [N, C, crop, crop] for any N, preprocessed as for `predict`; outputs are
    logits [N, classes]. Both files say what the classes, the preprocessing and the task are.

    Raises:
        UsageError: no such network, another suffix, or the output is there already.
    """
    one_of_checkpoint_and_weights(arguments)
    output: Path = arguments.output
    if output.suffix not in _FORMATS:
        raise UsageError(f"--output {output}: expected a name that ends in {' or '.join(_FORMATS)}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    if output.exists() and not arguments.overwrite:
        raise UsageError(f"--output {output} is there already: --overwrite replaces it")
    if output.suffix == ".onnx":
        requirements.require(requirements.ONNX, "an export to ONNX", "export")
    network = trained.load(arguments, torch.device("cpu"))
    size = (network.channels, network.plain.crop, network.plain.crop)
    check_images(network.model, 1, *size[:2])
    facts = {
        "classes": network.classes,
        "preprocessing": network.plain.to_dict(),
        "task": network.task.name,
    }
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network.model, (torch.zeros(2, *size),), dynamic_shapes=({0: batch},)
    )
    write_atomically(output, _FORMATS[output.suffix](program, json.dumps(facts)))
    shape = ", ".join(map(str, ("N", *size)))
    print(f"{output}: {INPUT} [{shape}] to {OUTPUT} [N, {len(network.classes)}]")
    return 0


def _onnx(program: torch.export.ExportedProgram, facts: str) -> bytes:
    found = torch.onnx.export(
        program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert found is not None
    found.model.metadata_props["densenet_fast"] = facts
    data: bytes = found.model_proto.SerializeToString()
    return data


def _pt2(program: torch.export.ExportedProgram, facts: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"densenet_fast": facts})
    return buffer.getvalue()


_FORMATS = {".onnx": _onnx, ".pt2": _pt2}
