"""Record which neurons and experts fire on a text, and what that says about caches: `powerinfer trace`.

Recording goes through llama.cpp's evaluation callback (`llama_context_params.cb_eval`), which hands out the
activations of every FFN as the graph is computed: the same for stock GGUF and sparse-GGUF files, at the price
of speed. A neuron fires when its activation (what `down` is multiplied with) is not zero.

The file (`.npz`): `meta`, a JSON string; for every FFN `bits.<unit>`, the firing neurons packed eight to a
byte, uint8 [tokens, n_ff / 8], or [tokens, experts used, n_ff / 8] in a mixture, whose experts are in
`experts.<unit>`, int16 [tokens, experts used]. Neurons are numbered as they are stored in the model file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguf_tools.activations import NATIVE
from gguf_tools.profile import write_atomically
from gguf_tools.reader import GGUFFile
from powerinfer_ext import cache_simulator
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.graph import Handler, Watcher, open_watched

SILENT = ("relu", "relu2", "drelu")  # activations that are zero for neurons that do not fire
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # cache sizes, of a layer's neurons or experts
COVERED = 0.8  # the share of firings that the skew speaks of
VERSION = 1
_BATCH = 128

Progress = Callable[..., None]

# Names of the nodes that hold what `down` is multiplied with (llama.cpp's src/llama-graph.cpp), after the
# layer's number has been cut off. Plain relu is also the first half of squared relu: it has the same zeros.
_DENSE = re.compile(r"^ffn_(reglu|swiglu|geglu|relu)-(\d+)$")
_MIXTURE = re.compile(r"^ffn_moe_(reglu|swiglu|geglu|relu|relu_sqr)-(\d+)$")
_ROUTED = re.compile(r"^ffn_moe_topk-(\d+)$")


@dataclass
class Layer:
    """What one FFN did. unit: "3", or "3.shared" for the shared expert of a mixture.

    bits: packed as in the file, None where every neuron counts (SwiGLU). experts: None for a dense FFN.
    """

    unit: str
    n_ff: int  # per expert; 0 where neurons were not recorded
    n_expert: int  # 0 for a dense FFN
    bits: np.ndarray | None
    experts: np.ndarray | None

    @property
    def n_units(self) -> int:
        """Neurons of the layer, of all its experts."""
        return self.n_ff * (self.n_expert or 1)

    def neurons(self) -> list[np.ndarray]:
        """Per token the numbers of the neurons that fired, ascending; expert e's begin at e x n_ff."""
        assert self.bits is not None
        fired = []
        for t, packed in enumerate(self.bits):
            on = np.unpackbits(packed, axis=-1, count=self.n_ff)
            if self.experts is None:
                fired.append(np.flatnonzero(on).astype(np.int32))
            else:
                which, neuron = np.nonzero(on)
                fired.append(
                    np.sort(self.experts[t, which].astype(np.int32) * self.n_ff + neuron.astype(np.int32))
                )
        return fired

    def routed(self) -> list[np.ndarray]:
        """Per token the numbers of the experts used, ascending."""
        assert self.experts is not None
        return [np.sort(row).astype(np.int32) for row in self.experts]


