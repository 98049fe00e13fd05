"""`powerinfer bench`: our engine and what a user would run instead, on the same model, tokens and machine.

Every run is a process of its own (`engines`), runs are interleaved A B A B so that a machine that warms up
or is disturbed does not favour one side, all engines decode the same given tokens, and the result carries
what is needed to doubt it: every single run, spreads, what else the machine was doing, the limit of the
hardware (`roofline`), the versions and the command. docs/BENCHMARKS.md describes the method and the JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguf_tools.activations import NATIVE
from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import SparseGGUF, is_sparse
from gguf_tools.virtual import ModelFiles
from powerinfer_ext import disk, figures, hits, machine, memory_limit, roofline
from powerinfer_ext.engines import (
    WARM_UP_DECODES,
    Engine,
    EngineFailure,
    Job,
    parse_engine,
    run,
    tokenize,
)
from powerinfer_ext.errors import BudgetError, PowerInferError
from powerinfer_ext.placement import EXPERTS, Context, choose_ubatch, place

FORMAT = "powerinfer.bench.v1"
OVERHEAD = 256 << 20  # bytes that an interpreter, llama.cpp, a KV cache and compute buffers may need
QUIET_WAIT = 30.0  # seconds to wait at most for a quiet machine before every round
BESIDE = 0.6  # seconds that memory is read for, before and after every run
NORMAL_TOKEN = 1  # tokenizer.ggml.token_type

Step = Callable[[str], None]


def bench(
    model: str,
    *,
    baseline: str | None = None,
    converted: bool | None = None,
    engines: list[Engine] | None = None,
    memory: list[str] | None = None,
    prompt: int = 128,
    gen: int = 64,
    runs: int = 3,
    threads: int | None = None,
    text: str | None = None,
    seed: int = 0,
    timeout: float = 1800,
    invocation: str = "powerinfer_ext.bench.bench()",
    step: Step = lambda text: None,
) -> dict[str, Any]:
    """Compare our engine with stock llama-cpp-python, and `engines` if any; returns the command's JSON.

    Args:
        model: a sparse-GGUF or a stock GGUF (of a split one, the first file).
        converted: whether a stock GGUF is converted, to a temporary file, or run by our engine as it is, which streams
            it where memory is limited. None: it is converted if its neurons can stay silent.
        baseline: the stock GGUF; by default it is looked for beside the model, or exported from it.
        engines: engines besides "sparse" and "stock".
        memory: limits such as "50%" of the stock file or "4GiB", each measured; the first is at the top level
            of the result, the others in `conditions`. None: no limit.
        prompt, gen: tokens read at once, and one by one.
        runs: how often each engine runs; the figures are medians.
        text: text to take the tokens from; by default they are drawn at random with `seed`.
        timeout: seconds after which a run is stopped.
        invocation: the command line, for the record.
        step: told what is being done.

    Raises PowerInferError for files that cannot be compared and for limits that cannot be set,
    FormatError, OSError. An engine that fails does not raise: its entry holds `error`, the others' are kept.
    """
    threads = threads or len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(_files(model, baseline, step, converted))
        same = _check_same_model(pair, step)
        step("Reading tokens")
        tokens, tokens_from = _tokens(pair.stock, prompt + gen, text, seed)
        work = figures.Workload(tokens, tokens_from, prompt, gen, runs, threads, timeout)
        size = model_bytes(pair.stock)
        limits = [memory_limit.parse_limit(entry, size) for entry in (memory or ["none"])]
        for limit in limits:
            with memory_limit.limited(limit):
                pass  # raises now, and not after the first condition, when it cannot be done
        everyone = [
            Engine("stock"),
            Engine("sparse"),
            *(e for e in engines or [] if e.name not in ("stock", "sparse")),
        ]
        step("Measuring how fast memory and disk are read")
        speeds = _speeds(pair.stock)
        speeds["rates"] = [_rates(pair.sparse, threads)]
        about = about_machine(pair.stock, threads)
        measured = [_condition(pair, everyone, work, limit, step) for limit in limits]
        step("Measuring how fast memory is read, again")
        speeds["memory"] += _memory_speed()  # it changes with what a virtual machine's neighbours do
        speeds["rates"].append(_rates(pair.sparse, threads))
        results = []
        for condition, limits_of in measured:
            condition["roofline"] = limits_of(speeds)
            condition["plan"] = planned(pair.sparse, condition, speeds, prompt + gen)
            results.append({**condition, "summary": sentences(condition)})
        first, others = results[0], results[1:]
        return {
            "format": FORMAT,
            "version": importlib.metadata.version("powerinfer-ext"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": invocation,
            "model": _describe(pair, same),
            "workload": {
                **{key: value for key, value in asdict(work).items() if key != "tokens"},
                "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
                "warm_up": f"each process reads the prompt and decodes {min(WARM_UP_DECODES, gen)} tokens "
                "before the measured pass; ttft_s is that first, unwarmed reading",
                "order": "interleaved: every engine once, then every engine again",
            },
            **first,
            "conditions": others,
            "machine": {**about, "read_ahead_kb": first["memory_limit"]["read_ahead_kb"]},
        }


# ---- the files -----------------------------------------------------------------------------------


def model_bytes(path: str) -> int:
    """Bytes of a model, of all its files."""
    with ModelFiles.open(path) as files:
        return files.nbytes


def parts(path: str) -> list[str]:
    """The files of a model: one, or those of a split GGUF."""
    with ModelFiles.open(path) as files:
        return [os.fspath(file.path) for file in files.files]


def _worth_converting(model: str) -> bool:
    """Can the neurons of this stock GGUF stay silent, by its architecture or by what its metadata says?"""
    with GGUFFile.open(model) as file:
        native = NATIVE.get(file.metadata.get("general.architecture"), (None,))[0]
        return file.metadata.get("powerinfer.activation", native) in ("relu", "relu2", "drelu")


@contextlib.contextmanager
def _files(
    model: str, baseline: str | None, step: Step, converted: bool | None = None
) -> Iterator[figures.Pair]:
    """The sparse and the stock file; what is missing is made in a temporary folder beside the model."""
    from gguf_tools.convert import convert
    from gguf_tools.export import export

    sparse = is_sparse(model)
    if sparse and baseline is not None:
        if is_sparse(baseline):
            raise PowerInferError(f"{baseline} is a sparse-GGUF: --baseline wants the stock GGUF to compare with")
        yield figures.Pair(model, baseline)
        return
    if not sparse and baseline is not None and not is_sparse(baseline):
        raise PowerInferError(
            f"{model} is a stock GGUF and so is the baseline: give the sparse-GGUF as MODEL (make it with: "
            "powerinfer convert), or leave --baseline out"
        )
    if not sparse and baseline is not None:
        raise PowerInferError(f"MODEL and --baseline are swapped: {baseline} is the sparse-GGUF, so it is the MODEL")
    beside = Path(model).resolve().parent
    if sparse:
        with SparseGGUF.open(model) as file:
            source, size = beside / file.source_name, file.source_size
        if source.is_file() and source.stat().st_size == size:
            yield figures.Pair(model, str(source), stock_from="found beside the model")
            return
    folder = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".powerinfer-bench-", dir=folder) as temporary:
        if sparse:
            step("Exporting the stock GGUF to compare with")
            target = os.path.join(temporary, "stock.gguf")
            report = export(model, target)
            kind = "identical to the source" if report.identical else "with re-quantised tensors"
            yield figures.Pair(model, target, stock_from=f"exported from the sparse-GGUF, {kind}")
        elif not (_worth_converting(model) if converted is None else converted):
            yield figures.Pair(model, model, sparse_from="the stock GGUF as it is")
        else:
            step("Converting the model to sparse-GGUF")
            target = os.path.join(temporary, "model.sparse.gguf")
            convert(model, target)
            yield figures.Pair(target, model, sparse_from="converted from the stock GGUF")


def _check_same_model(pair: figures.Pair, step: Step) -> str:
    """How we know that both files hold the same model. Raises PowerInferError when they do not."""
    if pair.unconverted:
        return "both engines run the same file"
    with SparseGGUF.open(pair.sparse) as sparse, GGUFFile.open(pair.stock) as stock:
        problems = []
        if stock.metadata.get("general.architecture") != sparse.architecture:
            problems.append(f"architecture {stock.metadata.get('general.architecture')} and {sparse.architecture}")
        ours = {name: f.raw for name, f in sparse.file.fields.items() if name.startswith("tokenizer.")}
        theirs = {name: f.raw for name, f in stock.fields.items() if name.startswith("tokenizer.")}
        if ours != theirs:
            problems.append("different tokenizers")
        if set(stock.tensors) != set(sparse.source_tensors):
            problems.append("different tensors")
        if not problems and pair.stock_from.startswith("exported"):
            return "the stock file was exported from the sparse one"
        if not problems:
            if stock.size != sparse.source_size:
                problems.append(f"the stock file has {stock.size} bytes, the source had {sparse.source_size}")
            else:
                step("Checking that both files hold the same model")
                with open(pair.stock, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != sparse.source_sha256:
                    problems.append("the stock file's SHA-256 is not that of the source")
        if problems:
            raise PowerInferError(
                f"not comparable: {pair.sparse} was not made from {pair.stock} ({'; '.join(problems)}); "
                "convert that file, or name the one it was made from with --baseline"
            )
    return "the stock file's SHA-256 is that of the source in the sparse one"


def _describe(pair: figures.Pair, same: str) -> dict[str, Any]:
    with ModelFiles.open(pair.sparse) as files:
        metadata, sparse = files.first.metadata, files.sparse
        arch = metadata.get("general.architecture")
        native = NATIVE.get(arch, (None, False))[0]
        n_expert = metadata.get(f"{arch}.expert_count") or 0
        n_ff = metadata.get(f"{arch}.expert_feed_forward_length") or metadata.get(f"{arch}.feed_forward_length")
        return {
            "name": metadata.get("general.name"),
            "architecture": arch,
            "activation": sparse.activation if sparse is not None else native,
            "stock_activation": native,
            "layers": metadata.get(f"{arch}.block_count"),
            "n_embd": metadata.get(f"{arch}.embedding_length"),
            "n_ff": sparse.layers[0].n_ff if sparse is not None else n_ff,
            "n_expert": n_expert,
            "n_expert_used": metadata.get(f"{arch}.expert_used_count"),
            "sparse_file": Path(pair.sparse).name,
            "sparse_bytes": files.nbytes,
            "sparse_from": pair.sparse_from,
            "stock_file": Path(pair.stock).name,
            "stock_bytes": model_bytes(pair.stock),
            "stock_from": pair.stock_from,
            "same_model": same,
            "source_sha256": sparse.source_sha256 if sparse is not None else None,
        }


def _tokens(path: str, count: int, text: str | None, seed: int) -> tuple[list[int], str]:
    """`count` token ids of the vocabulary, and where they come from."""
    if text is not None:
        return tokenize(path, text, count), "the text given with --text"
    with GGUFFile.open(path) as file:
        types = file.metadata.get("tokenizer.ggml.token_type")
        embedding = file.tensors.get("token_embd.weight")
        n_vocab = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else len(types or [])
    normal = [i for i, kind in enumerate((types or [])[:n_vocab]) if kind == NORMAL_TOKEN] or list(range(n_vocab))
    drawn = np.random.default_rng(seed).choice(np.asarray(normal), count)
    return [int(token) for token in drawn], f"drawn at random with seed {seed}"


# ---- one condition: all engines under one memory limit -------------------------------------------


def _condition(
    pair: figures.Pair,
    engines: list[Engine],
    work: figures.Workload,
    limit: int | None,
    step: Step,
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Measure every engine under `limit` bytes of memory (None: all there is).

    Returns what was measured, and the function that makes its roofline from `_speeds`.
    """
    # Repacked weights are copies that cannot be paged out: below the model's size stock would only be killed.
    repack = limit is None or limit > 1.1 * model_bytes(pair.stock) + OVERHEAD
    series = [
        figures.Series(engine, pair.sparse if engine.is_sparse else pair.stock, True if engine.is_sparse else repack)
        for engine in engines
    ]
    load_before = os.getloadavg()
    cached = _prepare_cache(pair, limit, step)
    with contextlib.ExitStack() as stack:
        kib = machine.read_ahead_kb(pair.stock)
        if limit is not None:
            kib = stack.enter_context(memory_limit.read_ahead(pair.stock))
        how, set_aside = _rounds(series, work, limit, cached, step)
    named = {entry.engine.name: entry for entry in series}
    built_in = {name: entry for name, entry in named.items() if entry.engine.template is None}
    touched = {name: figures.touched(entry) for name, entry in built_in.items()}
    hit_rates = {name: _hit_rate(entry.model) for name, entry in built_in.items()}
    summaries = {name: figures.summary(entry, work) for name, entry in named.items()}
    comparable = figures.comparable(pair, named, work)
    rooflines = partial(figures.limits, named, touched, limit, hit_rates=hit_rates)
    ratio = figures.ratios(named, comparable)
    condition = {
        "memory_limit": {
            "bytes": limit,
            "share_of_model": None if limit is None else limit / model_bytes(pair.stock),
            "how": how,
            "page_cache": cached,
            "read_ahead_kb": kib,
        },
        "baseline": summaries.pop("stock"),
        "sparse": summaries.pop("sparse"),
        "engines": summaries,
        "ratio": ratio,
        "comparable": comparable,
        "noise": {**figures.noise(named, ratio, load_before), "set_aside": set_aside},
    }
    return condition, rooflines


