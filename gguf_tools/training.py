"""Make predictors of which neurons of an FFN fire, with numpy alone.

Three families compete for every layer, and `choose` takes what gives the fastest decoding at the recall asked for:

    linear    The deciding product g = W x, cut to rank r where it matters: reduced-rank regression of g on the
              inputs of the profile, by subspace iteration. All ranks come from one decomposition. Then, unless a
              layer is too large for it, trained on: minibatch Adam on a logistic loss that weighs firing neurons
              more, as they are few.
    lowrank   r hidden units with a ReLU, as in Deja Vu (arXiv 2310.17157) and PowerInfer (2312.12456), trained in
              the same way from random ones.
    direct    W itself in few bits; nothing is trained but the bias. Q2_K, TQ1_0 with thresholds and scales of our
              own (least squares), and signs alone as in SparseInfer (2411.12692).

A neuron is selected where its score exceeds a threshold. Where scores come from a regression, each is measured in
standard deviations of its error, so that one threshold treats all neurons alike: the most recall for the fewest
neurons. The threshold is set on tokens that were held back, after quantisation, and ends up in the bias. Recall
and the share computed are reported for other tokens again.

Where it is known how many neurons will be in memory, the fewest neurons are not the cheapest: one that has to be read
from flash costs as much as dozens that are in memory. `for_flash` has rare neurons score more, frequent ones less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.predictor import Predictor
from gguf_tools.reader import BLOCKS, row_bytes
from gguf_tools.sparse import DIRECT, LINEAR, LOWRANK, RANK_STEP

RANKS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
BUDGET = 0.12  # bytes of a predictor, of the FFN's
WASTE = 1.5  # neurons computed, of those that fire, that a predictor should stay below
JUDGED = 1 << 24  # neuron evaluations that thresholds are set on, and others that they are judged by
GROUPS = 32  # of neighbouring tokens, by whose differences it is known how far recall can be trusted
LEAST_TOKENS = 256

EPOCHS = 24
RATE = 8e-3
MINIBATCH = 256
SOFTNESS = 0.1  # deviations of a margin over which a target goes from 1/4 to 3/4, about
FIRING_WEIGHT = 10.0  # of a neuron that fires in the loss
EFFORT = 5e11  # multiplications and additions that training one predictor may take
QUANTISED_FROM = 0.5  # share of the steps after which the weights count as they will be stored
LEAST_EPOCHS = 4  # with fewer, training makes a good start worse

TQ1_0, Q2_K, Q4_0, Q8_0 = 34, 10, quants.Q4_0, quants.Q8_0
_OVERSAMPLING, _ITERATIONS, _SHRINKAGE = 32, 2, 0.05
_SOME = 512  # tokens on which the error of a regression is measured; and at a time
_COVARIANCE_TOKENS = 8192
_COUNTED_TOKENS = 4096
_HANDICAPS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)  # of rare neurons, in deviations of all scores: `for_flash`
_READ = 200e3  # bytes that could be read from memory in the time that a neuron from flash takes (12 us for 1.7 of them)
_RECALLS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)  # of the curves on a chart


@dataclass(frozen=True)
class Material:
    """What a layer's predictor is made from. x: float32 [tokens, n_embd], the FFN's inputs; fired: bool [tokens,
    n_ff]; w: float32 [n_ff, n_embd], the deciding matrix; train, tune, test: which tokens serve for what; up: float32
    [n_ff, n_embd], where u must be positive too (dReLU)."""

    x: np.ndarray
    fired: np.ndarray
    w: np.ndarray
    train: np.ndarray
    tune: np.ndarray
    test: np.ndarray
    up: np.ndarray | None = None

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

    @cached_property
    def targets(self) -> np.ndarray:
        """float16 [tokens to train on, n_ff]: how clearly a neuron fires, from 0 to 1.

        By the margin in its deviations, so that training does not labour at what rounding decides.
        """
        targets = np.empty((len(self.train), self.n_ff), np.float16)
        deviations = [(self.x[_some(self)] @ w.T).std(axis=0) + 1e-12 for w in self._deciding]
        for part in range(0, len(targets), _SOME):
            x = self.x[self.train[part : part + _SOME]]
            margins = [x @ w.T / deviation for w, deviation in zip(self._deciding, deviations, strict=True)]
            targets[part : part + _SOME] = _sigmoid(np.minimum.reduce(margins) / SOFTNESS)
        return targets

    @property
    def _deciding(self) -> list[np.ndarray]:
        return [self.w] if self.up is None else [self.w, self.up]


def material(
    x: np.ndarray, fired: np.ndarray, w: np.ndarray, window: int, up: np.ndarray | None = None
) -> Material:
    """Split tokens by windows: of seven, five to train, one to tune, one to test.

    Raises ConversionError when there is too little, or nothing fires.
    """
    n = len(x)
    if n < LEAST_TOKENS:
        raise ConversionError(f"{n} tokens are too few to train on; calibrate with at least {LEAST_TOKENS}")
    window = min(window, n // 7)  # short profiles are cut finer, so that each part gets some
    part = np.arange(n) // window % 7
    split = {name: np.flatnonzero(mask) for name, mask in zip("abc", (part < 5, part == 5, part == 6), strict=True)}
    tune, test = (_spread(split[part], JUDGED // len(w)) for part in "bc")
    made = Material(x.astype(np.float32), fired, w, split["a"], tune, test, up)
    if not fired[made.tune].any() or not fired[made.test].any():
        raise ConversionError("no neuron fires in the text: there is nothing to predict")
    return made


def _spread(tokens: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them, evenly spread."""
    return tokens if len(tokens) <= most else tokens[np.linspace(0, len(tokens) - 1, most).astype(int)]


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

    def weighed(self, predictor_bytes: int, computed: float, m: Material) -> float:
        """What predictors are compared by: bytes, times what is computed beyond `WASTE` times what fires."""
        return (predictor_bytes + computed * m.n_ff * self.bundle) * max(1.0, computed / (WASTE * m.density))


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
    return _quantile(np.sort(scores[fired]), recall)