@dataclass
class Trace:
    """A recording. meta: model, architecture, activation, tokens, window (tokens read with one context),
    text."""

    meta: dict[str, Any]
    layers: list[Layer]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to `path` (complete or not at all). Raises OSError."""
        path = Path(path)
        arrays: dict[str, np.ndarray] = {}
        for layer in self.layers:
            if layer.bits is not None:
                arrays[f"bits.{layer.unit}"] = layer.bits
            if layer.experts is not None:
                arrays[f"experts.{layer.unit}"] = layer.experts
        units = [{"unit": x.unit, "n_ff": x.n_ff, "n_expert": x.n_expert} for x in self.layers]
        meta = json.dumps({"version": VERSION, **self.meta, "layers": units})
        write_atomically(path, lambda file: np.savez_compressed(file, meta=np.array(meta), **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace. Raises PowerInferError when `path` is not one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                if meta.pop("version") != VERSION:
                    raise PowerInferError(f"{path}: a trace of another version; record it again")
                layers = [
                    Layer(
                        **unit,
                        bits=file[f"bits.{unit['unit']}"] if f"bits.{unit['unit']}" in file else None,
                        experts=file[f"experts.{unit['unit']}"]
                        if f"experts.{unit['unit']}" in file
                        else None,
                    )
                    for unit in meta.pop("layers")
                ]
        except (ValueError, KeyError, TypeError, EOFError, AttributeError) as error:
            raise PowerInferError(f"{path}: not a trace made by powerinfer trace ({error})") from error
        except Exception as error:
            if type(error).__module__ in ("zipfile", "zlib"):
                raise PowerInferError(f"{path}: a damaged trace ({error})") from error
            raise
        return cls(meta, layers)


# ---- recording ---------------------------------------------------------------------------------------------


@dataclass
class _Recorder:
    """The evaluation callback: asks for the nodes it knows and packs what they hold."""

    neurons: bool  # whether firing means anything for this model's activation
    bits: dict[str, list[np.ndarray]] = field(default_factory=dict)
    experts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mixtures: set[str] = set()
        self.watcher = Watcher(self._wanted)

    def _wanted(self, name: str) -> Handler | None:
        if routed := _ROUTED.match(name):
            unit = routed[1]
            self.mixtures.add(unit)
            return lambda values: self.experts.setdefault(unit, []).append(values.astype(np.int16))
        match = _MIXTURE.match(name) or _DENSE.match(name)
        if match is None or not self.neurons:
            return None
        # In a mixture's layer a dense FFN is the shared expert.
        unit = match[2] + (".shared" if match.re is _DENSE and match[2] in self.mixtures else "")
        return lambda values: self._fired(unit, values)

    def _fired(self, unit: str, values: np.ndarray) -> None:
        self.widths[unit] = values.shape[-1]
        self.bits.setdefault(unit, []).append(np.packbits(values != 0, axis=-1))

    def layers(self, n_expert: int) -> list[Layer]:
        """All that was seen, in the order of the layers."""
        found = []
        for unit in sorted({*self.bits, *self.experts}, key=lambda u: (int(u.split(".")[0]), u)):
            bits, experts = self.bits.get(unit), self.experts.get(unit)
            found.append(
                Layer(
                    unit=unit,
                    n_ff=self.widths.get(unit, 0),
                    n_expert=n_expert if experts else 0,
                    bits=np.concatenate(bits) if bits else None,
                    experts=np.concatenate(experts) if experts else None,
                )
            )
        return found


def record(
    model: str,
    text: str | None,
    *,
    tokens: int = 2048,
    window: int = 512,
    threads: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Run `text` through the model and note what fires.

    text: None takes random tokens (for models that never learnt a language). tokens: read at most so many.
    window: the tokens of one context, at most as many as the model was trained with; each window starts with
    an empty one. progress(done, total) counts tokens. Raises PowerInferError when nothing in the model is
    ever silent, or the text is empty; FormatError, OSError.
    """
    architecture, activation, n_expert, trained_context, sparse = _about(model)
    window = min(window, trained_context or window)
    if activation in SILENT and not sparse and activation != NATIVE.get(architecture, (None, False))[0]:
        raise PowerInferError(
            f"{model}: its FFN is meant to compute {activation}, but stock llama.cpp computes something else "
            f"for {architecture}; convert it first (powerinfer convert) and trace the result"
        )
    if activation not in SILENT and not n_expert:
        raise PowerInferError(
            f"{model}: every neuron fires for every token ({activation or 'activation unknown'}), and there "
            "are no experts: nothing to trace"
        )
    recorder = _Recorder(neurons=activation in SILENT)
    with contextlib.ExitStack() as stack:
        llama, context, batch = open_watched(stack, model, window, _BATCH, threads, recorder.watcher.callback)
        ids = _tokens(llama, text, tokens, seed)
        done = 0
        for start in range(0, len(ids), window):
            context.kv_cache_clear()
            piece = ids[start : start + window]
            for at in range(0, len(piece), _BATCH):
                # All of them are outputs: llama.cpp leaves the others out of the last layer's FFN.
                batch.set_batch(piece[at : at + _BATCH], n_past=at, logits_all=True)
                try:
                    context.decode(batch)
                finally:
                    recorder.watcher.check()
                done += len(piece[at : at + _BATCH])
                if progress:
                    progress(done, len(ids))
    layers = recorder.layers(n_expert)
    if not layers:
        raise PowerInferError(f"{model}: llama.cpp's graph for {architecture} names no FFN that we know")
    meta = {
        "model": os.path.basename(model),
        "architecture": architecture,
        "activation": activation,
        "tokens": len(ids),
        "window": window,
        "text": "given" if text is not None else f"random tokens, seed {seed}",
    }
    return Trace(meta, layers)


