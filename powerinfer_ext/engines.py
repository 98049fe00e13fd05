"""The programs that a benchmark compares, each run in a child process of its own.

A run is a child: what it holds in memory, what it reads, and whether it crashes concern nobody else, and a
memory limit can be put around it. Built-in engines are this module itself (`python -m
powerinfer_ext.engines`: a JSON job on stdin, a JSON result as the last line of stdout); both of them go
through the same code, which loads a file with llama-cpp-python and decodes a given sequence of tokens, so
that they do the same work. External engines are any command that prints llama.cpp's timing lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerinfer_ext import machine, memory_limit
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.probe import describe_end

BUILT_IN = {
    "sparse": "powerinfer-ext, computing the neurons that fire",
    "stock": "llama-cpp-python as installed",
    "dense": "powerinfer-ext, computing all neurons",
}
PLACEHOLDERS = ("{model}", "{prompt}", "{gen}", "{threads}")
WARM_UP_DECODES = 8
_TAIL = 1500  # characters of a failed engine's output that are kept


@dataclass(frozen=True)
class Engine:
    """Something to measure: a built-in engine, or, with `template`, a command with `PLACEHOLDERS`."""

    name: str
    template: str | None = None

    @property
    def is_sparse(self) -> bool:
        """Is it ours: does it run MODEL (and not the baseline), and keep to a memory limit by itself?"""
        return self.template is None and self.name in ("sparse", "dense")


@dataclass(frozen=True)
class Job:
    """What every engine has to do: read `prompt` tokens at once, then `gen` tokens one by one.

    tokens: prompt + gen token ids, the same for all (teacher-forced: predictions are not fed back).
    extra_bufts: may weights be repacked into other layouts (stock's default; such copies cannot be paged).
    memory: the budget that our engines are given, in bytes; None: all there is.
    """

    model: str
    prompt: int
    gen: int
    threads: int
    tokens: list[int] = field(default_factory=list, repr=False)
    extra_bufts: bool = True
    memory: int | None = None


class EngineFailure(Exception):
    """A run without a result: one sentence, the engine's last output, and whether memory was the reason.

    needs: bytes of the least memory that works, where the engine said so.
    """

    def __init__(self, reason: str, output: str = "", out_of_memory: bool = False, needs: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output[-_TAIL:].strip()
        self.out_of_memory = out_of_memory
        self.needs = needs


def parse_engine(text: str) -> Engine:
    """An engine from the command line: a built-in name or NAME=COMMAND. Raises ValueError, one sentence."""
    name, equals, template = text.partition("=")
    name = name.strip()
    if not equals:
        if name not in BUILT_IN:
            raise ValueError(
                f"unknown engine {text!r}: built in are {', '.join(BUILT_IN)}; any other program is given as "
                "NAME=COMMAND with {model}, {prompt}, {gen} and {threads} in the command"
            )
        return Engine(name)
    if name in BUILT_IN or not re.fullmatch(r"[\w+-]{1,40}", name):
        raise ValueError(
            f"engine name {name!r} is taken or is not a plain word; choose another before the = of --engine"
        )
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ValueError(f"the command of engine {name!r} cannot be split into words: {error}") from None
    if not words:
        raise ValueError(f"engine {name!r} has no command after the =")
    if "{model}" not in template:
        raise ValueError(
            f"the command of engine {name!r} has no {{model}} in it, so it would not run the model"
        )
    return Engine(name, template)


# ---- running one ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `peak`: largest resident set in bytes, if it was watched; times in seconds."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak: int | None
    timed_out: bool


def run(
    engine: Engine, job: Job, limit: memory_limit.Limit = memory_limit.NO_LIMIT, timeout: float = 1800
) -> Any:
    """Run `engine` once and return its measurements (see `_worker` and `parse_timings`).

    Raises EngineFailure when it crashes, does not end within `timeout` seconds, or prints no timings.
    """
    if engine.template is None:
        command = [sys.executable, "-m", "powerinfer_ext.engines"]
        request = {**job.__dict__, "engine": engine.name, "limited": limit.limit is not None}
        outcome = _run_child([*limit.prefix, *command], json.dumps(request), timeout)
        result = _last_json(outcome.stdout)
    else:
        command = external_command(engine, job)
        if shutil.which(command[0]) is None:
            raise EngineFailure(f"engine {engine.name}: there is no program {command[0]!r} on the PATH")
        outcome = _run_child([*limit.prefix, *command], "", timeout, watch=True)
        result = parse_timings(outcome.stdout + "\n" + outcome.stderr)
        result["peak_bytes"] = outcome.peak
    output = "\n".join(part for part in (outcome.stdout, outcome.stderr) if part.strip())
    if outcome.timed_out:
        raise EngineFailure(
            f"engine {engine.name} did not end within {timeout:.0f} s and was stopped", output
        )
    if result.get("refused"):
        raise EngineFailure(f"engine {engine.name}: {result['refused']}", "", True, result["needs_bytes"])
    if outcome.returncode != 0:
        killed = limit.oom_kills() > 0 or (limit.limit is not None and outcome.returncode == -signal.SIGKILL)
        if killed:
            size = (limit.limit or 0) / 1e6
            reason = f"engine {engine.name} was killed by the kernel for exceeding {size:.0f} MB of memory"
        else:
            reason = describe_end(outcome.returncode, outcome.stderr, f"engine {engine.name}").reason
        raise EngineFailure(reason, output, out_of_memory=killed)
    if not result or "decode_tps" not in result:
        raise EngineFailure(
            f"engine {engine.name} printed no timing that we can read (wanted: llama.cpp's 'eval time' "
            "lines, or the output of llama-bench)",
            output,
        )
    result["cpu_s"] = outcome.cpu_seconds
    result["wall_s"] = outcome.seconds
    peak = limit.peak()
    if peak is not None:
        result["group_peak_bytes"] = peak
    return result


def external_command(engine: Engine, job: Job) -> list[str]:
    """The words of an external engine's command, placeholders filled in; no shell is involved."""
    values = {"{model}": job.model, "{prompt}": job.prompt, "{gen}": job.gen, "{threads}": job.threads}
    words = shlex.split(engine.template or "")
    for placeholder, value in values.items():
        words = [word.replace(placeholder, str(value)) for word in words]
    return words


def _run_child(command: list[str], request: str, timeout: float, watch: bool = False) -> Outcome:
    """Run a command to its end, in a process group of its own that is killed with us or when time is up.

    watch: look at its resident set ten times a second. (The kernel's own record, ru_maxrss, starts with that
    of the process it was forked from, which is larger than a small program.)
    """
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # Files, not pipes: wait4 (which gives this child's own resource usage) must not wait for a reader.
    with contextlib.ExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        stdin.write(request.encode())
        stdin.seek(0)
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, start_new_session=True
        )
        timed_out = threading.Event()

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(child.pid, signal.SIGKILL)

        def stop() -> None:
            timed_out.set()
            kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        peak = None
        try:
            while watch and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                peak = max(peak or 0, _status("VmHWM", child.pid)) or None
                time.sleep(0.1)
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # Ctrl-C goes to us alone, the child is in a group of its own
            kill()
            os.wait4(child.pid, 0)
            raise
        finally:
            timer.cancel()
            child.returncode = 0  # reaped above; Popen must not try
        seconds = time.perf_counter() - start

        def text(file: Any) -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        return Outcome(
            returncode=os.waitstatus_to_exitcode(status),
            stdout=text(stdout),
            stderr=text(stderr),
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak=peak,
            timed_out=timed_out.is_set(),
        )