def _rounds(
    series: list[figures.Series], work: figures.Workload, limit: int | None, cached: str, step: Step
) -> tuple[str, list[dict[str, Any]]]:
    """Run every engine in turns until there are `work.runs` rounds, appending to the series.

    A round in which other processes took much of the CPU says nothing, so it is set aside and repeated, but
    not for ever: at most twice `work.runs` rounds are made, and the last ones count whatever happened. What
    decides is the other processes' CPU time, never the result.

    Returns how memory was limited, and the rounds that were set aside: engine -> speeds and others' share.
    """
    how, counted, set_aside = "none", 0, []
    for attempt in range(2 * work.runs):
        active = [entry for entry in series if entry.failure is None]
        if counted == work.runs or not active:
            break
        _wait_until_quiet()
        for entry in active:
            at = "" if limit is None else f" in {limit / 1e6:.0f} MB"
            step(f"Run {counted + 1} of {work.runs}{at}: {entry.engine.name}")
            how = _one_run(entry, work, limit, cached)
        last = {entry.engine.name: entry.runs[-1] for entry in active}
        crashed = any(run is None for run in last.values())
        disturbed = not crashed and any(
            run["others_cpu_share"] > figures.OTHERS_THRESHOLD for run in last.values() if run
        )
        spare = 2 * work.runs - 1 - attempt
        if disturbed and spare >= work.runs - counted:
            keys = ("decode_tps", "prefill_tps", "others_cpu_share")
            set_aside.append({name: {key: run.get(key) for key in keys} for name, run in last.items() if run})
            for entry in active:
                entry.runs.pop()
                entry.others_cpu.pop()
        else:
            counted += 1
    return how, set_aside


