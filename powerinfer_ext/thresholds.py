"""Thresholds for FFNs whose neurons are never silent (SwiGLU, GeGLU): which of them may be taken for zero.

A neuron adds act(g_j) u_j times its column of `down` to the output. It is skipped, its row of `up` and its column of
`down` not read, when |act(g_j)| < t_j. Where the t_j come from:

cats    CATS (arXiv 2404.08763): one t for all neurons of a layer, the quantile of |act(g)| that leaves the density
        asked for.
chess   CHESS (arXiv 2409.01366): what is lost with a neuron is |act(g_j)| |u_j|, and u_j is not known yet, so its mean
        over a text stands in: t_j = q / mean |u_j|, with q the quantile of |act(g_j)| mean |u_j| that leaves the
        density asked for. As in the paper's selective sparsification, more is taken where it hurts less: a layer's
        sensitivity is the KL that thresholding it alone costs over the energy it removes, and its share of the
        density follows from that. How far is measured (`BALANCES`), the even split being one of the candidates.

Everything is measured on the stock model itself: an evaluation callback sees each layer's gate and zeroes what the
engine would skip. Three parts of text are kept apart: one gives the statistics, one is for tuning (sensitivities,
the search for a perplexity), and one for the figures that are reported.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from llama_cpp._logger import set_verbose

from gguf_tools.activations import NATIVE
from gguf_tools.convert import Calibrated, Calibration, plan_conversion
from gguf_tools.profile import Profile
from gguf_tools.reader import GGUFFile
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.evaluate import Divergence, log_softmax, windows
from powerinfer_ext.graph import Handler, Watcher, open_watched
from powerinfer_ext.run import trained_context

KINDS = ("cats", "chess")
BALANCES = (0.0, 0.5, 1.0)  # powers of the sensitivities that chess tries; 0 is the same density everywhere
SAMPLED = 512  # tokens whose gates are kept, fewer where they would take more than
_GATE_BYTES = 1 << 28
TOKENS = 4096  # of each of the three parts of the text
LEAST_TOKENS = 256
_LOGIT_BYTES = 1 << 30  # the dense model's logits that are kept while tuning
_SHARP = 0.002  # how close a search comes to the density it looks for
_LEAST_DENSITY = 0.02  # the search for a perplexity goes no further

Progress = Callable[[int, int, str], None]
Thresholds = Mapping[int, np.ndarray]  # layer -> float32 [n_ff]

_NODE = re.compile(r"ffn_(gate|gate_b|up|up_b|swiglu|geglu)-(\d+)")


@dataclass
class LayerStatistics:
    """What one FFN did: |act(g)| of sampled tokens, float16 [tokens, n_ff], and mean |u| over all, float32 [n_ff]."""

    gate: np.ndarray
    mean_up: np.ndarray


Statistics = dict[int, LayerStatistics]


@dataclass(frozen=True)
class Cost:
    """Thresholds measured on a text. density: share of neurons computed, mean over tokens and layers; `kl`, `top1`:
    mean KL(dense || thresholded) in nats, and how often the likeliest token stays the same. Perplexities are of the
    second half of each window; `error` is the standard error of the logarithm of their ratio, from tokens that are
    taken for independent.
    """

    tokens: int
    density: float
    layers: list[float]  # density of each
    ppl_before: float
    ppl_after: float
    error: float
    kl: float
    top1: float

    @property
    def increase(self) -> float:
        """Relative increase of perplexity; 0.01 is 1 %."""
        return self.ppl_after / self.ppl_before - 1

    @property
    def increase_at_most(self) -> float:
        """What the increase on other text of this kind stays below with a probability of 95 %."""
        return (1 + self.increase) * math.exp(1.645 * self.error) - 1


@dataclass(frozen=True)
class ThresholdReport:
    """What was asked for, what it costs on text that nothing was chosen by, and how it was found."""

    kind: str
    balance: float  # see BALANCES
    density_wanted: float | None
    increase_wanted: float | None
    cost: Cost
    tuning: Cost  # the same thresholds on the text they were chosen by

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "increase": self.cost.increase}

    def sentence(self) -> str:
        """What it costs, for the terminal."""
        c = self.cost
        return (
            f"{self.kind} thresholds: {1 - c.density:.1%} of the neurons are skipped; perplexity {c.ppl_before:.3f} -> "
            f"{c.ppl_after:.3f} ({c.increase:+.2%}), mean KL {c.kl:.1e}, same top token {c.top1:.1%}, on "
            f"{c.tokens} tokens of held-out text"
        )


# ---- running the dense model -------------------------------------------------------------------------------


class GatedModel:
    """A stock GGUF whose gates are seen, and obeyed, while llama.cpp runs it.

    `thresholds`: what is skipped; empty computes everything. Raises PowerInferError for models that this makes no
    sense for, FormatError, OSError.
    """

    def __init__(self, path: str, *, window: int | None = None, threads: int = 1) -> None:
        self.path = path
        self.layers, self.activation = _gated_layers(path)
        self.window = window or trained_context(path, at_most=512)
        self.thresholds: Thresholds = {}
        self.computed = dict.fromkeys(self.layers, 0)  # neurons, since the last reset
        self.offered = dict.fromkeys(self.layers, 0)
        self._record: Callable[[int, np.ndarray, np.ndarray], None] | None = None
        self._gate: dict[int, np.ndarray] = {}
        self._up: dict[int, np.ndarray] = {}
        self._watcher = Watcher(self._wanted)
        self._stack = contextlib.ExitStack()
        try:
            self._open(threads)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, threads: int) -> None:
        set_verbose(False)  # llama.cpp's log, as llama_cpp.Llama(verbose=False) does
        self.llama, self.context, self.batch = open_watched(
            self._stack, self.path, self.window, self.window, threads, self._watcher.callback
        )
        self.n_vocab: int = self.llama.n_vocab()

    def close(self) -> None:
        """Free the model."""
        self._stack.close()

    def __enter__(self) -> GatedModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def windows(self, text: str, tokens: int, purpose: str = "judge") -> list[list[int]]:
        """`text` as token windows, `tokens` in all (fewer where it is shorter, PowerInferError where it is too short
        for its purpose).
        """
        bos = self.llama.token_bos() if self.llama.add_bos_token() else None
        ids = self.llama.tokenize(text.encode(), add_bos=False, special=False)
        if len(ids) < LEAST_TOKENS:
            raise PowerInferError(
                f"the text to {purpose} with has {len(ids)} tokens, at least {LEAST_TOKENS} are needed; give more text"
            )
        return windows(ids, tokens, self.window, bos)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), n_vocab] of a window that starts with an empty context."""
        self.context.kv_cache_clear()
        self.batch.set_batch(tokens, n_past=0, logits_all=True)
        try:
            self.context.decode(self.batch)
        finally:
            self._watcher.check()
        rows = np.ctypeslib.as_array(self.context.get_logits(), shape=(len(tokens) * self.n_vocab,))
        return rows.reshape(len(tokens), self.n_vocab).copy()

    def reset_density(self) -> None:
        """Start counting neurons afresh."""
        self.computed = dict.fromkeys(self.layers, 0)
        self.offered = dict.fromkeys(self.layers, 0)

    def record(
        self, cut: list[list[int]], sampled: int = SAMPLED, step: Callable[[], None] = lambda: None
    ) -> Statistics:
        """What every layer's gate and up do on these windows; gates of about `sampled` tokens (at most) are kept.

        Raises PowerInferError where they are not finite.
        """
        total = sum(map(len, cut))
        sampled = min(sampled, _GATE_BYTES // (2 * sum(self.layers.values())))
        rng = np.random.default_rng(0)
        gates: dict[int, list[np.ndarray]] = {layer: [] for layer in self.layers}
        ups = {layer: np.zeros(n_ff) for layer, n_ff in self.layers.items()}
        picked = np.empty(0, int)

        def see(layer: int, gate: np.ndarray, up: np.ndarray) -> None:
            nonlocal picked
            if layer == min(self.layers):  # the same tokens for all layers
                picked = np.flatnonzero(rng.random(len(gate)) < sampled / total)
            ups[layer] += np.abs(up).sum(axis=0, dtype=np.float64)
            if not np.isfinite(ups[layer]).all() or not np.isfinite(gate).all():
                raise PowerInferError(f"{self.path}: the FFN of layer {layer} computes values that are not finite")
            gates[layer].append(np.minimum(gate[picked], 65504).astype(np.float16))

        self._record = see
        try:
            for window in cut:
                self.logits(window)
                step()
        finally:
            self._record = None
        if unseen := [layer for layer in self.layers if not gates[layer]]:
            raise PowerInferError(f"{self.path}: llama.cpp's graph shows no gate of layers {unseen} that we know")
        return {
            layer: LayerStatistics(np.concatenate(gates[layer]), (ups[layer] / total).astype(np.float32))
            for layer in self.layers
        }

    def _wanted(self, name: str) -> Handler | None:
        match = _NODE.fullmatch(name)
        if match is None or int(match[2]) not in self.layers:
            return None
        part, layer = match[1], int(match[2])
        if part.startswith("gate"):  # the later of product and bias is what counts
            return lambda values: self._gate.__setitem__(layer, values.copy())
        if part.startswith("up"):
            return (lambda values: self._up.__setitem__(layer, values.copy())) if self._record else None
        return lambda values: self._product(layer, values)

    def _product(self, layer: int, product: np.ndarray) -> None:
        """act(g) . u of a layer was computed: zero what is below its thresholds."""
        magnitude = np.abs(_ACTIVATE[self.activation](self._gate.pop(layer)))
        if self._record:
            self._record(layer, magnitude, self._up.pop(layer))
        self.offered[layer] += magnitude.size
        if layer in self.thresholds:
            skipped = magnitude < self.thresholds[layer]
            product[skipped] = 0
            self.computed[layer] += magnitude.size - int(np.count_nonzero(skipped))
        else:
            self.computed[layer] += magnitude.size


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 * (1 + np.tanh(0.5 * x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


_ACTIVATE = {"silu": _silu, "gelu": _gelu}


def _gated_layers(path: str) -> tuple[dict[int, int], str]:
    """Layer -> n_ff of the FFNs that can have thresholds, and their activation."""
    with GGUFFile.open(path) as file:
        plan = plan_conversion(file)
    if plan.activation not in _ACTIVATE:
        raise PowerInferError(
            f"{path}: thresholds are for SwiGLU and GeGLU; under {plan.activation} neurons are silent by themselves"
        )
    if not plan.gated:
        raise PowerInferError(f"{path}: its FFN has no gate to compare with a threshold")
    if NATIVE.get(plan.architecture) != (plan.activation, True):
        raise PowerInferError(f"{path}: stock llama.cpp does not compute {plan.activation} for {plan.architecture}")
    if any(ffn.suffix for ffn in plan.ffns):
        raise PowerInferError(f"{path}: thresholds for mixtures of experts are not supported yet")
    return {ffn.index: ffn.n_ff for ffn in plan.ffns}, plan.activation


# ---- from statistics to thresholds -------------------------------------------------------------------------


def cats(statistics: Statistics, density: float) -> dict[int, np.ndarray]:
    """One threshold per layer, which leaves `density` of its neurons (0 to 1)."""
    return {
        layer: np.full(len(s.mean_up), _quantile(s.gate.astype(np.float32), density), np.float32)
        for layer, s in statistics.items()
    }


def chess(statistics: Statistics, density: float, weights: Mapping[int, float] | None = None) -> dict[int, np.ndarray]:
    """A threshold per neuron. weights: how much a layer's neurons count, none for the same density in every layer.

    With weights the density is the mean over all neurons, and a layer's neuron j is skipped when
    weight |act(g_j)| mean |u_j| is below one number for the whole model.
    """
    if weights is None:
        cuts = {layer: _quantile(_importance(s), density) for layer, s in statistics.items()}
    else:
        cut = _common_cut(statistics, density, weights)
        cuts = {layer: cut / weights[layer] for layer in statistics}
    return {layer: _per_neuron(cuts[layer], s.mean_up) for layer, s in statistics.items()}


def _importance(s: LayerStatistics) -> np.ndarray:
    return s.gate.astype(np.float32) * s.mean_up


def _per_neuron(cut: float, mean_up: np.ndarray) -> np.ndarray:
    """cut / mean_up; what never has an up product can always be skipped."""
    with np.errstate(divide="ignore", over="ignore"):
        thresholds = np.float32(cut) / mean_up
    return np.where(mean_up > 0, thresholds, np.float32(np.inf)).astype(np.float32)


def _quantile(values: np.ndarray, density: float) -> float:
    """What a share of `density` of the values is not below; 0.0 keeps all."""
    if density >= 1:
        return 0.0
    return float(np.quantile(values.ravel(), 1 - density))


def _common_cut(statistics: Statistics, density: float, weights: Mapping[int, float]) -> float:
    """The cut on weighted importance that leaves `density` of all neurons, by bisection on its logarithm."""
    if density >= 1:
        return 0.0
    values = {layer: np.sort(_importance(s).ravel()) for layer, s in statistics.items()}
    total = sum(map(len, values.values()))

    def left(cut: float) -> float:
        return sum(len(v) - np.searchsorted(v, cut / weights[layer]) for layer, v in values.items()) / total

    low, high = 1e-30, max(float(v[-1]) * weights[layer] for layer, v in values.items()) * 2
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if left(middle) > density else (low, middle)
        if high / low < 1 + 1e-6:
            break
    return high


# ---- tuning ------------------------------------------------------------------------------------------------


@dataclass
class Tuner:
    """Chooses thresholds by what they do to the model on a text. `cut`: its windows, `dense`: the logits there."""

    model: GatedModel
    statistics: Statistics
    cut: list[list[int]]
    step: Callable[[], None] = lambda: None
    dense: list[np.ndarray] = field(default_factory=list)
    weights: dict[float, dict[int, float] | None] = field(default_factory=dict)  # by balance

    def __post_init__(self) -> None:
        least = max(1, _LOGIT_BYTES // (4 * self.model.n_vocab * self.model.window))
        self.cut = self.cut[:least]
        for window in self.cut:
            self.dense.append(self.model.logits(window))
            self.step()

    def cost(self, thresholds: Thresholds, windows: int | None = None) -> Cost:
        """What these thresholds cost on the text, or on its first windows."""
        pairs = list(zip(self.cut, self.dense, strict=True))[:windows]
        return measure(self.model, thresholds, pairs, self.step)

    def weigh(self, density: float) -> None:
        """Find the sensitivities of the layers: KL over energy removed when one alone is thresholded."""
        even = chess(self.statistics, density)
        ratio = {}
        for layer, s in self.statistics.items():
            importance = _importance(s)
            removed = np.where(importance < even[layer] * s.mean_up, importance, 0)
            energy = float(np.mean(np.sum(removed.astype(np.float64) ** 2, axis=1)))
            kl = self.cost({layer: even[layer]}, max(1, len(self.cut) // 4)).kl
            ratio[layer] = math.sqrt(max(kl, 1e-12) / max(energy, 1e-30))
        for balance in BALANCES:
            self.weights[balance] = {layer: r**balance for layer, r in ratio.items()} if balance else None

    def thresholds(self, kind: str, density: float, balance: float) -> dict[int, np.ndarray]:
        """Thresholds of a kind; `weigh` first for a balance other than 0."""
        if kind == "cats":
            return cats(self.statistics, density)
        return chess(self.statistics, density, self.weights[balance] if balance else None)

    def best(self, kind: str, density: float) -> tuple[dict[int, np.ndarray], float, Cost]:
        """The thresholds for a density whose balance does the least harm (KL), that balance, and what they cost."""
        balances = BALANCES if kind == "chess" else (0.0,)
        if kind == "chess" and not self.weights:
            self.weigh(density)
        found = []
        for balance in balances:
            thresholds = self.thresholds(kind, density, balance)
            found.append((thresholds, balance, self.cost(thresholds)))
        return min(found, key=lambda entry: entry[2].kl)

    def search(self, kind: str, increase: float) -> tuple[dict[int, np.ndarray], float, Cost]:
        """The least density whose perplexity is at most `increase` above the dense model's, by bisection; so far that
        other text may be expected to keep to it (`increase_at_most`).

        With the balance that is best for half of the neurons. Raises PowerInferError when no density does.
        """
        _, balance, _ = self.best(kind, 0.5)
        low, high, best = _LEAST_DENSITY, 1.0, None
        while high - low > _SHARP:
            middle = (low + high) / 2
            thresholds = self.thresholds(kind, middle, balance)
            cost = self.cost(thresholds)
            if cost.increase_at_most <= increase:
                best, high = (thresholds, balance, cost), middle
            else:
                low = middle
        if best is None:
            raise PowerInferError(
                f"{self.model.path}: no thresholds keep perplexity within {increase:.3%}: with {middle:.1%} of the "
                f"neurons it is {cost.increase:+.3%}, up to {cost.increase_at_most:+.3%} given the {cost.tokens} "
                "tokens it was measured on; allow more, or give more text"
            )
        return best


def measure(
    model: GatedModel,
    thresholds: Thresholds,
    pairs: list[tuple[list[int], np.ndarray | None]],
    step: Callable[[], None] = lambda: None,
) -> Cost:
    """Run windows, given with the dense model's logits (None: computed here), under thresholds."""
    before, after, divergence = [], [], Divergence()
    computed, offered = dict.fromkeys(model.layers, 0), dict.fromkeys(model.layers, 0)
    for tokens, dense in pairs:
        if dense is None:
            model.thresholds = {}
            dense = model.logits(tokens)
        model.thresholds = thresholds
        model.reset_density()
        try:
            logits = model.logits(tokens)
        finally:
            model.thresholds = {}
        for layer in model.layers:
            computed[layer] += model.computed[layer]
            offered[layer] += model.offered[layer]
        before.append(_surprise(dense, tokens))
        after.append(_surprise(logits, tokens))
        divergence.add(dense, logits)
        step()
    one, two = np.concatenate(before), np.concatenate(after)
    return Cost(
        tokens=divergence.positions,
        density=sum(computed.values()) / sum(offered.values()),
        layers=[computed[layer] / offered[layer] for layer in model.layers],
        ppl_before=float(np.exp(one.mean())),
        ppl_after=float(np.exp(two.mean())),
        error=float(np.std(two - one) / math.sqrt(len(one))),
        kl=divergence.sum_kl / divergence.positions,
        top1=divergence.agreeing / divergence.positions,
    )


def _surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """-log of the probability of each token in the second half of a window, float64."""
    rows = np.arange(len(tokens) // 2, len(tokens) - 1)
    return -log_softmax(logits[rows])[np.arange(len(rows)), np.asarray(tokens)[rows + 1]]


def find_thresholds(
    path: str,
    kind: str,
    *,
    density: float | None = None,
    max_increase: float | None = None,
    text: str | None = None,
    heldout: str | None = None,
    tokens: int = TOKENS,
    window: int | None = None,
    threads: int = 1,
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, ThresholdReport]:
    """Thresholds for the dense gated stock GGUF at `path`, and what they cost.

    Give one of density (share of neurons to compute, above 0 and at most 1) and max_increase (of perplexity: 0.01 is
    1 %, kept to with a margin for text not seen); a half of the neurons is left where neither is given. text: to
    calibrate and tune with, the bundled one by default; heldout: for the final figures, by default the last quarter of
    `text`, or the bundled held-out one. tokens: at most so many of each part are read. profile: of this model, saves
    reading the first part. progress(done, total, what) counts windows; the total is an estimate.
    Raises PowerInferError (not a model for thresholds, too little text), FormatError (a profile of another model),
    OSError.
    """
    density = 0.5 if density is None and max_increase is None else density
    _check_wishes(kind, density, max_increase)
    text, tuning, heldout, source = texts(text, heldout)
    with GatedModel(path, window=window, threads=threads) as model:
        read = model.windows(text, tokens, "calibrate")
        tuned = model.windows(tuning, tokens, "tune")
        judged = model.windows(heldout, tokens)
        rounds = 1 + (len(model.layers) / 4 + len(BALANCES) if kind == "chess" else 1) + 9 * (density is None)
        step = _counter(progress, len(read) + math.ceil(rounds * len(tuned)) + len(judged))
        statistics = profiled(path, profile, model.layers) if profile else model.record(read, step=step)
        tuner = Tuner(model, statistics, tuned, step)
        if max_increase is not None:
            thresholds, balance, tuning_cost = tuner.search(kind, max_increase)
        else:
            thresholds, balance, tuning_cost = tuner.best(kind, density)
        cost = measure(model, thresholds, [(part, None) for part in judged], step)
    report = ThresholdReport(kind, balance, density, max_increase, cost, tuning_cost)
    ffns = {
        str(layer): Calibrated(thresholds=values, density=share)
        for (layer, values), share in zip(thresholds.items(), tuning_cost.layers, strict=True)
    }
    return Calibration(ffns, source, sum(map(len, read)), threshold_kind=kind), report


def profiled(path: str, profile: Profile, layers: Mapping[int, int]) -> Statistics:
    """The statistics that a profile of the model at `path` has. Raises FormatError if it is another model's."""
    with GGUFFile.open(path) as file:
        profile.check_model(file)
    found = {}
    for layer in layers:
        gate, up = (profile.array(part, str(layer)) for part in ("gate", "up"))
        if gate is None or up is None:
            raise PowerInferError(f"{profile.folder}: has no gates of layer {layer}; calibrate the model again")
        found[layer] = LayerStatistics(gate, np.mean(up, axis=0, dtype=np.float32))
    return found


def _check_wishes(kind: str, density: float | None, max_increase: float | None) -> None:
    if kind not in KINDS:
        raise PowerInferError(f"thresholds of kind {kind!r}: not one of {', '.join(KINDS)}")
    if density is not None and max_increase is not None:
        raise PowerInferError("give a density or a perplexity increase to aim for, not both")
    if density is not None and not 0 < density <= 1:
        raise PowerInferError(f"a density of {density:g}: give a share of the neurons, above 0 and at most 1")
    if max_increase is not None and not 0 <= max_increase < math.inf:
        raise PowerInferError(f"a perplexity increase of {max_increase:g}: give a share of at least 0, such as 0.01")


def texts(text: str | None, heldout: str | None) -> tuple[str, str, str, str]:
    """Texts for statistics, tuning and the final figures, and a name for where they are from."""
    source = "given"
    if text is None:
        from powerinfer_ext.models import bundled

        texts = bundled()[0]
        text, source = texts.calibration_text.read_text(encoding="utf-8"), texts.calibration_text.name
        heldout = texts.heldout_text.read_text(encoding="utf-8") if heldout is None else heldout
    if heldout is None:
        at = _line_end(text, 0.75)
        text, heldout = text[:at], text[at:]
    at = _line_end(text, 0.6)
    return text[:at], text[at:], heldout, source


def _line_end(text: str, share: float) -> int:
    """Where the line at that share of the text ends."""
    return text.find("\n", int(len(text) * share)) + 1 or int(len(text) * share)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total, "thresholds")

    return step
