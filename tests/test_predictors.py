"""Predictors and orders: what is trained from a profile, what it reaches, and `convert --mode predict` to `eval`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make

from gguf_tools import ConversionError, FormatError, SparseGGUF, convert, fit, order, quants, training
from gguf_tools.predictor import Predictor, product, rounded, stored_predictor, stored_rows
from gguf_tools.profile import Profile
from powerinfer_ext import Llama, PowerInferError
from powerinfer_ext.calibrate import calibrate, fitted_to
from powerinfer_ext.evaluate import evaluate
from powerinfer_ext.firing import firing
from powerinfer_ext.sweep import sweep


def synthetic(tokens: int = 2100, n_embd: int = 256, n_ff: int = 320, rank: int = 48, density: float = 0.1):
    """Inputs near a subspace, weights, biases through a constant channel, as `powerinfer synth` makes them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, n_embd)) / np.sqrt(rank)
    x = (x + 0.15 * rng.standard_normal(x.shape)).astype(np.float32)
    x[:, 0] = 1
    w = rng.standard_normal((n_ff, n_embd)).astype(np.float32) / np.sqrt(n_embd)
    product = x[:, 1:] @ w[:, 1:].T
    w[:, 0] = -np.quantile(product, 1 - density, axis=0)
    return x, x @ w.T > 0, w


@pytest.fixture(scope="module")
def material() -> training.Material:
    return training.material(*synthetic(), window=100)


COSTS = training.Costs(bundle=768, ffn=768 * 320, exact=768 * 320 * 0.4)


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_inputs_are_rounded_as_ggml_rounds_them() -> None:
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for ggml_type in (quants.Q4_0, quants.Q8_0):
        blocks = x.reshape(3, -1, 32)
        scale = np.float16(np.abs(blocks).max(axis=2, keepdims=True) / 127).astype(np.float32)
        near = rounded(ggml_type, x).reshape(blocks.shape)
        assert np.abs(near - blocks).max() <= 0.51 * scale.max()
        np.testing.assert_allclose(near / scale, np.rint(near / scale), atol=1e-3)
    blocks = x.reshape(3, -1, 256)
    near = rounded(10, x).reshape(blocks.shape)
    assert np.abs(near - blocks).max() <= 0.501 * np.abs(blocks).max() / 127
    assert np.array_equal(rounded(quants.F16, x), x.astype(np.float16).astype(np.float32))
    assert np.array_equal(rounded(quants.F32, x), x)


def test_scores_of_each_kind() -> None:
    rng = np.random.default_rng(1)
    a, b, x = (rng.standard_normal(s).astype(np.float32) for s in ((32, 64), (10, 32), (5, 64)))
    bias = rng.standard_normal(10).astype(np.float32)
    f32 = dict(b_type=0, b=quants.quantise(0, b), bias=bias, a_type=0, a=quants.quantise(0, a))
    np.testing.assert_allclose(Predictor("linear", **f32).scores(x), x @ a.T @ b.T + bias, rtol=1e-4, atol=1e-4)
    relu = np.maximum(x @ a.T, 0) @ b.T + bias
    np.testing.assert_allclose(Predictor("lowrank", **f32).scores(x), relu, rtol=1e-4, atol=1e-4)
    straight = Predictor("direct", 0, quants.quantise(0, a[:10]), bias)
    np.testing.assert_allclose(straight.scores(x), x @ a[:10].T + bias, rtol=1e-4, atol=1e-4)


def test_threshold_reaches_the_recall() -> None:
    rng = np.random.default_rng(2)
    scores, fired = rng.standard_normal((50, 40)), rng.random((50, 40)) < 0.2
    for recall in (0.5, 0.9, 0.97, 1.0):
        selected = scores >= training.threshold(scores, fired, recall)
        reached, computed = training.measure(selected, fired)
        assert recall <= reached < recall + 0.01
        assert computed == selected.mean()


# ---- training ----------------------------------------------------------------------------------------------


def test_regression_is_the_best_of_its_rank(material: training.Material) -> None:
    """Against the closed form: the leading eigenvectors of the covariance of the products."""
    regression = training.regress(material, 32)
    x = material.x[material.train]
    g = x @ material.w.T
    g -= g.mean(axis=0)
    energies = np.linalg.eigvalsh((g.T @ g).astype(np.float64))[::-1]
    for rank in (8, 16, 32):
        a, b = regression.a[:rank], regression.b[:, :rank]
        left = g - (x - x.mean(axis=0)) @ a.T @ b.T
        # The covariance is shrunk a little, so the optimum of the sample is not quite reached.
        assert (left.astype(np.float64) ** 2).sum() < 1.02 * energies[rank:].sum() + 0.003 * energies.sum()


