"""Decoding beside other work, ours and stock's: `python -m bench.busy MODEL BASELINE [--json]`.

Tokens per second while none, one, ... as many loops that never end as there are cores run beside it at normal priority.
Engines run in processes of their own, in turns; the figures are medians over the rounds of tokens over seconds. Our
engine runs as users get it, and once with libgomp's own default for how long waiting threads spin
(`powerinfer_ext/openmp.py` says what we set, and why).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from bench.batches import machine

ENGINES = ("stock", "sparse", "sparse, libgomp's spinning")
LIBGOMP_SPINS = "300000"
LOOP = [sys.executable, "-c", "while True: pass"]


def measure(path: str, engine: str, loops: list[int], seconds: float) -> dict[int, float]:
    """Tokens per second beside so many loops, in this process."""
    if engine != "stock":
        from powerinfer_ext import Llama
    else:
        from llama_cpp import Llama
    threads = len(os.sched_getaffinity(0))
    llama = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama.eval(range(5, 21))
    speeds = {}
    for n in loops:
        others = [subprocess.Popen(LOOP) for _ in range(n)]
        try:
            time.sleep(0.5)
            start, tokens = time.perf_counter(), 0
            while time.perf_counter() < start + seconds:
                if llama.n_tokens > 1000:
                    llama.n_tokens = 16
                llama.eval([10 + tokens % 500])
                tokens += 1
            speeds[n] = tokens / (time.perf_counter() - start)
        finally:
            for other in others:
                other.kill()
                other.wait()
    return speeds


def measure_apart(path: str, engine: str, loops: list[int], seconds: float) -> dict[int, float]:
    """The same in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if engine == ENGINES[2]:
        env["GOMP_SPINCOUNT"] = LIBGOMP_SPINS
    command = [sys.executable, "-m", "bench.busy", path, "--engine", engine, "--seconds", str(seconds), "--loops"]
    done = subprocess.run([*command, *map(str, loops)], check=True, capture_output=True, text=True, env=env)
    return {int(n): speed for n, speed in json.loads(done.stdout).items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a sparse-GGUF")
    parser.add_argument("baseline", nargs="?", help="the GGUF it was made from")
    parser.add_argument("--loops", type=int, nargs="+", default=list(range(len(os.sched_getaffinity(0)) + 1)))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of loops")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.model, arguments.engine, arguments.loops, arguments.seconds)))
        return
    if arguments.baseline is None:
        parser.error("BASELINE is missing")
    runs = {engine: [] for engine in ENGINES}
    for _ in range(arguments.rounds):
        for engine, of_engine in runs.items():
            path = arguments.baseline if engine == "stock" else arguments.model
            of_engine.append(measure_apart(path, engine, arguments.loops, arguments.seconds))
    medians = {e: {n: statistics.median(run[n] for run in of) for n in arguments.loops} for e, of in runs.items()}
    result = {
        "format": "powerinfer.busy.v1",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": f"python -m bench.busy {' '.join(map(os.path.basename, sys.argv[1:]))}",
        "machine": machine(),
        "loops": arguments.loops,
        "runs": runs,
        "tokens_per_second": medians,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for engine, speeds in medians.items():
        print(f"{engine:28s}", *(f"{n} loops: {speed:5.1f} tokens/s" for n, speed in speeds.items()), sep="  ")


if __name__ == "__main__":
    main()
