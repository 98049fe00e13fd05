"""`powerinfer_ext.evaluate`: its arithmetic, and what it says about real conversions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import rel_entr, softmax
from tiny_models import make

from gguf_tools import convert
from powerinfer_ext import PowerInferError
from powerinfer_ext.evaluate import (
    PASSES,
    Divergence,
    LlamaScorer,
    Perplexity,
    evaluate,
    log_softmax,
    windows,
)

TEXT = "the quick brown fox jumps over the lazy dog, and then it sat on the mat. " * 20
FAST = {"tokens": 256, "window": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("evaluate")
    paths = {}
    for name, architecture, settings in (
        ("arcee", "arcee", {"quant": "F16"}),
        ("arcee-q8", "arcee", {"quant": "Q8_0"}),
        ("smallthinker", "smallthinker", {"quant": "F16"}),
        ("smallthinker-q8", "smallthinker", {"quant": "Q8_0"}),
        ("drelu", "llama", {"quant": "F16", "hint_activation": "drelu"}),
    ):
        stock, sparse = folder / f"{name}.gguf", folder / f"{name}.sparse.gguf"
        make(stock, architecture, density=0.12, **settings)
        # F32 holds what Q8_0 does: no rounding of the conversion's, which these random models would amplify.
        convert(stock, sparse, down_type="F32" if settings["quant"] == "Q8_0" else "auto")
        paths |= {name: str(stock), f"{name}.sparse": str(sparse)}
    return paths


# ---- arithmetic ------------------------------------------------------------------------------------------


def test_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (5, 1000)).astype(np.float32)
    np.testing.assert_allclose(log_softmax(logits), scipy_log_softmax(logits.astype(np.float64), axis=1))


def test_divergence_is_kl_and_top1_over_all_positions() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.normal(0, 3, (2, 150, 40)).astype(np.float32)
    q[:100] = p[:100]
    divergence = Divergence()
    divergence.add(p[:70], q[:70])
    divergence.add(p[70:], q[70:])
    kl = rel_entr(softmax(p.astype(np.float64), axis=1), softmax(q.astype(np.float64), axis=1)).sum(1)
    figures = divergence.json()
    assert figures["mean_kl"] == pytest.approx(kl.mean())
    assert figures["max_kl"] == pytest.approx(kl.max())
    assert figures["top1_agreement"] == np.mean(p.argmax(1) == q.argmax(1))
    assert divergence.positions == 150


def test_kl_is_accurate_where_it_is_tiny() -> None:
    """In float32 the logarithms alone would be off by 1e-7."""
    p = np.zeros((1, 2), np.float32)
    q = np.array([[0.0, 1e-3]], np.float32)
    divergence = Divergence()
    divergence.add(p, q)
    assert divergence.json()["mean_kl"] == pytest.approx(1e-6 / 8, rel=1e-3)


def test_perplexity_is_of_the_second_half() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (10, 30)).astype(np.float32)
    tokens = rng.integers(0, 30, 10).tolist()
    perplexity = Perplexity()
    perplexity.add(logits, tokens)
    logs = scipy_log_softmax(logits.astype(np.float64), axis=1)
    expected = np.exp(-np.mean([logs[row, tokens[row + 1]] for row in range(5, 9)]))
    assert perplexity.value() == pytest.approx(expected)


def test_windows() -> None:
    assert windows(list(range(100)), 24, 10, None) == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 24)),
    ]
    assert windows(list(range(100)), 20, 10, 500) == [[500, *range(9)], [500, *range(9, 18)]]
    assert windows(list(range(12)), 4096, 10, None) == [list(range(10))]  # two tokens left: too few
    with pytest.raises(PowerInferError, match="too little text"):
        windows([1, 2], 4096, 512, None)


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arcee", "arcee-q8", "smallthinker", "smallthinker-q8"])
def test_natively_sparse_models_agree_with_stock(models: dict[str, str], name: str) -> None:
    result = evaluate(models[f"{name}.sparse"], models[name], TEXT, **FAST, extra_bufts=False)
    assert result["tokens"] == 256 and set(result["passes"]) == set(PASSES)
    for figures in result["passes"].values():
        assert figures["mean_kl"] < 1e-4
        assert figures["top1_agreement"] >= 0.995
        assert figures["ppl_sparse"] == pytest.approx(figures["ppl_dense"], rel=1e-3)
    assert result["mean_kl"] == max(figures["mean_kl"] for figures in result["passes"].values())
    assert 0.03 < result["density"] < 0.3
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    assert result["stock_self"]["mean_kl"] < 1e-4


@pytest.mark.parametrize("name", ["arcee-q8", "smallthinker-q8"])
def test_so_they_do_with_products_of_our_own(models: dict[str, str], name: str) -> None:
    """Panels add products of 8-bit weights up in another order than stock: where inputs are rounded to 8 bits next,
    some are rounded the other way. Random models amplify that, in a perplexity of thousands too."""
    result = evaluate(models[f"{name}.sparse"], models[name], TEXT, **FAST)
    assert result["mean_kl"] < 1e-4
    assert result["top1_agreement"] >= 0.99


def test_stocks_repacked_products_are_ours_bit_for_bit(models: dict[str, str], tmp_path: Path) -> None:
    """Of Q4_0, which stock adds up block by block too."""
    stock, sparse = tmp_path / "stock.gguf", tmp_path / "sparse.gguf"
    make(stock, "arcee", density=0.12, quant="Q4_0")
    convert(stock, sparse, down_type="F32")
    result = evaluate(str(sparse), str(stock), TEXT, **FAST)
    assert result["mean_kl"] < 1e-9
    assert result["stock_prefill_vs_decode"]["mean_kl"] < 1e-4


def test_an_overridden_activation_agrees_with_the_reference(models: dict[str, str]) -> None:
    sparse, dense = models["drelu.sparse"], models["drelu"]
    result = evaluate(sparse, None, TEXT, reference=(dense, "drelu"), **FAST)
    assert result["against"] == "reference" and result["stock_self"] is None
    for figures in result["passes"].values():
        assert figures["mean_kl"] < 1e-4
        assert figures["top1_agreement"] >= 0.995
    wrong = evaluate(sparse, dense, TEXT, passes=["prefill"], floor=False, **FAST)  # stock computes SwiGLU
    assert wrong["mean_kl"] > 1e-2


def test_stock_against_itself_is_equal(models: dict[str, str]) -> None:
    result = evaluate(models["arcee"], models["arcee"], TEXT, passes=["prefill"], **FAST)
    assert result["mean_kl"] == 0 and result["top1_agreement"] == 1
    assert result["density"] is None and result["layers"] == []
    assert result["stock_prefill_vs_decode"] is not None  # measured although only prefill was asked for


def test_the_floor_can_be_left_out(models: dict[str, str]) -> None:
    result = evaluate(models["arcee.sparse"], models["arcee"], TEXT, passes=["decode"], floor=False, **FAST)
    assert result["pass"] == "decode" and result["mode"] == "exact" and list(result["passes"]) == ["decode"]
    assert result["stock_self"] is None and result["stock_prefill_vs_decode"] is None


def test_windows_fit_the_models_context(models: dict[str, str]) -> None:
    result = evaluate(
        models["arcee.sparse"], models["arcee"], TEXT, tokens=600, passes=["prefill"], floor=False
    )
    assert result["window"] == 512  # of 4096


def test_progress_counts_tokens(models: dict[str, str]) -> None:
    seen = []
    evaluate(
        models["arcee.sparse"],
        models["arcee"],
        TEXT,
        passes=["prefill"],
        floor=False,
        progress=lambda done, total: seen.append((done, total)),
        **FAST,
    )
    assert seen == [(done, 512) for done in range(64, 513, 64)]  # 256 tokens, by two models


def test_prefill_and_decode_give_the_same_logits(models: dict[str, str]) -> None:
    with LlamaScorer(models["arcee.sparse"], window=32, threads=1) as scorer:
        tokens = scorer.tokenize(TEXT)[:32]
        prefill, decode = (scorer.logits(tokens, mode) for mode in PASSES)
    assert prefill.shape == (32, 512)
    np.testing.assert_allclose(prefill, decode, atol=2e-2)


def test_different_models_are_refused(
    models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "other.gguf"
    make(other, "arcee", n_vocab=600)
    with pytest.raises(PowerInferError, match="not the same model.*512 and 600"):
        evaluate(models["arcee.sparse"], str(other), TEXT, **FAST)
    with pytest.raises(PowerInferError, match="nothing to compare with"):
        evaluate(models["arcee.sparse"], None, TEXT, **FAST)