def test_training_finds_what_a_regression_cannot() -> None:
    """Under dReLU two products must be positive; the regression knows one of them."""
    x, fired, w = synthetic(tokens=7000, n_embd=64, n_ff=64, rank=16)
    other = np.random.default_rng(4).standard_normal(w.shape).astype(np.float32)
    both = training.material(x, fired & (x @ other.T > 0), w, 500, other)
    start = training._mixed(*training.regress(both, 32).cut(32), seed=0)

    def stored(a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> Predictor:
        predictor = training._stored("linear", quants.Q4_0, a, b, bias)
        return training.tuned(both, predictor, 0.9, trained=False).predictor

    before = stored(*start)
    after = stored(*training.train(both, *start, relu=False, epochs=24))
    assert after.computed < 0.8 * before.computed
    assert after.recall > 0.87


def test_b_makes_up_for_what_quantisation_does_to_a(material: training.Material) -> None:
    regression = training.regress(material, 32)
    plain = training._stored("linear", quants.Q4_0, *training._mixed(*regression.cut(32), seed=0))
    refitted = regression.stored(32, seed=0)
    assert np.array_equal(plain.a, refitted.a)
    g = material.x[material.test] @ material.w.T

    def error(predictor: Predictor) -> float:
        """What is left of g when every score is regressed on it."""
        scores = predictor.scores(material.x[material.test])
        scores, truth = scores - scores.mean(axis=0), g - g.mean(axis=0)
        slope = (scores * truth).sum(axis=0) / (scores**2).sum(axis=0)
        return float(((truth - slope * scores) ** 2).sum() / (truth**2).sum())

    assert error(refitted) < error(plain)


def test_thresholds_are_on_the_safe_side() -> None:
    """By more, the more tokens differ; by nothing to speak of where all are alike."""
    rng = np.random.default_rng(5)
    scores, fired = rng.standard_normal((3200, 40)), rng.random((3200, 40)) < 0.2
    alike = training.measure(scores >= training.safe_threshold(scores, fired, 0.9), fired)[0]
    uneven = scores + np.repeat(rng.standard_normal(32), 100)[:, None]  # groups of tokens that are harder
    apart = training.measure(uneven >= training.safe_threshold(uneven, fired, 0.9), fired)[0]
    assert 0.9 < alike < 0.906 < 0.91 < apart <= 0.95


def _float(a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> Predictor:
    return Predictor("linear", 0, quants.quantise(0, b), bias.astype(np.float32), 0, quants.quantise(0, a))


def test_rotated_units_say_the_same_and_quantise_better(material: training.Material) -> None:
    a, b, bias = training.regress(material, 32).cut(32)
    mixed = training._mixed(a, b, bias, seed=0)
    np.testing.assert_allclose(mixed[1] @ mixed[0], b @ a, atol=1e-3 * np.abs(b @ a).max())

    def error(values: np.ndarray) -> float:
        return float(np.linalg.norm(training._as_stored(values) - values) / np.linalg.norm(values))

    assert error(mixed[1]) < error(b)


def test_candidates_reach_the_recall_on_other_tokens(material: training.Material) -> None:
    found = list(training.candidates(material, COSTS, 0.95, budget=0.3, effort=2e10))
    assert {s.predictor.kind for s in found} == {"linear", "lowrank", "direct"}
    for scored in found:
        predictor = scored.predictor
        assert predictor.recall > 0.93, scored.name
        selected = predictor.scores(material.x[material.test]) > 0
        reached, computed = training.measure(selected, material.fired[material.test])
        assert (reached, computed) == (
            pytest.approx(predictor.recall, abs=1e-3),
            pytest.approx(predictor.computed, abs=1e-3),
        )
        predictor.check("layer 0", material.n_embd, material.n_ff)
    best = training.choose(found, COSTS, material, 0.3)
    assert best.predictor.computed < 1.5 * material.density
    assert best.predictor.nbytes < 0.3 * COSTS.ffn


def test_the_cheapest_is_chosen(material: training.Material) -> None:
    def scored(nbytes: int, computed: float) -> training.Scored:
        b = np.zeros((material.n_ff, nbytes // material.n_ff), np.uint8)
        bias = np.zeros(material.n_ff, np.float32)
        return training.Scored("x", False, Predictor("direct", 0, b, bias, recall=0.97, computed=computed), [])

    small, middle, large = scored(320 * 16, 0.5), scored(320 * 32, 0.12), scored(320 * 64, 0.11)
    assert training.choose([small, middle, large], COSTS, material, 0.9) is middle
    assert training.choose([small, middle, large], COSTS, material, 0.03) is small
    assert training.choose([large], COSTS, material, 0.01) is None


def test_ternary_rows_beat_ggmls_scales(material: training.Material) -> None:
    importance = (material.x**2).mean(axis=0)
    ours = quants.dequantise(training.TQ1_0, training.ternary(material.w, importance), 256)
    theirs = quants.dequantise(training.TQ1_0, quants.quantise(training.TQ1_0, material.w), 256)

    def error(rows: np.ndarray) -> float:
        """Of the products, but for what a bias makes up for."""
        return float((material.x @ (rows - material.w).T).std(axis=0).mean())

    assert error(ours) < 0.7 * error(theirs)


def test_too_little_to_train_on() -> None:
    x, fired, w = synthetic(tokens=200)
    with pytest.raises(ConversionError, match="200 tokens are too few to train on"):
        training.material(x, fired, w, 100)
    x, fired, w = synthetic(tokens=400)
    with pytest.raises(ConversionError, match="nothing to predict"):
        training.material(x, np.zeros_like(fired), w, 100)


# ---- order -------------------------------------------------------------------------------------------------


def test_hot_count() -> None:
    assert order.hot_count(np.array([0.1, 0.6, 0.2, 0.1])) == 2
    assert order.hot_count(np.array([0.1, 0.6, 0.2, 0.1]), covered=0.95) == 4
    assert order.hot_count(np.zeros(5)) == 0


def test_cold_neurons_that_fire_together_lie_together() -> None:
    rng = np.random.default_rng(3)
    groups = rng.permutation(np.repeat(np.arange(40), 10))  # 40 groups of 10, scattered
    fired = (rng.random((3000, 40)) < 0.05)[:, groups] & (rng.random((3000, 400)) < 0.9)
    hot = rng.random((3000, 20)) < 0.8
    fired = np.concatenate((hot, fired), axis=1)
    frequency = fired[:2000].mean(axis=0)
    stored = order.stored_order(frequency, fired[:2000], 20)
    assert sorted(stored) == list(range(420)) and set(stored[:20]) == set(range(20))
    assert (np.diff(frequency[stored[:20]]) <= 0).all()
    before, after = (
        order.reads(fired[2000:], o, 20, 4096) for o in (order.stored_order(frequency, None, 20), stored)
    )
    assert before.wanted == after.wanted
    assert after.run_length > 4 * before.run_length and after.reads < 0.3 * before.reads


def test_reads_are_counted() -> None:
    fired = np.zeros((2, 20), bool)
    fired[0, [0, 5, 6, 9, 19]] = True  # 0 is hot
    found = order.reads(fired, np.arange(20), 2, stride=4096)  # 4 neurons in between are read through
    assert (found.wanted, found.runs, found.reads, found.neurons) == (2.0, 1.5, 1.0, 3.0)
    assert found.run_length == pytest.approx(4 / 3)


# ---- from a model to a file --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictors") / "arcee.gguf"
    make(path, "arcee", quant="F16", density=0.08, n_embd=256, n_ff=1024)
    return path


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    return calibrate(str(model), None, model.with_name("arcee.profile"), tokens=3000)


@pytest.fixture(scope="module")
def predicted(model: Path, profile: Profile) -> Path:
    """With predictors that take more than they may: random models have no structure that would fit the budget."""
    out = model.with_name("predicted.gguf")
    found = {}
    whole = fit.fit(profile, model)
    for unit, calibrated in whole.calibration.ffns.items():
        x, fired = profile.array("x", unit), profile.masks(unit)
        with SparseGGUF.open(_exact(model)) as view:
            raw = np.frombuffer(view.file.data(f"blk.{unit}.ffn_up.weight"), np.uint8).reshape(1024, -1)
            w = quants.dequantise(quants.F16, raw, 256)[np.argsort(view.layers[int(unit)].order[0])]
        m = training.material(x, fired, w, 500)
        scored = training.tuned(m, _float(*training.regress(m, 192).cut(192)), 0.97, trained=False)
        found[unit] = type(calibrated)(**{**vars(calibrated), "predictor": scored.predictor})
    convert(model, out, calibration=type(whole.calibration)(found))
    return out


def test_predictors_for_flash_spare_rare_neurons() -> None:
    """At the same recall: fewer of those that would have to be read, for more of those that are in memory."""
    x, _, w = synthetic(tokens=4200)
    density = np.random.default_rng(1).permutation(np.geomspace(0.01, 0.6, len(w)))
    product = x[:, 1:] @ w[:, 1:].T
    w[:, 0] = [-np.quantile(product[:, j], 1 - share) for j, share in enumerate(density)]
    m = training.material(x, x @ w.T > 0, w, window=100)
    plain = training.tuned(m, _float(*training.regress(m, 24).cut(24)), 0.95, trained=False).predictor
    n, tests = 100, m.x[m.test]

    def from_flash(predictor: Predictor) -> float:
        return float(np.sort((predictor.scores(tests) > 0).sum(axis=0))[::-1][n:].sum())

    found = training.for_flash(m, plain, 0.95, n, row=256)
    assert found.recall is not None and found.computed is not None
    assert 0.94 < found.recall and abs(found.recall - plain.recall) < 0.01
    assert from_flash(found) < 0.9 * from_flash(plain)
    assert plain.computed < found.computed < 1.5 * plain.computed
    whole = training.for_flash(m, plain, 0.95, m.n_ff, row=256)  # nothing is on flash: nothing to pay more for
    assert whole.computed is not None and whole.computed < 1.005 * plain.computed


def _exact(model: Path) -> Path:
    path = model.with_name("exact.gguf")
    if not path.exists():
        convert(model, path)
    return path


def test_fit_finds_orders(model: Path, profile: Profile) -> None:
    found = fit.fit(profile, model)
    assert not found.candidates and not found.notes
    for unit, calibrated in found.calibration.ffns.items():
        frequency = profile.frequency(unit)
        assert calibrated.predictor is None
        hottest = frequency[calibrated.order[: calibrated.hot_count]]
        assert hottest.sum() >= 0.8 * frequency.sum() > hottest[:-1].sum()
    budgeted = fit.fit(profile, model, hot_bytes=150 * 512)  # columns of 512 bytes
    counts = [c.hot_count for c in budgeted.calibration.ffns.values()]
    assert sum(counts) == 150 and min(counts) > 0
    convert(model, model.with_name("ordered.gguf"), calibration=found.calibration)
    with SparseGGUF.open(model.with_name("ordered.gguf")) as view:
        assert view.mode == "exact" and all(layer.hot_count for layer in view.layers)
        np.testing.assert_allclose(
            view.layers[0].frequency[0], profile.frequency("0")[view.layers[0].order[0]], rtol=1e-6
        )


def test_what_cannot_be_reached_says_so(
    model: Path, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EFFORT", 0)
    dense = make(tmp_path / "dense.gguf", "arcee", quant="F16", density=0.6, n_embd=256, n_ff=256)
    half = calibrate(str(dense), None, tmp_path / "dense.profile", tokens=1000)
    told = r"no layer gains from a predictor: layer 0 stays exact: .*% of its neu.* recall (of about 0|from 0\.8 up)"
    with pytest.raises(ConversionError, match=told):
        fit.fit(half, dense, predict=True, recall=0.999)
    with pytest.raises(ConversionError, match="a recall of 1 cannot be asked for"):
        fit.fit(profile, model, predict=True, recall=1.0)


def test_trained_predictors_are_kept(model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EFFORT", 0)
    first = fit.fit(profile, model, predict=True, recall=0.6)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "candidates", never)
    again = fit.fit(profile, model, predict=True, recall=0.6)
    for unit, calibrated in first.calibration.ffns.items():
        kept = again.calibration.ffns[unit].predictor
        assert kept.kind == calibrated.predictor.kind and np.array_equal(kept.b, calibrated.predictor.b)
        assert np.array_equal(kept.bias, calibrated.predictor.bias) and kept.recall == calibrated.predictor.recall
    with pytest.raises(AssertionError, match="trained again"):
        fit.fit(profile, model, predict=True, recall=0.61)
    # The same ones serve for any amount of memory. What the file then says of neurons is how often they are selected.
    for_flash = fit.fit(profile, model, predict=True, recall=0.6, hot_bytes=100 << 10)
    for unit, calibrated in for_flash.calibration.ffns.items():
        before = first.calibration.ffns[unit].predictor
        assert np.array_equal(calibrated.predictor.b, before.b)
        assert not np.array_equal(calibrated.predictor.bias, before.bias)
        assert abs(calibrated.predictor.recall - before.recall) < 0.03
        assert abs(calibrated.frequency.mean() - calibrated.predictor.computed) < 0.03
        hottest = calibrated.frequency[calibrated.order[: calibrated.hot_count]]
        assert calibrated.hot_count and (np.diff(hottest) <= 0).all()


def test_a_chart(model: Path, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EPOCHS", 1)
    monkeypatch.setattr(training, "LEAST_EPOCHS", 1)
    monkeypatch.setattr(training, "RANKS", (32, 64))
    found = fit.fit(profile, model, predict=True, recall=0.6, everything=True)
    fit.chart_of(found.candidates, tmp_path / "chart.png", "a title")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "chart.json").read_text())
    assert {point["name"].split()[0] for point in points} == {"linear", "lowrank", "direct", "signs"}
    assert {point["layer"] for point in points} == {0, 1}
    assert sum(point["chosen"] for point in points) == 2
    for point in points:
        recalls = [recall for recall, _ in point["curve"]]
        assert recalls == sorted(recalls)
        assert all(size > point["predictor_bytes"] for _, size in point["curve"])


def test_another_models_profile(model: Path, profile: Profile, tmp_path: Path) -> None:
    other = make(tmp_path / "other.gguf", "arcee", seed=1, n_embd=256, n_ff=1024, quant="F16")
    with pytest.raises(FormatError, match="profile of another model"):
        fit.fit(profile, other)
    with pytest.raises(ConversionError, match="give one of them"):
        fitted_to(str(model), profile=profile.folder, texts=["x"], beside=tmp_path / "x")


def test_the_engine_selects_what_numpy_selects(model: Path, predicted: Path) -> None:
    """Scores and selection are the same in C: the counters of a run agree with what is worked out beside it."""
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 500, 128).tolist() for _ in range(2)]
    found = firing(str(predicted), windows)
    text = "the quick brown fox jumps over the lazy dog, and then it sat on the mat. " * 20
    result = evaluate(str(predicted), str(model), text, tokens=256, window=128, passes=["prefill"], floor=False)
    assert result["mode"] == "predict"
    for layer in result["layers"]:
        assert 0.85 < layer["recall"] <= 1 and 0.1 < layer["precision"] <= 1
        assert layer["computed_share"] == pytest.approx(layer["density"], abs=2e-3)
    assert result["recall"] == pytest.approx(np.mean([layer["recall"] for layer in result["layers"]]))
    assert result["computed_share"] == result["density"] and result["predictor_share"] > 0.3
    assert set(found) == {0, 1} and 0.9 < found[0].json()["recall"] <= 1
    with pytest.raises(PowerInferError, match="verify is a share"):
        Llama(str(predicted), verify=1.5, verbose=False)
    llama = Llama(str(predicted), verify=1.0, n_ctx=128, n_threads=1, verbose=False)
    for token in windows[0]:
        llama.eval([token])
    stats = llama.sparse_stats()
    assert stats["verified"] == 2 * 128  # both layers of every token
    expected = {i: 1 - f.json()["recall"] for i, f in firing(str(predicted), windows[:1]).items()}
    for layer in stats["layers"]:
        assert layer["missed"] / layer["true_fired"] == pytest.approx(expected[layer["layer"]], abs=0.01)
    assert 0 < stats["missed"] < 0.15
    exact = evaluate(
        str(predicted), str(model), text, tokens=256, window=128, passes=["prefill"], floor=False, mode="exact"
    )
    assert exact["recall"] is None and exact["mean_kl"] < 0.1 * result["mean_kl"]
    with pytest.raises(PowerInferError, match="has nothing for mode threshold"):
        evaluate(str(predicted), str(model), text, mode="threshold")


def test_stored_parts_are_read_back(predicted: Path) -> None:
    with SparseGGUF.open(predicted) as view:
        layer = view.layers[1]
        predictor = stored_predictor(layer)
        assert (predictor.kind, predictor.rank, predictor.recall) == ("linear", 192, layer.predictor.recall)
        rows = stored_rows(layer, "up")
        x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
        # A linear predictor of full rank is the deciding product itself, up to a scale and a shift per neuron.
        scores, exact = predictor.scores(x) - predictor.bias, product(0, quants.quantise(0, rows), x)
        correlation = np.corrcoef((scores - scores.mean(0)).ravel() / scores.std(), (exact - exact.mean(0)).ravel())
        assert correlation[0, 1] > 0.9


def test_a_sweep_goes_from_sparse_to_dense(model: Path, predicted: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog, and then it sat on the mat. " * 20

    def judge(path: str) -> dict:
        return evaluate(path, str(model), text, tokens=128, window=128, passes=["prefill"], floor=False)

    before = predicted.read_bytes()
    points = sweep(str(predicted), judge)
    densities = [point["density"] for point in points]
    assert densities == sorted(densities) and densities[-1] > 2 * densities[0]
    assert points[0]["recall"] < points[-1]["recall"] and points[0]["mean_kl"] > points[-1]["mean_kl"]
    assert predicted.read_bytes() == before
    assert not list(predicted.parent.glob("*.sweep"))
    with pytest.raises(PowerInferError, match="nothing to sweep"):
        sweep(str(_exact(model)), judge)
