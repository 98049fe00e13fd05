"""Continuous generation within a tight memory budget: does it stay right, stable and as small as it was?

    python -m bench.endurance MODEL --memory 50% --minutes 60 --json result.json

Prompts change all the time, and with them the neurons or experts that are wanted. The first prompt comes back every
tenth round and has to give the same tokens each time (greedy, so any wrong byte in a cache would show). Once a minute
a line is written: tokens per second, resident memory, hit rate, open files. Time that the process was stopped
(SIGSTOP) does not count. Exit status 1 when an answer changed, memory or open files grew, or an error was raised.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from powerinfer_ext import Llama, machine
from powerinfer_ext.placement import resident_bytes

PROMPT, GEN = 48, 48
_GAP = 5.0  # seconds without a token after which the process must have been stopped


def anonymous_bytes() -> int:
    """Bytes of anonymous memory that this process has."""
    for line in machine.read_text("/proc/self/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run(model: str, memory: str, minutes: float, threads: int, report: Path | None) -> dict[str, Any]:
    """Generate for `minutes` of running time; the result as written to `report`, which is kept up to date."""
    llama = Llama(model, memory=memory, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    vocabulary = llama.n_vocab()
    first: list[int] | None = None
    result: dict[str, Any] = {
        "model": os.path.basename(model),
        "memory": memory,
        "budget_bytes": llama.sparse_stats()["flash"]["budget"],
        "threads": threads,
        "cpu": machine.parse_cpuinfo(machine.read_text("/proc/cpuinfo"))[0],
        "minutes": [],
        "answers_checked": 0,
        "errors": [],
    }
    ran, tokens, minute_start, last = 0.0, 0, 0.0, time.monotonic()

    def tick() -> None:
        nonlocal ran, last
        now = time.monotonic()
        ran += now - last if now - last < _GAP else 0.0
        last = now

    def close_minute() -> None:
        nonlocal tokens, minute_start
        flash = llama.sparse_stats()["flash"]
        llama.reset_sparse_stats()
        entry = {
            "at_s": round(ran),
            "tokens_per_s": tokens / max(ran - minute_start, 1e-9),
            "rss_bytes": resident_bytes(),
            "anonymous_bytes": anonymous_bytes(),
            "hit_rate": flash["hit_rate"],
            "open_files": len(os.listdir("/proc/self/fd")),
            "load_average": os.getloadavg()[0],
        }
        result["minutes"].append(entry)
        print(json.dumps(entry), flush=True)
        tokens, minute_start = 0, ran
        if report is not None:
            temporary = report.with_name(f".{report.name}.tmp")
            temporary.write_text(json.dumps(result, indent=1))
            temporary.rename(report)

    number = 0
    while ran < minutes * 60 and not result["errors"]:
        rng = np.random.default_rng(0 if number % 10 == 0 else number)
        prompt = rng.integers(min(1000, vocabulary // 2), vocabulary - 1, PROMPT).tolist()
        answer: list[int] = []
        try:
            for token in llama.generate(prompt, temp=0.0, reset=True):
                answer.append(int(token))
                tokens += 1
                tick()
                if ran - minute_start >= 60:
                    close_minute()
                if len(answer) == GEN or ran >= minutes * 60:
                    break
        except Exception as error:
            result["errors"].append(f"{type(error).__name__}: {error}")
        if number % 10 == 0 and len(answer) == GEN:
            first = first or answer
            result["answers_checked"] += 1
            if answer != first:
                result["errors"].append(f"prompt 0 gave another answer in round {number}")
        number += 1
    if not result["minutes"]:
        close_minute()
    return judge(result)


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Adds what the minutes say: growth of memory (last against second minute), of open files, and of time."""
    minutes = result["minutes"]
    early, late = minutes[min(1, len(minutes) - 1)], minutes[-1]
    quarter = max(1, len(minutes) // 4)
    speeds = [entry["tokens_per_s"] for entry in minutes]
    growth = late["anonymous_bytes"] - early["anonymous_bytes"]
    result["summary"] = {
        "minutes": late["at_s"] / 60,
        "growth_bytes": growth,
        "peak_rss_bytes": max(entry["rss_bytes"] for entry in minutes),
        "open_files_growth": late["open_files"] - early["open_files"],
        "first_quarter_tokens_per_s": statistics.median(speeds[:quarter]),
        "last_quarter_tokens_per_s": statistics.median(speeds[-quarter:]),
        "ok": not result["errors"] and growth < 8 << 20 and late["open_files"] <= early["open_files"],
    }
    return result


def main(
    model: Annotated[str, typer.Argument(help="A sparse-GGUF, or a stock GGUF that can be streamed.")],
    memory: Annotated[str, typer.Option(help="The budget: bytes, 4GiB, or a percentage of the file.")] = "50%",
    minutes: Annotated[float, typer.Option(min=0.01)] = 60.0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    report: Annotated[Path | None, typer.Option("--json", help="Write the result here, minute by minute.")] = None,
) -> None:
    """Generate without pause within a budget and watch."""
    result = run(model, memory, minutes, threads, report)
    if report is not None:
        report.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["summary"]))
    sys.exit(0 if result["summary"]["ok"] else 1)


if __name__ == "__main__":
    typer.run(main)