def _last_json(text: str) -> dict[str, Any]:
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


# ---- what external programs print ----------------------------------------------------------------

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_TIMING = r"{what} time\s*=\s*" + _NUMBER + r"\s*ms\s*/\s*([0-9]+)\s*(?:tokens|runs)"
_PREFILL_LINE = re.compile(_TIMING.format(what="prompt eval"))
_DECODE_LINE = re.compile(r"(?<!prompt )" + _TIMING.format(what=r"\beval"))
_LOAD_LINE = re.compile(r"load time\s*=\s*" + _NUMBER + r"\s*ms")
_SHORT_LINE = re.compile(
    r"\[\s*Prompt:\s*" + _NUMBER + r"\s*t/s\s*\|\s*Generation:\s*" + _NUMBER + r"\s*t/s\s*\]"
)
_BENCH_ROW = re.compile(r"\|\s*(pp|tg)([0-9]+)[^|]*\|\s*" + _NUMBER + r"(?:\s*±\s*" + _NUMBER + r")?\s*\|")


def parse_timings(text: str) -> dict[str, Any]:
    """Speeds from the output of a llama.cpp program; {} when there are none.

    Understood: the "prompt eval time" / "eval time" lines of llama_perf_context_print (or of older
    llama_print_timings), llama-bench's table and its `-o json`, and llama-cli's "[ Prompt: ... t/s |
    Generation: ... t/s ]".

    Returns `prefill_tps`, `decode_tps`, and where they are printed `prefill_tokens`, `decode_tokens`,
    `load_s`.
    """
    found: dict[str, Any] = {}
    rows = _bench_json(text)
    for kind, count, speed in rows or [(m[1], int(m[2]), float(m[3])) for m in _BENCH_ROW.finditer(text)]:
        phase = "prefill" if kind == "pp" else "decode"
        found[f"{phase}_tps"], found[f"{phase}_tokens"] = speed, count
    if found:
        return found
    for phase, pattern in (("prefill", _PREFILL_LINE), ("decode", _DECODE_LINE)):
        matches = list(pattern.finditer(text))
        if matches and float(matches[-1][1]) > 0:
            milliseconds, count = float(matches[-1][1]), int(matches[-1][2])
            found[f"{phase}_tps"], found[f"{phase}_tokens"] = count / milliseconds * 1000, count
    if not found and (short := _SHORT_LINE.search(text)):
        found = {"prefill_tps": float(short[1]), "decode_tps": float(short[2])}
    if found and (load := _LOAD_LINE.search(text)):
        found["load_s"] = float(load[1]) / 1000
    return found


