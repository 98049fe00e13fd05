"""Speed of batches of 1 to 512 tokens, ours beside stock's: `python -m bench.batches MODEL BASELINE [--json]`.

Every batch is evaluated by one `llama_decode` (parallel sequences and the verification of drafts cost the same), with
logits for all of its tokens up to 64, beyond that for the last. Engines run in processes of their own, in turns; of
each batch the fastest of several evaluations counts. `--tiles` forces our engine to compute in tiles always or never,
which is how the crossover of cpatch/ffn_tiles.c was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512)
TILES = {"always": -1, "never": 10**6, "default": 0}


def measure(path: str, engine: str, rows: list[int], tiles: str) -> dict[int, float]:
    """Tokens per second of each batch size, in this process."""
    import llama_cpp
    import numpy as np

    from powerinfer_ext import Llama
    from powerinfer_ext.loader import native
    from powerinfer_ext.run import default_threads

    threads = default_threads()
    settings = dict(n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama = Llama(path, **settings) if engine == "sparse" else llama_cpp.Llama(path, **settings)
    if engine == "sparse":
        native()[1].pi_tiles_force(TILES[tiles], -1)
    context = llama._ctx.ctx
    rng = np.random.default_rng(0)
    speeds = {}
    for n in rows:
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        best = float("inf")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for again in range(4 if n >= 128 else 12):
            if n > 64:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for i in range(n):
                batch.token[i] = int(rng.integers(100, llama.n_vocab() - 100))
                batch.pos[i] = i + (again * n if n <= 64 else 0)
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = n <= 64 or i == n - 1
            start = time.perf_counter()
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError(f"llama_decode failed for a batch of {n}")
            if again > 0:
                best = min(best, time.perf_counter() - start)
        llama_cpp.llama_batch_free(batch)
        speeds[n] = n / best
    return speeds


def measure_apart(path: str, engine: str, rows: list[int], tiles: str) -> dict[int, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "bench.batches", path, "--engine", engine, "--tiles", tiles, "--rows"]
    done = subprocess.run([*command, *map(str, rows)], check=True, capture_output=True, text=True)
    return {int(n): speed for n, speed in json.loads(done.stdout).items()}


def machine() -> str:
    """The processor's name and how many cores there are to use."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or 'unknown'}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a sparse-GGUF")
    parser.add_argument("baseline", nargs="?", help="the stock GGUF it was made from")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="batch sizes")
    parser.add_argument("--tiles", choices=TILES, default="default")
    parser.add_argument("--runs", type=int, default=1, help="turns of both engines; the best of each counts")
    parser.add_argument("--engine", choices=("sparse", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.engine is not None:
        print(json.dumps(measure(options.model, options.engine, options.rows, options.tiles)))
        return
    engines = {"sparse": options.model} | ({"stock": options.baseline} if options.baseline else {})
    best: dict[str, dict[int, float]] = {engine: dict.fromkeys(options.rows, 0.0) for engine in engines}
    for _ in range(options.runs):
        for engine, path in engines.items():
            for n, speed in measure_apart(path, engine, options.rows, options.tiles).items():
                best[engine][n] = max(best[engine][n], speed)
    table: list[dict[str, Any]] = []
    for n in options.rows:
        line = {"rows": n} | {engine: round(speeds[n], 2) for engine, speeds in best.items()}
        table.append(line | ({"ratio": round(best["sparse"][n] / best["stock"][n], 3)} if "stock" in best else {}))
    if options.json:
        command = "python -m bench.batches " + " ".join(sys.argv[1:])
        day = time.strftime("%Y-%m-%d")
        print(json.dumps({"command": command, "time": day, "machine": machine(), "batches": table}, indent=1))
        return
    for line in table:
        print("  ".join(f"{name} {value}" for name, value in line.items()))


if __name__ == "__main__":
    main()
