"""Make predictors of which neurons of an FFN fire, with numpy alone.

Three families compete for every layer, and `choose` takes what gives the fastest decoding at the recall asked for:

    linear    The deciding product g = W x, cut to rank r where it matters: reduced-rank regression of g on the
              inputs of the profile, by subspace iteration. All ranks come from one decomposition. Then, unless a
              layer is too large for it, trained on (with the same loss as below).
    lowrank   r hidden units with a ReLU, as in Deja Vu (arXiv 2310.17157) and PowerInfer (2312.12456): minibatch
              Adam on a logistic loss that weighs firing neurons more, as they are few.
    direct    W itself in few bits; nothing is trained but the bias. Q2_K, TQ1_0 with thresholds and scales of our
              own (least squares), and signs alone as in SparseInfer (2411.12692).

A neuron is selected where its score exceeds a threshold. Where scores come from a regression, each is measured in
standard deviations of its error, so that one threshold treats all neurons alike: the most recall for the fewest
neurons. The threshold is set on tokens that were held back, after quantisation, and ends up in the bias. Recall
and the share computed are reported for other tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.predictor import Predictor
from gguf_tools.reader import BLOCKS, row_bytes
from gguf_tools.sparse import DIRECT, LINEAR, LOWRANK, RANK_STEP

RANKS = (32, 64, 96, 128, 192, 256, 384, 512)
BUDGET = 0.12  # bytes of a predictor, of the FFN's
WASTE = 1.5  # neurons computed, of those that fire, that a predictor should stay below
MARGIN = 0.1  # of the share that may be missed, kept in reserve between the tokens for tuning and others
LEAST_TOKENS = 256

EPOCHS = 40
MINIBATCH = 256
FIRING_WEIGHT = 4.0  # of a neuron that fires in the loss
EFFORT = 5e11  # multiplications and additions that training one predictor may take
QUANTISED_FROM = 0.5  # share of the steps after which the weights count as they will be stored
LEAST_EPOCHS = 4  # with fewer, training makes a good start worse

TQ1_0, Q2_K, Q4_0, Q8_0 = 34, 10, quants.Q4_0, quants.Q8_0
_OVERSAMPLING, _ITERATIONS, _SHRINKAGE = 32, 2, 0.05
_ERROR_TOKENS = 1024  # on which the error of a regression is measured


@dataclass(frozen=True)
class Material:
    """What a layer's predictor is made from. x: float32 [tokens, n_embd], the FFN's inputs; fired: bool [tokens,
    n_ff]; w: float32 [n_ff, n_embd], the deciding matrix; train, tune, test: which tokens serve for what."""

    x: np.ndarray
    fired: np.ndarray
    w: np.ndarray
    train: np.ndarray
    tune: np.ndarray
    test: np.ndarray

    @property
    def n_embd(self) -> int:
        return self.w.shape[1]

    @property
    def n_ff(self) -> int:
        return self.w.shape[0]

    @property
    def density(self) -> float:
        """The share of neurons that fire, in the tokens for testing."""
        return float(self.fired[self.test].mean())


def material(x: np.ndarray, fired: np.ndarray, w: np.ndarray, window: int) -> Material:
    """Split tokens by windows: of seven, five to train, one to tune, one to test.

    Raises ConversionError when there is too little, or nothing fires.
    """
    n = len(x)
    if n < LEAST_TOKENS:
        raise ConversionError(f"{n} tokens are too few to train on; calibrate with at least {LEAST_TOKENS}")
    window = min(window, n // 7)  # short profiles are cut finer, so that each part gets some
    part = np.arange(n) // window % 7
    split = {name: np.flatnonzero(mask) for name, mask in zip("abc", (part < 5, part == 5, part == 6), strict=True)}
    made = Material(x.astype(np.float32), fired, w, split["a"], split["b"], split["c"])
    if not fired[made.tune].any() or not fired[made.test].any():
        raise ConversionError("no neuron fires in the text: there is nothing to predict")
    return made


@dataclass(frozen=True)
class Costs:
    """Bytes that a token has to read, by which predictors are compared: of a neuron's bundle when the layer is
    predicted, of the whole FFN as it is in the source, of the layer when it is exact (deciding matrix, and bundles
    of the neurons that fire)."""

    bundle: int
    ffn: int
    exact: float

    def predicted(self, predictor: Predictor, n_ff: int) -> float:
        assert predictor.computed is not None
        return predictor.nbytes + predictor.computed * n_ff * self.bundle


@dataclass(frozen=True)
class Scored:
    """A predictor and its recall and share computed at other thresholds: what a chart draws."""

    name: str
    trained: bool
    predictor: Predictor
    curve: list[tuple[float, float]]  # (recall, computed)


# ---- recall ------------------------------------------------------------------------------------------------


def threshold(scores: np.ndarray, fired: np.ndarray, recall: float) -> float:
    """The score that `recall` of the firing neurons exceed."""
    firing = scores[fired]
    k = min(len(firing) - 1, int((1 - recall) * len(firing)))
    return float(np.partition(firing, k)[k])


def measure(selected: np.ndarray, fired: np.ndarray) -> tuple[float, float]:
    """Recall, and the share of all neurons that is selected."""
    return float((selected & fired).sum() / max(1, fired.sum())), float(selected.mean())


def tuned(m: Material, predictor: Predictor, recall: float, *, trained: bool) -> Scored:
    """The predictor with its threshold set for `recall` and folded into the bias, and how it does on other tokens."""
    wanted = recall + MARGIN * (1 - recall)
    cut = threshold(predictor.scores(m.x[m.tune]), m.fired[m.tune], wanted)
    scale = max(abs(cut), 1e-6)
    predictor = replace(predictor, bias=(predictor.bias - (cut - 1e-6 * scale)).astype(np.float32))
    scores, fired = predictor.scores(m.x[m.test]), m.fired[m.test]
    reached, computed = measure(scores > 0, fired)
    curve = [measure(scores >= threshold(scores, fired, r), fired) for r in (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)]
    name = f"{predictor.label}{', trained' if trained else ''}"
    return Scored(name, trained, replace(predictor, recall=reached, computed=computed), curve)


# ---- linear ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """g is about b . (a x) + bias: a [rank, n_embd], whose products have unit variance and are uncorrelated, so that
    the first r rows of a and columns of b are the best of rank r. x, g: some tokens to measure errors on."""

    a: np.ndarray
    b: np.ndarray
    mean_x: np.ndarray
    mean_g: np.ndarray
    x: np.ndarray
    g: np.ndarray

    def cut(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and bias of that rank, scores in standard deviations of their error."""
        a, b = self.a[:rank], self.b[:, :rank]
        bias = self.mean_g - b @ (a @ self.mean_x)
        error = self.g - (self.x @ a.T @ b.T + bias)
        scale = 1 / np.maximum(error.std(axis=0), 1e-3 * self.g.std(axis=0) + 1e-12)
        return a, b * scale[:, None], bias * scale