def _bench_json(text: str) -> list[tuple[str, int, float]]:
    """(kind, tokens, tokens/s) of `llama-bench -o json`; [] when it is something else."""
    start = re.search(r"^\[", text, re.MULTILINE)
    if not start:
        return []
    try:
        rows, _ = json.JSONDecoder().raw_decode(text[start.start() :])
        out = []
        for row in rows:
            kind = "tg" if row["n_gen"] else "pp"
            out.append((kind, int(row["n_gen"] or row["n_prompt"]), float(row["avg_ts"])))
        return out
    except (ValueError, KeyError, TypeError):
        return []


# ---- the child -----------------------------------------------------------------------------------


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure. Runs in the child; every time is in seconds unless it says ms.

    The first pass over the prompt after loading is `ttft_s` (nothing is warm) and, with a few tokens after
    it, the warm-up; then the context is cleared and the measured pass begins.
    """
    started = time.perf_counter()
    import numpy as np

    from powerinfer_ext.openmp import spin_briefly

    if job["engine"] != "stock":
        spin_briefly()  # as `from powerinfer_ext import Llama` does
    from powerinfer_ext.errors import BudgetError
    from powerinfer_ext.evaluate import LlamaScorer

    prompt, gen, tokens = job["prompt"], job["gen"], job["tokens"]
    engine = job["engine"]
    imported = time.perf_counter()
    before, process = _read_bytes(), _status("VmRSS")
    try:
        scorer = LlamaScorer(
            job["model"],
            window=prompt + gen,
            threads=job["threads"],
            sparse_mode={"stock": None, "dense": "dense"}.get(engine, "exact"),
            extra_bufts=job["extra_bufts"],
            memory=job["memory"],
            logits_all=False,
        )
    except BudgetError as error:
        return {"refused": str(error), "needs_bytes": error.least}
    load_s = time.perf_counter() - imported
    read_by_loading = _difference(_read_bytes(), before)
    memory = {"after_load": _resident()}

    def step(part: list[int], position: int) -> float:
        start = time.perf_counter()
        scorer.batch.set_batch(part, n_past=position, logits_all=False)
        scorer.context.decode(scorer.batch)
        scorer.context.get_logits()  # waits until they are there
        return time.perf_counter() - start

    scorer.context.kv_cache_clear()
    ttft_s = step(tokens[:prompt], 0)
    for position in range(prompt, prompt + min(WARM_UP_DECODES, gen)):
        step(tokens[position : position + 1], position)
    scorer.context.kv_cache_clear()
    if scorer.sparse is not None:
        scorer.sparse.reset_stats()

    before_prefill = _flash(scorer)
    prefill_s = step(tokens[:prompt], 0)
    memory["after_prefill"] = _resident()
    after_prefill = _flash(scorer)
    before_decode, faults = _read_bytes(), _major_faults()
    latencies, likeliest = [], []
    for position in range(prompt, prompt + gen):
        latencies.append(step(tokens[position : position + 1], position) * 1000)
        logits = np.ctypeslib.as_array(scorer.context.get_logits(), shape=(scorer.n_vocab,))
        likeliest.append(int(logits.argmax()))  # not timed
    read_by_decoding = _difference(_read_bytes(), before_decode)
    memory["after_decode"] = _resident()
    after_decode = _flash(scorer)
    sparse = scorer.sparse.stats() if scorer.sparse is not None else None
    return {
        "engine": engine,
        "start_s": imported - started,
        "load_s": load_s,
        "ttft_s": ttft_s,
        "prefill_s": prefill_s,
        "prefill_tokens": prompt,
        "prefill_tps": prompt / prefill_s,
        "decode_tokens": gen,
        "decode_tps": gen / (sum(latencies) / 1000),
        "latencies_ms": latencies,
        "likeliest": likeliest,
        "n_vocab": scorer.n_vocab,
        "process_bytes": process,  # before loading: Python, llama.cpp's libraries, ours
        "peak_bytes": _status("VmHWM"),
        "peak_anonymous_bytes": max(sample["anonymous"] for sample in memory.values()),
        "peak_file_bytes": max(sample["file"] for sample in memory.values()),
        "memory": memory,
        "group_peak_bytes": memory_limit.own_group_peak() if job["limited"] else None,
        "load_read_bytes": read_by_loading,
        "decode_read_bytes": read_by_decoding,
        "major_faults_decode": _major_faults() - faults,
        "extra_bufts": job["extra_bufts"],
        # The plugin must not even be in the process that stands for stock.
        "plugin_loaded": "powerinfer_ext._cpatch" in sys.modules,
        "sparse": sparse,
        "flash": None
        if after_decode is None
        else {
            "engine": sparse["flash"]["engine"],
            "slots_bytes": sparse["flash"]["slots_bytes"],
            "budget": sparse["flash"]["budget"],
            "prefill": _since(after_prefill, before_prefill),
            "decode": _since(after_decode, after_prefill),
        },
    }


def _flash(scorer: Any) -> dict[str, Any] | None:
    """The counters of what was streamed so far; None where nothing is."""
    return scorer.sparse.stats()["flash"] if scorer.sparse is not None else None


def _since(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was counted between the two."""
    keys = ("wanted", "missed", "unit_bytes", "read_bytes", "reads", "wait_seconds", "prefetched", "useful", "wasted")
    return {key: after[key] - before[key] for key in keys}


