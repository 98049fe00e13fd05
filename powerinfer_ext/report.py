"""The page that `powerinfer bench --report DIR` writes: index.html, its plots as PNG files, and bench.json.

The page is one file that needs nothing else: the plots are inside it, there are no scripts, fonts or links to
load. It is made from the JSON alone, and every measured number on it carries the JSON path that it was taken
from (the attribute data-json), so that it can be checked.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from powerinfer_ext.errors import PowerInferError

PAGE, DATA = "index.html", "bench.json"
_COLOURS = {"stock": "#868e96", "sparse": "#e8590c", "dense": "#f4b183"}
_LABELS = {
    "stock": "stock llama-cpp-python",
    "sparse": "powerinfer-ext",
    "dense": "powerinfer-ext, all neurons",
}
_OTHERS = ("#1c7ed6", "#2f9e44", "#9c36b5", "#0c8599")
_INK, _GRID = "#212529", "#dee2e6"
_DPI = 160


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Can a report be written to `folder`? Makes the folder; raises PowerInferError or OSError when it
    cannot.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PowerInferError(
            "the report's plots need matplotlib, which is not installed: pip install 'powerinfer-ext[bench]'"
        ) from None
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PowerInferError(f"{os.fspath(folder)} cannot be written to: choose another folder for --report")


def write(result: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write the report on the JSON of `powerinfer bench` to `folder`; returns the path of the page.

    Each file is written under a temporary name and renamed, so that there is never half a file.
    """
    check_folder(folder)
    place = Path(folder)
    plots = {name: _png(draw, result) for name, draw in PLOTS.items() if _has_data(name, result)}
    for name, picture in plots.items():
        _replace(place / f"{name}.png", picture)
    _replace(place / DATA, json.dumps(result, indent=1, ensure_ascii=False).encode())
    _replace(place / PAGE, page(result, plots).encode())
    return place / PAGE


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".powerinfer-report-", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---- reading the JSON -----------------------------------------------------------------------------


