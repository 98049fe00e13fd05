"""How fast the kernels read scattered rows, beside what memory gives: ``python -m bench.kernels [--json]``.

A buffer many times the size of the caches is cut into rows of ``--n`` weights; a pass goes over a new random sorted
list of them, each thread over its part. Before and after each pass the same threads read a part of the same buffer from
one end to the other, so that a machine whose bandwidth changes from minute to minute is compared with itself; the
faster of the two counts. Each pass goes over all combinations, so that a slow minute is all of theirs. Reported are the
medians over the passes; ``fraction`` is the median of the quotients.

``reads`` fetches the same rows as the kernels do, and computes nothing: what scattered rows allow. Whole matrices
(``panels``, cpatch/panels.h) are read from one end to the other, 128 MiB in a pass.

Columns of integers (I8) count the rows of scales they touch, once per pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from statistics import median
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from powerinfer_ext.loader import native

MIB = 1 << 20
PAGE = 4096
TYPES = ("Q4_0", "Q8_0", "I8", "F16", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "BF16", "F32")
X86 = ("avx512bf16", "avx512vnni", "avx512", "avx2", "portable")
LEVELS = ("neon", "portable") if platform.machine() == "aarch64" else X86
OPS = ("dots", "axpys", "reads")
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
SCALE_ROWS = 32  # rows that share one row of scales


class Buffer:
    """Memory full of random weights: whatever the type, its bytes are small numbers."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        ffi, _ = native()
        # These bytes make small halves, floats and exponents wherever a type has them, and no subnormal ones.
        pages = np.empty(size + PAGE, np.uint8)
        at = -pages.ctypes.data % PAGE  # as the engine's neurons lie: few of their cache lines are shared with others
        self.memory = pages[at : at + size]
        self.memory.reshape(-1, MIB)[:] = rng.integers(0x20, 0x30, (size // MIB, MIB), np.uint8)
        self.pointer = ffi.from_buffer(self.memory)
        self.read_at = 0
        self.scales = np.empty((0, 0), np.float16)

    def read_rate(self, threads: int, size: int = 96 * MIB) -> float:
        """Bytes per second of reading the next part of the buffer."""
        ffi, lib = native()
        if self.read_at + size > self.memory.nbytes:
            self.read_at = 0
        seconds = lib.pi_read_seconds(self.pointer + self.read_at, size, threads)
        self.read_at += size
        return size / seconds

    def scales_of(self, n: int) -> np.ndarray:
        """A row of scales for every SCALE_ROWS rows of n integers, the same ones for all who ask."""
        if self.scales.shape[1] != n:
            self.scales = np.full((self.memory.nbytes // n // SCALE_ROWS + 1, n), 0.01, np.float16)
        return self.scales


class Case:
    """One combination to be measured, and what its passes found: bytes per second of kernel and of memory, and rows."""

    def __init__(self, buffer: Buffer, level: str, name: str, op: str, threads: int, density: float, n: int) -> None:
        ffi, _ = native()
        self.buffer, self.level, self.name, self.op, self.n = buffer, level, name, op, n
        self.threads, self.density = threads, density
        self.kind = gguf.GGMLQuantizationType[name]
        one = {"I8": n, "F32": 4 * n}
        self.stride = one[name] if name in one else quant_shape_to_byte_shape((n,), self.kind)[0]
        self.found: list[tuple[float, float, int]] = []
        self.scales = self.input = self.job = None
        if op == "panels":
            return
        if name == "I8":
            self.scales = buffer.scales_of(n)
        self.input = np.zeros(4 * n + 4096, np.uint8)
        self.job = ffi.new("struct pi_kernel_job *")
        self.job.op, self.job.type, self.job.n, self.job.stride = OPS.index(op), self.kind, n, self.stride
        self.job.buffer, self.job.input = buffer.pointer, ffi.from_buffer(self.input)
        self.job.scales = ffi.from_buffer(self.scales) if self.scales is not None else ffi.NULL

    def measure(self, rng: np.random.Generator) -> bool:
        """One pass; whether there is such a kernel."""
        ffi, lib = native()
        lib.pi_kernel_force(self.level.encode())
        if self.op == "panels":
            rows = 128 * MIB // self.stride // 16 * 16
            touched = rows * self.stride
            at = len(self.found) % (self.buffer.memory.nbytes // (128 * MIB) - 1) * 128 * MIB
            before = self.buffer.read_rate(self.threads)
            seconds = lib.pi_panel_seconds(self.kind, self.n, rows, self.buffer.pointer + at, self.threads)
            if seconds < 0:
                return False
        else:
            there = self.buffer.memory.nbytes // self.stride
            chosen = np.flatnonzero(rng.random(there) < self.density).astype(np.int32)
            rows, touched = chosen.size, chosen.size * self.stride
            if self.scales is not None:
                touched += np.unique(chosen // SCALE_ROWS).size * self.n * 2
            before = self.buffer.read_rate(self.threads)
            seconds = lib.pi_kernel_seconds(self.job, ffi.from_buffer("int32_t[]", chosen), rows, self.threads)
            if seconds < 0:
                raise MemoryError("out of memory")
        self.found.append((touched / seconds, max(before, self.buffer.read_rate(self.threads)), rows))
        return True

    def record(self) -> dict[str, Any]:
        rates, memory, rows = zip(*self.found, strict=True)
        return {
            "type": self.name.lower(),
            "isa": self.level,
            "op": self.op,
            "threads": self.threads,
            "density": self.density,
            "rows": round(sum(rows) / len(rows)),
            "n": self.n,
            "gbps": round(median(rates) / 1e9, 2),
            "memory_gbps": round(median(memory) / 1e9, 2),
            "fraction": round(median(rate / at for rate, at in zip(rates, memory, strict=True)), 3),
        }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each combination that this machine has."""
    ffi, lib = native()
    rng = np.random.default_rng(0)
    buffer = Buffer(options.mib * MIB, rng)
    try:
        cases = [
            Case(buffer, level, name, op, threads, density, options.n)
            for level in options.isa
            if lib.pi_kernel_force(level.encode()) == 0
            for name in options.type
            for op in (("axpys",) if name == "I8" else (*OPS, "panels"))
            for threads in options.threads
            for density in (options.density if op != "panels" else (1.0,))
        ]
        for _ in range(options.passes):
            cases = [case for case in cases if case.measure(rng)]
    finally:
        lib.pi_kernel_force(ffi.NULL)
    return [case.record() for case in cases]


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="a list of records instead of a table")
    parser.add_argument("--type", nargs="+", default=list(TYPES), type=str.upper, choices=TYPES)
    parser.add_argument("--isa", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--density", nargs="+", default=list(DENSITIES), type=float)
    parser.add_argument("--threads", nargs="+", default=[1, 2] if cores > 1 else [1], type=int)
    parser.add_argument("--n", default=4096, type=int, help="weights per row, a multiple of 256")
    parser.add_argument("--mib", default=768, type=int, help="size of the buffer")
    parser.add_argument("--passes", default=7, type=int, help="of which the median is taken")
    options = parser.parse_args()
    if options.n <= 0 or options.n % 256:
        parser.error(f"--n {options.n}: rows have a multiple of 256 weights")
    if options.mib < 256:
        parser.error(f"--mib {options.mib}: at least 256, or the caches are measured")
    if options.json:
        print(json.dumps(run(options), indent=1))
        return
    print("type   isa         op     threads  density    GB/s  memory  fraction")
    for r in run(options):
        print(
            f"{r['type']:6} {r['isa']:11} {r['op']:6} {r['threads']:7} {r['density']:8.2f} {r['gbps']:7.1f} "
            f"{r['memory_gbps']:7.1f} {r['fraction']:9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