def _quantile(firing: np.ndarray, recall: float) -> float:
    """The value in ascending `firing` that `recall` of them reach."""
    return float(firing[min(len(firing) - 1, int((1 - recall) * len(firing)))])


def measure(selected: np.ndarray, fired: np.ndarray) -> tuple[float, float]:
    """Recall, and the share of all neurons that is selected."""
    return float((selected & fired).sum() / max(1, fired.sum())), float(selected.mean())


def safe_threshold(scores: np.ndarray, fired: np.ndarray, recall: float) -> float:
    """The score that `recall` of the firing neurons exceed, and two standard errors more, as other tokens will differ
    from these as these differ among themselves."""
    firing = np.sort(scores[fired])
    missed = fired & (scores < _quantile(firing, recall))
    groups = np.array_split(np.arange(len(scores)), GROUPS)
    counts = np.array([(fired[g].sum(), missed[g].sum()) for g in groups], np.float64)
    total, lost = counts.sum(axis=0)
    error = np.sqrt(((counts[:, 1] - lost / total * counts[:, 0]) ** 2).sum()) / total
    return _quantile(firing, min(recall + 2 * error, (1 + recall) / 2))


def _curve(scores: np.ndarray, fired: np.ndarray) -> list[tuple[float, float]]:
    """(recall, share computed) at several thresholds."""
    firing = np.sort(scores[fired])
    return [(recall, float((scores >= _quantile(firing, recall)).mean())) for recall in _RECALLS]


def tuned(m: Material, predictor: Predictor, recall: float, *, trained: bool) -> Scored:
    """The predictor with its threshold set for `recall` and folded into the bias, and how it does on other tokens."""
    cut = safe_threshold(predictor.scores(m.x[m.tune]), m.fired[m.tune], recall)
    scale = max(abs(cut), 1e-6)
    predictor = replace(predictor, bias=(predictor.bias - (cut - 1e-6 * scale)).astype(np.float32))
    scores, fired = predictor.scores(m.x[m.test]), m.fired[m.test]
    reached, computed = measure(scores > 0, fired)
    name = f"{predictor.label}{', trained' if trained else ''}"
    return Scored(name, trained, replace(predictor, recall=reached, computed=computed), _curve(scores, fired))


