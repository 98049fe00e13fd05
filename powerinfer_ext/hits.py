"""How often a cache of a given size has what is asked for, before anything ran.

Where a file says how often each neuron fires (`ffn_freq`, from a profile), a cache that holds the most frequent ones is
what counts: no policy that does not know the future does better on requests that are independent of each other, and
LFU comes near it. Elsewhere a curve measured on a trained model stands in (`powerinfer trace` of the bundled
smallthinker-reglu-moe on its held-out text, LFU with ageing): other models have other curves, so the source is named
with every figure made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gguf_tools.virtual import ModelFiles

# Share of the neurons or experts that is cached, share of the requests that it answers.
NEURONS = ((0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), (0.0, 0.398, 0.571, 0.755, 0.850, 0.938, 0.975, 1.0))
EXPERTS = ((0.0, 0.2, 0.3, 0.5, 0.7, 1.0), (0.0, 0.270, 0.465, 0.730, 0.830, 1.0))
FREQUENCIES = "the file's neuron frequencies"
STORED = "a curve measured on another model (powerinfer trace of the bundled mixture)"
ALL = "everything is asked for by every token"
_POINTS = 257


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


def of_neurons(frequencies: list[np.ndarray] | None) -> HitRate:
    """Of a sparse-GGUF's neurons: frequencies are those of its layers, each of them with the same share of slots."""
    if not frequencies or sum(float(layer.sum()) for layer in frequencies) <= 0:
        return HitRate(*NEURONS, STORED)
    shares = np.linspace(0, 1, _POINTS)
    hits = np.zeros(_POINTS)
    for layer in frequencies:
        most = np.cumsum(np.sort(np.maximum(layer.astype(np.float64).ravel(), 0))[::-1])
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
    return of_neurons(known)
