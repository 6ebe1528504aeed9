"""`growth` and `depth` cover what they name, and say how figures grow and where ours is slower."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure, memory, peers
from benchmarks.environment import describe
from benchmarks.networks import NetworkSpec
from benchmarks.peers import BASIC_PEERS
from benchmarks.suites import Options, depth, growth, step, sweep_page

MIB = 2**20
CPU = torch.device("cpu")
QUIET = ["--no-progress", "--device", "cpu"]
SUITES = {"growth": growth, "depth": depth}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of few layers, and batches of two and of three images."""
    monkeypatch.setattr(growth, "DEPTH", 10)
    monkeypatch.setattr(growth, "BATCH_SIZE", 2)
    monkeypatch.setattr(depth, "BATCH_SIZE", 3)
    monkeypatch.setattr(depth, "GROWTH_RATE", 4)


def values(record: dict[str, Any]) -> list[int]:
    return [case["value"] for case in record["settings"]["cases"]]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("suite", "ends"), [("growth", (8, 48)), ("depth", (40, 250))])
def test_suites_reach_from_end_to_end(suite: str, ends: tuple[int, int], full: bool) -> None:
    record = SUITES[suite].plan(Options(full=full))
    assert min(values(record)) <= ends[0] and max(values(record)) == ends[1]
    assert len(values(record)) >= sweep_page.LEAST_POINTS  # how figures grow can be said
    titles = [case["network"] for case in record["settings"]["cases"]]
    assert len(set(titles)) == len(titles) == len(record["settings"]["networks"])
    assert record["settings"]["parts"] == ["memory", "time", "inference"]