def _about(model: str) -> tuple[str, str | None, int, int, bool]:
    """Architecture, activation (None: not known), number of experts, context length (0: not known), and
    whether it is a sparse-GGUF."""
    with GGUFFile.open(model) as file:
        architecture = str(file.metadata.get("general.architecture"))
        activation = file.metadata.get("powerinfer.activation") or NATIVE.get(architecture, (None, False))[0]
        n_expert = int(file.metadata.get(f"{architecture}.expert_count", 0))
        context = int(file.metadata.get(f"{architecture}.context_length", 0))
        return architecture, activation, n_expert, context, "powerinfer.version" in file.fields


def _tokens(llama: Any, text: str | None, tokens: int, seed: int) -> list[int]:
    if text is None:
        return np.random.default_rng(seed).integers(0, llama.n_vocab(), tokens).tolist()
    ids = llama.tokenize(text.encode(), add_bos=False, special=False)[:tokens]
    if not ids:
        raise PowerInferError("the text is empty; give some text to trace")
    return ids


# ---- analysis ----------------------------------------------------------------------------------------------


def analyse(
    trace: Trace,
    *,
    fractions: tuple[float, ...] = FRACTIONS,
    policies: tuple[str, ...] = cache_simulator.POLICIES,
    cache_layers: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a trace says, for JSON.

    density: share of neurons that fire, mean over layers (in a mixture, of the experts used). skew: the share
    of neurons that makes 80 % of the firings. overlap: the share of a token's firing neurons that fired for
    the token before; overlap_by_chance: what it would be if tokens fired independently, each neuron at its
    own rate. The same for experts. cache and expert_cache: hit rates in the second half of the trace for
    caches that hold those fractions of each layer, over at most `cache_layers` layers spread evenly; None
    where there is nothing to cache.
    """
    layers = [_layer_figures(layer, trace.meta["window"]) for layer in trace.layers]
    figures = {key: _mean(layer.get(key) for layer in layers) for key in _FIGURES}
    simulated = _spread(trace.layers, "bits", cache_layers)
    routed = _spread(trace.layers, "experts", cache_layers)
    steps = (len(simulated) + len(routed)) * len(policies)
    count = iter(range(1, steps + 1))

    def advance() -> None:
        if progress:
            progress(next(count), steps)

    def cache(chosen: list[Layer], experts: bool) -> dict[str, Any] | None:
        return _cache(chosen, experts, fractions, policies, advance) if chosen else None

    return {
        **trace.meta,
        **figures,
        "layers": layers,
        "cache": cache(simulated, experts=False),
        "expert_cache": cache(routed, experts=True),
    }


_FIGURES = (
    "density",
    "skew",
    "overlap",
    "overlap_by_chance",
    "expert_skew",
    "expert_overlap",
    "expert_overlap_by_chance",
)


def _spread(layers: list[Layer], attribute: str, most: int) -> list[Layer]:
    """At most so many of the layers that have the attribute, evenly spread."""
    having = [layer for layer in layers if getattr(layer, attribute) is not None]
    if len(having) <= most:
        return having
    return [having[i] for i in np.linspace(0, len(having) - 1, most).round().astype(int)]


def _layer_figures(layer: Layer, window: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"layer": layer.unit, "neurons": layer.n_ff, "experts": layer.n_expert}
    if layer.bits is not None:
        fired = layer.neurons()
        rows = len(fired) if layer.experts is None else layer.experts.size
        figures["density"] = sum(map(len, fired)) / (rows * layer.n_ff)
        figures |= _pattern(fired, layer.n_units, window, "")
    if layer.experts is not None:
        figures |= _pattern(layer.routed(), layer.n_expert, window, "expert_")
    return figures


def _pattern(fired: list[np.ndarray], n_units: int, window: int, prefix: str) -> dict[str, float | None]:
    """Skew and overlaps of a sequence of sets."""
    count = np.bincount(np.concatenate(fired), minlength=n_units)
    both = sum(
        len(np.intersect1d(before, now, assume_unique=True))
        for t, (before, now) in enumerate(zip(fired, fired[1:], strict=False), 1)
        if t % window
    )
    now = sum(len(units) for t, units in enumerate(fired) if t % window)
    rate = count / len(fired)
    return {
        f"{prefix}skew": skew(count),
        f"{prefix}overlap": both / now if now else None,
        f"{prefix}overlap_by_chance": float((rate**2).sum() / rate.sum()) if count.any() else None,
    }


def skew(count: np.ndarray, covered: float = COVERED) -> float | None:
    """The least share of units that has `covered` of all counts (0.8 when all are equal), None for no
    counts."""
    if not count.any():
        return None
    reached = np.cumsum(np.sort(count)[::-1]) / count.sum()
    return float((np.searchsorted(reached, covered) + 1) / len(count))


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there, None and NaN (no request at all) left out."""
    present = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(present)) if present else None


