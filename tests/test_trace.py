"""`powerinfer trace`: cache policies against hand-made and brute-force answers, recordings against
the engine.
"""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_synth import random_tokens, small
from typer.testing import CliRunner

from gguf_tools import convert, synth
from powerinfer_ext import Llama, PowerInferError, trace
from powerinfer_ext.cache_simulator import POLICIES, hit_rates

# ---- caches ---------------------------------------------------------------------------------------------


def hits(sequence: list[list[int]], size: int, policy: str, warm: int = 0, n_units: int = 6) -> int:
    """The number of hits in a cache of `size` units."""
    requests = [np.array(sorted(units), np.int64) for units in sequence]
    asked = sum(len(units) for units in sequence[warm:])
    rate = hit_rates(requests, n_units, [size], policy, warm=warm)[0]
    return round(rate * asked)


def test_lru_by_hand() -> None:
    # cache of 2, after each token: {0}, {1 0}, {2 1}, {0 2}, {0 2}, {2 0}
    sequence = [[0], [1], [2], [0], [0], [2]]
    assert hits(sequence, 2, "lru") == 2  # the second 0 in a row, and the last 2
    assert hits(sequence, 3, "lru") == 3
    assert hits(sequence, 1, "lru") == 1


def test_lfu_by_hand() -> None:
    # 0 is used three times, so that the passing 1, 2, 3 do not push it out; LRU loses it
    sequence = [[0], [0], [0], [1], [2], [3], [0]]
    assert hits(sequence, 2, "lfu") == 3
    assert hits(sequence, 2, "lru") == 2
    # but what was popular long ago is forgotten: with a half-life of a token, the last two win
    requests = [np.array([u]) for u in (0, 0, 0, 1, 2, 3, 2)]
    assert hit_rates(requests, 4, [2], "lfu", half_life=1.0)[0] == pytest.approx(3 / 7)


def test_window_by_hand() -> None:
    # a cache of 3 holds the last token whole and no part of the one before; LRU keeps a unit of that, too
    sequence = [[0, 1], [2, 3], [0, 4]]
    assert hits(sequence, 3, "window") == 0
    assert hits(sequence, 3, "lru") == 1
    assert hits(sequence, 4, "window") == 1
    # {1 2} and {2 3} together are three: both fit, and the 3 of the last token hits as well as the 2 before
    assert hits([[0, 1], [2, 3], [1, 2], [0, 3]], 3, "window") == 2
    assert hits([[0, 1, 2], [0, 1, 2]], 2, "window") == 2  # a token that does not fit: its first units


def test_static_by_hand() -> None:
    sequence = [[0, 1], [0, 2], [0, 1], [1, 2], [0, 3]]
    assert hits(sequence, 2, "static", warm=3) == 2  # 0 and 1 are hot: a hit in each of the last two tokens
    assert hits(sequence, 6, "static", warm=3) == 4  # the whole layer fits: everything hits


def test_belady_by_hand() -> None:
    # a loop over 3 units in a cache of 2: LRU drops each one just before it is wanted
    loop = [[0], [1], [2]] * 4
    assert hits(loop, 2, "lru", n_units=3) == 0
    assert hits(loop, 2, "belady", n_units=3) == best_possible(loop, 2)
    # with bypassing: the passing 1, 2, 3 are never cached in a cache of 1
    assert hits([[0], [1], [0], [2], [0], [3], [0]], 1, "belady") == 3


def best_possible(sequence: list[list[int]], size: int) -> int:
    """The most hits that any choice of what to keep can give, by trying all of them."""
    states = {frozenset(): 0}
    for units in sequence:
        following: dict[frozenset[int], int] = {}
        for cached, count in states.items():
            count += len(cached & set(units))
            at_hand = cached | set(units)
            for kept in itertools.combinations(sorted(at_hand), min(size, len(at_hand))):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), count)
        states = following
    return max(states.values())


SEQUENCES = st.lists(st.sets(st.integers(0, 5), max_size=3).map(sorted), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 5))
def test_belady_is_the_best_and_no_policy_is_better(sequence: list[list[int]], size: int) -> None:
    if not any(sequence):
        return
    best = best_possible(sequence, size)
    assert hits(sequence, size, "belady") == best
    for policy in ("lru", "lfu", "window"):
        assert hits(sequence, size, policy) <= best


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 6), st.integers(0, 3))
def test_lru_and_window_against_plain_code(sequence: list[list[int]], size: int, warm: int) -> None:
    if not any(sequence[warm:]):
        return
    order: list[int] = []
    lru = window = 0
    for t, units in enumerate(sequence):
        if t >= warm:
            lru += len(set(units) & set(order[:size]))
            held: set[int] = set(sequence[t - 1][:size]) if t else set()
            for back in range(t - 1, -1, -1):
                together = set().union(*sequence[back:t])
                if len(together) > size:
                    break
                held = together
            window += len(set(units) & held)
        order = units + [unit for unit in order if unit not in units]
    assert hits(sequence, size, "lru", warm) == lru
    assert hits(sequence, size, "window", warm) == window