def _status(name: str, pid: int | str = "self") -> int:
    """A size from /proc/PID/status in bytes; 0 when the process has just ended."""
    found = re.search(rf"^{name}:\s+(\d+) kB", machine.read_text(f"/proc/{pid}/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _resident() -> dict[str, int]:
    """Bytes resident now: anonymous (ours alone, cannot be paged out without swap) and of mapped files."""
    return {"anonymous": _status("RssAnon"), "file": _status("RssFile")}


def _read_bytes() -> int | None:
    """Bytes that this process made the block devices read, page faults included; None where not accounted."""
    try:
        found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _major_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def main() -> None:
    """Read a job from stdin, print its result; a failure is one line on stderr and exit code 1."""
    _end_with_parent()
    job = json.load(sys.stdin)
    try:
        result = _worker(job)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result), flush=True)
    os._exit(0)  # measured already: freeing gigabytes page by page tells nothing


def _end_with_parent() -> None:
    """Have the kernel kill this process when the benchmark dies (prctl PR_SET_PDEATHSIG, Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def tokenize(path: str, text: str, count: int) -> list[int]:
    """The first `count` tokens of `text` in the vocabulary of the GGUF at `path`, read in a child process.

    Raises PowerInferError when the text is too short or the file has no vocabulary.
    """
    code = (
        "import json,sys,llama_cpp\n"
        "a=json.load(sys.stdin)\n"
        "m=llama_cpp.Llama(a['model'],vocab_only=True,verbose=False)\n"
        "print(json.dumps({'tokens':m.tokenize(a['text'].encode(),add_bos=True)[:a['count']]}))\n"
    )
    request = json.dumps({"model": path, "text": text, "count": count})
    outcome = _run_child([sys.executable, "-c", code], request, 120)
    tokens = _last_json(outcome.stdout).get("tokens") if outcome.returncode == 0 else None
    if tokens is None:
        reason = describe_end(outcome.returncode, outcome.stderr, "tokenizing").reason
        raise PowerInferError(f"{path}: the text cannot be tokenized: {reason}")
    if len(tokens) < count:
        raise PowerInferError(
            f"the text has only {len(tokens)} tokens, {count} are needed: give a longer one with --text"
        )
    return tokens


if __name__ == "__main__":
    main()
