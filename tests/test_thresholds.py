"""Thresholds for SwiGLU and GeGLU: from statistics to files, and what they do, judged by the numpy reference."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import make
from typer.testing import CliRunner

from gguf_tools import FormatError, SparseGGUF, convert
from gguf_tools.convert import Calibrated, Calibration
from powerinfer_ext import Llama, PowerInferError
from powerinfer_ext.calibrate import calibrate
from powerinfer_ext.cli import app
from powerinfer_ext.models import find
from powerinfer_ext.reference import Reference
from powerinfer_ext.thresholds import (
    GatedModel,
    LayerStatistics,
    Tuner,
    cats,
    chess,
    find_thresholds,
    measure,
    profiled,
    texts,
)

TOKENS = np.random.default_rng(5).integers(0, 512, 64).tolist()
RANDOM_TEXT = " ".join(map(str, np.random.default_rng(6).integers(0, 10**6, 3000)))


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("swiglu") / "swiglu.gguf", "llama")


def statistics(seed: int = 0, n_ff: int = 200, layers: int = 3) -> dict[int, LayerStatistics]:
    rng = np.random.default_rng(seed)
    return {
        layer: LayerStatistics(
            np.abs(rng.standard_normal((300, n_ff)) * rng.uniform(0.1, 3, n_ff)).astype(np.float16),
            rng.uniform(0.01, 2, n_ff).astype(np.float32),
        )
        for layer in range(layers)
    }


# ---- from statistics to thresholds -------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_thresholds_leave_the_density(density):
    seen = statistics()
    for thresholds in (cats(seen, density), chess(seen, density)):
        for layer, s in seen.items():
            assert np.mean(s.gate.astype(np.float32) >= thresholds[layer]) == pytest.approx(density, abs=0.01)
    balanced = chess(seen, density, {0: 1.0, 1: 4.0, 2: 0.3})
    shares = [np.mean(s.gate.astype(np.float32) >= balanced[layer]) for layer, s in seen.items()]
    assert np.mean(shares) == pytest.approx(density, abs=0.01)
    assert shares[1] > shares[0] > shares[2]  # what weighs more is kept


def test_the_formulas_of_the_papers():
    """CATS: one number per layer. CHESS: one number over the mean of |up|."""
    seen = statistics()
    for layer, t in cats(seen, 0.4).items():
        assert (t == t[0]).all() and t[0] == pytest.approx(np.quantile(seen[layer].gate.astype(np.float32), 0.6))
    for layer, t in chess(seen, 0.4).items():
        s = seen[layer]
        expected = np.quantile(s.gate.astype(np.float32) * s.mean_up, 0.6) / s.mean_up
        assert np.allclose(t, expected, rtol=1e-5)


def test_neurons_without_an_up_product_and_a_density_of_one():
    seen = statistics()
    seen[1].mean_up[7] = 0
    assert chess(seen, 0.5)[1][7] == np.inf
    assert all((t == 0).all() for t in cats(seen, 1.0).values())
    nothing = chess(statistics(), 1.0, dict.fromkeys(range(3), 1.0))
    assert all((t == 0).all() for t in nothing.values())


# ---- on the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn_bias", [False, True], ids=["", "biases"])
def test_the_callback_does_what_thresholds_say(tmp_path, ffn_bias):
    path = make(tmp_path / "m.gguf", "llama", ffn_bias=ffn_bias)
    with GatedModel(str(path), window=64) as model:
        dense = model.logits(TOKENS)
        thresholds = chess(model.record([TOKENS]), 0.4)
        cost = measure(model, thresholds, [(TOKENS, dense)])
        model.thresholds = thresholds
        sparse = model.logits(TOKENS)
        model.thresholds = {}
        assert np.array_equal(model.logits(TOKENS), dense)
    kept = []

    def keep(layer, x, act):
        kept.append(np.abs(act) >= thresholds[layer])
        return kept[-1]

    expected = Reference(path, keep=keep).logits(TOKENS)
    assert np.abs(expected - dense).max() > 0.3 * dense.std()  # they must show
    # Stock keeps keys and values as F16, so a gate close to its threshold may fall to the other side: in few tokens.
    off = np.abs(sparse - expected).max(axis=1) / dense.std()
    assert np.quantile(off, 0.7) < 0.002 and off.max() < 0.3
    assert cost.density == pytest.approx(np.mean(kept), abs=1e-4)
    assert cost.density == pytest.approx(0.4, abs=0.05)  # by chance of which tokens are sampled, and of layer 2's input


def test_geglu(tmp_path, swiglu):
    """The same tensors as a gemma: its gates go through GELU."""
    reader = gguf.GGUFReader(swiglu)
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = entry.types
            sub = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name.replace("llama.", "gemma."), entry.contents(), kinds[0], sub)
    for tensor in reader.tensors:
        if tensor.name != "output.weight":
            writer.add_tensor(tensor.name, np.array(tensor.data).reshape(tensor.shape[::-1].tolist()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GatedModel(str(tmp_path / "gemma.gguf"), window=64) as model:
        assert model.activation == "gelu"
        seen = model.record([TOKENS])
        gate = seen[0].gate.astype(np.float32)
        assert gate.max() > 1  # gelu(x) for positive x is about x, for negative ones at most 0.17
        cost = measure(model, cats(seen, 0.3), [(TOKENS, None)])
    assert cost.density == pytest.approx(0.3, abs=0.05)
    assert cost.kl > 0


def test_chess_is_better_than_cats_on_the_bundled_model():
    calibration, tuning, heldout, _ = texts(None, None)
    with GatedModel(str(find("llama-swiglu").path), window=256) as model:
        tuner = Tuner(model, model.record(model.windows(calibration, 512)), model.windows(tuning, 512))
        tuner.weigh(0.5)
        judged = [(part, model.logits(part)) for part in model.windows(heldout, 768)]
        for density in (0.3, 0.65):  # at every density; and a third is skipped for far less than 1 % of perplexity
            one = measure(model, cats(tuner.statistics, density), judged)
            two = measure(model, tuner.best("chess", density)[0], judged)
            assert one.density == pytest.approx(density, abs=0.03)
            assert two.density == pytest.approx(density, abs=0.03)
            assert two.kl < 0.8 * one.kl
        assert two.increase < 0.01


def test_find_thresholds_for_a_perplexity():
    path = str(find("llama-swiglu").path)
    steps = []
    calibration, report = find_thresholds(
        path, "chess", max_increase=0.01, tokens=256, window=128, progress=lambda *a: steps.append(a)
    )
    assert report.tuning.increase < report.tuning.increase_at_most <= 0.01
    assert report.tuning.density < 0.9
    assert report.cost.tokens == 256 and report.cost.ppl_after < 1.02 * report.cost.ppl_before
    assert steps[-1][0] <= steps[-1][1]
    assert calibration.threshold_kind == "chess" and calibration.tokens == 256
    densities = [found.density for found in calibration.ffns.values()]
    assert np.mean(densities) == pytest.approx(report.tuning.density, abs=1e-6)
    for word in ("chess", "skipped", "perplexity", "held-out"):
        assert word in report.sentence()


def test_text_of_ones_own(swiglu):
    _, report = find_thresholds(str(swiglu), "cats", density=0.5, text=RANDOM_TEXT, tokens=512, window=256)
    assert report.cost.density == pytest.approx(0.5, abs=0.05)
    assert json.loads(json.dumps(report.to_dict()))["kind"] == "cats"


def test_a_profile_saves_reading(tmp_path, swiglu):
    """The statistics are the profile's: the same thresholds, but for the tokens that happen to be sampled."""
    (tmp_path / "text.txt").write_text(RANDOM_TEXT)
    profile = calibrate(str(swiglu), [tmp_path / "text.txt"], tmp_path / "profile", tokens=1024)
    with GatedModel(str(swiglu), window=256) as model:
        seen = profiled(str(swiglu), profile, model.layers)
        recorded = model.record(model.windows(RANDOM_TEXT, 1024))
    for layer, t in chess(seen, 0.5).items():
        assert np.allclose(t, chess(recorded, 0.5)[layer], rtol=0.3)
    asked = dict(density=0.5, text=RANDOM_TEXT, tokens=256, profile=profile)
    _, report = find_thresholds(str(swiglu), "chess", **asked)
    assert report.cost.density == pytest.approx(0.5, abs=0.05)
    other = make(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(FormatError, match="profile of another model"):
        find_thresholds(str(other), "chess", **asked)


# ---- in files ----------------------------------------------------------------------------------------------


def test_thresholds_are_stored_in_stored_order(tmp_path, swiglu):
    thresholds = {layer: np.random.default_rng(layer).uniform(0, 1, 512).astype(np.float32) for layer in range(2)}
    order = np.random.default_rng(9).permutation(512)
    ffns = {str(layer): Calibrated(thresholds=t, density=0.5) for layer, t in thresholds.items()}
    convert(swiglu, tmp_path / "s.gguf", order={1: order}, calibration=Calibration(ffns, threshold_kind="chess"))
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert view.threshold_kind == "chess"
        assert np.array_equal(view.layers[0].thresholds[0], thresholds[0])
        assert np.array_equal(view.layers[1].thresholds[0], thresholds[1][order])


def test_the_engine_applies_them(tmp_path, swiglu):
    with GatedModel(str(swiglu), window=64) as model:
        thresholds = chess(model.record([TOKENS]), 0.4)
    order = {0: np.random.default_rng(1).permutation(512)}
    ffns = {str(layer): Calibrated(thresholds=t) for layer, t in thresholds.items()}
    convert(swiglu, tmp_path / "s.gguf", order=order, calibration=Calibration(ffns, threshold_kind="chess"))
    kept = []

    def keep(layer, x, act):
        kept.append(np.abs(act) >= thresholds[layer])
        return kept[-1]

    expected = Reference(swiglu, keep=keep).logits(TOKENS)
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "type_k": 0, "type_v": 0}
    with closing(Llama(str(tmp_path / "s.gguf"), verbose=False, **settings)) as llama:
        llama.eval(TOKENS[:40])  # a prefill,
        for token in TOKENS[40:]:  # and decoding
            llama.eval([token])
        logits = np.array(llama.scores[: len(TOKENS)])
        assert llama.sparse_stats()["density"] == pytest.approx(np.mean(kept), abs=0.01)
    assert np.abs(logits - expected).max() < 1e-3 * expected.std()