def _wait_until_quiet() -> None:
    """Wait, for QUIET_WAIT seconds at most, until other processes leave the CPU alone for a second."""
    deadline, calm = time.monotonic() + QUIET_WAIT, 0
    while calm < 2 and time.monotonic() < deadline:
        before = _cpu_times()
        time.sleep(0.5)
        calm = calm + 1 if _others_share(before, _cpu_times(), 0.0) < figures.OTHERS_THRESHOLD else 0


def _hit_rate(path: str) -> hits.HitRate:
    with ModelFiles.open(path) as files:
        mixture = any(EXPERTS.fullmatch(tensor.name) for tensor in files.tensors())
        return hits.of_model(files, mixture)


def _prepare_cache(pair: figures.Pair, limit: int | None, step: Step) -> str:
    """State of the page cache: "warm", "dropped" (before every run), or "as it was" for large files.

    Warm: both files are read once, so that no engine pays for bringing them in.
    """
    if limit is not None:
        return "dropped"
    sizes = {path: model_bytes(path) for path in (pair.stock, pair.sparse)}
    if sum(sizes.values()) + 2 * max(sizes.values()) > machine.available_memory():
        return "as it was"
    step("Reading the model's files into the page cache")
    for path in sizes:
        for part in parts(path):
            memory_limit.fill_cache(part)
    return "warm"


