"""How often a cache of a given size has what is asked for, before anything ran.

Where a file says how often each neuron fires (`ffn_freq`, from a profile), a cache that holds the most frequent ones is
what counts: no policy that does not know the future does better on requests that are independent of each other, and
LFU comes near it. A predictor selects more than fires: what comes within a margin of firing, as it cannot tell that
from what fires. That makes requests less concentrated than firings are, by as much as the share that it selects says.
Elsewhere a curve measured on a trained model stands in (`powerinfer trace` of the bundled smallthinker-reglu-moe on its
held-out text, LFU with ageing): other models have other curves, so the source is named with every figure made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from gguf_tools.virtual import ModelFiles

# Share of the neurons or experts that is cached, share of the requests that it answers.
NEURONS = ((0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), (0.0, 0.398, 0.571, 0.755, 0.850, 0.938, 0.975, 1.0))
EXPERTS = ((0.0, 0.2, 0.3, 0.5, 0.7, 1.0), (0.0, 0.270, 0.465, 0.730, 0.830, 1.0))
FREQUENCIES = "the file's neuron frequencies"
STORED = "a curve measured on another model (powerinfer trace of the bundled mixture)"
ALL = "everything is asked for by every token"
_POINTS = 257
_DEVIATIONS = np.linspace(-8, 8, 4001)  # where the normal distribution is tabled, and
_BELOW = np.array([NormalDist().cdf(x) for x in _DEVIATIONS])  # how much of it lies below


@dataclass(frozen=True)
class HitRate:
    """A curve: call it with the share of units that is cached."""

    shares: tuple[float, ...]
    rates: tuple[float, ...]
    source: str

    def __call__(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.rates))


def dense() -> HitRate:
    """Of units that every token asks for: what is not cached is missed."""
    return HitRate((0.0, 1.0), (0.0, 1.0), ALL)


def selected(frequency: np.ndarray, computed: float) -> np.ndarray:
    """How often neurons that fire so often are selected, if a share `computed` of all is and each is selected when it
    comes within a margin of firing. The margin, in units of each neuron's own (normal) spread, is the same for all.
    """
    if computed <= float(frequency.mean()):
        return frequency
    deviations = np.interp(frequency, _BELOW, _DEVIATIONS)
    least, most = 0.0, 8.0
    for _ in range(30):
        margin = (least + most) / 2
        enough = float(np.interp(deviations + margin, _DEVIATIONS, _BELOW).mean()) >= computed
        least, most = (least, margin) if enough else (margin, most)
    return np.interp(deviations + most, _DEVIATIONS, _BELOW)


def of_neurons(frequencies: list[np.ndarray] | None, computed: float | None = None) -> HitRate:
    """Of a sparse-GGUF's neurons: frequencies are those of its layers, each of them with the same share of slots.

    computed: the share of the neurons that is selected, if not only those that fire are.
    """
    if not frequencies or sum(float(layer.sum()) for layer in frequencies) <= 0:
        return HitRate(*NEURONS, STORED)
    shares = np.linspace(0, 1, _POINTS)
    hits = np.zeros(_POINTS)
    for layer in frequencies:
        wanted = np.maximum(layer.astype(np.float64).ravel(), 0)
        if computed is not None:
            wanted = selected(wanted, computed)
        most = np.cumsum(np.sort(wanted)[::-1])
        hits += np.interp(shares * len(most), np.arange(len(most) + 1), np.concatenate([[0.0], most]))
    return HitRate(tuple(shares), tuple(hits / hits[-1]), FREQUENCIES)


def of_experts() -> HitRate:
    """Of a mixture's experts."""
    return HitRate(*EXPERTS, STORED)


def of_model(files: ModelFiles, mixture: bool) -> HitRate:
    """Of what a model's file is streamed in."""
    if files.sparse is None:
        return of_experts() if mixture else dense()
    known = [layer.frequency for layer in files.sparse.layers if layer.frequency is not None]
    return of_neurons(known, computed(files.sparse.layers))


def computed(layers: list[Any]) -> float | None:
    """The share of the neurons that these layers' predictors select, by the file; None where it does not say."""
    shares = [layer.predictor.computed for layer in layers if layer.predictor is not None]
    return float(np.mean(shares)) if shares and None not in shares else None