def test_larger_caches_hit_more_and_whole_layers_always() -> None:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 201) ** 0.8
    requests = [np.flatnonzero(rng.random(200) < 0.4 * popularity) for _ in range(300)]
    rates = {
        policy: hit_rates(requests, 200, [10, 20, 50, 100, 200], policy, warm=150) for policy in POLICIES
    }
    for policy, rate in rates.items():
        assert (np.diff(rate) >= 0).all()
        assert (rates["belady"] >= rate - 1e-9).all() or policy == "static"
    assert rates["static"][-1] == 1.0
    assert rates["lfu"][1] > rates["lru"][1]  # what is drawn independently is best kept by frequency


def test_unknown_policy_and_nothing_asked_for() -> None:
    with pytest.raises(ValueError, match="policy 'fifo' is not one of lru"):
        hit_rates([np.array([0])], 1, [1], "fifo")
    assert np.isnan(hit_rates([np.array([], np.int64)], 1, [1], "lru")[0])


# ---- recordings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small synthetic models by name; "*.sparse" are conversions."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name in (
        "arcee-4.5b",
        "llama2-7b",
        "smallthinker-4b-a0.6b",
        "qwen3-30b-a3b",
        "nemotron3-nano-30b-a3b",
    ):
        path, sparse = folder / f"{name}.gguf", folder / f"{name}.sparse.gguf"
        shape = small(name)
        synth.run(path, shape, layers=max(2, shape.least_layers), quant="Q8_0")
        found[name] = str(path)
        if shape.sparse:
            convert(path, sparse)
            found[f"{name}.sparse"] = str(sparse)
    return found


@pytest.mark.parametrize("name", ["arcee-4.5b", "llama2-7b", "smallthinker-4b-a0.6b"])
def test_the_engine_counts_what_the_trace_holds(name: str, models: dict[str, str]) -> None:
    path = models[f"{name}.sparse"]
    recorded = trace.record(path, None, tokens=200, window=200)
    with closing(
        Llama(path, n_ctx=200, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    ) as llama:
        llama.eval(random_tokens(llama, 200))
        counted = llama.sparse_stats()["layers"]
    for layer, stats in zip(recorded.layers, counted, strict=True):
        fired = sum(len(neurons) for neurons in layer.neurons())
        # recording evaluates gate and up apart, in another order of additions: values at the edge differ
        assert fired == pytest.approx(stats["fired"], rel=2e-3)
        assert layer.bits is not None and layer.bits.shape[0] == 200
        assert layer.n_ff == stats["neurons"]


@pytest.mark.parametrize("name", ["arcee-4.5b", "smallthinker-4b-a0.6b", "nemotron3-nano-30b-a3b"])
def test_stock_and_sparse_files_give_the_same_trace(name: str, models: dict[str, str]) -> None:
    stock, ours = (trace.record(models[n], None, tokens=64) for n in (name, f"{name}.sparse"))
    assert [layer.unit for layer in stock.layers] == [layer.unit for layer in ours.layers]
    for a, b in zip(stock.layers, ours.layers, strict=True):
        assert a.bits is not None and b.bits is not None
        assert np.mean(np.unpackbits(a.bits) != np.unpackbits(b.bits)) < 2e-3
        if a.experts is not None:
            assert np.mean(a.experts == b.experts) > 0.99


def test_a_mixture_with_a_shared_expert(models: dict[str, str]) -> None:
    recorded = trace.record(models["nemotron3-nano-30b-a3b"], None, tokens=40)
    units = {layer.unit: layer for layer in recorded.layers}
    (routed,) = (unit for unit in units if not unit.endswith(".shared"))
    assert set(units) == {routed, f"{routed}.shared"}
    assert units[routed].n_expert == 8 and units[routed].n_ff == 512 and units[routed].n_units == 4096
    assert units[f"{routed}.shared"].n_expert == 0 and units[f"{routed}.shared"].n_ff == 256
    experts = units[routed].experts
    assert experts is not None and experts.shape == (40, 2)
    assert ((experts >= 0) & (experts < 8)).all() and (experts[:, 0] != experts[:, 1]).all()


def test_where_only_experts_are_sparse(models: dict[str, str]) -> None:
    recorded = trace.record(models["qwen3-30b-a3b"], "def f(x):\n    return x\n" * 9, tokens=64, window=32)
    assert recorded.meta["tokens"] == 64
    assert all(layer.bits is None and layer.n_expert == 8 for layer in recorded.layers)
    result = trace.analyse(recorded)
    assert result["density"] is None and result["cache"] is None
    assert result["expert_cache"]["hit_rates"]["belady"][-1] > 0.5


def test_saving_and_loading(models: dict[str, str], tmp_path: Path) -> None:
    recorded = trace.record(models["smallthinker-4b-a0.6b"], None, tokens=30)
    recorded.save(tmp_path / "trace.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    loaded = trace.Trace.load(tmp_path / "trace.npz")
    assert loaded.meta == recorded.meta
    for a, b in zip(recorded.layers, loaded.layers, strict=True):
        assert (a.unit, a.n_ff, a.n_expert) == (b.unit, b.n_ff, b.n_expert)
        np.testing.assert_array_equal(a.bits, b.bits)
        np.testing.assert_array_equal(a.experts, b.experts)
    whole = (tmp_path / "trace.npz").read_bytes()
    for content in (b"", b"no trace", whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "trace.npz").write_bytes(content)
        with pytest.raises(PowerInferError, match="trace"):
            trace.Trace.load(tmp_path / "trace.npz")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(PowerInferError, match="not a trace"):
        trace.Trace.load(tmp_path / "other.npz")


def test_figures_by_hand() -> None:
    """Four neurons, four tokens: {0 1}, {0 2}, {0 1}, {0 3}."""
    bits = np.packbits(np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]), axis=-1)
    layer = trace.Layer("0", 4, 0, bits, None)
    assert [units.tolist() for units in layer.neurons()] == [[0, 1], [0, 2], [0, 1], [0, 3]]
    meta = {"model": "m", "architecture": "a", "activation": "relu", "tokens": 4, "window": 4}
    result = trace.analyse(trace.Trace(meta, [layer]), fractions=(0.25, 1.0), policies=("lru", "belady"))
    assert result["density"] == 0.5
    assert result["overlap"] == 0.5  # 0 always, the other never
    assert result["overlap_by_chance"] == pytest.approx((1 + 0.25 + 0.0625 * 2) / 2)
    assert result["skew"] == 0.75  # 4 + 2 + 1 of 8 firings is the first to reach 80 %
    assert result["cache"]["hit_rates"] == {"lru": [0.5, 0.75], "belady": [0.5, 0.75]}
    # experts 1 and 0, then 1 and 2; two neurons each
    mixed = trace.Layer("0", 2, 3, np.packbits([[[1, 0], [0, 1]], [[1, 1], [0, 0]]], axis=-1), None)
    mixed.experts = np.array([[1, 0], [1, 2]], np.int16)
    assert [units.tolist() for units in mixed.neurons()] == [[1, 2], [2, 3]]
    assert [units.tolist() for units in mixed.routed()] == [[0, 1], [1, 2]]