def conditions(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(JSON path, condition): the one at the top level has an empty path, others "conditions.N."."""
    return [("", result), *((f"conditions.{i}.", c) for i, c in enumerate(result["conditions"]))]


def engine_paths(condition: dict[str, Any]) -> dict[str, str]:
    """Engine name -> path of its entry in the condition: stock, ours, then the others."""
    return {
        "stock": "baseline",
        "sparse": "sparse",
        **{name: f"engines.{name}" for name in condition["engines"]},
    }


def look_up(result: Any, path: str) -> Any:
    """The value at a path such as "conditions.0.baseline.latency_ms.p50"; KeyError when there is none."""
    value = result
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _entries(condition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: look_up(condition, path) for name, path in engine_paths(condition).items()}


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _limit_words(condition: dict[str, Any]) -> str:
    limit = condition["memory_limit"]["bytes"]
    return "all memory" if limit is None else f"{limit / 1e9:.2f} GB of memory"


# ---- the page -------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; color: #212529; background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem }
p { margin: .5rem 0; max-width: 46rem } .quiet { color: #5c636a } figure { margin: 1.2rem 0 2rem }
figure img { width: 100%; height: auto } figcaption { color: #5c636a; font-size: .9rem; max-width: 46rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0 }
.card { border: 1px solid #dee2e6; border-radius: .5rem; padding: .8rem 1rem }
.card b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.card span.what { color: #5c636a; font-size: .88rem }
.whole { white-space: nowrap }
.warn { background: #fff3bf; border-left: 4px solid #f59f00; padding: .6rem 1rem; margin: 1rem 0 }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .95rem }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid #e9ecef; text-align: right;
  vertical-align: top }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
table.facts td { text-align: left; overflow-wrap: anywhere }
table.facts td:first-child { white-space: nowrap }
pre { background: #f1f3f5; padding: .7rem 1rem; border-radius: .4rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .88rem }
details { margin: .8rem 0 } summary { cursor: pointer; color: #495057 } .scroll { overflow-x: auto }
"""

_CAPTIONS = {
    "speed": "Tokens per second; the whiskers span the single runs, × is our speed over stock's under the "
    "same memory limit (the median over pairs of runs).",
    "roofline": "The lines are what memory and disk bandwidth, measured on this machine, allow at most; the "
    "dots are what was measured. An engine that touches fewer bytes has a higher limit. Where memory is limited, the "
    "lines are for weights that every token touches; a hollow mark above or below its line is the limit for experts or "
    "neurons, of which a cache misses only some.",
    "latency": "Time of every decoded token, the median over the runs.",
    "memory": "Speed against the memory held at the peak: resident, or with the page cache where memory was "
    "limited.",
    "density": "Share of the FFN neurons that were computed in each layer while decoding (in a mixture, of "
    "the routed experts' neurons).",
}


def page(result: dict[str, Any], plots: dict[str, bytes]) -> str:
    """The HTML text; `plots` are PNG files by name."""

    def number(path: str, pattern: str = "{}", factor: float = 1.0) -> str:
        try:
            value = look_up(result, path)
        except (KeyError, TypeError):  # an engine that does not stream has no counters of it
            value = None
        if value is None:
            return "–"
        shown = pattern.format(value if factor == 1 else value * factor)
        return f'<span data-json="{html.escape(path)}">{html.escape(shown)}</span>'

    model = result["model"]
    title = f"{model['name'] or model['stock_file']}: powerinfer-ext against stock"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{html.escape(model["architecture"])}, {html.escape(model["activation"])} · '
        f"{number('model.layers')} layers · {number('model.stock_bytes', '{:.2f} GB', 1e-9)} · "
        f"{number('workload.prompt')} tokens read, {number('workload.gen')} decoded, "
        f"{number('workload.runs')} runs of each engine · "
        f'<span class="whole">{html.escape(result["time"][:16].replace("T", " "))} UTC</span></p>',
        _cards(result, number),
        _warnings(result),
    ]
    for path, condition in conditions(result):
        parts.append(f"<h2>With {_limit_html(path, condition, number)}</h2>")
        if condition["memory_limit"]["bytes"] is not None:
            parts.append(_limit_paragraph(path, number))
        parts.append(_speed_table(path, condition, number))
        parts += [f"<p>{_linked(sentence)}</p>" for sentence in _outcomes(condition)]
    parts.append("<h2>Plots</h2>")
    for name, picture in plots.items():
        source = base64.b64encode(picture).decode()
        caption = html.escape(_CAPTIONS[name])
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts.append(_runs(result, number))
    parts.append(_facts(result, number))
    parts.append("</body></html>")
    return "\n".join(parts)


Number = Callable[..., str]


def _cards(result: dict[str, Any], number: Number) -> str:
    """The headline figures: of the first condition in which ours and stock both ran, else of the first."""
    path, condition = next(
        (entry for entry in conditions(result) if entry[1]["ratio"]["decode"] is not None), ("", result)
    )
    cards = [
        (number(f"{path}ratio.decode", "{:.2f}×"), "decode speed against stock"),
        (number(f"{path}ratio.prefill", "{:.2f}×"), "prefill speed against stock"),
        (number(f"{path}sparse.density", "{:.1%}"), "of the neurons computed"),
        (number(f"{path}roofline.fraction", "{:.0%}"), "of the hardware's limit reached"),
    ]
    where = _limit_html(path, condition, number)
    boxes = "".join(
        f'<div class="card"><b>{value}</b><span class="what">{what}</span></div>' for value, what in cards
    )
    return f'<div class="cards">{boxes}</div><p class="quiet">Above: with {where}.</p>'


def _warnings(result: dict[str, Any]) -> str:
    lines = []
    for _, condition in conditions(result):
        where = _limit_words(condition)
        lines += [f"Not comparable ({where}): {reason}." for reason in condition["comparable"]["reasons"]]
        lines += [f"Too noisy to tell ({where}): {reason}." for reason in condition["noise"]["reasons"]]
    return f'<div class="warn">{"<br>".join(map(html.escape, lines))}</div>' if lines else ""


