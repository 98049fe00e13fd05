"""`powerinfer calibrate`: what a profile holds, against traces and the weights; interruption, damage, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make

from gguf_tools import FormatError, GGUFFile, SparseGGUF, convert, quants
from gguf_tools.profile import Profile, fingerprint
from powerinfer_ext import PowerInferError
from powerinfer_ext import calibrate as calibration
from powerinfer_ext.calibrate import calibrate, summary
from powerinfer_ext.trace import record

WORDS = "the quick brown fox jumps over the lazy dog while (a.b) reads: every word of it, "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate")
    rng = np.random.default_rng(0)
    words = WORDS.split()
    (path / "text.txt").write_text(" ".join(rng.choice(words, 3000)))
    make(path / "arcee.gguf", "arcee", quant="F16", density=0.15, n_ff=256, n_embd=128)
    make(path / "reglu.gguf", "llama", quant="F16", density=0.15, n_ff=256, n_embd=128, hint_activation="relu")
    make(path / "drelu.gguf", "llama", quant="F16", density=0.15, n_ff=256, n_embd=128, hint_activation="drelu")
    make(path / "swiglu.gguf", "llama", quant="F16", n_ff=256, n_embd=128)
    make(path / "moe.gguf", "smallthinker", quant="F16", density=0.15, n_ff=64, n_embd=128)
    return path


def profiled(folder: Path, name: str, **settings) -> Profile:
    out = folder / f"{name}.profile"
    return calibrate(str(folder / f"{name}.gguf"), [folder / "text.txt"], out, tokens=2560, **settings)


def weights(path: Path, name: str) -> np.ndarray:
    with GGUFFile.open(path) as file:
        tensor = file.tensors[name]
        raw = np.frombuffer(file.data(name), np.uint8).reshape(tensor.shape[1], -1)
        return quants.dequantise(tensor.type, raw, tensor.shape[0])


@pytest.mark.parametrize(("name", "part"), [("arcee", "up"), ("reglu", "gate"), ("drelu", "gate")])
def test_masks_are_what_the_inputs_give(folder: Path, name: str, part: str) -> None:
    profile = profiled(folder, name)
    assert profile.complete and profile.tokens == 2560 and list(profile.ffns) == ["0", "1"]
    for unit in profile.ffns:
        x, masks = profile.array("x", unit).astype(np.float32), profile.masks(unit)
        assert x.shape == (2560, 128) and masks.shape == (2560, 256)
        product = x @ weights(folder / f"{name}.gguf", f"blk.{unit}.ffn_{part}.weight").T
        expected = product > 0
        if name == "drelu":
            expected &= x @ weights(folder / f"{name}.gguf", f"blk.{unit}.ffn_up.weight").T > 0
        assert np.mean(expected == masks) > 0.999  # inputs are kept in half precision
        np.testing.assert_allclose(profile.frequency(unit), masks.mean(axis=0), rtol=1e-6)


def test_it_sees_what_trace_sees(folder: Path) -> None:
    profile = profiled(folder, "arcee")
    trace = record(str(folder / "arcee.gguf"), (folder / "text.txt").read_text(), tokens=2560, window=512)
    for layer in trace.layers:
        assert np.mean(np.unpackbits(layer.bits, axis=-1) == profile.masks(layer.unit)) > 0.9999


def test_neurons_are_numbered_as_in_the_source(folder: Path) -> None:
    order = {i: np.random.default_rng(i).permutation(256) for i in (0, 1)}
    convert(folder / "arcee.gguf", folder / "permuted.gguf", order=order)
    straight, permuted = profiled(folder, "arcee"), profiled(folder, "permuted")
    assert permuted.meta["fingerprint"] == straight.meta["fingerprint"]
    for unit in straight.ffns:
        assert np.mean(straight.masks(unit) == permuted.masks(unit)) > 0.9999


def test_magnitudes_for_thresholds(folder: Path) -> None:
    profile = profiled(folder, "swiglu")
    assert profile.frequency("0") is None and profile.masks("0") is None
    gate, up = profile.array("gate", "1"), profile.array("up", "1")
    assert gate.shape == up.shape and gate.shape[1] == 256 and 400 <= len(gate) <= 600
    assert (gate >= 0).all() and (up >= 0).all()
    x = profile.array("x", "1").astype(np.float32)
    product = x @ weights(folder / "swiglu.gguf", "blk.1.ffn_gate.weight").T
    act = np.abs(product / (1 + np.exp(-product)))
    assert np.quantile(gate, 0.5) == pytest.approx(np.quantile(act, 0.5), rel=0.05)


def test_experts(folder: Path) -> None:
    profile = profiled(folder, "moe")
    assert list(profile.ffns) == ["0_exps", "1_exps"]
    experts = profile.array("experts", "0_exps")
    assert experts.shape == (2560, 2)
    frequency = profile.frequency("0_exps")
    bits = np.unpackbits(profile.array("bits", "0_exps"), axis=-1)
    for expert in range(4):
        assert frequency[expert] == pytest.approx(bits[experts == expert].mean(axis=0), rel=1e-6)
    layer = summary(profile)["layers"][0]
    assert sum(layer["expert_load"]) == pytest.approx(2)


def test_a_shared_fingerprint(folder: Path) -> None:
    convert(folder / "reglu.gguf", folder / "reglu.sparse.gguf")
    with GGUFFile.open(folder / "reglu.gguf") as stock, GGUFFile.open(folder / "reglu.sparse.gguf") as sparse:
        assert fingerprint(stock) == fingerprint(sparse)
    with GGUFFile.open(folder / "drelu.gguf") as other:
        assert fingerprint(other) != fingerprint(GGUFFile.open(folder / "arcee.gguf"))
        with pytest.raises(FormatError, match=r"the profile of another model \('arcee.gguf'\), not of .*drelu.gguf"):
            profiled(folder, "arcee").check_model(other)


def test_an_interrupted_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profiled(folder, "arcee")
    out = folder / "interrupted.profile"
    read = []

    def interrupted(done: int, total: int) -> None:
        read.append(done)
        if done > 2048:
            raise KeyboardInterrupt

    arguments = (str(folder / "arcee.gguf"), [folder / "text.txt"], out)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*arguments, tokens=2560, progress=interrupted)
    partial = Profile.open(out)
    assert partial.done == 1 and not partial.complete and partial.tokens == 2048
    read.clear()
    again = calibrate(*arguments, tokens=2560, progress=lambda done, total: read.append(done))
    assert read == [2560]
    assert again.complete
    for unit in whole.ffns:
        assert np.array_equal(whole.array("bits", unit), again.array("bits", unit))
    with pytest.raises(FormatError, match="holds another profile .*tokens"):
        calibrate(*arguments, tokens=1024)
    (folder / "other.txt").write_text("another text " * 1000)
    with pytest.raises((FormatError, PowerInferError), match="another"):
        calibrate(arguments[0], [folder / "other.txt"], out, tokens=2560)


def test_a_profile_is_bounded(folder: Path) -> None:
    profile = calibrate(
        str(folder / "arcee.gguf"), [folder / "text.txt"], folder / "small.profile", tokens=4096, disk=1 << 20
    )
    assert profile.meta["stored"] > 1 and profile.n_chunks == 2
    assert len(profile.array("x", "0")) == 2048  # of 4096
    with GGUFFile.open(folder / "arcee.gguf"):
        assert profile.array("count", "0").sum() > profile.masks("0").sum()


def test_temporary_files_go(folder: Path) -> None:
    profiled(folder, "drelu")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "short.txt").write_text("too short")
    model = str(folder / "arcee.gguf")
    with pytest.raises(PowerInferError, match=r"short.txt: \d+ tokens of text are too few"):
        calibrate(model, [folder / "short.txt"], folder / "x.profile")
    assert not (folder / "x.profile").exists()
    with pytest.raises(FormatError, match="is not a profile; make one with: powerinfer calibrate"):
        Profile.open(folder / "nothing")
    (folder / "odd.profile").mkdir()
    (folder / "odd.profile" / "profile.json").write_text("[]")
    with pytest.raises(FormatError, match="is not the description of a profile"):
        Profile.open(folder / "odd.profile")
    profile = profiled(folder, "arcee")
    described = json.loads((profile.folder / "profile.json").read_text())
    del described["meta"]["tokens"]
    (folder / "odd.profile" / "profile.json").write_text(json.dumps(described))
    with pytest.raises(FormatError, match="tokens is missing"):
        Profile.open(folder / "odd.profile")
    broken = calibrate(model, [folder / "text.txt"], folder / "broken.profile", tokens=600)
    chunk = broken.folder / "chunk-00000.npz"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"chunk-00000.npz: is damaged .*; remove it and run powerinfer calibrate"):
        broken.array("x", "0")


def test_values_that_are_no_numbers_name_the_layer(folder: Path) -> None:
    path = folder / "nan.gguf"
    path.write_bytes((folder / "arcee.gguf").read_bytes())
    with GGUFFile.open(path) as file:
        tensor = file.tensors["blk.1.ffn_norm.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(PowerInferError, match=r"nan.gguf: layer 1: \d+ of \d+ values of its FFN's inputs are not numb"):
        calibrate(str(path), [folder / "text.txt"], folder / "nan.profile", tokens=600)


def test_predicted_files_cannot_be_profiled(folder: Path) -> None:
    from test_predict_format import lowrank

    from gguf_tools.convert import Calibrated, Calibration

    found = Calibration({"0": Calibrated(predictor=lowrank(128, 256))})
    convert(folder / "arcee.gguf", folder / "predicted.gguf", calibration=found)
    with SparseGGUF.open(folder / "predicted.gguf") as view:
        assert view.mode == "predict"
    with pytest.raises(PowerInferError, match="calibrate its source"):
        calibrate(str(folder / "predicted.gguf"), [folder / "text.txt"], folder / "y.profile", tokens=600)


def test_random_tokens_are_the_same_every_time(folder: Path) -> None:
    model = str(folder / "arcee.gguf")
    first = calibrate(model, None, folder / "r1.profile", tokens=600)
    second = calibrate(model, None, folder / "r2.profile", tokens=600)
    assert first.meta["text"] == "random tokens"
    assert np.array_equal(first.array("x", "0"), second.array("x", "0"))
    assert calibration.LEAST_TOKENS <= 600