def regress(m: Material, rank: int, seed: int = 0) -> Regression:
    """Reduced-rank regression of the deciding product on the inputs, up to `rank`.

    The best prediction of g = W x from r numbers that are linear in x projects g's covariance, W C W', on its r
    leading eigenvectors. Found by block power iteration, without forming W C W' or C (7B: 14336 and 4096 wide). C
    is shrunk towards a multiple of the identity, as there may be fewer tokens than dimensions.
    """
    x = m.x[m.train]
    mean_x = x.mean(axis=0)
    x = x - mean_x
    floor = _SHRINKAGE * (x * x).mean(axis=0)[:, None]  # nothing for channels that never vary
    weight = (1 - _SHRINKAGE) / len(x)

    def covariance(y: np.ndarray) -> np.ndarray:
        """C y, for y [n_embd, columns]."""
        return weight * (x.T @ (x @ y)) + floor * y

    width = min(rank + _OVERSAMPLING, *m.w.shape)
    basis = np.random.default_rng(seed).standard_normal((m.n_ff, width), np.float32)
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(m.w @ covariance(m.w.T @ basis))
    y = m.w.T @ basis  # [n_embd, width]; basis' (W C W') basis = y' C y
    values, vectors = np.linalg.eigh(y.T @ covariance(y))
    rank = min(rank, width)
    largest = np.argsort(values)[::-1][:rank]
    a = y @ (vectors[:, largest] / np.sqrt(np.maximum(values[largest], 1e-12)))
    b = m.w @ covariance(a)  # the regression of g on products that are uncorrelated and of unit variance
    some = m.x[_some(m)]
    return Regression(np.ascontiguousarray(a.T), b, mean_x, m.w @ mean_x, some, some @ m.w.T)