def _one_run(entry: figures.Series, work: figures.Workload, limit: int | None, cached: str) -> str:
    """Run one engine once, appending to its series; returns how memory was limited."""
    files = parts(entry.model)
    left = sum(map(memory_limit.drop_cached, files)) if cached == "dropped" else None
    job = Job(
        entry.model, work.prompt, work.gen, work.threads, work.tokens, entry.extra_bufts, memory=limit
    )
    memory_before, costs_before = _speeds_beside(entry, limit)
    with memory_limit.limited(limit) as bounds:
        before = _cpu_times()
        try:
            result = run(entry.engine, job, bounds, work.timeout)
        except EngineFailure as failure:
            entry.failure = {
                "error": failure.reason,
                "output": failure.output,
                "fits": False if failure.out_of_memory else None,
                "needs_bytes": failure.needs,
            }
            entry.runs.append(None)
            return bounds.how
        after = _cpu_times()
    memory_after, costs_after = _speeds_beside(entry, limit)
    result["memory_gbps"] = max(memory_before + memory_after, default=None)
    result["read_costs"] = costs_before + costs_after
    result["others_cpu_share"] = _others_share(before, after, result["cpu_s"])
    result["page_cache_before_bytes"] = left
    result["page_cache_bytes"] = sum(map(memory_limit.cached_bytes, files))
    entry.others_cpu.append(result["others_cpu_share"])
    entry.runs.append(result)
    return bounds.how