def _limit_html(path: str, condition: dict[str, Any], number: Number) -> str:
    if condition["memory_limit"]["bytes"] is None:
        return _limit_words(condition)
    return number(f"{path}memory_limit.bytes", "{:.2f} GB", 1e-9) + " of memory"


def _limit_paragraph(path: str, number: Number) -> str:
    limit = f"{path}memory_limit"
    return (
        f"<p>Every process was held to {number(f'{limit}.bytes', '{:.0f} MB', 1e-6)}, page cache included, "
        f"{number(f'{limit}.share_of_model', '{:.0%}')} of the model ({number(f'{limit}.how')}); the model "
        f"was dropped from the page cache before each run, and the kernel's read-ahead was "
        f"{number(f'{limit}.read_ahead_kb', '{} KiB')}.</p>"
    )


_ROWS = (
    ("decode, tokens/s", "decode_tps", "{:.2f}", 1.0),
    ("spread of the runs", "spread.decode", "{:.1%}", 1.0),
    ("prefill, tokens/s", "prefill_tps", "{:.1f}", 1.0),
    ("time to first token, s", "ttft_s", "{:.2f}", 1.0),
    ("load, s", "load_s", "{:.2f}", 1.0),
    ("ms per token, median", "latency_ms.p50", "{:.1f}", 1.0),
    ("90th percentile", "latency_ms.p90", "{:.1f}", 1.0),
    ("99th percentile", "latency_ms.p99", "{:.1f}", 1.0),
    ("peak resident, MB", "peak_bytes", "{:.0f}", 1e-6),
    ("peak with page cache, MB", "group_peak_bytes", "{:.0f}", 1e-6),
    ("read from disk, MB per token", "bytes_read_per_token", "{:.2f}", 1e-6),
    ("cache hit rate", "streaming.hit_rate", "{:.1%}", 1.0),
    ("reads per token", "streaming.reads_per_token", "{:.0f}", 1.0),
    ("waiting for reads, ms per token", "streaming.io_wait_ms_per_token", "{:.1f}", 1.0),
    ("prefetches that were used", "streaming.prefetch_accuracy", "{:.0%}", 1.0),
)


