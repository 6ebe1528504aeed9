"""What the suites `growth` and `depth` share: DenseNet-BCs that differ in one number.

One training step and inference of every network, measured as the `step` suite does. Being slower
than the naive network is a finding of the page, not a failure.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.prediction import shapes, usual
from benchmarks.suites import Options, Record, step

PARTS = step.PARTS
QUICK_ROUNDS = 3
FULL_ROUNDS = 5
IMAGE_SIZES = {1: 4096, 2: 32, 3: 32}  # by dimensions
VOLUMES = 4  # of which a batch has this part of the images


def network(options: Options, depth: int, growth_rate: int, images: int) -> NetworkSpec:
    """The DenseNet-BC of one case, in the dimensions that the user asked for."""
    dims = options.dims or 2
    own = {} if dims == 2 else {"in_channels": 1, "num_classes": 2}
    return densenet_bc(
        depth,
        growth_rate,
        batch_size=-(-images // VOLUMES) if dims == 3 else images,
        image_size=IMAGE_SIZES[dims],
        dims=dims,
        **own,
    )


def plan(options: Options, varied: str, title: str, specs: Mapping[int, NetworkSpec]) -> Record:
    """Settings of a suite whose networks `specs` differ in what is `varied`."""
    step.check_peers(options, specs.values())
    dims = options.dims or 2
    return {
        "settings": {
            "varied": varied,
            "title": title + f", {dims}-D" * (dims != 2),
            "dims": dims,
            "cases": [
                {
                    "value": value,
                    "network": spec.title,
                    "images": spec.batch_size,
                    "parameters": shapes.parameters(spec),
                    "flops": step_flops(spec),
                }
                for value, spec in specs.items()
            ],
            "networks": [spec.to_json() for spec in specs.values()],
            "peers": [
                name
                for name in options.peers or BASIC_PEERS
                if any(PEERS[name].applies(spec) for spec in specs.values())
            ],
            "parts": list(options.parts or PARTS),
            "rounds": options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
            "seed": options.seed,
            "amp": "none",
        },
        "memory": [],
        "time": [],
        "inference": [],
    }


def step_flops(spec: NetworkSpec) -> int:
    """FLOPs of the usual network's convolutions and classifier in one training step."""
    return sum(op.flops for op in usual.usual_step(spec, shapes.FORMATS["float32"]))