def _speeds_beside(entry: figures.Series, limit: int | None) -> tuple[list[float], list[dict[str, float]]]:
    """What memory gives now (GB/s), or, where it is limited and ours reads from the disk, what reads cost there."""
    if limit is None:
        return [rate / 1e9 for rate in _memory_speed(BESIDE, mean=True)], []
    cost = disk.cost(entry.model, remeasure=True) if entry.engine.is_sparse else None
    return [], [asdict(cost)] if cost is not None else []


def planned(
    path: str, condition: dict[str, Any], speeds: dict[str, Any], n_ctx: int
) -> dict[str, Any] | None:
    """What `powerinfer plan` predicts for our engine under a condition's limit, beside what it reached.

    The share of neurons that is computed is given to it as measured: a file without a profile does not say.
    Returns `placement`, `predicted_tps`, `error` (predicted over measured, less one), `row` (the prediction in full),
    `speeds`; None when our engine did not run.
    """
    from powerinfer_ext import plan

    ours = condition["sparse"]
    good = [run for run in ours["runs"] if run.get("decode_tps")]
    if not good:
        return None
    shares = [layer["computed"] for layer in ours["layers"]]
    limit = condition["memory_limit"]["bytes"]
    context = Context(n_ctx, n_ctx, min(n_ctx, 512), process=good[-1].get("process_bytes"))
    with plan.open_model(path, density=sum(shares) / len(shares) if shares else None) as models:
        model = models[0]
        rates = plan.mean(speeds["rates"])
        try:
            room = replace(context, n_ubatch=choose_ubatch(model.files, limit, context) or context.n_ubatch)
            placement = place(model.files, limit if limit is not None else 1 << 60, room)
        except BudgetError as error:
            return {"placement": None, "predicted_tps": None, "error": None, "reason": str(error)}
        row = plan.predict(model, placement, rates)
    reached = ours["decode_tps"]
    return {
        "placement": row.placement,
        "predicted_tps": row.decode_tps,
        "error": row.decode_tps / reached - 1 if row.decode_tps and reached else None,
        "row": asdict(row),
        "hit_rate_from": model.hit_rate.source,
        "speeds": asdict(rates),
    }


def _rates(path: str, threads: int) -> Any:
    """`plan.Speeds` for the model at `path`, as they are now."""
    from powerinfer_ext import plan

    with plan.open_model(path) as models:
        return plan.measure(models[0], threads, path, fresh=True)


