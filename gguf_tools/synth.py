"""Write models of published shapes with random weights and a controlled share of firing neurons.

No weights are needed to measure speed, but what a sparse engine does depends on which neurons fire. So the
weights are random, and the pattern is not. Every vector of the residual stream has four kinds of channels:

    32 constant    1 in every embedding; no layer writes to them and every norm passes them on, so that
                   weights there act as biases
    128 topic      what the token is about (random, twice the size of the rest)
    96 context     empty in the embedding; the first layer that mixes tokens writes a fading average of the
                   last few here (attention whose scores depend on distance alone, or a Mamba state)
    the rest       noise, to which the layers add a little (0.3 of its variance over the whole depth)

A row of the deciding matrix (gate, or up where there is no gate) reads topic and context (rank 224 at most,
three quarters of its variance: what a low-rank predictor can learn) and the rest (what it cannot), and has a
bias: the neuron fires when a sum that is normally distributed over tokens exceeds a threshold, which we can
compute from the row as it was quantised. The thresholds are set so that the firing probabilities follow a
power law over the neurons, in a random order in every layer: a share `skew` of them makes 80 % of all firings
(0.26 for OPT-30B, 0.43 for LLaMA(ReGLU)-70B in PowerInfer, arXiv 2312.12456), and their mean is the density
asked for. At a density of 1 there is no law: every threshold lies so low that every neuron fires for every token.

Routers of mixtures read the context for 60 % and the topic for 30 % of their logits' variance, so that
consecutive tokens share experts, and have a random bias per expert (half the logits' deviation), so that some
are popular.

Speed: nothing but what decides is quantised anew. All else is cut from a pool of random rows, quantised once
for each type, at random places, with the scales of its blocks multiplied. That, and 1/n_embd x 256 of the
deciding matrices to quantise, makes the disk the limit.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
import typer

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.reader import BLOCKS, DEFAULT_ALIGNMENT, TYPE_NAMES, row_bytes
from gguf_tools.shapes import ATTENTION, FFN, MAMBA, SHAPES, Shape, find, metadata
from gguf_tools.stream import Progress, Reporter
from gguf_tools.writer import GGUFWriter, NewTensor

F32 = quants.F32
_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}
QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
MXFP4 = "MXFP4"  # for the experts of gpt-oss, as published
# What llama.cpp's quantiser takes where a row is not a multiple of 256.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

DENSITIES = (0.001, 0.9)  # and 1, every neuron always
DEFAULT_DENSITY = 0.1
DEFAULT_SKEW = 0.26
MOST_LIKELY = 0.99  # no neuron fires more often than that, unless all always do
ALWAYS = -6.0  # a threshold below a unit normal: silent once in a thousand million times
COVERED = 0.8  # the share of firings that the skew speaks of

N_CONST, N_TOPIC, N_CONTEXT = 32, 128, 96  # channels; together a block of the K types
N_HEAD = N_CONST + N_TOPIC + N_CONTEXT
TOPIC, CONTEXT = slice(N_CONST, N_CONST + N_TOPIC), slice(N_CONST + N_TOPIC, N_HEAD)
TOPIC_VARIANCE = CONTEXT_VARIANCE = 4.0
ADDED_VARIANCE = 0.3  # what all layers together add to every channel but the constant ones
SHARES = (0.5, 0.25, 0.25)  # of topic, context and the rest in the variance of a deciding row
ROUTER_SHARES = (0.3, 0.6, 0.1)
ROUTER_DEVIATION, ROUTER_BIAS = 2.0, 1.0
ATTENTION_SLOPE = 1.6  # attention weights fall with distance to the power of minus this ...
ATTENTION_REACH = 512  # ... up to so many tokens
UNIFORM_MEMORY = 0.25  # the `attention_memory` that layers without positions are scaled as if they had

_POOL_VALUES = (1 << 19, 1 << 22)  # values in a pool: one for 64 parameters, within these bounds
_CHUNK = 4 << 20  # bytes made at a time
# Where the float16 scales lie in a block (ggml-common.h).
_SCALES = {
    "Q4_0": (0,),
    "Q8_0": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}

# rows(matrix, first, last, rng) -> uint8 [last - first, bytes per row]
Rows = Callable[[int, int, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class SynthReport:
    """What was written. density and skew are None where every neuron counts (SwiGLU)."""

    output: str
    shape: str
    architecture: str
    layers: int
    quant: str
    density: float | None
    skew: float | None
    seed: int
    parameters: int
    output_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.output_bytes / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "bytes_per_second": self.bytes_per_second}


def run(
    output: str | os.PathLike[str],
    shape: str | Shape,
    *,
    layers: int | None = None,
    density: float | None = None,
    skew: float | None = None,
    quant: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthReport:
    """Write a stock GGUF of the shape `shape` (a name in `shapes.SHAPES`) with random weights.

    layers: blocks to write, default all. density: share of FFN neurons that fire in every layer, 0.1 by
    default, 1 for all; only for shapes whose neurons can stay silent. skew: the share of neurons that makes 80 % of the
    firings, default 0.26 or the nearest that the density allows. quant: type of the matrices, default Q4_0
    (gpt-oss: MXFP4 experts). `progress(done, total, what)` counts bytes. Raises ConversionError for arguments
    that cannot be, or too small a disk, before anything is written.
    """
    started = time.monotonic()
    shape = find(shape) if isinstance(shape, str) else shape
    layers = _check_layers(shape, layers)
    density, skew = _check_density(shape, density, skew)
    quant = _check_quant(shape, quant)
    if seed < 0:
        raise ConversionError(f"the seed must not be negative, not {seed}")
    plan = _Plan(shape, layers, density, skew, quant, seed)
    plan.build()
    described = (
        f"Random weights in the shape of {shape.name} ({shape.note}), {layers} of {shape.n_layer} blocks"
    )
    if density is not None:
        described += (
            f"; {density:g} of the FFN neurons fire, {skew:.3g} of them make {COVERED:g} of the firings"
        )
    writer = GGUFWriter(
        output,
        metadata(shape, layers, f"{described}. Made by powerinfer synth, seed {seed}."),
        [tensor for tensor, _ in plan.tensors],
        alignment=DEFAULT_ALIGNMENT,
    )
    reporter = Reporter(progress, writer.size)
    with writer:
        plan.draw()
        _write(writer, plan, reporter)
    return SynthReport(
        output=os.fspath(output),
        shape=shape.name,
        architecture=shape.arch,
        layers=layers,
        quant=quant,
        density=density,
        skew=skew,
        seed=seed,
        parameters=plan.parameters,
        output_bytes=writer.size,
        seconds=time.monotonic() - started,
    )


def layout(shape: Shape, *, layers: int | None = None, quant: str | None = None) -> list[NewTensor]:
    """The tensors that `run` would write, without their data. Raises ConversionError for arguments that cannot be."""
    plan = _Plan(shape, _check_layers(shape, layers), *_check_density(shape, None, None), _check_quant(shape, quant), 0)
    plan.build()
    return [tensor for tensor, _ in plan.tensors]


def _check_layers(shape: Shape, layers: int | None) -> int:
    if layers is None:
        return shape.n_layer
    if not shape.least_layers <= layers <= shape.n_layer:
        reason = " (one of each kind of block)" if shape.least_layers > 1 else ""
        raise ConversionError(
            f"{shape.name} can have {shape.least_layers}{reason} to {shape.n_layer} layers, not {layers}"
        )
    return layers


def _check_density(
    shape: Shape, density: float | None, skew: float | None
) -> tuple[float | None, float | None]:
    if not shape.sparse:
        if density is not None or skew is not None:
            raise ConversionError(
                f"{shape.name} computes {shape.activation}, whose neurons are never silent; density and "
                f"skew are for {', '.join(name for name, other in SHAPES.items() if other.sparse)}"
            )
        return None, None
    density = DEFAULT_DENSITY if density is None else density
    if not DENSITIES[0] <= density <= DENSITIES[1] and density != 1:
        raise ConversionError(f"density must be between {DENSITIES[0]} and {DENSITIES[1]}, or 1, not {density:g}")
    if density == 1:
        if skew not in (None, COVERED):
            raise ConversionError(f"where every neuron fires, all are alike: skew is {COVERED}, not {skew:g}")
        return 1.0, COVERED
    least = COVERED * density / MOST_LIKELY
    if skew is None:
        return density, min(max(DEFAULT_SKEW, least + 0.1), COVERED)
    if not least + 0.01 <= skew <= COVERED:
        raise ConversionError(
            f"skew must be between {least + 0.01:.2f} and {COVERED} at a density of {density:g}, not "
            f"{skew:g}: {COVERED:.0%} of the firings cannot come from fewer neurons than that, nor need more"
        )
    return density, skew


def _check_quant(shape: Shape, quant: str | None) -> str:
    known = (*QUANTS, MXFP4) if shape.arch == "gpt-oss" else QUANTS
    if quant is None:
        return MXFP4 if MXFP4 in known else "Q4_0"
    if quant.upper() not in known:
        raise ConversionError(
            f"{shape.name} cannot be written as {quant!r}; choose one of {', '.join(known)}"
        )
    return quant.upper()


# ---- firing ------------------------------------------------------------------------------------------------


@cache
def firing_probabilities(n: int, density: float, skew: float) -> np.ndarray:
    """float64 [n], falling: min(0.99, a / rank**b) with a and b such that the mean is `density` and the first
    n x `skew` of them make 80 % of the sum; all 1 at a density of 1."""
    if density == 1:
        return np.ones(n)
    rank = np.arange(n) + 0.5

    def law(b: float) -> np.ndarray:
        """The law of exponent b whose mean is `density`: a by bisection, on a logarithmic scale."""
        shape = (rank / n) ** -b
        low, high = -60.0, 10.0
        for _ in range(50):
            middle = (low + high) / 2
            if np.minimum(shape * math.exp(middle), MOST_LIKELY).mean() < density:
                low = middle
            else:
                high = middle
        return np.minimum(shape * math.exp(high), MOST_LIKELY)

    low, high = 0.0, 12.0
    for _ in range(32):
        middle = (low + high) / 2
        p = law(middle)
        covered = np.interp(skew * n, np.arange(n + 1), np.concatenate([[0], np.cumsum(p)])) / p.sum()
        low, high = (middle, high) if covered < COVERED else (low, middle)
    p = law(low)
    p.setflags(write=False)
    return p


@cache
def _thresholds(n: int, density: float, skew: float) -> np.ndarray:
    """float64 [n]: what a unit normal must exceed to fire with `firing_probabilities`."""
    quantile = NormalDist().inv_cdf
    probabilities = firing_probabilities(n, density, skew)
    z = np.array([ALWAYS if p == 1 else -quantile(max(p, 1e-15)) for p in probabilities])
    z.setflags(write=False)
    return z


def _moment(p: np.ndarray, z: np.ndarray, power: int) -> float:
    """Sum over neurons of E[max(x - z, 0)**power], x unit normal, p = P(x > z); power 2 or 4."""
    bell = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if power == 2:
        return float(np.sum((1 + z**2) * p - z * bell))
    return float(np.sum((z**4 + 6 * z**2 + 3) * p - (z**3 + 5 * z) * bell))


def attention_constants(shape: Shape) -> np.ndarray:
    """float64 [head_dim]: the constant query and key that make attention weights fall as
    distance**-ATTENTION_SLOPE, up to ATTENTION_REACH.

    With q = k = a in both dimensions of the pairs rotated by frequencies f, the score is 2 a^2 /
    sqrt(head_dim) sum cos(distance f). The frequencies are spread evenly on a logarithmic scale, so it falls
    with the logarithm of the distance; slower ones than 1 / reach would only add a constant.
    """
    q = np.zeros(shape.head_dim)
    n = int(shape.head_dim * shape.rotary)
    if n == 0:
        return q
    a = math.sqrt(ATTENTION_SLOPE * math.log(shape.rope_base) * math.sqrt(shape.head_dim) / n)
    fast = np.flatnonzero(_frequencies(shape) * ATTENTION_REACH >= 1)
    # Which dimensions are a pair: llama.cpp's LLAMA_ROPE_TYPE_NORM and _NEOX.
    pairs = (2 * fast, 2 * fast + 1) if shape.arch in ("llama", "arcee") else (fast, fast + n // 2)
    q[np.concatenate(pairs)] = a
    return q


def _frequencies(shape: Shape) -> np.ndarray:
    n = int(shape.head_dim * shape.rotary)
    return shape.rope_base ** (-np.arange(0, n, 2) / n)


def attention_memory(shape: Shape, rotated: bool, unevenness: float = 0.0, positions: int = 256) -> float:
    """The variance of an attention average of independent unit values, mean over the first `positions`
    tokens.

    unevenness: relative deviation of the keys' lengths, which makes scores and so weights uneven.
    """
    distance = np.arange(positions)
    score = np.zeros(positions)
    if rotated:
        q = attention_constants(shape)
        frequency = _frequencies(shape)
        fast = frequency[frequency * ATTENTION_REACH >= 1]
        score = np.cos(np.outer(distance, fast)).sum(1) * 2 * q.max() ** 2 / math.sqrt(shape.head_dim)
    weight = np.exp(score - score[0])
    memory = float(np.mean(np.cumsum(weight**2) / np.cumsum(weight) ** 2))
    return memory * math.exp((unevenness * score[1]) ** 2)


# ---- pools of random rows ----------------------------------------------------------------------------------


class _Pools:
    """Rows of normal values of any deviation in any type, cut from one pool of values.

    Thread-safe; keeps the last few deviations of each type.
    """

    def __init__(self, seed: int, stream: int, size: int) -> None:
        self.values = np.random.default_rng([seed, stream]).standard_normal(size, np.float32)
        self._lock = threading.Lock()
        self._unit: dict[int, np.ndarray] = {}
        self._spread: dict[int, float] = {}
        self._scaled: dict[tuple[int, float], np.ndarray] = {}
        self._energy: dict[tuple[int, float], np.ndarray] = {}

    def blocks(self, kind: int, deviation: float) -> np.ndarray:
        """uint8 [blocks, bytes per block]: the pool as `kind`, with that deviation."""
        key = (kind, deviation)
        with self._lock:
            if key not in self._scaled:
                if len(self._scaled) > 12:
                    self._scaled.pop(next(iter(self._scaled)))
                self._scaled[key] = self._scale(kind, deviation)
            return self._scaled[key]

    def _scale(self, kind: int, deviation: float) -> np.ndarray:
        name = TYPE_NAMES[kind]
        block, size = BLOCKS[kind]
        if name not in _SCALES:
            rows = (self.values * np.float32(deviation)).reshape(-1, 1 << 12)
            return quants.quantise(kind, rows).reshape(-1, size)
        if kind not in self._unit:
            unit = quants.quantise(kind, self.values.reshape(-1, 1 << 12))
            self._unit[kind] = unit.reshape(-1, size)
            # Rounding changes the variance by a percent.
            self._spread[kind] = float(np.sqrt(np.mean(quants.dequantise(kind, unit, 1 << 12) ** 2)))
        blocks = self._unit[kind].copy()
        deviation /= self._spread[kind]
        for at in _SCALES[name]:
            scale = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) * np.float32(deviation)
            blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
        return blocks

    def energy(self, kind: int, deviation: float) -> np.ndarray:
        """float64 [blocks + 1]: sums of squares of the stored values before each block."""
        blocks = self.blocks(kind, deviation)
        with self._lock:
            if (kind, deviation) not in self._energy:
                block, size = BLOCKS[kind]
                rows = blocks.reshape(-1, row_bytes(kind, 1 << 12))
                squares = quants.dequantise(kind, rows, 1 << 12).reshape(-1, block) ** 2
                sums = np.concatenate([[0.0], np.cumsum(squares.sum(1, dtype=np.float64))])
                if len(self._energy) > 12:
                    self._energy.pop(next(iter(self._energy)))
                self._energy[kind, deviation] = sums
            return self._energy[kind, deviation]

    def cut(self, kind: int, deviation: float, out: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Fill `out`, uint8 [rows, bytes of a row], from random places; returns those, in blocks."""
        blocks = self.blocks(kind, deviation)
        flat, size, width = blocks.reshape(-1), blocks.shape[1], out.shape[1]
        at = rng.integers(0, len(blocks) - width // size + 1, len(out))
        for row, start in zip(out, (at * size).tolist(), strict=True):
            row[:] = flat[start : start + width]
        return at

    def floats(self, n_rows: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [n_rows, n], unit normal, a copy: rows that follow one another in the pool."""
        start = int(rng.integers(0, len(self.values) - n_rows * n + 1))
        return self.values[start : start + n_rows * n].reshape(n_rows, n).copy()


# ---- the plan ----------------------------------------------------------------------------------------------


@dataclass
class _Residual:
    """Variances of the residual stream's channels over tokens, as the layers add to them."""

    shape: Shape
    topic: float = TOPIC_VARIANCE
    context: float = 0.0
    tail: float = 1.0

    def add(self, variance: float) -> None:
        """What a layer adds to every channel but the constant ones (and the context, before it is there)."""
        self.topic += variance
        self.tail += variance
        if self.context:
            self.context += variance

    @property
    def constant(self) -> float:
        """What a constant channel holds, less the mean where the norm subtracts it."""
        return 1.0 - (N_CONST / self.shape.n_embd if self.shape.layer_norm else 0.0)

    @property
    def scale(self) -> float:
        """What the norm divides by."""
        n = self.shape.n_embd
        variances = N_TOPIC * self.topic + N_CONTEXT * self.context
        squares = N_CONST + variances + (n - N_HEAD) * self.tail
        return math.sqrt(squares / n - (1.0 - self.constant) ** 2)

    @property
    def constant_share(self) -> float:
        """The share of the constant channels in the squared length of what the norm gives."""
        return N_CONST * (self.constant / self.scale) ** 2 / self.shape.n_embd

    @property
    def unevenness(self) -> float:
        """The relative deviation, over tokens, of what the norm divides by."""
        n = self.shape.n_embd
        squares = N_TOPIC * self.topic**2 + N_CONTEXT * self.context**2
        squares += (n - N_HEAD) * self.tail**2
        return math.sqrt(2 * squares) / n / self.scale**2 / 2

    @property
    def mean_variance(self) -> float:
        """How much the mean that the norm subtracts varies over tokens."""
        if not self.shape.layer_norm:
            return 0.0
        n = self.shape.n_embd
        variances = N_TOPIC * self.topic + N_CONTEXT * self.context
        return (variances + (n - N_HEAD) * self.tail) / n**2

    def weights(self, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        """Deviations of weights on topic, context and tail that give those shares of a sum of unit variance;
        what is not in the stream yet leaves its share to the others."""
        counts = (N_TOPIC, N_CONTEXT, self.shape.n_embd - N_HEAD)
        variances = (self.topic, self.context, self.tail)
        present = [share if variance else 0.0 for share, variance in zip(shares, variances, strict=True)]
        return tuple(
            math.sqrt(share / sum(present) / (count * variance)) if share else 0.0
            for share, count, variance in zip(present, counts, variances, strict=True)
        )


@dataclass
class _Plan:
    """All tensors in file order, each with the function that makes its rows."""

    shape: Shape
    layers: int
    density: float | None
    skew: float | None
    quant: str
    seed: int
    tensors: list[tuple[NewTensor, Rows]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.shape.n_embd < 2 * N_HEAD or self.shape.n_embd % 32:
            raise ConversionError(
                f"{self.shape.name}: an embedding of {self.shape.n_embd} channels is too narrow"
            )
        self.residual = _Residual(self.shape)
        blocks = self.shape.blocks(self.layers)
        parts = sum(1 if self.shape.pattern else 2 for _ in blocks)
        self.added = ADDED_VARIANCE / parts
        # The first block that sees where tokens are: layer 0 of a windowed SmallThinker does not rotate.
        self.mixing = 1 if self.shape.arch == "smallthinker" and self.shape.sliding_window else 0

    @property
    def parameters(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(tensor.shape) for tensor, _ in self.tensors)

    def draw(self) -> None:
        """Fill the pools; rows can be made from then on."""
        least, most = _POOL_VALUES
        size = max(least, min(1 << (self.parameters // 64).bit_length(), most))
        self.pools = _Pools(self.seed, 1, size)
        # Tokens have a pool of their own: cut from the same one, a token and a row that reads it would now
        # and then be the same numbers, and their product enormous.
        self.token_pools = _Pools(self.seed, 2, size)

    # -- tensors of one kind or another --

    def kind(self, n: int, quant: str | None = None) -> int:
        """The ggml type for rows of n values."""
        quant = quant or ("Q8_0" if self.quant == MXFP4 else self.quant)
        if n % BLOCKS[_NUMBERS[quant]][0]:
            quant = _FALLBACK.get(quant, "F16")
        return _NUMBERS[quant]

    def matrix(self, name: str, n_in: int, n_out: int, rows: Callable[[int], Rows], experts: int = 0) -> None:
        """A matrix in the chosen type; `rows` is given the type."""
        quant = self.quant if experts else None
        kind = self.kind(n_in, quant)
        ne = (n_in, n_out, experts) if experts else (n_in, n_out)
        self.tensors.append((NewTensor(f"{name}.weight", kind, ne), rows(kind)))

    def floats(self, name: str, values: np.ndarray) -> None:
        """An F32 tensor with these values, [..., n]."""
        values = np.ascontiguousarray(values, np.float32)
        table = values.reshape(-1, values.shape[-1])
        self.tensors.append(
            (
                NewTensor(name, F32, values.shape[::-1]),
                lambda m, first, last, rng: table[first:last].view(np.uint8),
            )
        )

    def norm(self, name: str) -> None:
        """Scales of one, and biases of zero for a LayerNorm."""
        n = self.shape.n_embd
        self.floats(f"{name}.weight", np.ones(n))
        if self.shape.layer_norm:
            self.floats(f"{name}.bias", np.zeros(n))

    # -- recipes --

    def plain(self, deviation: float, n: int) -> Callable[[int], Rows]:
        """Normal rows of n values."""

        def of_kind(kind: int) -> Rows:
            def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
                out = np.empty((last - first, row_bytes(kind, n)), np.uint8)
                self.pools.cut(kind, deviation, out, rng)
                return out

            return rows

        return of_kind

    def writes(self, deviation: float, n: int, context: float | None = None) -> Callable[[int], Rows]:
        """Rows that write to the residual stream: none for the constant channels, those for the context with
        a deviation of their own."""
        context = deviation if context is None else context

        def of_kind(kind: int) -> Rows:
            width = row_bytes(kind, n)
            zero = quants.quantise(kind, np.zeros((1, n), np.float32))

            def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
                out = np.empty((last - first, width), np.uint8)
                for start, stop, std in (
                    (0, N_CONST, 0.0),
                    (N_CONST, CONTEXT.start, deviation),
                    (CONTEXT.start, N_HEAD, context),
                    (N_HEAD, self.shape.n_embd, deviation),
                ):
                    part = out[max(start - first, 0) : max(stop - first, 0)]
                    if std == 0.0:
                        part[:] = zero
                    elif len(part):
                        self.pools.cut(kind, std, part, rng)
                return out

            return rows

        return of_kind

    def biased(self, outputs: np.ndarray, noise: float) -> Callable[[int], Rows]:
        """Rows that read a normed residual stream: their outputs are `outputs`, [rows at least], the same for
        every token, by weights on the constant channels, and noise of that deviation from the others."""
        n = self.shape.n_embd
        bias = (outputs * self.residual.scale / self.residual.constant / N_CONST).astype(np.float32)
        noise /= math.sqrt(n)

        def of_kind(kind: int) -> Rows:
            span = max(BLOCKS[kind][0], N_CONST)

            def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
                out = np.empty((last - first, row_bytes(kind, n)), np.uint8)
                self.pools.cut(kind, noise, out, rng)
                head = self.pools.floats(last - first, span, rng) * np.float32(noise)
                head[:, :N_CONST] = bias[first:last, None]
                out[:, : row_bytes(kind, span)] = quants.quantise(kind, head)
                return out

            return rows

        return of_kind

    def embedding(self, kind: int) -> Rows:
        """Token vectors: constants, topic, an empty context, and the rest."""
        n = self.shape.n_embd

        def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
            out = np.empty((last - first, row_bytes(kind, n)), np.uint8)
            self.token_pools.cut(kind, 1.0, out, rng)
            head = np.zeros((last - first, N_HEAD), np.float32)
            head[:, :N_CONST] = 1.0
            head[:, TOPIC] = self.token_pools.floats(last - first, N_TOPIC, rng) * np.float32(
                TOPIC_VARIANCE**0.5
            )
            out[:, : row_bytes(kind, N_HEAD)] = quants.quantise(kind, head)
            return out

        return rows

    def deciding(self, n_ff: int, index: int) -> Callable[[int], Rows]:
        """Rows of the matrix that decides, with thresholds from the rows as they are stored."""
        assert self.density is not None and self.skew is not None
        residual, n = self.residual, self.shape.n_embd
        shares = (SHARES[0], 0.0, SHARES[2]) if self.shape.pattern else SHARES
        topic, context, tail = (float(np.float32(w)) for w in residual.weights(shares))
        variances = np.repeat([0.0, residual.topic, residual.context], [N_CONST, N_TOPIC, N_CONTEXT])
        variances, tail_variance, constant = variances.astype(np.float32), residual.tail, residual.constant
        thresholds = _thresholds(n_ff, self.density, self.skew)
        # A mean that varies takes the bias with it: the variance grows with the square of the threshold.
        thresholds = thresholds / np.sqrt(1 - thresholds**2 * residual.mean_variance / constant**2)

        def of_kind(kind: int) -> Rows:
            span, head_bytes = max(BLOCKS[kind][0], N_CONST), row_bytes(kind, N_HEAD)
            tail_blocks = (n - N_HEAD) // BLOCKS[kind][0]

            def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
                order = np.random.default_rng([self.seed, index, matrix, 0xF1]).permutation(n_ff)
                out = np.empty((last - first, row_bytes(kind, n)), np.uint8)
                at = self.pools.cut(kind, tail, out[:, head_bytes:], rng)
                energy = self.pools.energy(kind, tail)
                head = self.pools.floats(last - first, N_HEAD, rng)
                head[:, :N_CONST] = 0
                head[:, TOPIC] *= topic
                head[:, CONTEXT] *= context
                stored = quants.quantise(kind, head)
                variance = quants.dequantise(kind, stored, N_HEAD) ** 2 @ variances
                variance += (energy[at + tail_blocks] - energy[at]) * tail_variance
                bias = -thresholds[order[first:last]] * np.sqrt(variance) / (N_CONST * constant)
                head[:, :N_CONST] = bias[:, None]
                out[:, :head_bytes] = stored
                out[:, : row_bytes(kind, span)] = quants.quantise(kind, head[:, :span])
                return out

            return rows

        return of_kind

    # -- the model --

    def build(self) -> None:
        """Plan every tensor, in the order of the file."""
        shape = self.shape
        kind = self.kind(shape.n_embd)
        self.tensors.append(
            (NewTensor("token_embd.weight", kind, (shape.n_embd, shape.n_vocab)), self.embedding(kind))
        )
        for layer, kind_of_block in enumerate(shape.blocks(self.layers)):
            name = f"blk.{layer}"
            self.entering = replace(self.residual)
            self.norm(f"{name}.attn_norm")
            if kind_of_block == MAMBA:
                self._mamba(name, layer)
            elif kind_of_block == ATTENTION:
                self._attention(name, layer)
                if not shape.pattern:
                    self.norm(f"{name}.{'post_attention_norm' if shape.arch == 'gpt-oss' else 'ffn_norm'}")
                    self._ffn(name)
            elif kind_of_block == FFN:
                self._ffn(name)
        if shape.tied:
            # Random signs, or every token would predict itself; and nothing from the constant channels.
            signs = np.random.default_rng([self.seed, 0x71ED]).choice([-3.0, 3.0], shape.n_embd)
            signs[:N_CONST] = 0
            self.floats("output_norm.weight", signs / math.sqrt(shape.n_embd))
        else:
            self.norm("output_norm")
            quant = self.quant if self.quant in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
            kind = self.kind(shape.n_embd, quant)
            head = self.plain(3 / math.sqrt(shape.n_embd), shape.n_embd)(kind)
            self.tensors.append((NewTensor("output.weight", kind, (shape.n_embd, shape.n_vocab)), head))

    def _attention(self, name: str, layer: int) -> None:
        shape, residual = self.shape, self.residual
        n, n_q, n_kv = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        q = attention_constants(shape)
        if shape.arch == "qwen3moe":  # queries and keys are normed, then scaled
            for part in ("attn_q_norm", "attn_k_norm"):
                self.floats(f"{name}.{part}.weight", np.full(shape.head_dim, math.sqrt(np.mean(q**2))))
            q /= math.sqrt(np.mean(q**2))
        fixed = self.biased(np.tile(q, shape.n_head), 0.03)
        self.matrix(f"{name}.attn_q", n, n_q, fixed)
        self.matrix(f"{name}.attn_k", n, n_kv, fixed)
        # Values do not read the constant channels: what does not vary would not fade in the average either.
        self.matrix(f"{name}.attn_v", n, n_kv, self.biased(np.zeros(n_kv), 1.0))
        rotated = bool(shape.rotary) and layer >= self.mixing
        memory = attention_memory(shape, rotated, residual.unevenness)
        memory *= 1 - residual.constant_share
        # Without positions all tokens weigh the same, and the first ones' averages are far larger than the
        # later ones': such a layer is given less to say.
        added = self.added if rotated else self.added * memory / UNIFORM_MEMORY
        writes_context = not shape.pattern and layer == self.mixing
        context = math.sqrt(CONTEXT_VARIANCE / (n_q * memory)) if writes_context else None
        if layer < self.mixing:
            context = 0.0
        self.matrix(
            f"{name}.attn_output", n_q, n, self.writes(math.sqrt(added / (n_q * memory)), n_q, context)
        )
        residual.add(added)
        if writes_context:
            residual.context = CONTEXT_VARIANCE
        if shape.arch == "gpt-oss":
            for part, size in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv), ("attn_output", n)):
                self.floats(f"{name}.{part}.bias", np.zeros(size))
            self.floats(f"{name}.attn_sinks.weight", np.full(shape.n_head, -5.0))

    def _mamba(self, name: str, layer: int) -> None:
        """A Mamba-2 block that keeps a fading average of its input: B, C and the gate are nearly constant."""
        shape, residual, m = self.shape, self.residual, self.shape.mamba
        assert m is not None
        d_bc = 2 * m.n_group * m.d_state
        wanted = np.repeat([1.0, 0.0, 0.5, 0.0], [m.d_inner, m.d_inner, d_bc, m.n_head])
        self.matrix(f"{name}.ssm_in", shape.n_embd, len(wanted), self.biased(wanted, 1.0))
        rng = np.random.default_rng([self.seed, layer, 0x55])
        taps = 0.1 * rng.standard_normal((m.d_inner + d_bc, m.d_conv), np.float32)
        taps[:, -1] = 1.0
        self.floats(f"{name}.ssm_conv1d.weight", taps)
        self.floats(f"{name}.ssm_conv1d.bias", np.zeros(m.d_inner + d_bc))
        self.floats(f"{name}.ssm_dt.bias", rng.uniform(-3, -1, m.n_head))
        self.floats(f"{name}.ssm_a", np.full((m.n_head, 1), -1.0))
        self.floats(f"{name}.ssm_d", np.ones((m.n_head, 1)))
        self.floats(f"{name}.ssm_norm.weight", np.ones((m.n_group, m.d_inner // m.n_group)))
        context = math.sqrt(CONTEXT_VARIANCE / m.d_inner) if layer == 0 else None
        out = self.writes(math.sqrt(self.added / m.d_inner), m.d_inner, context)
        self.matrix(f"{name}.ssm_out", m.d_inner, shape.n_embd, out)
        residual.add(self.added)
        if layer == 0:
            residual.context = CONTEXT_VARIANCE

    def _ffn(self, name: str) -> None:
        shape, experts = self.shape, self.shape.n_expert
        suffix = "_exps" if experts else ""
        if experts:
            self._router(name)
        share = self.added / 2 if shape.n_ff_shared else self.added
        # Expert outputs are averaged with weights of about 1 / n_expert_used.
        averaged = 1.2 / shape.n_expert_used * (shape.expert_scale or 1.0) ** 2 if experts else 1.0
        self._ffn_matrices(name, suffix, shape.n_ff, experts, share / averaged)
        if shape.n_ff_shared:
            self._ffn_matrices(name, "_shexp", shape.n_ff_shared, 0, share)
        if shape.arch == "gpt-oss":
            for part, size in (("gate", shape.n_ff), ("up", shape.n_ff), ("down", shape.n_embd)):
                self.floats(f"{name}.ffn_{part}_exps.bias", np.zeros((experts, size)))
        self.residual.add(self.added)

    def _ffn_matrices(self, name: str, suffix: str, n_ff: int, experts: int, added: float) -> None:
        shape, n = self.shape, self.shape.n_embd
        unit = self.plain(1 / math.sqrt(n), n)  # makes products of unit variance from what a norm gives
        deciding = self.deciding(n_ff, len(self.tensors)) if shape.sparse else unit
        if shape.gated:
            self.matrix(f"{name}.ffn_gate{suffix}", n, n_ff, deciding, experts)
        self.matrix(f"{name}.ffn_up{suffix}", n, n_ff, unit if shape.gated else deciding, experts)
        down = self.writes(math.sqrt(added / self._energy(n_ff)), n_ff)
        self.matrix(f"{name}.ffn_down{suffix}", n_ff, n, down, experts)

    def _energy(self, n_ff: int) -> float:
        """The mean squared length of an FFN's activations."""
        if not self.shape.sparse:
            return n_ff * (0.36 if self.shape.activation == "silu" else 0.9)  # E[silu(x)^2], x unit normal
        assert self.density is not None and self.skew is not None
        p = firing_probabilities(n_ff, self.density, self.skew)
        power = 2 if self.shape.activation == "relu" else 4
        z = _thresholds(n_ff, self.density, self.skew)
        return _moment(p, z, power) / self.residual.scale**power

    def _router(self, name: str) -> None:
        shape = self.shape
        # SmallThinker's router reads the residual stream before any norm, and before this layer's attention.
        normed = shape.arch != "smallthinker"
        residual = self.residual if normed else self.entering
        scale = residual.scale if normed else 1.0
        deviations = [w * scale * ROUTER_DEVIATION for w in residual.weights(ROUTER_SHARES)]
        counts = (N_TOPIC, N_CONTEXT, shape.n_embd - N_HEAD)
        deviation = np.repeat(np.float32(deviations), counts)
        bias = ROUTER_BIAS * scale / (N_CONST * (residual.constant if normed else 1.0))

        def rows(matrix: int, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
            weights = rng.standard_normal((last - first, shape.n_embd), np.float32)
            weights[:, N_CONST:] *= deviation
            weights[:, :N_CONST] = bias * rng.standard_normal((last - first, 1), np.float32)
            return weights.view(np.uint8)

        self.tensors.append(
            (NewTensor(f"{name}.ffn_gate_inp.weight", F32, (shape.n_embd, shape.n_expert)), rows)
        )
        if shape.arch == "nemotron_h_moe":
            self.floats(f"{name}.exp_probs_b.bias", np.zeros(shape.n_expert))
        if shape.arch == "gpt-oss":
            self.floats(f"{name}.ffn_gate_inp.bias", np.zeros(shape.n_expert))


# ---- writing -----------------------------------------------------------------------------------------------


def _write(writer: GGUFWriter, plan: _Plan, reporter: Reporter) -> None:
    """Make rows on as many threads as there are CPUs, a few pieces ahead, and write them in order."""
    workers = len(os.sched_getaffinity(0))
    ahead: deque[tuple[str, bool, Future[np.ndarray]]] = deque()

    def write_oldest() -> None:
        name, is_first, made = ahead.popleft()
        if is_first:
            writer.begin(name)
        data = made.result()
        writer.write(data)
        reporter.advance(data.nbytes, name)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for name, is_first, make in _pieces(plan):
                ahead.append((name, is_first, pool.submit(make)))
                if len(ahead) > 2 * workers:
                    write_oldest()
            while ahead:
                write_oldest()
        except BaseException:
            for _, _, made in ahead:
                made.cancel()
            raise


def _pieces(plan: _Plan) -> Iterator[tuple[str, bool, Callable[[], np.ndarray]]]:
    """(tensor, whether the piece is its first, what makes it) for the whole file. The random generator of a
    piece depends on its place alone, so that the file does not depend on the number of threads."""
    for number, (tensor, rows) in enumerate(plan.tensors):
        n_rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
        step = max(1, min(_CHUNK // row_bytes(tensor.type, tensor.shape[0]), _POOL_VALUES[0] // N_HEAD))
        for matrix in range(math.prod(tensor.shape[2:])):
            for first in range(0, n_rows, step):
                last = min(first + step, n_rows)

                def make(
                    rows: Rows = rows,
                    number: int = number,
                    matrix: int = matrix,
                    first: int = first,
                    last: int = last,
                ) -> np.ndarray:
                    rng = np.random.default_rng([plan.seed, number, matrix, first])
                    return np.ascontiguousarray(rows(matrix, first, last, rng))

                yield tensor.name, matrix == 0 and first == 0, make


# ---- the command -------------------------------------------------------------------------------------------


EXAMPLES = (
    "powerinfer synth mistral.gguf --shape mistral-7b --layers 8 --density 0.1",
    "powerinfer synth moe.gguf --shape qwen3-30b-a3b --layers 8 --quant Q4_K",
)


def command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The stock GGUF to write.")],
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"One of: {', '.join(SHAPES)}.")],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers to write.", show_default="as many as the model has")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of FFN neurons that fire, in every layer; 1: all. Only for shapes with a ReLU.",
            show_default=str(DEFAULT_DENSITY),
        ),
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option(
            help="Share of neurons that makes 80 % of the firings; 0.8: all alike.",
            show_default=f"{DEFAULT_SKEW}, or the nearest the density allows",
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help=f"Type of the matrices: {', '.join(QUANTS)}.", show_default="Q4_0; gpt-oss: MXFP4"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed: the same file for the same seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Write a model of a published shape with random weights and a controlled share of firing neurons.

    It costs what the real model costs and says nothing sensible. Convert it like any other.
    """
    from powerinfer_ext.cli import _print_json, _progress

    with _progress(f"Writing {output.name}") as progress:
        report = run(
            output,
            shape,
            layers=layers,
            density=density,
            skew=skew,
            quant=quant,
            seed=seed,
            progress=progress,
        )
    if as_json:
        return _print_json(report.to_dict())
    firing = (
        "" if report.density is None else f", {report.density:.1%} of neurons fire (skew {report.skew:.2f})"
    )
    typer.echo(
        f"{report.output}: {report.shape} ({report.architecture}), {report.layers} layers, "
        f"{report.parameters / 1e9:.2f} G parameters as {report.quant}{firing}; "
        f"{report.output_bytes / 1e6:.0f} MB in {report.seconds:.1f} s, "
        f"{report.bytes_per_second / 1e6:.0f} MB/s"
    )


command.__name__ = "synth"
