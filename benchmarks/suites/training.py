"""The main job: train the naive network and `densenet_fast` side by side on handwritten digits.

All implementations start from the same weights and see the same batches in the same order.
Rounding errors grow exponentially while a network trains, so two exact implementations in
float32 drift apart. Agreement is therefore judged twice:

* in float64 over the first stages, where the drift stays tiny: a fixed tolerance, for the
  training losses and then for the loss in evaluation mode, which uses the running statistics;
* in float32 over the whole training, against the drift between the naive network and itself
  in another memory layout, which computes the same sums in another order.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import digits as digits_data
from benchmarks.measure import MeasurementError, release_cached, timed, tuned_libraries
from benchmarks.memory import MemoryCase, measure_in_child
from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS, build, initial_state
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save
from benchmarks.suites.training_page import REFERENCE, failures, figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"growth_rates", "peers", "parts", "rounds"})
PARTS = ("parity", "training", "memory")

GROWTH_RATES = (12, 24, 32)
QUICK_PEERS = ("naive", "naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")
LEARNING_RATE = 0.01
FLOAT64_TOLERANCE = 1e-9
PARITY_TEST_IMAGES = 60
# Work of the progress bar: a float64 step costs about five in float32, a child some steps more.
FLOAT64_WORK = 5
CHILD_WORK = 1_500


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    peers = options.peers or (BASIC_PEERS if options.full else QUICK_PEERS)
    if REFERENCE not in peers:
        peers = (REFERENCE, *peers)
    batch_size = 64 if options.full else 16
    epoch = (1_797 - digits_data.TEST_IMAGES) // batch_size
    steps = options.rounds or (10 * epoch if options.full else epoch)
    return {
        "settings": {
            "depth": 40 if options.full else 22,
            "batch_size": batch_size,
            "growth_rates": list(options.growth_rates or GROWTH_RATES),
            "peers": list(peers),
            "parts": list(options.parts or PARTS),
            "steps": steps,
            "stage_steps": max(1, steps // (10 if options.full else 8)),
            "parity_steps": min(steps, 12 if options.full else 6),
            "parity_stage_steps": 2,
            "parity_batch_size": 16,
            "parity_test_images": PARITY_TEST_IMAGES,
            "float64_tolerance": FLOAT64_TOLERANCE,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
        },
        "parity": [],
        "training": [],
        "memory": [],
    }


def spec_for(growth_rate: int, settings: dict[str, Any]) -> NetworkSpec:
    """The network that is trained at one growth rate."""
    return densenet_bc(
        settings["depth"], growth_rate, batch_size=settings["batch_size"], in_channels=1
    )


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure all parts, growth rate by growth rate."""
    settings = record["settings"]
    rates, parts = settings["growth_rates"], settings["parts"]
    peers = len(settings["peers"])
    work = sum(rates) * settings["steps"] * peers * ("training" in parts)
    work += sum(rates) * settings["parity_steps"] * FLOAT64_WORK * peers * ("parity" in parts)
    work += len(rates) * peers * CHILD_WORK * ("memory" in parts)
    progress.start(work)
    images = digits_data.load(seed=settings["seed"])
    for rate in rates if "parity" in parts else ():
        progress.describe(f"agreement in float64, k={rate}")
        _train(rate, images, record, "parity", options.device, progress)
        save()
    for rate in rates if "training" in parts else ():
        progress.describe(f"training, k={rate}")
        _train(rate, images, record, "training", options.device, progress)
        save()
    for rate in rates if "memory" in parts else ():
        for peer in settings["peers"]:
            progress.describe(f"memory, k={rate}, {peer}")
            _measure_memory(rate, peer, record, options)
            progress.advance(CHILD_WORK)
            save()


def _train(
    rate: int,
    images: digits_data.Digits,
    record: Record,
    part: str,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train every peer, step by step in turn, and fill an entry of `record[part]` for each."""
    settings = record["settings"]
    parity = part == "parity"
    dtype = torch.float64 if parity else torch.float32
    steps = settings["parity_steps" if parity else "steps"]
    batch_size = settings["parity_batch_size" if parity else "batch_size"]
    spec = spec_for(rate, settings)
    state = initial_state(spec, settings["seed"])
    trainees = []
    for name in settings["peers"]:
        entry: dict[str, Any] = {"growth_rate": rate, "peer": name, "losses": [], "seconds": []}
        record[part].append(entry)
        trainees.append(_Trainee(name, spec, state, entry, steps, device, dtype))
    with tuned_libraries(device):
        for batch, labels in digits_data.batches(images, batch_size, steps, settings["seed"]):
            for trainee in trainees:
                trainee.step(batch, labels)
                progress.advance(rate * (FLOAT64_WORK if parity else 1))
        for trainee in trainees:
            trainee.test(images, settings["parity_test_images"] if parity else None)


class _Trainee:
    """One implementation in training; its figures go into `entry` step by step."""

    def __init__(
        self,
        name: str,
        spec: NetworkSpec,
        state: dict[str, Tensor],
        entry: dict[str, Any],
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.peer = PEERS[name]
        self.model = build(self.peer, spec, state, device=device, dtype=dtype)
        self.entry = entry
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        warmup = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
        )
        entry["parameters"] = sum(p.numel() for p in self.model.parameters())

    def _to_device(self, images: Tensor) -> Tensor:
        placed = images.to(device=self.device, dtype=self.dtype)
        return placed.contiguous(memory_format=self.peer.memory_format)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step; forward, loss and backward are timed, the optimizer is not."""
        images, labels = self._to_device(images), labels.to(self.device)
        losses = []
        self.optimizer.zero_grad(set_to_none=True)

        def forward_backward() -> None:
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            losses.append(loss.detach())

        self.entry["seconds"].append(timed(forward_backward, self.device))
        self.optimizer.step()
        self.schedule.step()
        self.entry["losses"].append(losses[0].item())

    @torch.no_grad()
    def test(self, images: digits_data.Digits, count: int | None, batch_size: int = 60) -> None:
        """Mean loss and accuracy on the first `count` test images, in evaluation mode."""
        self.model.eval()
        right, loss = 0, 0.0
        all_labels = images.test_labels[:count]
        for batch, labels in zip(
            images.test_images[:count].split(batch_size), all_labels.split(batch_size), strict=True
        ):
            logits = self.model(self._to_device(batch)).cpu()
            right += int((logits.argmax(dim=1) == labels).sum())
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        self.entry["test_accuracy"] = right / len(all_labels)
        self.entry["test_loss"] = loss / len(all_labels)


def _measure_memory(rate: int, peer: str, record: Record, options: Options) -> None:
    settings = record["settings"]
    case = MemoryCase(
        spec_for(rate, settings),
        peer,
        torch.get_num_threads(),
        str(options.device),
        settings["seed"],
    )
    entry: dict[str, Any] = {"growth_rate": rate, "peer": peer}
    release_cached(options.device)
    try:
        entry.update(asdict(measure_in_child(case)))
    except MeasurementError as error:
        entry["error"] = str(error)
    record["memory"].append(entry)
