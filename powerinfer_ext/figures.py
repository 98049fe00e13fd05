"""The figures of a benchmark: from the single runs to medians, ratios, limits, and what to doubt.

Nothing here runs or measures anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gguf_tools.activations import NATIVE
from gguf_tools.sparse import SparseGGUF
from powerinfer_ext import machine, roofline
from powerinfer_ext.disk import DiskCost
from powerinfer_ext.engines import BUILT_IN, Engine
from powerinfer_ext.hits import HitRate

SPREAD_THRESHOLD = 0.10  # (max - min) / median of the paired ratios above which we say that we cannot tell
OTHERS_THRESHOLD = 0.10  # share of the machine's CPU time that other processes may take during a run
CACHE_LEFT_THRESHOLD = 16 << 20  # bytes of a model that may stay in the page cache before a limited run

NO_CACHE_NOTE = (
    "cache_hit_rate is null: this engine kept everything in memory, there is no cache that could be hit or missed."
)
STOCK_PATH_NOTE = (
    "A stock GGUF that fits into memory is left to stock llama.cpp: there is nothing of ours in this run, a ratio "
    "other than 1 is noise."
)


@dataclass(frozen=True)
class Pair:
    """The two files of a comparison. `sparse_from` and `stock_from` say where each came from.

    Both are the same file where our engine runs a stock GGUF as it is.
    """

    sparse: str
    stock: str
    sparse_from: str = "given"
    stock_from: str = "given"

    @property
    def unconverted(self) -> bool:
        """Does our engine run the stock file?"""
        return self.sparse == self.stock


@dataclass(frozen=True)
class Workload:
    """What every engine does, `runs` times: read `prompt` tokens at once and `gen` one by one."""

    tokens: list[int] = field(repr=False)
    tokens_from: str
    prompt: int
    gen: int
    runs: int
    threads: int
    timeout: float


@dataclass
class Series:
    """The runs of one engine in order; None for one without a result, whose `failure` ends the series."""

    engine: Engine
    model: str
    extra_bufts: bool
    runs: list[dict[str, Any] | None] = field(default_factory=list)
    others_cpu: list[float] = field(default_factory=list)
    failure: dict[str, Any] | None = None

    @property
    def good(self) -> list[dict[str, Any]]:
        return [run for run in self.runs if run is not None]


def summary(entry: Series, work: Workload) -> dict[str, Any]:
    """Medians over an engine's runs, and the runs; figures that the engine does not have are None."""
    good = entry.good

    def middle(key: str) -> float | None:
        values = [run[key] for run in good if run.get(key) is not None]
        return median(values) if values else None

    def most(key: str) -> int | None:
        return max((run[key] for run in good if run.get(key) is not None), default=None)

    def per_token(key: str) -> float | None:
        value = middle(key)
        return None if value is None else value / work.gen

    latencies = [run["latencies_ms"] for run in good if run.get("latencies_ms")]
    built_in = entry.engine.template is None
    out: dict[str, Any] = {
        "engine": entry.engine.name,
        "what": BUILT_IN.get(entry.engine.name, entry.engine.template),
        "file": Path(entry.model).name,
        "settings": {"threads": work.threads, "extra_bufts": entry.extra_bufts if built_in else None},
        "load_s": middle("load_s"),
        "ttft_s": middle("ttft_s"),
        "prefill_tps": middle("prefill_tps"),
        "decode_tps": middle("decode_tps"),
        "spread": {phase: spread([run[f"{phase}_tps"] for run in good if run.get(f"{phase}_tps")])
                   for phase in ("prefill", "decode")},
        "latency_ms": _percentiles(latencies),
        "latency_over_tokens_ms": [median(column) for column in zip(*latencies, strict=True)],
        "peak_bytes": most("peak_bytes"),
        "peak_anonymous_bytes": most("peak_anonymous_bytes"),
        "peak_file_bytes": most("peak_file_bytes"),
        "page_cache_bytes": most("page_cache_bytes"),
        "group_peak_bytes": most("group_peak_bytes"),
        "bytes_read_per_token": per_token("decode_read_bytes"),
        "load_read_bytes": middle("load_read_bytes"),
        "major_faults_per_token": per_token("major_faults_decode"),
        "runs": [_public(run) for run in good],
        "error": None,
        "output": None,
        "fits": True if good else None,
        "needs_bytes": None,
        **(entry.failure or {}),
    }  # fmt: skip
    if entry.engine.is_sparse:
        layers = layer_rows(good)
        out["density"] = sum(row["density"] for row in layers) / len(layers) if layers else None
        out["streaming"] = streaming(good, work)
        out["cache_hit_rate"] = out["streaming"]["hit_rate"] if out["streaming"] else None
        out["notes"] = [] if out["streaming"] or not good else [NO_CACHE_NOTE]
        if good and not out["streaming"] and not layers:
            out["notes"].append(STOCK_PATH_NOTE)
        out["layers"] = layers
    return out


