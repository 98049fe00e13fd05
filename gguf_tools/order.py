"""The order neurons are stored in: the hot ones first, then cold ones beside those they fire with.

Hot neurons are the fewest that make up a share of all firings (PowerInfer, arXiv 2312.12456); they stay in memory.
Cold neurons are read from flash when they are wanted, and neighbours that are wanted together are one read
(LLM in a flash, 2312.11514, calls it bundling by co-activation). They are chained greedily: each is followed by the
neuron that is wanted most often together with it, and with those just before it. Wanted is what fires, or, where a
predictor was made for the memory there is, what that selects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COVERED = 0.8  # the share of firings that hot neurons make up by default
GAP = 16 << 10  # bytes that are read through rather than skipped: a second read would take longer

_TOKENS = 4096  # of which co-activation is taken
_DIMENSIONS, _OVERSAMPLING = 128, 16
_MEMORY = 0.5  # weight of the neuron before last, against the last


def hot_count(frequency: np.ndarray, covered: float = COVERED) -> int:
    """The least number of neurons that make up `covered` of all firings; frequency: float [n_ff], any order."""
    total = np.cumsum(np.sort(frequency)[::-1], dtype=np.float64)
    if not total[-1] > 0:
        return 0
    return int(np.searchsorted(total, covered * total[-1])) + 1


def stored_order(frequency: np.ndarray, fired: np.ndarray | None, hot: int, seed: int = 0) -> np.ndarray:
    """int32 [n_ff], stored -> source: `hot` neurons by frequency, then the others by co-activation in `fired`, bool
    [tokens, n_ff]: which are wanted, as they fire or a predictor selects them (None: by frequency)."""
    order = np.argsort(-frequency, kind="stable").astype(np.int32)
    cold = order[hot:]
    if fired is None or len(cold) < 3:
        return order
    rng = np.random.default_rng(seed)
    if len(fired) > _TOKENS:
        fired = fired[np.sort(rng.choice(len(fired), _TOKENS, replace=False))]
    return np.concatenate((order[:hot], cold[_chain(_embedding(fired[:, cold], rng))]))


def _embedding(fired: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [neurons, dimensions], whose inner products are about how often two neurons are wanted together."""
    x = np.ascontiguousarray(fired.T, dtype=np.float32)
    width = _DIMENSIONS + _OVERSAMPLING
    if x.shape[0] <= width or x.shape[1] <= width:
        return x
    basis = x @ rng.standard_normal((x.shape[1], width), np.float32)
    for _ in range(2):
        basis, _ = np.linalg.qr(basis)
        basis = x @ (x.T @ basis)
    basis, _ = np.linalg.qr(basis)
    values, vectors = np.linalg.eigh((x.T @ basis).T @ (x.T @ basis))
    kept = slice(-_DIMENSIONS, None)
    return basis @ vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0))


def _chain(places: np.ndarray) -> np.ndarray:
    """An order in which each is the one most alike those before it, starting with the first."""
    left = np.arange(len(places))
    vectors = places.copy()
    order = np.empty(len(places), np.int64)
    current = np.zeros(places.shape[1], np.float32)
    at, n = 0, len(places)
    for i in range(len(places)):
        order[i] = left[at]
        current = _MEMORY * current + vectors[at]
        n -= 1
        left[at], vectors[at] = left[n], vectors[n]  # the last takes the free place
        if n:
            at = int((vectors[:n] @ current).argmax())
    return order


@dataclass(frozen=True)
class Reads:
    """What reading the wanted cold neurons costs, mean over tokens: how many are wanted, in how many runs of
    neighbours, in how many reads when gaps of up to `GAP` bytes are read through, and the neurons those read."""

    wanted: float
    runs: float
    reads: float
    neurons: float

    @property
    def run_length(self) -> float:
        """Wanted neurons per run."""
        return self.wanted / self.runs if self.runs else 0.0


def reads(fired: np.ndarray, order: np.ndarray, hot: int, stride: int) -> Reads:
    """For bool [tokens, n_ff] in source order, neurons stored in `order`, `stride` bytes each, the first `hot` in
    memory."""
    wanted = fired[:, order[hot:]]
    through = GAP // stride
    totals = np.zeros(4)
    for row in wanted:
        at = np.flatnonzero(row)
        if not len(at):
            continue
        steps = np.diff(at)
        breaks = np.flatnonzero(steps > through + 1)
        first, last = np.r_[at[0], at[breaks + 1]], np.r_[at[breaks], at[-1]]
        totals += len(at), 1 + np.count_nonzero(steps > 1), len(first), (last - first + 1).sum()
    return Reads(*(totals / max(1, len(wanted))).tolist())
