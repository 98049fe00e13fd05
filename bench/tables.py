"""Write the tables of docs/BENCHMARKS.md from bench/results/*.json, between its marker lines.

python -m bench.tables            write them
python -m bench.tables --check    only say (exit code 1) whether the document has other figures than the
results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "BENCHMARKS.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: python -m bench.tables -->", "<!-- end of results -->"
BATCHES_BEGIN, BATCHES_END = "<!-- batches: python -m bench.tables -->", "<!-- end of batches -->"

HEAD = (
    "| result (below) | memory | engine | prefill tokens/s | decode tokens/s | decode against stock | limit of the "
    "hardware | reached | peak | from disk per token | cache hits | limit for what was read | reached | planned |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def rows(result: dict[str, Any], label: str) -> list[str]:
    """One line for each engine under each memory limit; `label` comes first."""
    lines = []
    for condition in (result, *result["conditions"]):
        limit = condition["memory_limit"]
        memory = (
            "all"
            if limit["bytes"] is None
            else f"{limit['bytes'] / 1e9:.2f} GB ({limit['share_of_model']:.0%})"
        )
        entries = {"stock": condition["baseline"], "sparse": condition["sparse"], **condition["engines"]}
        for name, entry in entries.items():
            lines.append(_row(label, memory, name, entry, condition))
    return lines


def _row(label: str, memory: str, name: str, entry: dict[str, Any], condition: dict[str, Any]) -> str:
    bound = condition["roofline"]["engines"].get(name, {})
    measured = bound.get("measured") or {}
    plan = (condition.get("plan") if name == "sparse" else None) or {}
    ratio = condition["ratio"] if name == "sparse" else {"decode": None}
    speed = entry["decode_tps"]
    if speed is None:
        what = (
            f"does not fit, needs {entry['needs_bytes'] / 1e9:.2f} GB" if entry["needs_bytes"] else "failed"
        )
    else:
        what = _shown(speed, "{:.2f}")
    against = "-"
    if ratio["decode"] is not None:
        spread = "" if ratio["spread"] is None else f" (spread {ratio['spread']:.1%})"
        against = f"{ratio['decode']:.2f}x{spread}"
    cells = [
        label,
        memory,
        name,
        _shown(entry["prefill_tps"], "{:.1f}"),
        what,
        against,
        _shown(bound.get("bound_tps"), "{:.1f}"),
        _shown(bound.get("fraction"), "{:.0%}") + _shown(bound.get("beside"), " ({:.0%})").lstrip("-"),
        _shown(entry["group_peak_bytes"] or entry["peak_bytes"], "{:.2f} GB", 1e-9),
        _shown(entry["bytes_read_per_token"], "{:.1f} MB", 1e-6),
        _shown(entry.get("cache_hit_rate"), "{:.0%}"),
        _shown(measured.get("bound_tps"), "{:.1f}"),
        _shown(measured.get("fraction"), "{:.0%}") + _shown(measured.get("beside"), " ({:.0%})").lstrip("-"),
        _shown(plan.get("predicted_tps"), "{:.1f}") + _shown(plan.get("error"), " ({:+.0%})").lstrip("-"),
    ]
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, pattern: str, factor: float = 1.0) -> str:
    return "-" if value is None else pattern.format(value * factor)


def section(paths: Iterable[Path]) -> str:
    """The table, and below it for each file where and how it was measured, with its doubts."""
    table, notes = list(HEAD), []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        table += rows(result, path.stem)
        about, roof = result["machine"], result["roofline"]
        features = " ".join(about["cpu_features"])
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        memory, disk = _shown(roof["memory_gbps"], "{:.1f} GB/s"), _shown(roof["disk_gbps"], "{:.2f} GB/s")
        notes += [
            f"**`{path.name}`** ({result['time'][:10]}): {about['cpu']} ({features}), {about['threads']} "
            f"threads on {about['cores_allowed']} cores, {about['memory_bytes'] / 1e9:.0f} GB of memory read "
            f"at {memory}, disk read at {disk} (O_DIRECT), read-ahead {about['read_ahead_kb_before']} KiB "
            f"({_limited_read_ahead(result)}), Linux {about['kernel']}; {versions}. {_density(result)}",
            "",
            "```sh",
            result["command"],
            "```",
            "",
        ]
        for condition in (result, *result["conditions"]):
            doubts = condition["noise"]["reasons"] + condition["comparable"]["reasons"]
            limit = condition["memory_limit"]["bytes"]
            where = "all memory" if limit is None else f"{limit / 1e9:.2f} GB"
            notes += [f"*To doubt ({where}): {doubt}.*\n" for doubt in doubts]
    return "\n".join([*table, "", *notes]).rstrip() + "\n"


def _limited_read_ahead(result: dict[str, Any]) -> str:
    limits = [condition["memory_limit"] for condition in (result, *result["conditions"])]
    values = {limit["read_ahead_kb"] for limit in limits if limit["bytes"] is not None}
    shown = ", ".join(f"{value} KiB" for value in sorted(values, key=str))
    return f"{shown} where memory was limited" if values else "memory was not limited"


def _density(result: dict[str, Any]) -> str:
    density = result["sparse"]["density"]
    return "" if density is None else f"{density:.1%} of the neurons were computed."


def batches(paths: Iterable[Path]) -> str:
    """The table of bench.batches' results, with the commands below it."""
    table = ["| result | tokens | stock tokens/s | ours tokens/s | against stock |", "|---|---:|---:|---:|---:|"]
    commands = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        for line in result["batches"]:
            table.append(
                f"| {path.stem} | {line['rows']} | {line['stock']:.1f} | {line['sparse']:.1f} | {line['ratio']:.2f}x |"
            )
        commands.append(f"- `{path.name}` ({result['time']}, {result['machine']}): `{result['command']}`")
    return "\n".join([*table, "", *commands]) + "\n"


def filled(document: str, paths: Iterable[Path]) -> str:
    """`document` with the results between its markers replaced. ValueError when it has no markers."""
    return _between(document, BEGIN, END, section(paths))


def filled_batches(document: str, paths: Iterable[Path]) -> str:
    """The same with the results of bench.batches."""
    return _between(document, BATCHES_BEGIN, BATCHES_END, batches(paths))


def _between(document: str, first: str, last: str, text: str) -> str:
    before, begin, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"there is no line {first!r} with a line {last!r} after it")
    return f"{before}{first}\n\n{text}\n{last}{after}"


def main() -> int:
    """Fill the document, or check it; returns the exit code."""
    document = DOCUMENT.read_text(encoding="utf-8")
    wanted = filled(document, sorted(RESULTS.glob("*.json")))
    wanted = filled_batches(wanted, sorted((RESULTS / "batches").glob("*.json")))
    if "--check" in sys.argv[1:]:
        return int(wanted != document)
    if wanted != document:
        temporary = DOCUMENT.with_suffix(".new")
        temporary.write_text(wanted, encoding="utf-8")
        temporary.rename(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
