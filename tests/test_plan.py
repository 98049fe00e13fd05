"""`powerinfer plan` and what it stands on: hit rates, runs of reads, what a device's reads cost, the cost model.

Speeds are given, not measured, wherever a number is compared: no test looks at how fast this machine is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import typer
from rich.console import Console
from typer.testing import CliRunner

from gguf_tools import quants
from gguf_tools.convert import Calibrated, Calibration, convert
from gguf_tools.errors import ConversionError
from gguf_tools.predictor import Predictor
from powerinfer_ext import disk, hits, plan
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.placement import Context, place

DEVICE = disk.DiskCost(latency=1e-5, bandwidth=1e9, round_trip=1e-4)
SPEEDS = plan.Speeds(stock=20e9, panels=20e9, experts=20e9, neurons=10e9, memory=30e9, disk=DEVICE)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "_measured", {})
    yield tmp_path / "cache" / "powerinfer-ext" / "disk.json"


# ---- hit rates and reads -----------------------------------------------------------------------------


def test_hit_rates_from_frequencies() -> None:
    even = hits.of_neurons([np.full((1, 1000), 0.1, np.float32)])
    assert even.source == hits.FREQUENCIES
    assert even(0.3) == pytest.approx(0.3, abs=0.01)
    frequency = np.array([[0.0, 0.9, 0.0, 0.1]], np.float32)  # in any order
    uneven = hits.of_neurons([frequency])
    assert uneven(0.25) == pytest.approx(0.9, abs=0.01) and uneven(0.5) == pytest.approx(1.0, abs=0.01)
    both = hits.of_neurons([frequency, np.full((1, 4), 0.25, np.float32)])
    assert both(0.25) == pytest.approx((0.9 + 0.25) / 2, abs=0.01)
    assert hits.of_neurons([]).source == hits.STORED == hits.of_neurons([np.zeros((1, 4), np.float32)]).source
    for curve in (even, hits.of_neurons(None), hits.of_experts(), hits.dense()):
        found = [curve(share) for share in np.linspace(0, 1, 50)]
        assert found[0] == 0 and found[-1] == pytest.approx(1) and found == sorted(found)


def test_a_predictor_that_selects_more_makes_requests_less_concentrated() -> None:
    rng = np.random.default_rng(1)
    tendency = rng.standard_normal((1, 2000)) - 1.5
    fires = tendency[..., None] + rng.standard_normal((1, 2000, 4000))  # of every neuron, for 4000 tokens
    frequency = (fires > 0).mean(axis=2).astype(np.float32)
    for margin in (0.3, 0.8):  # a predictor that cannot tell what fires from what nearly does
        selected = (fires > -margin).mean(axis=2)
        share = float(selected.mean())
        found = hits.selected(frequency.astype(np.float64), share)
        assert found.mean() == pytest.approx(share, rel=0.01)
        cached = np.sort(selected.ravel())[::-1][:400].sum() / selected.sum()
        assert hits.of_neurons([frequency], share)(0.2) == pytest.approx(cached, abs=0.01)
        assert hits.of_neurons([frequency])(0.2) > cached + 0.04
    assert np.array_equal(hits.selected(frequency, 0.01), frequency)  # it cannot select less than fires
    assert hits.computed([]) is None


def test_neighbours_are_read_together() -> None:
    unit = 1000
    assert plan.runs(0, 100, unit, 5000) == (0.0, 0.0)
    alone = plan.runs(10, 1e6, unit, 0)
    assert alone[0] == pytest.approx(10, rel=0.01) and alone[1] == pytest.approx(10 * unit + 10 * 512, rel=0.01)
    rng = np.random.default_rng(0)
    for share, gap in ((0.05, 4000), (0.2, 2000), (0.4, 0)):
        places = np.flatnonzero(rng.random(200_000) < share)
        steps = np.diff(places)
        joined = (steps - 1) * unit <= gap
        reads, n_bytes = plan.runs(len(places), 200_000, unit, gap)
        assert reads == pytest.approx(1 + np.count_nonzero(~joined), rel=0.06)
        through = (steps[joined] - 1).sum() * unit
        assert n_bytes - reads * 512 == pytest.approx(len(places) * unit + through, rel=0.06)


# ---- the device --------------------------------------------------------------------------------------


def _file(folder: Path) -> Path:
    path = folder / "data"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def test_a_device_is_measured_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path)
    found = disk.cost(path)
    if found is None:
        pytest.skip("the temporary folder has no O_DIRECT")
    assert found.latency >= 0 and found.bandwidth > 1e6 and found.round_trip >= found.latency
    monkeypatch.setattr(disk, "_measure", lambda *arguments: pytest.fail("measured again"))
    assert disk.cost(path) == found
    disk._measured.clear()  # as a new process
    assert disk.cost(path) == found
    assert disk.gap(path) == min(found.gap, disk.RUN // 2)
    assert disk.flight(path) == max(MIB, int(found.bandwidth * disk.FLIGHT))
    assert [name.name for name in cache.parent.iterdir()] == ["disk.json"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"254:0": 3}', "\x00", '{"DEVICE": {"latency": 1, "time": 0}}'])
def test_a_damaged_cache_is_measured_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    status = os.stat(tmp_path)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("DEVICE", device))
    monkeypatch.setattr(disk, "_measure", lambda *arguments: DEVICE)
    assert disk.cost(_file(tmp_path)) == DEVICE
    entry = json.loads(cache.read_text())[device]
    assert entry["latency"] == DEVICE.latency and entry["time"] > 0
    entry["time"] -= 365 * 24 * 3600
    cache.write_text(json.dumps({device: entry, "other": entry}))
    disk._measured.clear()
    monkeypatch.setattr(disk, "_measure", lambda *arguments: replace(DEVICE, latency=2e-5))
    assert disk.cost(_file(tmp_path)).latency == 2e-5  # a year is too old
    assert set(json.loads(cache.read_text())) == {device, "other"}


def test_a_cache_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(disk, "_measure", lambda *arguments: DEVICE)
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert disk.cost(_file(tmp_path)) == DEVICE
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    disk._measured.clear()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert disk.cost(_file(tmp_path)) == DEVICE
    assert list((tmp_path / "full" / "powerinfer-ext").iterdir()) == []  # nothing half-written stays


def test_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert disk.cost(small) is None and disk.cost(tmp_path / "nothing") is None
    assert disk.gap(small) == disk.GAP and disk.flight(small) > MIB
    monkeypatch.setattr(disk, "_measure", lambda *arguments: None)  # a tmpfs
    assert disk.cost(_file(tmp_path)) is None


# ---- the cost model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, wide_relu: tuple[Path, Path]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("plan")
    mixture = tiny_models.make(
        folder / "mixture.gguf", "qwen3moe", n_layer=4, n_ff=2048, n_expert=16, n_expert_used=2, quant="F16"
    )
    stock, sparse = map(str, wide_relu)
    return {"stock": stock, "sparse": sparse, "mixture": str(mixture)}


def _planned(name: str, memory: str | int | None, **more: Any) -> dict[str, Any]:
    return json.loads(json.dumps(plan.plan(name, memory, speeds=SPEEDS, process=50 * MIB, n_ctx=64, **more)))


def test_everything_in_memory_costs_what_it_touches(files: dict[str, str]) -> None:
    found = _planned(files["sparse"], None, density=0.25)
    (row,) = found["placements"]
    assert row["placement"] == "all in memory" and row["missing_bytes"] == row["disk_s"] == 0
    matrix = 256 * 16384 * 2
    rest = found["bytes"] - 4 * 2 * matrix
    assert row["touched_bytes"] == pytest.approx(4 * matrix + 0.25 * 4 * matrix, abs=rest)
    fixed = 4 * plan._BLOCK
    expected = 4 * matrix / SPEEDS.stock + 0.25 * 4 * matrix / SPEEDS.neurons + fixed
    assert row["compute_s"] == pytest.approx(expected, abs=rest / SPEEDS.stock)
    assert row["decode_tps"] == pytest.approx(1 / row["compute_s"])
    assert found["choice"]["placement"] == "all in memory" and found["choice"]["reason"] == "everything fits"
    assert any("25.0% of the (routed) neurons" in line for line in found["assumptions"])


def test_slow_first_readings_are_mentioned_where_something_is_read(files: dict[str, str]) -> None:
    slow = replace(SPEEDS, disk=replace(DEVICE, first=50.0))
    less = _planned(files["sparse"], None)["placements"][0]["memory"] - 16 * MIB
    for speeds, budget, said in ((slow, less, True), (slow, None, False), (SPEEDS, less, False)):
        found = plan.plan(files["sparse"], budget, speeds=speeds, process=50 * MIB, n_ctx=64)
        assert found["choice"] is not None and (found["choice"]["reads"] > 0) == (budget is not None)
        assert any("50 times as long" in line for line in found["assumptions"]) == said


def test_predictors_for_a_budget_are_recommended_where_there_are_predictors(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n_embd, n_ff = 256, 16384
    matrices = [quants.quantise(quants.Q8_0, np.zeros(shape)) for shape in ((n_ff, 32), (32, n_embd))]
    low = Predictor("lowrank", quants.Q8_0, matrices[0], np.zeros(n_ff, np.float32), quants.Q8_0, matrices[1])
    each = {str(i): Calibrated(predictor=low) for i in range(4)}
    calibration = Calibration(each, text="t", tokens=1, profile="ab" * 32)
    convert(files["stock"], tmp_path / "predicted.gguf", calibration=calibration)
    for path, recommended in ((str(tmp_path / "predicted.gguf"), True), (files["sparse"], False)):
        budget = _planned(path, None)["placements"][0]["memory"] - 16 * MIB
        found = plan.plan(path, budget, speeds=SPEEDS, process=50 * MIB, n_ctx=64)
        assert found["choice"]["reads"] > 0
        plan.render(found, Console(width=160))
        slots = found["choice"]["predicted_slots"]
        assert (slots > 0) == recommended == (f"--hot-memory {slots / 1e6:.0f}" in capsys.readouterr().out)


def test_less_memory_is_slower_and_too_little_is_refused(files: dict[str, str]) -> None:
    for kind in ("sparse", "mixture"):
        least = next(
            row["memory"] for row in _planned(files[kind], "64MiB")["placements"] if "streamed" in row["placement"]
        )
        whole = _planned(files[kind], None)["placements"][0]["memory"]
        budgets = np.linspace(least + 4 * MIB, whole - MIB, 5).astype(int)
        found = [_planned(files[kind], int(budget)) for budget in budgets]
        speeds = [entry["choice"]["decode_tps"] for entry in found]
        missing = [entry["choice"]["missing_bytes"] for entry in found]
        assert speeds == sorted(speeds) and missing == sorted(missing, reverse=True)
        for entry, budget in zip(found, budgets, strict=True):
            assert entry["choice"]["memory"] <= budget
            assert entry["choice"]["disk_s"] > 0 and "ms of reading" in entry["choice"]["reason"]
        refused = _planned(files[kind], "64MiB")
        assert refused["choice"] is None and all(
            row["decode_tps"] is None and "takes" in row["reason"] for row in refused["placements"] if row["ours"]
        )


def test_the_choice_is_what_loading_does(files: dict[str, str]) -> None:
    from gguf_tools.virtual import ModelFiles

    for kind in ("sparse", "mixture"):
        whole = _planned(files[kind], None)["placements"][0]["memory"]
        with ModelFiles.open(files[kind]) as opened:
            placed = place(opened, whole - MIB, Context(64, 64, 64, process=50 * MIB))
        choice = _planned(files[kind], whole - MIB)["choice"]
        assert placed.streams and choice["memory"] == placed.total <= whole - MIB
        assert choice["placement"] == plan._name(placed) != "all in memory"


def test_a_stock_model_is_also_planned_as_converted(files: dict[str, str]) -> None:
    found = _planned(files["stock"], None)
    models = {row["model"] for row in found["placements"]}
    assert models == {files["stock"], f"{files['stock']}, converted"}
    converted = next(row for row in found["placements"] if row["model"].endswith("converted"))
    real = _planned(files["sparse"], None)["placements"][0]
    assert converted["touched_bytes"] == pytest.approx(real["touched_bytes"], rel=0.02)
    assert converted["memory"] == pytest.approx(real["memory"], rel=0.02)
    assert any(row["placement"] == "stock, mapped" and not row["ours"] for row in found["placements"])
    only = _planned(files["mixture"], None)
    assert {row["model"] for row in only["placements"]} == {files["mixture"]}  # SwiGLU: nothing to convert for


def test_a_shape_without_a_file() -> None:
    found = _planned("qwen3-30b-a3b", "8GiB", quant="Q4_0")
    assert found["bytes"] == pytest.approx(17.3e9, rel=0.02) and found["budget"] == 8 << 30
    streamed = next(row for row in found["placements"] if row["placement"] == "experts streamed")
    assert streamed["decode_tps"] > 0 and 0.3 < streamed["hit_rate"] < 0.9
    assert found["choice"]["placement"] == "experts streamed"
    expected = 48 * 8 * 3 * 768 * 2048 * 18 / 32 * (1 - streamed["hit_rate"])  # layers, experts, matrices of Q4_0
    assert streamed["missing_bytes"] == pytest.approx(expected, rel=0.02)
    shapes = [row["model"] for row in _planned("smallthinker-21b-a3b", "50%", layers=4, density=0.4)["placements"]]
    assert "smallthinker-21b-a3b, converted" in shapes
    with pytest.raises(ConversionError, match="layers"):
        _planned("qwen3-30b-a3b", "8GiB", layers=1000)


def test_bad_input(files: dict[str, str]) -> None:
    with pytest.raises(PowerInferError, match="none of 50%"):
        _planned(files["sparse"], "lots")
    with pytest.raises(PowerInferError, match="for the name of a shape"):
        _planned(files["sparse"], None, quant="Q4_0")
    with pytest.raises(PowerInferError, match="no such file.*shapes are.*qwen3"):
        plan._named("no-such-model")


def test_no_disk_to_measure(files: dict[str, str]) -> None:
    blind = replace(SPEEDS, disk=None)
    found = plan.plan(files["mixture"], 200 * MIB, speeds=blind, process=50 * MIB, n_ctx=64)
    assert found["choice"] is None or found["choice"]["placement"] == "all in memory"
    assert any("cannot be measured" in row["reason"] for row in found["placements"])


def test_command(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_WHOLE", 1 << 20)
    monkeypatch.setattr(plan.machine, "last_level_cache", lambda: 0)
    app = typer.Typer()
    app.command()(plan.command)
    shown = CliRunner().invoke(app, [files["sparse"], "--memory", "240MB", "--ctx", "64"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert "Choice: " in shown.output and "tokens/s" in shown.output and "Assumed: " in shown.output
    found = json.loads(CliRunner().invoke(app, [files["mixture"], "--json"]).stdout)
    assert found["choice"]["decode_tps"] > 0 and found["speeds"]["stock_gbps"] > 0
    refused = CliRunner().invoke(app, [files["sparse"], "--memory", "64MiB"])
    assert refused.exit_code == 1 and "No placement fits" in refused.output