def _speed_table(path: str, condition: dict[str, Any], number: Number) -> str:
    engines = engine_paths(condition)
    head = "".join(f"<th>{html.escape(_label(name))}</th>" for name in engines)
    body = []
    for what, key, pattern, factor in _ROWS:
        cells = [number(f"{path}{entry}.{key}", pattern, factor) for entry in engines.values()]
        if any(cell != "–" for cell in cells):
            body.append(f"<tr><td>{what}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


def _outcomes(condition: dict[str, Any]) -> list[str]:
    """The sentences of the JSON that are not in the warnings' box already."""
    doubts = ("NOT COMPARABLE", "TOO NOISY")
    return [line for line in condition["summary"] if not line.startswith(doubts)]


def _linked(sentence: str) -> str:
    """A sentence that stands in the JSON as it is: `summary`."""
    return f'<span data-json-text="summary">{html.escape(sentence)}</span>'


def _runs(result: dict[str, Any], number: Number) -> str:
    """Every single run, folded away."""
    keys = ("load_s", "ttft_s", "prefill_tps", "decode_tps", "cpu_s", "wall_s")
    rows = []
    for path, condition in conditions(result):
        where = _limit_html(path, condition, number)
        for name, entry in engine_paths(condition).items():
            for i, run in enumerate(look_up(condition, entry)["runs"]):
                cells = [
                    number(f"{path}{entry}.runs.{i}.{key}", "{:.3f}") if run.get(key) is not None else "–"
                    for key in keys
                ]
                cells = "".join(f"<td>{cell}</td>" for cell in cells)
                rows.append(f"<tr><td>{html.escape(_label(name))}, {where}, run {i + 1}</td>{cells}</tr>")
    head = "".join(f"<th>{key}</th>" for key in keys)
    return (
        f'<h2>Every run</h2><details><summary>{len(rows)} runs</summary><div class="scroll"><table>'
        f"<tr><th></th>{head}</tr>{''.join(rows)}</table></div></details>"
    )


def _facts(result: dict[str, Any], number: Number) -> str:
    about, versions = result["machine"], result["machine"]["versions"]
    disk = " · ".join(
        f"{number(f'roofline.disk.{i}.block', '{:.0f} KiB', 1 / 1024)} × "
        f"{number(f'roofline.disk.{i}.depth')}: {number(f'roofline.disk.{i}.gbps', '{:.2f} GB/s')}"
        for i in range(len(result["roofline"]["disk"]))
    )
    facts = [
        ("Processor", f"{number('machine.cpu')}, {number('machine.cores_allowed')} cores, "
                      f"{number('machine.threads')} threads"),
        ("Features", html.escape(" ".join(about["cpu_features"]))),
        ("Memory", f"{number('machine.memory_bytes', '{:.1f} GB', 1e-9)}, read at "
                   f"{number('roofline.memory_gbps', '{:.1f} GB/s')} by all cores together"),
        ("Disk", f"random reads of the model's file past the page cache, block × in flight: {disk}"),
        ("Read-ahead", number("machine.read_ahead_kb", "{} KiB")),
        ("Software", ", ".join(f"{html.escape(name)} {html.escape(str(v))}" for name, v in versions.items())
                     + f", Linux {number('machine.kernel')}"),
        ("Model", f"{number('model.stock_file')} and {number('model.sparse_file')} "
                  f"({number('model.stock_from')}); {number('model.same_model')}"),
        ("Tokens", f"{number('workload.tokens_from')}; the same for all engines, fed whatever they predict"),
        ("Warm-up", number("workload.warm_up")),
        ("Order", number("workload.order")),
    ]  # fmt: skip
    notes = result["sparse"].get("notes", [])
    facts += [("Note", html.escape(note)) for note in notes]
    rows = "".join(f"<tr><td>{what}</td><td>{value}</td></tr>" for what, value in facts)
    return (
        f"<h2>Machine and method</h2><table class='facts'>{rows}</table>"
        f"<pre>{html.escape(result['command'])}</pre><p class='quiet'>All numbers, with every single run, "
        f"are in {DATA} beside this page; the page's source names the JSON path of each (data-json).</p>"
    )


# ---- plots ----------------------------------------------------------------------------------------


def _png(draw: Callable[[Any, dict[str, Any]], None], result: dict[str, Any]) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": "#adb5bd",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, result)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=_DPI, facecolor="white")
    return out.getvalue()


def _has_data(name: str, result: dict[str, Any]) -> bool:
    if name == "density":
        return any(condition["sparse"]["layers"] for _, condition in conditions(result))
    if name == "roofline":
        return any(condition["roofline"]["engines"] for _, condition in conditions(result))
    if name == "latency":
        return any(e["latency_over_tokens_ms"] for _, c in conditions(result) for e in _entries(c).values())
    return True


def _colour(name: str, result: dict[str, Any]) -> str:
    others = [n for n in result["engines"] if n not in _COLOURS]
    return _COLOURS.get(name) or _OTHERS[others.index(name) % len(_OTHERS)]


def _draw_speed(figure: Any, result: dict[str, Any]) -> None:
    """Decode and prefill speed of every engine, grouped by memory limit."""
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        groups = [condition for _, condition in conditions(result)]
        seen: set[str] = set()
        names = list(engine_paths(result))
        width = 0.8 / len(names)
        singles = [
            run.get(f"{phase}_tps") or 0 for c in groups for e in _entries(c).values() for run in e["runs"]
        ]
        highest = max(singles, default=1) or 1
        for g, condition in enumerate(groups):
            entries = _entries(condition)
            for i, name in enumerate(names):
                entry = entries[name]
                at = g + (i - (len(names) - 1) / 2) * width
                speed = entry[f"{phase}_tps"]
                if speed is None:
                    text = "does not fit" if entry["fits"] is False else "failed"
                    axes.text(at, highest * 0.01, f"{_label(name)}: {text}", rotation=90, ha="center",
                              va="bottom", fontsize=9, color=_colour(name, result))  # fmt: skip
                    continue
                runs = [run[f"{phase}_tps"] for run in entry["runs"] if run.get(f"{phase}_tps")]
                whisker = [[speed - min(speed, *runs)], [max(speed, *runs) - speed]]
                label = None if _label(name) in seen else _label(name)
                seen.add(_label(name))
                axes.bar(at, speed, width * 0.92, color=_colour(name, result), label=label, yerr=whisker,
                         error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 3})  # fmt: skip
                ratio = condition["ratio"][phase] if name == "sparse" else None
                times = f"\n{ratio:.2f}×" if ratio else ""
                axes.text(at, max(runs) + highest * 0.02, f"{_short(speed)}{times}", ha="center", va="bottom",
                          fontsize=9)  # fmt: skip
        axes.set_xticks(range(len(groups)), [_limit_words(condition) for condition in groups])
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_ylim(0, highest * 1.22)
        axes.set_title(f"{phase.capitalize()}, tokens per second")
        axes.grid(axis="y")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _draw_roofline(figure: Any, result: dict[str, Any]) -> None:
    """Tokens per second against the bytes a token touches, with the limits of memory and disk."""
    axes = figure.subplots()
    found = [(c, name, e) for _, c in conditions(result) for name, e in c["roofline"]["engines"].items()]
    sizes = [entry["bytes_per_token"] / 1e9 for _, _, entry in found]
    low, high = min(sizes) / 2.5, max(sizes) * 2.5
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    for style, (_, condition) in zip(("-", "--", ":", "-.") * 4, conditions(result), strict=False):
        roof, limit = condition["roofline"], condition["memory_limit"]["bytes"]
        if not roof["memory_gbps"]:
            continue
        heights = []
        for size in steps:
            beyond = max(0.0, size - limit / 1e9) if limit is not None else 0.0
            from_disk = roof["disk_gbps"] / beyond if beyond and roof["disk_gbps"] else float("inf")
            heights.append(min(roof["memory_gbps"] / size, from_disk))
        axes.plot(
            steps, heights, style, color="#495057", lw=1.4, label=f"limit with {_limit_words(condition)}"
        )
    for condition, name, entry in found:
        size, colour = entry["bytes_per_token"] / 1e9, _colour(name, result)
        marker = _marker(condition, result)
        axes.plot([size, size], [entry["decode_tps"], entry["bound_tps"]], color=colour, lw=1, alpha=0.6)
        axes.plot(size, entry["bound_tps"], marker, mfc="white", mec=colour, ms=6)
        text = f"{_label(name)}, {_limit_words(condition)}:\n{_short(entry['decode_tps'])} tokens/s, "
        text += f"{entry['fraction']:.0%} of {_short(entry['bound_tps'])}"
        axes.plot(size, entry["decode_tps"], marker, color=colour, ms=9, label=text)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_logs(axes, "x")
    _plain_logs(axes, "y")
    axes.set_xlabel("gigabytes of weights that a token touches")
    axes.set_ylabel("tokens per second")
    axes.set_title("Decoding against the limit of the hardware")
    axes.grid(which="major")
    figure.legend(loc="outside right upper", fontsize=9)