def test_convert_says_what_it_costs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(find("llama-swiglu").calibration_text.read_text()[:9000])
    target = str(tmp_path / "s.gguf")
    arguments = ["convert", "llama-swiglu", target, "--threshold", "cats", "--text", str(text), "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--density", "0.6", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["threshold"]
    assert said["kind"] == "cats" and said["cost"]["density"] == pytest.approx(0.6, abs=0.04)
    assert said["cost"]["ppl_before"] < said["cost"]["ppl_after"]
    with SparseGGUF.open(target) as view:
        assert view.threshold_kind == "cats"
        assert all(layer.thresholds is not None for layer in view.layers)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (dict(density=0.0), "density of 0"),
        (dict(density=1.5), "density of 1.5"),
        (dict(max_increase=-0.1), "perplexity increase of -0.1"),
        (dict(density=0.5, max_increase=0.1), "not both"),
        (dict(text="Nothing much.\n" * 4), r"calibrate with has \d+ tokens, at least 256"),
    ],
)
def test_wishes_that_cannot_be_met(swiglu, wishes, message):
    with pytest.raises(PowerInferError, match=message):
        find_thresholds(str(swiglu), "chess", **wishes)


def test_a_perplexity_that_cannot_be_kept(swiglu):
    with pytest.raises(PowerInferError, match=r"swiglu.gguf: no thresholds keep perplexity within 0.000%: with 99.\d%"):
        find_thresholds(str(swiglu), "cats", max_increase=0.0, text=RANDOM_TEXT, tokens=256, window=128)