def _some(m: Material) -> np.ndarray:
    """Tokens to measure the errors of regressions on."""
    return m.train[:: max(1, len(m.train) // _ERROR_TOKENS)]


def _mixed(a: np.ndarray, b: np.ndarray, bias: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same product with hidden units rotated in groups of a quantisation block: their importance falls steeply,
    and a 4-bit block with one large entry would lose the others."""
    rng = np.random.default_rng(seed)
    a, b = a.copy(), b.copy()
    for first in range(0, len(a), RANK_STEP):
        group = slice(first, first + RANK_STEP)
        turn, _ = np.linalg.qr(rng.standard_normal((len(a[group]),) * 2))
        a[group] = turn.astype(np.float32) @ a[group]
        b[:, group] = b[:, group] @ turn.T.astype(np.float32)
    return a, b, bias


# ---- training ----------------------------------------------------------------------------------------------


def train(
    m: Material,
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray,
    *,
    relu: bool,
    epochs: int,
    rate: float,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minibatch Adam (arXiv 1412.6980) on the weighted logistic loss; returns new A, B and bias.

    In the last part the loss is that of the weights as they will be stored (the straight-through estimator, arXiv
    1308.3432), so that what remains of quantisation's error is trained away.
    """
    rng = np.random.default_rng(seed)
    weights = [np.array(part, np.float32) for part in (a, b, bias)]
    first = [np.zeros_like(part) for part in weights]
    second = [np.zeros_like(part) for part in weights]
    size = min(MINIBATCH, len(m.train))
    steps = epochs * (len(m.train) // size)
    step = 0
    while step < steps:
        for rows in np.split(rng.permutation(m.train)[: len(m.train) // size * size], len(m.train) // size):
            x, fired = m.x[rows], m.fired[rows]
            used = weights if step < QUANTISED_FROM * steps else [_as_stored(weights[0]), _as_stored(weights[1])]
            z = x @ used[0].T
            hidden = np.maximum(z, 0) if relu else z
            scores = hidden @ used[1].T
            scores += weights[2]
            slope = _sigmoid(scores)
            slope -= fired
            slope *= np.where(fired, np.float32(FIRING_WEIGHT / size), np.float32(1 / size))
            back = slope @ used[1]
            if relu:
                back *= z > 0
            gradients = (back.T @ x, slope.T @ hidden, slope.sum(axis=0))
            step += 1
            pace = rate * 0.5 * (1 + np.cos(np.pi * step / steps)) / (1 - 0.9**step)
            for part, gradient, m1, m2 in zip(weights, gradients, first, second, strict=True):
                m1 += 0.1 * (gradient - m1)
                m2 += 0.001 * (gradient * gradient - m2)
                part -= np.float32(pace) * m1 / (np.sqrt(m2 * np.float32(1 / (1 - 0.999**step))) + 1e-8)
    return weights[0], weights[1], weights[2]


def _as_stored(weights: np.ndarray) -> np.ndarray:
    return quants.dequantise(Q4_0, quants.quantise(Q4_0, weights), weights.shape[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    np.clip(x, -30, 30, out=x)
    np.negative(x, out=x)
    np.exp(x, out=x)
    x += 1
    return np.reciprocal(x, out=x)


def _epochs(m: Material, rank: int, effort: float) -> int:
    """Epochs that the effort allows, 0 where they are too few to be worth it."""
    epochs = int(effort / (6.0 * len(m.train) * rank * (m.n_embd + m.n_ff)))
    return 0 if epochs < LEAST_EPOCHS else min(EPOCHS, epochs)


# ---- direct ------------------------------------------------------------------------------------------------


def ternary(w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """uint8 rows of TQ1_0 whose values -s, 0, s are nearest to w, weighing squared errors by `importance` [n_embd].

    ggml's own quantiser scales by the largest value, which is right for weights that are ternary already. Here scale
    and threshold of each block follow by turns from each other (Lloyd's algorithm).
    """
    blocks = w.reshape(len(w), -1, 256)
    weight = importance.reshape(1, -1, 256)
    size = np.abs(blocks)
    scale = (size * weight).sum(axis=2, keepdims=True) / weight.sum()
    for _ in range(8):
        large = size > scale / 2
        share = weight * large
        scale = (size * share).sum(axis=2, keepdims=True) / np.maximum(share.sum(axis=2, keepdims=True), 1e-30)
    rows = np.where(large, np.sign(blocks) * scale, 0).reshape(w.shape)
    return quants.quantise(TQ1_0, rows)


def signs(w: np.ndarray) -> np.ndarray:
    """uint8 rows of TQ1_0 that hold the signs of w alone (SparseInfer)."""
    return quants.quantise(TQ1_0, np.where(w < 0, np.float32(-1), np.float32(1)))


# ---- the competition ---------------------------------------------------------------------------------------


def _stored(kind: str, ggml_type: int, a: np.ndarray | None, b: np.ndarray, bias: np.ndarray) -> Predictor:
    b_rows = quants.quantise(ggml_type, b)
    if a is None:
        return Predictor(kind, ggml_type, b_rows, bias.astype(np.float32))
    if a.shape[1] % BLOCKS[ggml_type][0]:
        return Predictor(kind, ggml_type, b_rows, bias.astype(np.float32), quants.F16, quants.quantise(quants.F16, a))
    return Predictor(kind, ggml_type, b_rows, bias.astype(np.float32), ggml_type, quants.quantise(ggml_type, a))


def _bytes(m: Material, rank: int, ggml_type: int) -> int:
    kind = ggml_type if m.n_embd % BLOCKS[ggml_type][0] == 0 else quants.F16
    return rank * row_bytes(kind, m.n_embd) + m.n_ff * row_bytes(ggml_type, rank) + 4 * m.n_ff


def directs(m: Material, recall: float) -> Iterator[Scored]:
    """The predictors that need no training, with biases from the profile."""
    if m.n_embd % 256:
        return
    x = m.x[_some(m)]
    exact = x @ m.w.T
    importance = (m.x[m.train] ** 2).mean(axis=0) + 1e-9
    shadows = [
        ("direct TQ1_0", TQ1_0, ternary(m.w, importance)),
        ("direct Q2_K", Q2_K, quants.quantise(Q2_K, m.w)),
        ("signs TQ1_0", TQ1_0, signs(m.w)),
    ]
    for name, ggml_type, rows in shadows:
        approximate = x @ quants.dequantise(ggml_type, rows, m.n_embd).T
        # Each score is regressed on the product it stands for, and its error's deviation is what a threshold is worth.
        slope = (approximate * exact).sum(axis=0) / np.maximum((approximate**2).sum(axis=0), 1e-12)
        offset = exact.mean(axis=0) - slope * approximate.mean(axis=0)
        error = (exact - slope * approximate - offset).std(axis=0)
        # Rows cannot be scaled without storing them anew, so the bias is in units of the row as it is.
        yield _tuned_rows(m, name, ggml_type, rows, slope, offset, error, recall)


def _tuned_rows(
    m: Material,
    name: str,
    ggml_type: int,
    rows: np.ndarray,
    slope: np.ndarray,
    offset: np.ndarray,
    error: np.ndarray,
    recall: float,
) -> Scored:
    """A direct predictor: neuron j is selected where slope_j (row_j . x) + offset_j > cut error_j, one cut for all."""
    slope, error = np.maximum(slope, 1e-6), np.maximum(error, 1e-9)
    plain = Predictor(DIRECT, ggml_type, rows, np.zeros(m.n_ff, np.float32))

    def normal(tokens: np.ndarray) -> np.ndarray:
        return (plain.scores(m.x[tokens]) * slope + offset) / error

    cut = threshold(normal(m.tune), m.fired[m.tune], recall + MARGIN * (1 - recall))
    scores, fired = normal(m.test), m.fired[m.test]
    reached, computed = measure(scores >= cut, fired)
    curve = [measure(scores >= threshold(scores, fired, r), fired) for r in (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)]
    bias = ((offset - cut * error) / slope).astype(np.float32)
    return Scored(name, False, replace(plain, bias=bias, recall=reached, computed=computed), curve)


def candidates(
    m: Material,
    costs: Costs,
    recall: float,
    *,
    ranks: Sequence[int] | None = None,
    budget: float = BUDGET,
    effort: float | None = None,
    everything: bool = False,
    seed: int = 0,
) -> Iterator[Scored]:
    """Predictors for a layer, each tuned to `recall`: those that need no training, then trained ones.

    Ranks are searched untrained, as all of them come from one regression; the best of them and the next smaller
    one are trained, linear and with a ReLU. everything: train every rank, and try what is over the budget too (for
    a chart).
    """
    limit = 4 * budget if everything else budget
    ranks = [r for r in ranks or RANKS if _bytes(m, r, Q4_0) <= limit * costs.ffn and r <= min(m.w.shape)]
    untrained: list[Scored] = []
    starts = {}
    regression = regress(m, max(ranks), seed) if ranks else None
    for rank in ranks:
        assert regression is not None
        starts[rank] = _mixed(*regression.cut(rank), seed)
        untrained.append(tuned(m, _stored(LINEAR, Q4_0, *starts[rank]), recall, trained=False))
        yield untrained[-1]
    for scored in directs(m, recall):
        if everything or scored.predictor.nbytes <= budget * costs.ffn:
            yield scored
    best = choose(untrained, costs, m, limit)
    if best is None:
        return
    at = ranks.index(best.predictor.rank)
    for rank in ranks if everything else ranks[max(0, at - 1) : at + 1]:
        epochs = _epochs(m, rank, EFFORT if effort is None else effort)
        if not epochs:
            continue
        trained = train(m, *starts[rank], relu=False, epochs=epochs, rate=1e-3, seed=seed)
        yield tuned(m, _stored(LINEAR, Q4_0, *trained), recall, trained=True)
        trained = train(m, *_random_start(m, rank, seed), relu=True, epochs=epochs, rate=3e-3, seed=seed)
        yield tuned(m, _stored(LOWRANK, Q4_0, *trained), recall, trained=True)


def _random_start(m: Material, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and bias whose scores are near each neuron's log odds of firing."""
    rng = np.random.default_rng([seed, rank])
    length = np.float32(np.sqrt((m.x[_some(m)] ** 2).sum(axis=1).mean()))
    a = rng.standard_normal((rank, m.n_embd), np.float32) / length
    b = rng.standard_normal((m.n_ff, rank), np.float32) / np.float32(2 * np.sqrt(rank))
    return a, b, np.log(m.fired[m.train].mean(axis=0) + 1e-3).astype(np.float32)


def choose(found: Sequence[Scored], costs: Costs, m: Material, budget: float = BUDGET) -> Scored | None:
    """Of the candidates within the budget the one that makes a token read the fewest bytes; one that computes more
    than `WASTE` times what fires counts for as much more. None where there is none."""

    def cost(scored: Scored) -> float:
        p = scored.predictor
        assert p.computed is not None
        return costs.predicted(p, m.n_ff) * max(1.0, p.computed / (WASTE * m.density))

    return min((s for s in found if s.predictor.nbytes <= budget * costs.ffn), key=cost, default=None)