def _marker(condition: dict[str, Any], result: dict[str, Any]) -> str:
    """A shape for each memory limit."""
    places = [entry is condition for _, entry in conditions(result)]
    return "osD^v"[places.index(True) % 5]


def _plain_logs(axes: Any, which: str) -> None:
    """Ticks 1, 2, 5, 10 ... written as they are, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_latency(figure: Any, result: dict[str, Any]) -> None:
    """Milliseconds of every decoded token."""
    axes = figure.subplots()
    highest = lowest = None
    for style, (_, condition) in zip(("-", "--", ":", "-.") * 4, conditions(result), strict=False):
        for name, entry in _entries(condition).items():
            times = entry["latency_over_tokens_ms"]
            if not times:
                continue
            label = f"{_label(name)}, {_limit_words(condition)}"
            axes.plot(
                range(1, len(times) + 1), times, style, color=_colour(name, result), lw=1.6, label=label
            )
            highest, lowest = max(times + [highest or 0]), min(times + [lowest or times[0]])
    if highest and lowest and highest > 8 * lowest:
        axes.set_yscale("log")
        _plain_logs(axes, "y")
    else:
        axes.set_ylim(0, (highest or 1) * 1.1)
    axes.set_xlabel("token")
    axes.set_title("Milliseconds per decoded token")
    axes.grid(axis="y")
    axes.legend(loc="best", fontsize=9)


def _draw_memory(figure: Any, result: dict[str, Any]) -> None:
    """Decode speed against the memory at the peak, and what did not fit."""
    axes = figure.subplots()
    points = []
    for _, condition in conditions(result):
        limit = condition["memory_limit"]["bytes"]
        if limit is not None:
            axes.axvline(limit / 1e9, color="#868e96", ls=":", lw=1.4)
            axes.annotate("limit", (limit / 1e9, 0.99), xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", va="top", fontsize=9, color="#5c636a")  # fmt: skip
        marker = _marker(condition, result)
        for name, entry in _entries(condition).items():
            peak, speed = entry["group_peak_bytes"] or entry["peak_bytes"], entry["decode_tps"]
            if speed is not None and peak:
                text = f"{_label(name)}, {_limit_words(condition)}:\n"
                text += f"{_short(speed)} tokens/s in {peak / 1e9:.2f} GB"
                points.append((peak / 1e9, speed, text, name, marker))
            elif entry["fits"] is False and entry["needs_bytes"]:
                needs = entry["needs_bytes"] / 1e9
                text = f"{_label(name)}, {_limit_words(condition)}:\ndoes not fit, needs {needs:.2f} GB"
                points.append((needs, 0.0, text, name, "x"))
    for x, y, text, name, marker in points:
        edge = 2.5 if marker == "x" else 1
        axes.plot(x, y, marker, ls="", color=_colour(name, result), ms=9, mew=edge, clip_on=False, zorder=3,
                  label=text)  # fmt: skip
    if points:
        figure.legend(loc="outside right upper", fontsize=9, labelspacing=0.8)
    axes.set_xlim(0, max((point[0] for point in points), default=1) * 1.2)
    axes.set_ylim(0, max((point[1] for point in points), default=1) * 1.15 or 1)
    axes.set_xlabel("gigabytes of memory at the peak (a cross: needed)")
    axes.set_ylabel("decoded tokens per second")
    axes.set_title("Memory against speed")
    axes.grid()


def _draw_density(figure: Any, result: dict[str, Any]) -> None:
    """Share of neurons computed in every layer."""
    axes = figure.subplots()
    ours = next(c["sparse"] for _, c in conditions(result) if c["sparse"]["layers"])
    layers, mean = ours["layers"], ours["density"]
    numbers = [row["layer"] for row in layers]
    axes.bar(numbers, [100 * row["density"] for row in layers], 0.7, color=_COLOURS["sparse"])
    axes.axhline(100 * mean, color=_INK, lw=1, ls="--")
    if len(numbers) <= 40:
        axes.set_xticks(numbers)
    axes.set_xlabel("layer")
    axes.set_title(f"Neurons computed per layer, % (dashed: the mean, {100 * mean:.1f} %)")
    axes.grid(axis="y")


PLOTS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "speed": _draw_speed,
    "roofline": _draw_roofline,
    "latency": _draw_latency,
    "memory": _draw_memory,
    "density": _draw_density,
}


def numbers(text: str) -> list[tuple[str, str]]:
    """(JSON path, shown text) of every number on a page."""
    found = re.findall(r'<span data-json="([^"]*)">([^<]*)</span>', text)
    return [(html.unescape(path), html.unescape(shown)) for path, shown in found]