def test_models_that_thresholds_are_not_for(tmp_path):
    cases = {
        "are silent by themselves": make(tmp_path / "relu.gguf", "llama", hint_activation="relu"),
        "neurons are silent": make(tmp_path / "arcee.gguf", "arcee"),
        "mixtures of experts are not": make(tmp_path / "moe.gguf", "qwen3moe"),
    }
    for message, path in cases.items():
        with pytest.raises(PowerInferError, match=f"{path.name}: .*{message}"):
            find_thresholds(str(path), "cats", density=0.5)


def test_activations_that_are_not_finite(tmp_path, swiglu):
    raw = bytearray(swiglu.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(swiglu).tensors if t.name == "blk.1.ffn_gate.weight")
    raw[tensor.data_offset : tensor.data_offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(PowerInferError, match="nan.gguf: the FFN of layer 1 computes values that are not finite"):
        find_thresholds(str(tmp_path / "nan.gguf"), "cats", density=0.5)


def test_options_that_do_not_go_together(tmp_path):
    target = str(tmp_path / "s.gguf")
    alone = CliRunner().invoke(app, ["convert", "llama-swiglu", target, "--density", "0.5"])
    assert isinstance(alone.exception, PowerInferError) and "--threshold" in str(alone.exception)
    wrong = ["--threshold", "chess", "--max-ppl-increase", "one percent"]
    said = CliRunner().invoke(app, ["convert", "llama-swiglu", target, *wrong])
    assert isinstance(said.exception, PowerInferError) and "such as 0.01 or 1%" in str(said.exception)
