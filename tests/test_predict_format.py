"""Files of predicted layers: what convert writes, what the reader refuses, the way back."""

from __future__ import annotations

import numpy as np
import pytest
from handmade import QT, Model, tiny_model
from test_format import number, rewrite, row, text

from gguf_tools import ConversionError, FormatError, SparseGGUF, convert, export, quants
from gguf_tools.convert import Calibrated, Calibration
from gguf_tools.inspect import inspect
from gguf_tools.predictor import Predictor
from gguf_tools.reader import STRING, GGUFFile
from gguf_tools.virtual import ModelFiles, virtual_header

Q8_0, F16 = quants.Q8_0, quants.F16


def lowrank(n_embd: int, n_ff: int, rank: int = 32, seed: int = 0, **figures: float) -> Predictor:
    """Random, but well formed."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, n_embd)), rng.standard_normal((n_ff, rank))
    return Predictor(
        "lowrank",
        Q8_0,
        quants.quantise(Q8_0, b),
        rng.standard_normal(n_ff).astype(np.float32),
        F16,
        quants.quantise(F16, a),
        **figures,
    )


def direct(n_embd: int, n_ff: int, seed: int = 0) -> Predictor:
    rng = np.random.default_rng(seed)
    b = quants.quantise(quants.Q4_0, rng.standard_normal((n_ff, n_embd)))
    return Predictor("direct", quants.Q4_0, b, np.zeros(n_ff, np.float32))


def predicted(path, model: Model, orders: dict | None = None, **ffns: Predictor) -> Calibration:
    """A file whose layers 0 (lowrank) and 1 (direct) are predicted, layer 2 exact."""
    found = {
        "0": Calibrated(predictor=lowrank(model.n_embd, model.n_ff, recall=0.97, computed=0.2), hot_count=7),
        "1": Calibrated(
            predictor=direct(model.n_embd, model.n_ff),
            frequency=np.linspace(0, 1, model.n_ff),
        ),
    }
    calibration = Calibration(found, text="a text", tokens=123, profile="ab" * 32)
    convert(model.path, path, activation="relu" if model.gated else None, order=orders, calibration=calibration)
    return calibration


@pytest.fixture(params=[True, False], ids=["gated", "ungated"])
def model(request, tmp_path) -> Model:
    return tiny_model(tmp_path / "m.gguf", gated=request.param, ggml_type=QT.F16, layers=(0, 1, 2))


@pytest.fixture
def gated(tmp_path) -> Model:
    return tiny_model(tmp_path / "m.gguf", ggml_type=QT.F16, layers=(0, 1, 2))


def test_what_is_written(tmp_path, model):
    order = {i: np.random.default_rng(i).permutation(model.n_ff) for i in model.layers}
    calibration = predicted(tmp_path / "s.gguf", model, order)
    parts = ["gate", "up", "down"] if model.gated else ["up", "down"]
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert (view.version, view.mode, view.segments, view.gated) == (2, "predict", parts, model.gated)
        low, straight, exact = view.layers
        assert (low.predictor.kind, low.predictor.rank) == ("lowrank", 32)
        assert (straight.predictor.kind, straight.predictor.rank) == ("direct", 0)
        assert exact.predictor is None and exact.decider.name == exact.decider_name
        assert exact.up_type == (1 if model.gated else None) and exact.gate_type is None
        assert [layer.hot_count for layer in view.layers] == [7, 0, 0]
        # Not every predictor's figures are known, so none are written.
        assert low.predictor.recall is None
        assert np.array_equal(
            straight.frequency[0], np.linspace(0, 1, model.n_ff).astype("f4")[order[1]]
        )
        for layer in (low, straight):
            assert layer.decider is None and layer.decider_name not in view.file.tensors
            rows = np.frombuffer(view.file.data(layer.bundle.name), np.uint8).reshape(model.n_ff, layer.stride)
            offsets = {"gate": layer.gate_offset, "up": layer.up_offset, "down": layer.down_offset}
            ends = 0
            for part in parts:
                raw = model.tensors[f"blk.{layer.index}.ffn_{part}.weight"].reshape(-1, 2 * model.n_ff)
                if part != "down":
                    raw = model.tensors[f"blk.{layer.index}.ffn_{part}.weight"].reshape(model.n_ff, -1)
                else:
                    raw = np.ascontiguousarray(raw.view(np.uint16).T).view(np.uint8)
                at = offsets[part]
                assert at == -(-ends // 64) * 64
                ends = at + raw.shape[1]
                assert np.array_equal(rows[:, at:ends], raw[order[layer.index]])
            given = calibration.ffns[str(layer.index)].predictor
            stored = np.frombuffer(view.file.data(layer.predictor.b_tensor.name), np.uint8)
            assert np.array_equal(stored.reshape(model.n_ff, -1), given.b[order[layer.index]])
            bias = np.frombuffer(view.file.data(layer.predictor.bias_tensor.name), "<f4")
            assert np.array_equal(bias, given.bias[order[layer.index]])
        assert view.file.data(low.predictor.a_tensor.name) == calibration.ffns["0"].predictor.a.tobytes()
        assert straight.predictor.a_tensor is None
        assert view.file.metadata["powerinfer.calibration.text"] == "a text"
        assert view.file.metadata["powerinfer.calibration.tokens"] == 123


def test_the_way_back(tmp_path, model):
    order = {i: np.random.default_rng(i).permutation(model.n_ff) for i in model.layers}
    predicted(tmp_path / "s.gguf", model, order)
    assert export(tmp_path / "s.gguf", tmp_path / "back.gguf").identical


def test_stock_is_shown_the_source(tmp_path, model):
    predicted(tmp_path / "s.gguf", model)
    with SparseGGUF.open(tmp_path / "s.gguf") as view, GGUFFile.open(model.path) as source:
        header, extents = virtual_header(ModelFiles(view.file, view))
        end = extents[-1].virtual_offset + extents[-1].size
        (tmp_path / "v.gguf").write_bytes(header.ljust(end, b"\0"))
        with GGUFFile.open(tmp_path / "v.gguf") as shown:
            expected = [(t.name, t.type, t.shape) for t in source.tensors.values()]
            assert [(t.name, t.type, t.shape) for t in shown.tensors.values()] == expected
            holes = {
                name for name, extent in zip(shown.tensors, extents, strict=True) if extent.file_offset < 0
            }
        parts = ("gate", "up", "down") if model.gated else ("up", "down")
        expected = {f"blk.{i}.ffn_{part}.weight" for i in (0, 1) for part in parts}
        assert holes == expected | {f"blk.2.ffn_{part}.weight" for part in parts[1:]}


def test_inspect_tells(tmp_path, model):
    predicted(tmp_path / "s.gguf", model)
    info = inspect(tmp_path / "s.gguf")
    assert info["mode"] == "predict"
    assert [layer["predictor"] for layer in info["layers"]] == ["lowrank", "direct", "none"]
    assert info["layers"][0]["predictor_bytes"] == 32 * 64 * 2 + 96 * 34 + 96 * 4
    assert info["layers"][1]["up_type"] == "F16"


def test_recall_is_kept_where_it_is_known(tmp_path, gated):
    found = {
        str(i): Calibrated(predictor=lowrank(gated.n_embd, gated.n_ff, recall=0.5 + i / 4, computed=0.25))
        for i in (0, 1)
    }
    report = convert(gated.path, tmp_path / "s.gguf", activation="relu", calibration=Calibration(found))
    assert [layer.recall for layer in report.layers] == [0.5, 0.75, None]
    assert report.mode == "predict" and not report.notes
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert [layer.predictor.recall for layer in view.layers[:2]] == [0.5, 0.75]
        assert view.layers[1].predictor.computed == 0.25


@pytest.mark.parametrize(
    ("kind", "activation", "why"),
    [
        (dict(n_expert=3), "relu", "mixtures of experts are not predicted"),
        (dict(bias=True), "relu", "biases"),
        (dict(), "silu", "never silent"),
    ],
    ids=["experts", "biases", "silu"],
)
def test_what_stays_exact_says_so(tmp_path, kind, activation, why):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.F16, **kind)
    unit = f"0{model.suffix}"
    calibration = Calibration({unit: Calibrated(predictor=lowrank(model.n_embd, model.n_ff))})
    report = convert(model.path, tmp_path / "s.gguf", activation=activation, calibration=calibration)
    assert report.mode == "exact" and len(report.notes) == 1 and why in report.notes[0]
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert (view.version, view.mode) == (1, "exact")


def test_thresholds(tmp_path, gated):
    values = np.linspace(0, 1, gated.n_ff, dtype="f4")
    order = np.random.default_rng(0).permutation(gated.n_ff)
    calibration = Calibration({"1": Calibrated(thresholds=values)}, threshold_kind="chess")
    convert(gated.path, tmp_path / "s.gguf", order={1: order}, calibration=calibration)
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert (view.version, view.mode, view.threshold_kind) == (1, "exact", "chess")
        assert view.layers[0].thresholds is None
        assert np.array_equal(view.layers[1].thresholds[0], values[order])
    assert export(tmp_path / "s.gguf", tmp_path / "back.gguf").identical
    bad = rewrite(
        tmp_path / "s.gguf", tensors={"blk.1.ffn_thresh.weight": (0, (96,), (values - 0.5).tobytes())}
    )
    with pytest.raises(FormatError, match=r"tensor blk\.1\.ffn_thresh\.weight: has negative thresholds"):
        SparseGGUF.open(bad)
    bad = rewrite(tmp_path / "s.gguf", **text("powerinfer.threshold.kind", "guess"))
    with pytest.raises(FormatError, match="powerinfer.threshold.kind: 'guess' is not one of cats, chess"):
        SparseGGUF.open(bad)
    bad = rewrite(tmp_path / "s.gguf", **text("powerinfer.activation", "relu"))
    with pytest.raises(FormatError, match="powerinfer.threshold.kind: relu neurons are silent without"):
        SparseGGUF.open(bad)


KINDS = "powerinfer.predictor.kind"
A, B, BIAS = (f"blk.0.ffn_pred_{part}.weight" for part in ("a", "b", "bias"))
BAD = {
    "mode": (text("powerinfer.mode", "guess"), "powerinfer.mode: 'guess' is not one of exact, predict"),
    "mode of version 1": (number("powerinfer.version", 1), "powerinfer.mode: predict in a file of version 1"),
    "exact after all": (text("powerinfer.mode", "exact"), "powerinfer.bundle.segments: 'gate, up, down'"),
    "no kinds": ({"drop": [KINDS]}, f"{KINDS}: is missing"),
    "no ranks": ({"drop": ["powerinfer.predictor.rank"]}, "powerinfer.predictor.rank: is missing"),
    "kind": (row(KINDS, ["tree", "direct", "none"], STRING), f"{KINDS}: 'tree'"),
    "kinds too few": (row(KINDS, ["lowrank", "direct"], STRING), f"{KINDS}: has 2 entries for 3 bundles"),
    "predictor lost": (row(KINDS, ["none", "direct", "none"], STRING), "rank: 32 for blk.0.ffn_bundle.weight"),
    "rank": (row("powerinfer.predictor.rank", [64, 0, 0], 4), f"shape of tensor {A}: [64, 32], expected"),
    "rank step": (row("powerinfer.predictor.rank", [33, 0, 0], 4), "rank: 33 for blk.0"),
    "rank of direct": (row("powerinfer.predictor.rank", [32, 32, 0], 4), "rank: 32 for blk.1"),
    "no a of linear": (
        {"drop": [A], **row(KINDS, ["linear", "direct", "none"], STRING)},
        f"tensor '{A}': is missing",
    ),
    "no a": ({"drop": [A]}, f"tensor '{A}': is missing"),
    "no b": ({"drop": [B]}, f"tensor '{B}': is missing"),
    "no bias": ({"drop": [BIAS]}, f"tensor '{BIAS}': is missing"),
    "b shape": ({"tensors": {B: (1, (64, 96), bytes(64 * 96 * 2))}}, f"shape of tensor {B}: [64, 96]"),
    "b type": ({"tensors": {B: (24, (32, 96), bytes(32 * 96))}}, f"type of tensor {B}: I8 holds no weights"),
    "bias shape": ({"tensors": {BIAS: (0, (95,), bytes(95 * 4))}}, f"shape of tensor {BIAS}: [95]"),
    "bias NaN": ({"tensors": {BIAS: (0, (96,), np.full(96, np.nan, "f4").tobytes())}}, f"{BIAS}: has NaN"),
    "a too wide": ({"tensors": {A: (1, (96, 32), bytes(96 * 64))}}, "powerinfer.bundle.stride: 384 bytes"),
    "gate type of an exact layer": (row("powerinfer.bundle.gate.type", [1, 1, 1]), "gate.type: is not -1"),
    "gate type of a predicted one": (row("powerinfer.bundle.gate.type", [-1, 1, -1]), "unknown ggml type -1"),
    "no gate types": ({"drop": ["powerinfer.bundle.gate.type"]}, "powerinfer.bundle.gate.type: is missing"),
    "silu": (text("powerinfer.activation", "silu"), "powerinfer.mode: no neuron can be predicted"),
    "gate beside the bundle": (
        {"tensors": {"blk.0.ffn_gate.weight": (1, (64, 96), bytes(64 * 96 * 2))}},
        "tensor blk.0.ffn_gate.weight: is present although it is also in a bundle",
    ),
    "gate of an exact layer lost": ({"drop": ["blk.2.ffn_gate.weight"]}, "'blk.2.ffn_gate.weight': is missing"),
    "thresholds too": (
        {"tensors": {"blk.0.ffn_thresh.weight": (0, (96,), bytes(96 * 4))}},
        "thresholds for a layer that is predicted",
    ),
    "predictor in the source": (
        row("powerinfer.source.tensors", [B], STRING),
        "powerinfer.source.tensors: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_field_by_field(tmp_path, gated, case):
    predicted(tmp_path / "s.gguf", gated)
    change, message = BAD[case]
    path = rewrite(tmp_path / "s.gguf", **change)
    with pytest.raises(FormatError) as error:
        SparseGGUF.open(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_bad_calibrations_are_refused(tmp_path, gated):
    good = lowrank(gated.n_embd, gated.n_ff)
    nan, halves = np.full(96, np.nan, np.float32), np.zeros((96, 128), np.uint8)
    cases = {
        "FFNs that this model does not have": {"7": Calibrated()},
        "hot neurons for layer 0": {"0": Calibrated(hot_count=97)},
        "frequency of layer 0": {"0": Calibrated(frequency=np.zeros(95))},
        "thresholds of layer 0": {"0": Calibrated(thresholds=-np.ones(96))},
        "neuron order of layer 0": {"0": Calibrated(order=np.zeros(96, int))},
        "B is not 96 rows of 32": {"0": Calibrated(predictor=lowrank(64, 95))},
        "A is not 32 rows of 64": {"0": Calibrated(predictor=lowrank(96, 96))},
        "rank 16": {"0": Calibrated(predictor=Predictor("lowrank", 8, good.b, good.bias, 1, good.a[:16]))},
        "a predictor and thresholds": {"0": Calibrated(predictor=good, thresholds=np.ones(96))},
        "B cannot be Q4_K": {"0": Calibrated(predictor=Predictor("direct", 12, good.b, good.bias))},
        "bias is not 96 numbers": {"0": Calibrated(predictor=Predictor("direct", 1, halves, nan))},
    }
    for message, found in cases.items():
        with pytest.raises(ConversionError, match=message):
            convert(gated.path, tmp_path / "s.gguf", activation="relu", calibration=Calibration(found))
    assert not (tmp_path / "s.gguf").exists()