def for_flash(m: Material, predictor: Predictor, recall: float, in_memory: int, row: int) -> Predictor:
    """The predictor with the same recall, but fewer neurons that are read from flash, if the `in_memory` ones wanted
    most are in memory: rare neurons have to score more, and the threshold is lower for all.

    By how much is what costs least on the tokens for tuning: `_READ` for a neuron from flash, and for every neuron
    selected its `row` bytes of the deciding matrix, as that is what a neuron selected in vain costs.
    """
    scores, fired = predictor.scores(m.x[m.tune]), m.fired[m.tune]
    place = np.empty(m.n_ff)
    place[np.argsort(-m.fired[m.train].mean(axis=0), kind="stable")] = np.arange(m.n_ff)
    # At the edge it is not certain which are in memory when it runs; a wider slope than this reads more.
    rare = np.clip((place / max(in_memory, 1) - 0.9) / 0.2, 0, 1).astype(np.float32) * scores.std()
    least, best = np.inf, np.zeros(m.n_ff, np.float32)
    for handicap in _HANDICAPS:
        taken_off = handicap * rare
        cut = safe_threshold(scores - taken_off, fired, recall)
        often = np.sort((scores >= taken_off + cut).mean(axis=0))[::-1]
        cost = often[in_memory:].sum() * _READ + often.sum() * row
        if cost < least:
            least, best = cost, taken_off + np.float32(cut - 1e-6 * max(abs(cut), 1e-6))
    predictor = replace(predictor, bias=(predictor.bias - best).astype(np.float32))
    reached, computed = measure(predictor.scores(m.x[m.test]) > 0, m.fired[m.test])
    return replace(predictor, recall=reached, computed=computed)


def selected(m: Material, predictor: Predictor) -> np.ndarray:
    """bool [tokens, n_ff]: which neurons it selects for a sample of all tokens."""
    sample = _spread(np.arange(len(m.x)), _COUNTED_TOKENS)
    parts = (predictor.scores(m.x[sample[at : at + _SOME]]) > 0 for at in range(0, len(sample), _SOME))
    return np.concatenate(list(parts))