def test_windows_do_not_overlap() -> None:
    """Tokens at a window's start have no token before them."""
    bits = np.packbits(np.array([[1, 0], [1, 0], [0, 1], [0, 1]]), axis=-1)
    meta = {"model": "m", "architecture": "a", "activation": "relu", "tokens": 4, "window": 2}
    result = trace.analyse(trace.Trace(meta, [trace.Layer("0", 2, 0, bits, None)]), policies=())
    assert result["overlap"] == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "llama2-7b",
            "meant to compute relu, but stock llama.cpp computes something else for llama; convert it",
        )
    ],
)
def test_models_that_cannot_be_traced(name: str, message: str, models: dict[str, str]) -> None:
    with pytest.raises(PowerInferError, match=message):
        trace.record(models[name], None)


def test_a_dense_swiglu_model_has_nothing_to_trace(tmp_path: Path) -> None:
    synth.run(tmp_path / "m.gguf", small("mixtral-8x7b", n_expert=0, n_expert_used=0), layers=1)
    with pytest.raises(PowerInferError, match=r"fires for every token \(silu\), and there are no experts"):
        trace.record(str(tmp_path / "m.gguf"), None)


def test_the_command_and_the_comparison(models: dict[str, str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(trace.command)
    (tmp_path / "text.txt").write_text("import os\n\nprint(os.getcwd())\n" * 20)
    kept = tmp_path / "trace.npz"
    arguments = [models["arcee-4.5b"], "--tokens", "100", "--threads", "1"]
    run = CliRunner().invoke(app, [*arguments, "--text", str(tmp_path / "text.txt"), "-o", str(kept)])
    assert run.exit_code == 0, run.output
    assert "belady" in run.stdout and "trace.npz" in run.stdout
    run = CliRunner().invoke(app, [*arguments, "--against", str(kept), "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout[run.stdout.index("{") :])
    figures = {row["figure"]: row for row in result["comparison"]["rows"]}
    assert figures["density"]["a"] == result["density"]
    assert "hits, lru, 20% of neurons" in figures
    assert len(result["layers"]) == 2 and set(result["cache"]["hit_rates"]) == set(POLICIES)
    again = CliRunner().invoke(app, [str(kept), "--json"])  # a trace instead of a model
    assert json.loads(again.stdout[again.stdout.index("{") :])["density"] == pytest.approx(
        figures["density"]["b"]
    )


def test_a_bundled_model_if_there_is_one() -> None:
    """The models that come with the package: the density in models.json is what the trace finds."""
    from powerinfer_ext.models import bundled

    for model in bundled():
        if model.activation in ("relu", "relu2"):
            text = model.heldout_text.read_text(encoding="utf-8")
            result = trace.analyse(trace.record(str(model.path), text, tokens=256, window=256), policies=())
            assert result["density"] == pytest.approx(model.density, rel=0.25)