def _cache(
    layers: list[Layer],
    experts: bool,
    fractions: tuple[float, ...],
    policies: tuple[str, ...],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Hit rates, mean over layers; fractions that are less than one unit are left out."""
    least = min(layer.n_expert if experts else layer.n_units for layer in layers)
    fractions = tuple(fraction for fraction in fractions if int(fraction * least))
    rates: dict[str, list[np.ndarray]] = {policy: [] for policy in policies}
    for layer in layers:
        requests = layer.routed() if experts else layer.neurons()
        n_units = layer.n_expert if experts else layer.n_units
        sizes = [int(fraction * n_units) for fraction in fractions]
        for policy in policies:
            warm = len(requests) // 2
            rates[policy].append(cache_simulator.hit_rates(requests, n_units, sizes, policy, warm=warm))
            advance()
    return {
        "fractions": list(fractions),
        "layers": [layer.unit for layer in layers],
        "hit_rates": {
            policy: [_mean(column) for column in zip(*found, strict=True)] for policy, found in rates.items()
        },
    }


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two analyses side by side: every figure that both have, as a list of {figure, a, b}."""
    rows = [
        {"figure": key, "a": a[key], "b": b[key]}
        for key in _FIGURES
        if a.get(key) is not None and b.get(key) is not None
    ]
    for key, unit in (("cache", "neurons"), ("expert_cache", "experts")):
        if not (a.get(key) and b.get(key)):
            continue
        shared = [f for f in a[key]["fractions"] if f in b[key]["fractions"]]
        for policy in a[key]["hit_rates"]:
            for fraction in shared if policy in b[key]["hit_rates"] else []:
                at = [x[key]["hit_rates"][policy][x[key]["fractions"].index(fraction)] for x in (a, b)]
                rows.append({"figure": f"hits, {policy}, {fraction:.0%} of {unit}", "a": at[0], "b": at[1]})
    return {"a": a["model"], "b": b["model"], "rows": rows}


# ---- output ------------------------------------------------------------------------------------------------


def render(result: dict[str, Any], console: Console) -> None:
    """An analysis as tables for people."""
    console.print(
        f"{result['model']}: {result['architecture']}, {result['activation']}, {result['tokens']} tokens"
    )
    rows = [*result["layers"], {"layer": "mean", **result}]
    for prefix, unit in (("", "neurons"), ("expert_", "experts")):
        titles = ("skew", "overlap", "overlap_by_chance")
        having = [row for row in rows if row.get(f"{prefix}skew") is not None]
        if not having:
            continue
        table = Table("layer", unit, "density", "skew", "overlap", "by chance")
        for row in having:
            figures = [row.get("density") if unit == "neurons" else None]
            figures += [row.get(prefix + title) for title in titles]
            table.add_row(row["layer"], _size(row, unit), *map(_percent, figures))
        console.print(table)
    for key, unit in (("cache", "neurons"), ("expert_cache", "experts")):
        if result.get(key):
            found = result[key]
            title = f"hit rate by cache size (share of a layer's {unit})"
            hits = Table("policy", *(f"{fraction:.0%}" for fraction in found["fractions"]), title=title)
            for policy, rates in found["hit_rates"].items():
                hits.add_row(policy, *(_percent(rate) for rate in rates))
            console.print(hits)


def render_comparison(result: dict[str, Any], console: Console) -> None:
    """`compare`'s result as a table; of the caches, those of a fifth and of half of a layer."""
    table = Table("", result["a"], result["b"])
    for row in result["rows"]:
        if row["figure"].startswith("hits") and not re.search(r", (20|50)% of", row["figure"]):
            continue
        table.add_row(row["figure"].replace("_", " "), _percent(row["a"]), _percent(row["b"]))
    console.print(table)


def _size(row: dict[str, Any], unit: str) -> str:
    if "neurons" not in row:
        return ""
    if unit == "experts":
        return str(row["experts"])
    return f"{row['experts']} x {row['neurons']}" if row["experts"] else str(row["neurons"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# ---- the command -------------------------------------------------------------------------------------------


def run(
    model: str,
    *,
    text: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    tokens: int = 2048,
    window: int = 512,
    threads: int | None = None,
    against: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record `model` (or read it, where it is a trace), keep the trace as `output`, and analyse it.

    against: another trace; the result then has `comparison`. Raises what `record`, `Trace.load` and
    `Trace.save` raise.
    """
    if model.endswith(".npz"):
        trace = Trace.load(model)
    else:
        content = None if text is None else Path(text).read_text(encoding="utf-8", errors="replace")
        trace = record(
            _path(model),
            content,
            tokens=tokens,
            window=window,
            threads=threads or len(os.sched_getaffinity(0)),
            seed=seed,
            progress=progress,
        )
    other = None if against is None else Trace.load(against)
    if output is not None:
        trace.save(output)
    result = analyse(trace, progress=progress)
    if other is not None:
        result["comparison"] = compare(result, analyse(other))
    return result


def _path(model: str) -> str:
    """The path of a model given as a path or as the name of a bundled one."""
    if Path(model).exists() or "/" in model or model.endswith(".gguf"):
        return model
    from powerinfer_ext.models import find

    try:
        return str(find(model).path)
    except ValueError as error:
        raise PowerInferError(f"{model}: there is no such file, and {error}") from None


EXAMPLES = (
    "powerinfer trace arcee-relu2 --text heldout.txt -o trace.npz",
    "powerinfer trace trace.npz --json",
)


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF or sparse-GGUF file, the name of a bundled model, or a trace (.npz) made earlier.",
        ),
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text to read.", show_default="random tokens, for synthetic models")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="TRACE.npz", help="Keep the trace here.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read at most.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window; each has an empty context.")] = 512,
    against: Annotated[
        Path | None, typer.Option(metavar="TRACE.npz", help="Show another trace's figures beside these.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="as many as there are CPUs to use")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Record which neurons and experts fire on a text, and what caches of them would be worth.

    Density, skew, overlap from token to token, and hit rates of LRU, LFU with ageing, sliding-window and
    static caches, with Belady's optimum as the bound. Slower than running the model: every activation is
    looked at.
    """
    from powerinfer_ext.cli import _print_json, _progress, _silence_llama_cpp

    _silence_llama_cpp()
    with _progress(f"Tracing {model}") as progress:
        result = run(
            model,
            text=text,
            output=output,
            tokens=tokens,
            window=window,
            threads=threads,
            against=against,
            seed=seed,
            progress=progress,
        )
    if as_json:
        return _print_json(result)
    console = Console(highlight=False)
    render(result, console)
    if "comparison" in result:
        render_comparison(result["comparison"], console)
    if output is not None:
        console.print(f"The trace is in {output}", markup=False, soft_wrap=True)


command.__name__ = "trace"