def _cpu_times() -> tuple[float, float]:
    """(busy, all) CPU seconds of the machine since it started, over all cores; stolen time is busy."""
    ticks = [int(number) for number in machine.read_text("/proc/stat").split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = (tick / os.sysconf("SC_CLK_TCK") for tick in ticks)
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def _others_share(before: tuple[float, float], after: tuple[float, float], own: float) -> float:
    """Share of CPU time between two `_cpu_times` that went neither idle nor to our child (`own` seconds)."""
    busy, everything = after[0] - before[0], after[1] - before[1]
    return max(0.0, busy - own) / everything if everything > 0 else 0.0


# ---- the machine -----------------------------------------------------------------------------------


def _speeds(path: str) -> dict[str, Any]:
    """Bandwidths in bytes per second: memory's measurements so far, the disk's best, and the disk's table."""
    rows = roofline.disk_speeds(path)
    device = disk.cost(path, remeasure=True)
    best = [row.rate for row in rows] + ([device.bandwidth] if device is not None else [])
    return {
        "memory": _memory_speed(),
        "disk": max(best, default=None),
        "device": device,
        "disk_table": [{"block": row.block, "depth": row.depth, "gbps": row.rate / 1e9} for row in rows],
    }


def _memory_speed(seconds: float = 3.0, *, mean: bool = False) -> list[float]:
    """One measurement of memory bandwidth; none where there is no room for it."""
    try:
        return [roofline.memory_bandwidth(seconds, mean=mean)]
    except MemoryError:
        return []


def about_machine(path: str, threads: int) -> dict[str, Any]:
    name, flags = machine.parse_cpuinfo(machine.read_text("/proc/cpuinfo"))
    wanted = ("avx", "fma", "f16c", "amx", "asimd", "sve", "sse4", "ssse3", "bmi2", "i8mm", "gfni")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": name,
        "cpu_features": sorted(flag for flag in flags if flag.startswith(wanted)),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "threads": threads,
        "last_level_cache_bytes": machine.last_level_cache(),
        "memory_bytes": total,
        "read_ahead_kb_before": machine.read_ahead_kb(path),
        "kernel": platform.release(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("powerinfer-ext", "llama-cpp-python", "numpy")},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- showing it ----------------------------------------------------------------------------------


def render(result: dict[str, Any], console: Console) -> None:
    """Print what `bench` returned: a table and a few sentences for every memory limit."""
    model, work, about = result["model"], result["workload"], result["machine"]
    console.print(
        f"{model['name']}: {model['architecture']}, {model['activation']}, {model['layers']} layers, "
        f"{model['stock_bytes'] / 1e6:.0f} MB; {work['prompt']} tokens read, {work['gen']} decoded, "
        f"{work['runs']} runs each, {work['threads']} threads on {about['cpu']}",
        markup=False,
    )
    for condition in (result, *result["conditions"]):
        console.print(_table(condition))
        for line in sentences(condition):
            console.print(line, markup=False)


def _table(condition: dict[str, Any]) -> Table:
    """One column per engine: it stays readable in a narrow terminal."""
    engines = rows(condition)
    table = Table("", *engines, title=f"Memory: {memory_words(condition)}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(what: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(what, *(cell(entry) for entry in engines.values()))

    add("decode, tokens/s", lambda e: _shown(e["decode_tps"], "{:.2f}"))
    add("  spread of runs", lambda e: _shown(e["spread"]["decode"], "{:.1%}"))
    add("prefill, tokens/s", lambda e: _shown(e["prefill_tps"], "{:.1f}"))
    add("first token, s", lambda e: _shown(e["ttft_s"], "{:.2f}"))
    add("load, s", lambda e: _shown(e["load_s"], "{:.2f}"))
    add("ms/token, median", lambda e: _shown(e["latency_ms"]["p50"], "{:.1f}"))
    add("  99th percentile", lambda e: _shown(e["latency_ms"]["p99"], "{:.1f}"))
    add("peak resident, MB", lambda e: _shown(e["peak_bytes"], "{:.0f}", 1e-6))
    if condition["memory_limit"]["bytes"] is not None:
        add("peak with page cache, MB", lambda e: _shown(e["group_peak_bytes"], "{:.0f}", 1e-6))
    add("from disk, MB/token", lambda e: _shown(e["bytes_read_per_token"], "{:.1f}", 1e-6))
    if any(entry.get("streaming") for entry in engines.values()):
        add("cache hit rate", lambda e: _shown(_streamed(e)["hit_rate"], "{:.1%}"))
        add("waiting for reads, ms/token", lambda e: _shown(_streamed(e)["io_wait_ms_per_token"], "{:.1f}"))
        add("prefetches that were used", lambda e: _shown(_streamed(e)["prefetch_accuracy"], "{:.0%}"))
    return table


def _streamed(entry: dict[str, Any]) -> dict[str, Any]:
    """What an engine counted while it streamed; everything None where it did not."""
    return entry.get("streaming") or dict.fromkeys(("hit_rate", "io_wait_ms_per_token", "prefetch_accuracy"))


def rows(condition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All engines of a condition by name: stock, ours, then the others."""
    return {"stock": condition["baseline"], "sparse": condition["sparse"], **condition["engines"]}


def memory_words(condition: dict[str, Any]) -> str:
    """A memory limit in words."""
    limit = condition["memory_limit"]
    if limit["bytes"] is None:
        return "no limit"
    return (
        f"{limit['bytes'] / 1e6:.0f} MB, {limit['share_of_model']:.0%} of the model ({limit['how']}, "
        f"read-ahead {limit['read_ahead_kb']} KiB)"
    )


def sentences(condition: dict[str, Any]) -> list[str]:
    """The outcome in words: failures, the ratio, the limit of the hardware, and what to doubt."""
    lines = [f"{name}: {entry['error']}" for name, entry in rows(condition).items() if entry["error"]]
    for name, entry in rows(condition).items():
        if entry["error"] and entry.get("output"):
            lines.append(f"{name}'s last output: {entry['output'].splitlines()[-1]}")
    if condition["baseline"]["settings"]["extra_bufts"] is False and not condition["baseline"]["error"]:
        lines.append("Stock ran without repacking weights: repacked copies cannot be paged out.")
    ratio, roof = condition["ratio"], condition["roofline"]
    if ratio["decode"] is not None:
        between = "" if ratio["spread"] is None else f" (spread {ratio['spread']:.1%})"
        prefill = _shown(ratio["prefill"], "{:.2f}x")
        lines.append(f"powerinfer-ext against stock: decode {ratio['decode']:.2f}x{between}, prefill {prefill}.")
    density = condition["sparse"]["density"]
    if density is not None:
        lines.append(f"Computed {density:.1%} of the FFN neurons while decoding.")
    for name, entry in rows(condition).items():
        if entry.get("streaming"):
            lines.append(f"{name} {streaming_words(entry)}.")
    for name, entry in roof["engines"].items():
        lines.append(
            f"{name}: a token touches {entry['bytes_per_token'] / 1e6:.1f} MB of weights; at "
            f"{roof['memory_gbps']:.1f} GB/s from memory"
            + (
                f" and {entry['disk_bytes_per_token'] / 1e6:.1f} MB of it from disk at {roof['disk_gbps']:.2f} GB/s"
                if entry["disk_bytes_per_token"] and roof["disk_gbps"]
                else ""
            )
            + f" the limit is {entry['bound_tps']:.1f} tokens/s, of which {entry['fraction']:.0%} is reached"
            + (f", {entry['beside']:.0%} of what memory gave just before or after." if entry["beside"] else ".")
        )
        measured = entry.get("measured")
        if measured is not None and measured["disk_bytes_per_token"]:
            beside = measured.get("beside")
            lines.append(
                f"{name}: with the {measured['disk_bytes_per_token'] / 1e6:.1f} MB per token that it did read, the "
                f"limit is {measured['bound_tps']:.1f} tokens/s (by {measured['bound_by']}), of which "
                f"{measured['fraction']:.0%} is reached"
                + (f", {beside:.0%} of what the disk gave just before or after." if beside else ".")
            )
    plan = condition.get("plan")
    if plan and plan["predicted_tps"] is not None:
        off = "" if plan["error"] is None else f", {plan['error']:+.0%} from what was measured"
        lines.append(f"powerinfer plan predicts {plan['predicted_tps']:.1f} tokens/s ({plan['placement']}){off}.")
    lines += [f"{note}." for note in roof["notes"]]
    comparable = condition["comparable"]
    if comparable["top1_agreement"] is not None:
        lines.append(f"Both found the same next token likeliest in {comparable['top1_agreement']:.1%} of the steps.")
    lines += [f"NOT COMPARABLE: {reason}." for reason in comparable["reasons"]]
    repeated = len(condition["noise"]["set_aside"])
    if repeated:
        lines.append(
            f"{repeated} rounds were repeated, because other processes took more than "
            f"{condition['noise']['others_cpu_threshold']:.0%} of the CPU time (noise.set_aside in the JSON)."
        )
    lines += [f"TOO NOISY TO TELL: {reason}." for reason in condition["noise"]["reasons"]]
    return lines


def streaming_words(entry: dict[str, Any]) -> str:
    """What an engine of ours read while decoding, as the rest of a sentence."""
    found = entry["streaming"]
    words = (
        f"had {_shown(found['hit_rate'], '{:.1%}')} of what it wanted in memory, read "
        f"{found['read_bytes_per_token'] / 1e6:.2f} MB per token in {found['reads_per_token']:.0f} reads "
        f"({found['io_engine']}), and waited {found['io_wait_ms_per_token']:.1f} ms per token for them"
    )
    if found["prefetch_accuracy"] is not None:
        words += f"; {found['prefetch_accuracy']:.0%} of what it read ahead was used"
    return words


def _shown(value: float | None, pattern: str, factor: float = 1.0) -> str:
    return "-" if value is None else pattern.format(value * factor)


# ---- the command ---------------------------------------------------------------------------------

EXAMPLES = (
    "powerinfer bench model.sparse.gguf",
    "powerinfer bench model.sparse.gguf --baseline model.gguf --memory none --memory 50% --report report",
    "powerinfer bench qwen3-30b-a3b-q4_0.gguf --memory 50%",
    'powerinfer bench m.sparse.gguf --engine "other=llama-bench -m {model} -p {prompt} -n {gen}"',
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A sparse-GGUF, or a stock GGUF.")],
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="GGUF",
            help="The stock GGUF that MODEL was made from.",
            show_default="looked for beside MODEL, else exported from it",
        ),
    ] = None,
    convert: Annotated[
        bool | None,
        typer.Option(
            "--convert/--no-convert",
            help="Convert a stock GGUF, or have our engine run it as it is, streaming it where memory is limited.",
            show_default="convert if its neurons can stay silent",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="Another engine, besides [bold]sparse[/bold] (ours) and [bold]stock[/bold]: a command with "
            "{model}, {prompt}, {gen} and {threads} in it that prints llama.cpp's timing lines or "
            "llama-bench's table; or [bold]dense[/bold], ours computing all neurons. Can be repeated.",
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Run with this much memory, page cache included: 50% of the stock file, 4GiB, or none; our engine "
            "streams what does not fit. Can be repeated; the first is at the top level of the JSON.",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 128,
    gen: Annotated[int, typer.Option(min=1, help="Tokens decoded one by one.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each engine; figures are medians.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="as many as there are CPUs to use")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Take the tokens from this text.", show_default="random tokens")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a run is stopped.")] = 1800,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a page with plots and the JSON here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Measure our engine against stock llama-cpp-python, with the limit of the hardware beside it.

    Each engine runs in processes of its own, in turns, and decodes the same given tokens. The exit code is 1
    when stock or ours failed, other than for want of memory.
    """
    try:
        engines = [parse_engine(entry) for entry in engine or []]
        for entry in memory or []:
            memory_limit.parse_limit(entry, 1 << 50)  # spelling now, size when the file is known
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if len({entry.name for entry in engines}) < len(engines):
        raise typer.BadParameter("two engines have the same name; give each --engine its own")
    if report is not None:
        from powerinfer_ext import report as page  # says now, not in ten minutes, that matplotlib is missing

        page.check_folder(report)
    with Console(stderr=True).status("") as status:
        result = bench(
            _named(model),
            baseline=os.fspath(baseline) if baseline else None,
            converted=convert,
            engines=engines,
            memory=memory,
            prompt=prompt,
            gen=gen,
            runs=runs,
            threads=threads,
            text=text.read_text(encoding="utf-8") if text else None,
            seed=seed,
            timeout=timeout,
            invocation=shlex.join(["powerinfer", *sys.argv[1:]]),
            step=lambda what: status.update(f"{what} ..."),
        )
        if report is not None:
            status.update("Drawing the report ...")
            page.write(result, report)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        render(result, console)
        if report is not None:
            console.print(f"Report: {report / 'index.html'}", markup=False, soft_wrap=True)
    crashed = [
        entry
        for condition in (result, *result["conditions"])
        for entry in (condition["baseline"], condition["sparse"])
        if entry["error"] and entry["fits"] is not False
    ]
    if crashed:
        raise typer.Exit(1)


def _named(model: str) -> str:
    """The path of a model given as a path or as the name of a bundled one."""
    from powerinfer_ext.models import find

    if os.path.exists(model) or "/" in model or model.endswith(".gguf"):
        return model
    try:
        return str(find(model).path)
    except ValueError as error:
        raise PowerInferError(f"{model}: there is no such file, and {error}") from None


# ---- the demo's second half -----------------------------------------------------------------------

DEMO_SHAPE, DEMO_LAYERS, DEMO_DENSITY = "mistral-7b", 6, 0.1  # 0.9 GB as Q4_0
DEMO_MEMORY = ("none", "50%")


def demo_comparison(
    console: Console,
    *,
    folder: str | os.PathLike[str] | None = None,
    shape: str = DEMO_SHAPE,
    layers: int = DEMO_LAYERS,
    density: float = DEMO_DENSITY,
    memory: tuple[str, ...] = DEMO_MEMORY,
    prompt: int = 32,
    gen: int = 12,
    runs: int = 1,
    step: Step = lambda text: None,
) -> dict[str, Any]:
    """Make a model with the shape of a real one, compare us with stock on it, print and return the result.

    With the defaults: under 1 GB and under a minute to make, about two to measure. The weights are random
    and the share of neurons that fires is set, so speed is all there is to see. A limit that cannot be set
    is said, and left out. Raises PowerInferError when disk or memory do not suffice.

    folder: where to put the files (2 GB, removed afterwards); default: a temporary one.
    """
    from gguf_tools.convert import convert
    from gguf_tools.synth import run as synthesise

    with tempfile.TemporaryDirectory(prefix="powerinfer-demo-", dir=folder) as temporary:
        stock = os.path.join(temporary, "model.gguf")
        step(f"Making a model of {layers} layers with the shape of {shape}")
        made = synthesise(stock, shape, layers=layers, density=density)
        sparse = os.path.join(temporary, "model.sparse.gguf")
        step("Converting it to sparse-GGUF")
        convert(stock, sparse)
        console.print(
            f"{layers} layers of {shape} with random weights ({made.output_bytes / 1e6:.0f} MB, made in "
            f"{made.seconds:.0f} s), of whose FFN neurons {density:.0%} fire.",
            markup=False,
        )
        options = {"baseline": stock, "prompt": prompt, "gen": gen, "runs": runs, "step": step}
        try:
            result = bench(sparse, memory=list(memory), invocation="powerinfer demo", **options)
        except PowerInferError as error:
            if "memory cannot be limited" not in str(error):
                raise
            console.print(f"Without the comparison in less memory: {error}", markup=False)
            result = bench(sparse, invocation="powerinfer demo", **options)
    render(result, console)
    return result

