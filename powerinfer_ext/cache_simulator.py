"""Hit rates of neuron and expert caches on a recorded trace, for several policies and all sizes at once.

The model of a cache: it holds up to C units (neurons or experts of one layer, all of one size). A token asks
for a set of units at once; those that are in the cache are hits, the others are loaded. After the token the
policy chooses which of the units at hand (those that were cached and those just loaded) to keep: it may drop
what it just loaded, and it cannot load what nobody asked for, except for the static hot set, which is loaded
in advance and never changes.

    lru     the units used last lfu     the units with the greatest count of uses, where a use counts half
    after `half_life` tokens window  all units of the last tokens, as many whole tokens as fit (LLM in a
    flash, arXiv 2312.11514, section 3.1) static  the units used most in the tokens before `warm`
    (PowerInfer's hot set, arXiv 2312.12456) belady  the units whose next use is nearest: no policy without
    knowledge of the future does better, as a unit asked
            for is at hand afterwards whether it was a hit or not (Belady 1966, with bypassing)

Ties are broken towards the lower unit number. Hits are counted from token `warm` on, in a cache warmed by the
tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POLICIES = ("lru", "lfu", "window", "static", "belady")
HALF_LIFE = 32.0  # tokens


def hit_rates(
    requests: Sequence[np.ndarray],
    n_units: int,
    sizes: Sequence[int],
    policy: str,
    *,
    warm: int = 0,
    half_life: float = HALF_LIFE,
) -> np.ndarray:
    """Share of requested units found in a cache of each size.

    requests: per token the units it asks for, distinct numbers below `n_units`, ascending. sizes: capacities
    in units, ascending. Returns float64 [len(sizes)]; NaN when nothing is asked for from token `warm` on.
    Raises ValueError for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    capacities = np.asarray(sizes, np.int64)
    asked = sum(len(units) for units in requests[warm:])
    if policy == "belady":
        hits = np.array([_belady(requests, n_units, int(size), warm) for size in capacities])
    else:
        # The others need no simulation for each size: a unit is in the cache when it ranks below the
        # capacity.
        ranks = {"lru": _lru, "lfu": _lfu, "window": _window, "static": _static}[policy]
        hits = np.zeros(len(capacities))
        for rank in ranks(requests, n_units, warm, half_life):
            hits += np.searchsorted(np.sort(rank), capacities, side="left")
    return hits / asked if asked else np.full(len(capacities), np.nan)


NEVER = np.iinfo(np.int64).max  # the rank of a unit that no cache holds


def _lru(requests: Sequence[np.ndarray], n_units: int, warm: int, half_life: float):
    """Yields, for every token from `warm` on, its units' places in the order of last use (0: the latest)."""
    order = np.arange(n_units)
    place = np.arange(n_units)
    seen = np.zeros(n_units, bool)
    for t, units in enumerate(requests):
        if t >= warm:
            yield np.where(seen[units], place[units], NEVER)
        seen[units] = True
        rest = np.ones(n_units, bool)
        rest[units] = False
        order = np.concatenate([units, order[rest[order]]])
        place[order] = np.arange(n_units)


def _lfu(requests: Sequence[np.ndarray], n_units: int, warm: int, half_life: float):
    """Yields places in the order of aged counts."""
    score = np.zeros(n_units)
    # Later uses weigh more instead of earlier ones less: one addition per use. The last factor breaks ties.
    growth, weight = 2.0 ** (1.0 / half_life), 1.0
    favour = 1.0 + 1e-9 * np.arange(n_units, 0, -1) / n_units
    for t, units in enumerate(requests):
        if t >= warm:
            falling = np.sort(-score)
            rank = np.searchsorted(falling, -score[units], side="left")
            yield np.where(score[units] > 0, rank, NEVER)
        score[units] += weight * favour[units]
        weight *= growth
        if weight > 1e100:
            score /= weight
            weight = 1.0


def _window(requests: Sequence[np.ndarray], n_units: int, warm: int, half_life: float):
    """Yields the least capacity, less one, that holds all tokens back to the unit's last use.

    Where not even the last token fits, its first units are kept."""
    last = np.full(n_units, -1, np.int64)
    count = np.zeros(len(requests) + 1, np.int64)  # units last used at that token
    for t, units in enumerate(requests):
        if t >= warm:
            held = np.cumsum(count[:t][::-1])[::-1]  # units last used at that token or later
            used = last[units]
            rank = np.where(used >= 0, held[used] - 1, NEVER) if t else np.full(len(units), NEVER)
            if t and (latest := used == t - 1).any():
                rank[latest] = np.searchsorted(requests[t - 1], units[latest])
            yield rank
        known = last[units]
        np.subtract.at(count, known[known >= 0], 1)
        last[units] = t
        count[t] = len(units)


def _static(requests: Sequence[np.ndarray], n_units: int, warm: int, half_life: float):
    """Yields places in the order of use before `warm`."""
    uses = np.zeros(n_units, np.int64)
    for units in requests[:warm]:
        uses[units] += 1
    place = np.empty(n_units, np.int64)
    place[np.argsort(-uses, kind="stable")] = np.arange(n_units)
    for units in requests[warm:]:
        yield place[units]


def _belady(requests: Sequence[np.ndarray], n_units: int, size: int, warm: int) -> int:
    """Hits from token `warm` on with perfect knowledge of what follows."""
    upcoming = np.full(n_units, NEVER, np.int64)
    following: list[np.ndarray] = []  # per token, when each of its units is used next
    for t in range(len(requests) - 1, -1, -1):
        following.append(upcoming[requests[t]])
        upcoming[requests[t]] = t
    following.reverse()
    cached = np.zeros(n_units, bool)
    next_use = np.full(n_units, NEVER, np.int64)
    hits = 0
    for t, units in enumerate(requests):
        if t >= warm:
            hits += int(cached[units].sum())
        next_use[units] = following[t]
        cached[units] = True
        held = np.flatnonzero(cached & (next_use != NEVER))  # what is never used again is dropped
        if len(held) > size:
            held = held[np.argpartition(next_use[held], size)[:size]] if size else held[:0]
        cached[:] = False
        cached[held] = True
    return hits