def test_values_that_are_named_are_measured() -> None:
    assert values(growth.plan(Options(growth_rates=(20, 7)))) == [20, 7]
    record = depth.plan(Options(depths=(10, 22, 28, 100, 250, 256)))
    assert values(record) == [10, 22, 28, 100, 250, 256]
    images = {network["batch_size"] for network in record["settings"]["networks"]}
    assert images == {depth.BATCH_SIZE}  # nothing but the depth differs


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_parameters_and_flops_are_those_of_the_network(dims: int) -> None:
    settings = growth.plan(Options(growth_rates=(12,), dims=dims))["settings"]
    (case,), (network,) = settings["cases"], settings["networks"]
    spec = NetworkSpec.from_json(network)
    assert len(spec.input_shape) == 2 + dims
    model = peers.build_torchvision(spec, memory_efficient=False)
    assert case["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        memory.training_step(model, *memory.make_batch(spec, torch.contiguous_format, CPU, 0))
    assert case["flops"] == counter.get_total_flops()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("suite", "chosen", "heading"),
    [
        ("growth", ["--growth-rates", "4,6"], "## Growth rates at depth 10"),
        ("depth", ["--depths", "10,16"], "## Depths at k=4"),
        ("depth", ["--depths", "10,16", "--dims", "1"], "## Depths at k=4, 1-D"),
        ("growth", ["--growth-rates", "4,6", "--dims", "3"], "## Growth rates at depth 10, 3-D"),
    ],
)
def test_small_run(
    suite: str, chosen: list[str], heading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [suite, *QUIET, *chosen, "--rounds", "2", "--parts", "time,inference"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{suite}.{suffix}" for suffix in ("md", "json", "png", "svg")}
    record = json.loads((tmp_path / f"{suite}.json").read_text())
    assert record["complete"]
    compared = record["settings"]["peers"]
    assert set(compared) <= set(BASIC_PEERS) and (len(compared) < len(BASIC_PEERS)) == (
        "--dims" in chosen
    )
    for part in ("time", "inference"):
        assert [len(entry["seconds"]) for entry in record[part]] == [2] * 2 * len(compared)
    assert not record["memory"]
    assert len(sweep_page.comparisons(record)) == 2 * 2 * 3  # cases, parts, modes
    text = (tmp_path / f"{suite}.md").read_text()
    assert heading in text
    assert "MiB |" not in text
    assert "—" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    printed = capsys.readouterr().out
    assert re.search(r"\b12\W+comparisons with the naive network in its faster layout", printed)


@pytest.mark.usefixtures("tiny")
def test_memory_is_in_the_table_and_cases_that_do_not_fit_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        if case.peer == "naive":
            raise measure.MeasurementError("does not fit")
        peak = (64 if case.peer == "naive-channels-last" else 16) * MIB
        return memory.StepMemory(peak, peak, 8 * MIB, peak, MIB)

    monkeypatch.setattr(memory, "measure_in_child", measured)
    arguments = ["depth", *QUIET, "--depths", "10", "--parts", "memory", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    text = (tmp_path / "depth.md").read_text()
    assert "DenseNet-BC-10 (k=4), 3×3×32×32, naive: does not fit" in text
    (row,) = (line for line in text.splitlines() if 'checkpoint="none"' in line)
    assert [cell.strip() for cell in row.split("|")][-4:-1] == ["16.0", "4.00×", "8.0"]
    assert "Nothing was measured side by side" in text


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_keeps_its_cases_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def interleave(calls: Any, *arguments: Any, **named: Any) -> None:
        if len(timed) == 2:
            next(iter(named["times"].values())).append(1.0)
            raise KeyboardInterrupt
        measure.interleave(calls, *arguments, **named)
        timed.append((tmp_path / "growth.json").exists())

    arguments = ["growth", *QUIET, "--growth-rates", "4,6", "--rounds", "1"]
    arguments += ["--parts", "time,inference"]
    arguments += ["--peers", "naive,ours-none", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(step, "interleave", interleave)
        assert cli.main(arguments) == cli.INTERRUPTED
    assert timed == [False, True]
    text = (tmp_path / "growth.md").read_text()
    assert "the results below are partial" in text
    assert re.search(r"\b2\W+comparisons", text)
    before = json.loads((tmp_path / "growth.json").read_text())
    assert [len(entry["seconds"]) for entry in before["time"]] == [1, 1, 1, 0]

    assert cli.main([*arguments, "--resume"]) == 0
    after = json.loads((tmp_path / "growth.json").read_text())
    assert after["complete"]
    assert after["time"][:2] == before["time"][:2]
    assert after["inference"][:2] == before["inference"]
    assert [len(entry["seconds"]) for entry in after["time"]] == [1] * 4
    assert len({entry["network"] for entry in after["time"]}) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "there is nothing to resume"),
        (lambda path: path.write_text("{"), "is not a record of results"),
        (lambda path: path.write_text("[]"), "it holds no object"),
        (
            lambda path: path.write_text(path.read_text().replace('"rounds": 1', '"rounds": 2')),
            "its rounds is 2, and now it is 1",
        ),
        (
            lambda path: path.write_text(
                re.sub(r'"threads": \d+', '"threads": 77', path.read_text())
            ),
            "its threads is 77",
        ),
    ],
    ids=["missing", "broken", "list", "settings", "machine"],
)
def test_only_the_same_run_is_resumed(
    change: Callable[[Path], object],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["growth", *QUIET, "--growth-rates", "4", "--rounds", "1", "--parts", "inference"]
    arguments += ["--peers", "ours-none", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    change(tmp_path / "growth.json")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--resume"])
    assert words in capsys.readouterr().err


def test_fits_tell_lines_from_parabolas() -> None:
    _, share = sweep_page.fitted([(d, 3.0 + 2 * d) for d in (10, 20, 40, 80)])
    assert share in ("0.0 %", "-0.0 %")
    fit, share = sweep_page.fitted([(d, 2.0 * d * d) for d in (10, 20, 40, 80)])
    assert share == "100.0 %"
    assert fit.endswith("+2·d²")


def test_growth_with_depth_is_on_the_page() -> None:
    record = depth.plan(Options(depths=(22, 40, 100, 190), peers=("naive", "ours-block")))
    for case in record["settings"]["cases"]:
        for peer, size in (("naive", case["value"] ** 2), ("ours-block", case["value"])):
            bytes_ = size * case["images"] * MIB
            entry = asdict(memory.StepMemory(bytes_, bytes_, bytes_, bytes_, MIB))
            record["memory"].append({"network": case["network"], "peer": peer, **entry})
    record.update(command="", complete=True, environment=describe(torch.device("cpu")))
    text = sweep_page.page(record).markdown().split("## How it grows")[1]
    shares = {
        row.split("|")[1].strip(): row.split("|")[3].strip()
        for row in text.splitlines()
        if row.startswith("| peak memory")
    }
    assert shares["peak memory, MiB, naive, contiguous"] == "100.0 %"
    assert shares['peak memory, MiB, densenet_fast, checkpoint="block"'].strip("-") == "0.0 %"
    assert sweep_page.figure(record) is not None


def filled(own: Callable[[int, str], float]) -> dict[str, Any]:
    """A complete record in which the faster naive layout takes a second everywhere."""
    names = ("naive", "naive-channels-last", "ours-none", "ours-block")
    record = growth.plan(Options(growth_rates=(8, 48), peers=names))
    for case in record["settings"]["cases"]:
        for part in ("time", "inference"):
            for peer, least in (("naive", 2.0), ("naive-channels-last", 1.0)):
                entry = {"network": case["network"], "peer": peer, "seconds": [least, 3.0]}
                record[part].append(entry)
            for peer in names[2:]:
                seconds = [9.0, own(case["value"], part)]
                record[part].append({"network": case["network"], "peer": peer, "seconds": seconds})
    record.update(command="", complete=True, environment=describe(torch.device("cpu")))
    return record


def test_verdict_of_a_sweep_without_a_slower_case() -> None:
    record = filled(lambda rate, part: 0.8 if (rate, part) == (48, "inference") else 0.5)
    text = sweep_page.page(record).markdown()
    assert "**densenet_fast is slower in none of 8** comparisons" in text
    assert "Closest: inference of DenseNet-BC-40 (k=48), 32×3×32×32, ours-none: 1.250×." in text
    assert not growth.failures(record)


def test_verdict_names_every_slower_case() -> None:
    record = filled(lambda rate, part: 1.25 if (rate, part) == (8, "time") else 1.0)
    lines = sweep_page.page(record).markdown().splitlines()
    assert "**densenet_fast is slower in 2 of 8** comparisons" in "\n".join(lines)
    assert [line for line in lines if line.startswith("- ")] == [
        f"- training step of DenseNet-BC-40 (k=8), 32×3×32×32, {peer}: 0.800×"
        for peer in ("ours-none", "ours-block")
    ]
    assert sweep_page.figure(record) is not None


def test_nothing_is_judged_without_naive() -> None:
    record = filled(lambda rate, part: 1.0)
    for part in ("time", "inference"):
        record[part] = [entry for entry in record[part] if entry["peer"].startswith("ours")]
    assert not sweep_page.comparisons(record)
    assert sweep_page.figure(record) is None


@pytest.mark.parametrize("suite", SUITES)
def test_a_peer_that_builds_none_of_the_networks_is_refused(
    suite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([suite, *QUIET, "--peers", "naive,resnet50"])
    assert "the peer 'resnet50' builds none of the networks measured" in capsys.readouterr().err