def streaming(good: list[dict[str, Any]], work: Workload) -> dict[str, Any] | None:
    """What an engine of ours read while it decoded: medians over its runs of the engine's own counters.

    None where everything was in memory. `io_wait_ms_per_token` is per thread: the sum over the threads by their
    number, so it compares with the milliseconds of a token.
    """
    flashes = [run["flash"] for run in good if run.get("flash")]
    if not flashes:
        return None

    def middle(phase: str, value: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = [found for flash in flashes if (found := value(flash[phase])) is not None]
        return median(values) if values else None

    def per(n: int, key: str, factor: float = 1.0) -> Callable[[dict[str, Any]], float]:
        return lambda counts: counts[key] * factor / n

    def phase(name: str, n: int) -> dict[str, float | None]:
        return {
            "hit_rate": middle(name, lambda c: 1 - c["missed"] / c["wanted"] if c["wanted"] else None),
            "wanted_per_token": middle(name, per(n, "wanted")),
            "missed_per_token": middle(name, per(n, "missed")),
            "read_bytes_per_token": middle(name, per(n, "read_bytes")),
            "unit_bytes_per_token": middle(name, per(n, "unit_bytes")),
            "reads_per_token": middle(name, per(n, "reads")),
            "io_wait_ms_per_token": middle(name, per(n, "wait_seconds", 1000 / work.threads)),
            "prefetched_per_token": middle(name, per(n, "prefetched")),
            "prefetch_accuracy": middle(
                name, lambda c: c["useful"] / (c["useful"] + c["wasted"]) if c["useful"] + c["wasted"] else None
            ),
        }

    last = flashes[-1]
    return {
        **phase("decode", work.gen),
        "prefill": phase("prefill", work.prompt),
        "io_engine": last["engine"],
        "slots_bytes": last["slots_bytes"],
        "budget_bytes": last["budget"],
    }


def spread(values: list[float]) -> float | None:
    """(largest - smallest) / median; None for fewer than two values."""
    return (max(values) - min(values)) / median(values) if len(values) > 1 else None


def _percentiles(latencies: list[list[float]]) -> dict[str, float | None]:
    """Over the tokens of all runs together."""
    names = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    if not latencies:
        return dict.fromkeys((*names, "mean"))
    pooled = np.concatenate([np.asarray(row) for row in latencies])
    return {
        **{name: float(np.percentile(pooled, p)) for name, p in names.items()},
        "mean": float(pooled.mean()),
    }


def layer_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per FFN layer, while decoding: density, and the share of neurons whose weights were read.

    From the last run; the tokens are the same in all, so the counts are too.
    """
    rows = []
    for layer in runs[-1]["sparse"]["layers"] if runs and runs[-1]["sparse"] else []:
        decode = layer["decode"]
        evaluated = decode["selected"] / decode["density"] if decode["density"] else 0
        rows.append(
            {
                "layer": layer["layer"],
                "neurons": layer["neurons"],
                "density": decode["density"] or 0.0,
                "computed": decode["touched"] / evaluated if evaluated else 0.0,
                "prefill_and_decode_density": layer["density"],
            }
        )
    return rows


def _public(run: dict[str, Any]) -> dict[str, Any]:
    """A run without what is elsewhere in the JSON (counters per layer) or of no use to a reader."""
    return {key: value for key, value in run.items() if key not in ("sparse", "likeliest", "engine")}


def ratio(other: Series, ours: Series) -> dict[str, Any]:
    """Our speed over another engine's: medians of the paired runs, and their spread."""
    pairs = [(a, b) for a, b in zip(other.runs, ours.runs, strict=False) if a is not None and b is not None]
    if not pairs:
        failed = [f"{entry.engine.name}: {entry.failure['error']}" for entry in (ours, other) if entry.failure]
        return no_ratio("; ".join(failed) or "there is no pair of runs")
    out: dict[str, Any] = {"decode": None, "prefill": None, "spread": None, "pairs": len(pairs)}
    for phase in ("decode", "prefill"):
        values = [b[f"{phase}_tps"] / a[f"{phase}_tps"] for a, b in pairs if a.get(f"{phase}_tps")]
        if values:
            out[phase] = median(values)
            out[f"{phase}_runs"] = values
            out["spread" if phase == "decode" else "prefill_spread"] = spread(values)
    return out


def no_ratio(reason: str) -> dict[str, Any]:
    """What stands in the place of a ratio that there is not."""
    return {"decode": None, "prefill": None, "spread": None, "pairs": 0, "reason": reason}


def touched(entry: Series) -> roofline.TokenBytes:
    """Weights that a token touches, with the shares of neurons that were computed in the runs."""
    computed = {row["layer"]: row["computed"] for row in layer_rows(entry.good)} if entry.engine.is_sparse else None
    return roofline.token_bytes(entry.model, computed)


def limits(
    named: dict[str, Series],
    touches: dict[str, roofline.TokenBytes],
    limit: int | None,
    speeds: dict[str, Any],
    hit_rates: Mapping[str, HitRate] | None = None,
) -> dict[str, Any]:
    """Bounds of the built-in engines; at the top those of ours (None where it did not run).

    Of several measurements of memory bandwidth the largest counts: the bound has to hold at all times. Where memory is
    limited there are two: `bound_tps` from what a cache of the limit's size should miss (hit_rates, by engine), and in
    `measured` the bound from what was really read per token, whose fraction says how well reading and computing
    overlap. `beside` is the fraction reached of what memory gave on average just before or after each run (the
    more of the two; median over the runs), where memory is not limited; where it is, the one in `measured` is that of
    what the disk's reads cost then. Where these change their speed all the time, no run has their best.
    """
    memory, disk = max(speeds["memory"], default=None), speeds["disk"]
    cache = machine.last_level_cache()
    engines, notes = {}, []
    for name, parts in touches.items():
        good = named[name].good
        if not good or memory is None:
            continue
        expected = (hit_rates or {}).get(name)
        bound = roofline.bound(parts, memory, disk, limit, expected or (lambda share: share))
        reached = median(run["decode_tps"] for run in good)
        engines[name] = {
            **bound,
            "attention_and_rest_bytes": parts.attention_and_rest,
            "ffn_deciding_bytes": parts.ffn_deciding,
            "ffn_neurons_bytes": parts.ffn_neurons,
            "decode_tps": reached,
            "fraction": reached / bound["bound_tps"],
            "beside": _beside(good, parts) if limit is None else None,
            "hit_rate_from": expected.source if expected and limit is not None else None,
            "measured": _measured(named[name], parts, memory, speeds, reached) if limit is not None else None,
        }
        if parts.total < 4 * cache:
            notes.append(
                f"{name}: a token touches less than four times the last-level cache, so the cache serves "
                "part of it and the bound by memory bandwidth does not hold"
            )
    measured = [rate / 1e9 for rate in speeds["memory"]]
    if measured and max(measured) > 1.2 * min(measured):
        notes.append(
            f"memory bandwidth was measured as {' and '.join(f'{rate:.1f}' for rate in measured)} GB/s before "
            "and after: this machine's memory changes its speed, and the bounds use the larger"
        )
    ours = engines.get("sparse", {})
    measured_bound = ours.get("measured") or {}
    device = speeds.get("device")
    return {
        "memory_gbps": None if memory is None else memory / 1e9,
        "memory_measured_gbps": measured,
        "disk_gbps": None if disk is None else disk / 1e9,
        "disk": speeds["disk_table"],
        "bound_tps": ours.get("bound_tps"),
        "fraction": ours.get("fraction"),
        "measured_bound_tps": measured_bound.get("bound_tps"),
        "measured_fraction": measured_bound.get("fraction"),
        "read_us": None if device is None else device.latency * 1e6,
        "round_trip_us": None if device is None else device.round_trip * 1e6,
        "last_level_cache_bytes": cache,
        "engines": engines,
        "notes": notes,
    }


def _beside(runs: list[dict[str, Any]], parts: roofline.TokenBytes) -> float | None:
    found = [run["decode_tps"] * parts.total / run["memory_gbps"] / 1e9 for run in runs if run.get("memory_gbps")]
    return median(found) if found else None


def _measured(
    entry: Series, parts: roofline.TokenBytes, memory: float, speeds: dict[str, Any], reached: float
) -> dict[str, Any] | None:
    """The bound from the bytes that decoding a token really read, and the fraction of it that was reached.

    device_tps: the same with the price of every single read (`disk.DiskCost`), which small reads cannot escape.
    beside: the fraction with those prices as they were just before or after each run.
    """
    tokens = [run["decode_tokens"] for run in entry.good]
    if entry.engine.is_sparse:
        found = [run["flash"]["decode"]["read_bytes"] for run in entry.good if run.get("flash")]
        reads = [run["flash"]["decode"]["reads"] for run in entry.good if run.get("flash")]
    else:
        found = [run["decode_read_bytes"] for run in entry.good if run.get("decode_read_bytes") is not None]
        reads = []
    if not found:
        return None
    n_bytes = median(found) / tokens[0]
    bound = roofline.slower(parts.total, round(n_bytes), memory, speeds["disk"])
    out = {**bound, "fraction": reached / bound["bound_tps"], "device_tps": None, "beside": None}
    device = speeds.get("device")
    if reads and device is not None:
        seconds = device.seconds(n_bytes, median(reads) / tokens[0])
        out["device_tps"] = 1 / max(seconds, parts.total / memory)
    fractions = []
    for run in entry.good:
        costs = [DiskCost(**cost) for cost in run.get("read_costs") or [] if run.get("flash")]
        if costs:
            decode = run["flash"]["decode"]
            seconds = min(cost.seconds(decode["read_bytes"], decode["reads"]) for cost in costs) / run["decode_tokens"]
            fractions.append(run["decode_tps"] * max(seconds, parts.total / memory))
    if fractions:
        out["beside"] = median(fractions)
    return out


def comparable(pair: Pair, named: dict[str, Series], work: Workload) -> dict[str, Any]:
    """Did every engine do the same work as ours?

    Returns `ok`, `reasons` (sentences), `engines` (name -> reason, for those whose runs cannot be compared)
    and `top1_agreement`: how often stock and ours found the same next token likeliest.
    """
    against: dict[str, str] = {}
    stock, sparse = named["stock"].good, named["sparse"].good
    for name, entry in named.items():
        for result in entry.good:
            wrong = _wrong_counts(result, work, exact=entry.engine.template is None)
            if not wrong and sparse and result.get("n_vocab") not in (None, sparse[0]["n_vocab"]):
                wrong = f"it has a vocabulary of {result['n_vocab']} tokens, ours has {sparse[0]['n_vocab']}"
            if not wrong and name == "stock" and result["plugin_loaded"]:
                wrong = "our plugin was loaded in its process"
            if wrong:
                against[name] = wrong
                break
    return {
        "ok": not against,
        "reasons": [f"{name}: {reason}" for name, reason in against.items()],
        "engines": against,
        "top1_agreement": _agreement(pair, stock, sparse),
    }


def ratios(named: dict[str, Series], verdict: dict[str, Any]) -> dict[str, Any]:
    """`ratio` of ours to stock, and in `engines` to every engine; none where `comparable` says no."""
    refused = verdict["engines"]
    all_of_them = {
        name: no_ratio(f"{name}: {refused[name]}") if name in refused else ratio(entry, named["sparse"])
        for name, entry in named.items()
        if name != "sparse"
    }
    return {**all_of_them["stock"], "engines": all_of_them}


def _wrong_counts(result: dict[str, Any], work: Workload, exact: bool) -> str:
    """What is wrong with the token counts, empty when nothing is.

    llama.cpp's programs take the first new token from the prompt's logits, so they decode one less.
    """
    read, wrote = result.get("prefill_tokens"), result.get("decode_tokens")
    if read is None or wrote is None:
        return "it does not print how many tokens it read and wrote"
    if read != work.prompt or wrote not in ((work.gen,) if exact else (work.gen, work.gen - 1)):
        return f"it read {read} and wrote {wrote} tokens instead of {work.prompt} and {work.gen}"
    return ""


def _agreement(pair: Pair, stock: list[dict[str, Any]], sparse: list[dict[str, Any]]) -> float | None:
    """Share of decode steps in which both find the same token likeliest.

    None where stock computes another activation than the sparse-GGUF asks for: then they need not agree.
    """
    if not stock or not sparse:
        return None
    with contextlib.nullcontext() if pair.unconverted else SparseGGUF.open(pair.sparse) as file:
        if file is not None and NATIVE.get(file.architecture, (None,))[0] != file.activation:
            return None
    pairs = list(zip(stock[0]["likeliest"], sparse[0]["likeliest"], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def noise(named: dict[str, Series], ratio: dict[str, Any], load_before: tuple[float, float, float]) -> dict[str, Any]:
    """Was the machine quiet enough to tell?"""
    reasons = []
    others = {name: max(entry.others_cpu) for name, entry in named.items() if entry.others_cpu}
    worst = max(others.values(), default=0.0)
    if worst > OTHERS_THRESHOLD:
        reasons.append(f"other processes took up to {worst:.0%} of the CPU time during a run")
    if ratio["spread"] is not None and ratio["spread"] > SPREAD_THRESHOLD:
        reasons.append(f"the ratio of decode speeds varied by {ratio['spread']:.0%} from pair to pair")
    elif ratio["decode"] is not None and ratio["spread"] is None:
        reasons.append("a single pair of runs has no spread")
    runs = [run for entry in named.values() for run in entry.good]
    left = max((run.get("page_cache_before_bytes") or 0 for run in runs), default=0)
    if left > CACHE_LEFT_THRESHOLD:
        reasons.append(
            f"{left / 1e6:.0f} MB of the model could not be dropped from the page cache, so the memory limit "
            "did not hold (is it on a tmpfs, or in use elsewhere?)"
        )
    return {
        "quiet": not reasons,
        "reasons": reasons,
        "spread_threshold": SPREAD_THRESHOLD,
        "others_cpu_threshold": OTHERS_THRESHOLD,
        "others_cpu_share": others,
        "page_cache_left_bytes": left,
        "load_average_before": list(load_before),
    }