# ---- linear ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """g is about b . (a x) + bias: a [rank, n_embd], whose products have unit variance and are uncorrelated, so that
    the first r rows of a and columns of b are the best of rank r. covariance(y): the inputs' covariance times y
    [n_embd, columns]. x, g: some tokens to measure errors on."""

    a: np.ndarray
    b: np.ndarray
    w: np.ndarray
    mean_x: np.ndarray
    mean_g: np.ndarray
    covariance: Callable[[np.ndarray], np.ndarray]
    x: np.ndarray
    g: np.ndarray

    def cut(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and bias of that rank, scores in standard deviations of their error."""
        a, b = self.a[:rank], self.b[:, :rank]
        return a, *self._scaled(a, b, b)

    def stored(self, rank: int, seed: int) -> Predictor:
        """The predictor of that rank. B is the regression on the hidden units as they are after A was quantised, and
        the bias and the scale make up for what B's quantisation changes."""
        a, *_ = _mixed(*self.cut(rank), seed)
        a_type = _a_type(a.shape[1], Q4_0)
        a = quants.dequantise(a_type, quants.quantise(a_type, a), a.shape[1])
        spread = self.covariance(a.T)
        within = a @ spread
        within[np.diag_indices(rank)] += 1e-6 * np.trace(within) / rank
        b = self.w @ np.linalg.solve(within, spread.T).T
        return _stored(LINEAR, Q4_0, a, *self._scaled(a, b, _as_stored(b)))

    def _scaled(self, a: np.ndarray, b: np.ndarray, as_stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """B and the bias, divided by the deviation of the error that they leave."""
        bias = self.mean_g - as_stored @ (a @ self.mean_x)
        error = self.g - ((self.x @ a.T) @ as_stored.T + bias)
        scale = 1 / np.maximum(error.std(axis=0), 1e-3 * self.g.std(axis=0) + 1e-12)
        return b * scale[:, None], bias * scale


def regress(m: Material, rank: int, seed: int = 0) -> Regression:
    """Reduced-rank regression of the deciding product on the inputs, up to `rank`.

    The best prediction of g = W x from r numbers that are linear in x projects g's covariance, W C W', on its r
    leading eigenvectors. Found by block power iteration, without forming W C W' or C (7B: 14336 and 4096 wide). C
    is shrunk towards its diagonal, as there may be fewer tokens than dimensions.
    """
    x = m.x[_spread(m.train, _COVARIANCE_TOKENS)]
    mean_x = x.mean(axis=0)
    x -= mean_x
    floor = _SHRINKAGE * (x * x).mean(axis=0)[:, None]
    weight = np.float32((1 - _SHRINKAGE) / len(x))

    def covariance(y: np.ndarray) -> np.ndarray:
        product = x.T @ (x @ y)
        product *= weight
        product += floor * y
        return product

    width = min(rank + _OVERSAMPLING, *m.w.shape)
    basis = np.random.default_rng(seed).standard_normal((m.n_ff, width), np.float32)
    for _ in range(_ITERATIONS):
        basis = _orthonormal(m.w @ covariance(m.w.T @ basis))
    y = m.w.T @ basis  # [n_embd, width]; basis' (W C W') basis = y' C y
    spread = covariance(y)
    values, vectors = np.linalg.eigh(y.T @ spread)
    largest = np.argsort(values)[::-1][: min(rank, width)]
    turn = vectors[:, largest] / np.sqrt(np.maximum(values[largest], 1e-12))
    a = np.ascontiguousarray((y @ turn).T)
    b = m.w @ (spread @ turn)  # the regression of g on products that are uncorrelated and of unit variance
    some = m.x[_some(m)]
    return Regression(a, b, m.w, mean_x, m.w @ mean_x, covariance, some, some @ m.w.T)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """A basis of the same space, from the eigenvectors of the products of the columns: ten times as fast as
    Householder's QR for tall matrices. Directions that are lost in rounding come out shorter."""
    wide = columns.astype(np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide)
    return columns @ (vectors / np.sqrt(np.maximum(values, 1e-13 * values[-1]))).astype(np.float32)


def _some(m: Material) -> np.ndarray:
    """Tokens to measure the errors of regressions on."""
    return _spread(m.train, _SOME)


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
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minibatch Adam (arXiv 1412.6980) on the weighted logistic loss of `m.targets`; returns new A, B and bias.

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
        for rows in np.split(rng.permutation(len(m.train))[: len(m.train) // size * size], len(m.train) // size):
            x, target = m.x[m.train[rows]], m.targets[rows].astype(np.float32)
            used = weights if step < QUANTISED_FROM * steps else [_as_stored(weights[0]), _as_stored(weights[1])]
            z = x @ used[0].T
            hidden = np.maximum(z, 0) if relu else z
            scores = hidden @ used[1].T
            scores += weights[2]
            # Of the loss -FIRING_WEIGHT t log p - (1 - t) log(1 - p), p = sigmoid(score).
            slope = _sigmoid(scores)
            slope *= (FIRING_WEIGHT - 1) * target + 1
            slope -= FIRING_WEIGHT * target
            slope /= size
            back = slope @ used[1]
            if relu:
                back *= z > 0
            gradients = (back.T @ x, slope.T @ hidden, slope.sum(axis=0))
            step += 1
            pace = RATE * 0.5 * (1 + np.cos(np.pi * step / steps)) / (1 - 0.9**step)
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


def _stored(kind: str, ggml_type: int, a: np.ndarray, b: np.ndarray, bias: np.ndarray) -> Predictor:
    a_type = _a_type(a.shape[1], ggml_type)
    a_rows, b_rows = quants.quantise(a_type, a), quants.quantise(ggml_type, b)
    return Predictor(kind, ggml_type, b_rows, bias.astype(np.float32), a_type, a_rows)


def _a_type(n_embd: int, ggml_type: int) -> int:
    """That type where its blocks divide a row of A."""
    return quants.F16 if n_embd % BLOCKS[ggml_type][0] else ggml_type


def _bytes(m: Material, rank: int, ggml_type: int) -> int:
    width = row_bytes(_a_type(m.n_embd, ggml_type), m.n_embd)
    return rank * width + m.n_ff * row_bytes(ggml_type, rank) + 4 * m.n_ff


def directs(m: Material, recall: float, most: float) -> Iterator[Scored]:
    """The predictors that need no training, with biases from the profile, that take at most so many bytes."""
    importance = (m.x[m.train] ** 2).mean(axis=0) + 1e-9
    shadows = [
        (name, ggml_type, make)
        for name, ggml_type, make in (
            ("direct TQ1_0", TQ1_0, lambda: ternary(m.w, importance)),
            ("direct Q2_K", Q2_K, lambda: quants.quantise(Q2_K, m.w)),
            ("signs TQ1_0", TQ1_0, lambda: signs(m.w)),
        )
        if m.n_embd % BLOCKS[ggml_type][0] == 0 and m.n_ff * (row_bytes(ggml_type, m.n_embd) + 4) <= most
    ]
    if not shadows:
        return
    x = m.x[_some(m)]
    exact = x @ m.w.T
    for name, ggml_type, make in shadows:
        rows = make()
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

    cut = safe_threshold(normal(m.tune), m.fired[m.tune], recall)
    scores, fired = normal(m.test), m.fired[m.test]
    reached, computed = measure(scores >= cut, fired)
    bias = ((offset - cut * error) / slope).astype(np.float32)
    return Scored(name, False, replace(plain, bias=bias, recall=reached, computed=computed), _curve(scores, fired))


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

    The rank is searched untrained, as all of them come from one regression; from there on trained, upwards and
    downwards as long as it helps. everything: train every rank, and try what is over the budget too (for a chart).
    """
    limit = 4 * budget if everything else budget
    ranks = [r for r in ranks or RANKS if _bytes(m, r, Q4_0) <= limit * costs.ffn and r <= min(m.w.shape)]
    yield from directs(m, recall, costs.ffn if everything else budget * costs.ffn)
    if not ranks:
        return
    regression = regress(m, max(ranks), seed)
    at = _promising(m, costs, regression, ranks, recall)
    for rank in ranks if everything else ranks[max(0, at - 1) : at + 2]:
        yield tuned(m, regression.stored(rank, seed), recall, trained=False)
    effort = EFFORT if effort is None else effort

    def trained(rank: int, relu: bool) -> Iterator[Scored]:
        if epochs := _epochs(m, rank, effort):
            start = _random_start(m, rank, seed) if relu else _mixed(*regression.cut(rank), seed)
            weights = train(m, *start, relu=relu, epochs=epochs, seed=seed)
            yield tuned(m, _stored(LOWRANK if relu else LINEAR, Q4_0, *weights), recall, trained=True)

    if everything:
        for rank in ranks:
            yield from trained(rank, relu=False)
            yield from trained(rank, relu=True)
        return
    found: list[Scored] = []
    for further in (ranks[at:], ranks[:at][::-1]):
        for rank in further:
            before = choose(found, costs, m, limit)
            found += (new := list(trained(rank, relu=False)))
            yield from new
            if choose(found, costs, m, limit) is before:
                break
    if best := choose(found, costs, m, limit):
        yield from trained(best.predictor.rank, relu=True)


def _promising(m: Material, costs: Costs, regression: Regression, ranks: Sequence[int], recall: float) -> int:
    """Which of the ranks costs least, before anything is quantised or trained."""
    tokens = _spread(m.tune, JUDGED // 2 // m.n_ff)
    best, least = 0, np.inf
    for i, rank in enumerate(ranks):
        a, b, bias = regression.cut(rank)
        scores = (m.x[tokens] @ a.T) @ b.T + bias
        computed = float((scores >= threshold(scores, m.fired[tokens], recall)).mean())
        cost = costs.weighed(_bytes(m, rank, Q4_0), computed, m)
        if cost < least:
            best, least = i, cost
        elif i > best + 1:  # what more rank costs, it no longer gives
            break
    return best


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
        assert scored.predictor.computed is not None
        return costs.weighed(scored.predictor.nbytes, scored.predictor.computed, m)

    return min((s for s in found if s.predictor.nbytes <= budget * costs.ffn), key=cost, default=None)
