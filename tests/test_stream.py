"""Bundles that are streamed through a store: the same bits as bundles that are all in memory, whatever the number of
slots, the I/O engine, the selection; and reads that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools import quants
from gguf_tools.predictor import rounded
from powerinfer_ext.loader import native

N_EMBD, N_FF, EXPERTS = 256, 320, 3
RELU, RELU2, DRELU, SILU = 1, 2, 3, 4
NONE, LOWRANK, DIRECT, LINEAR = 0, 1, 2, 3
F32, Q8_0, I8 = 0, 8, 24
ENGINES = {"io_uring": 1, "threads": 2}
RANK = 32


class File:
    """A layer's bundles and arrays in a file, with the spec that describes it."""

    def __init__(self, path: Path, *, gated: bool, predictor: int = NONE, experts: int = 0, threshold: bool = False,
                 order: bool = False, seed: int = 1) -> None:
        ffi, lib = native()
        rng = np.random.default_rng(seed)
        n = max(experts, 1)
        self.gated, self.predictor, self.experts = gated, predictor, experts
        parts = (["gate"] if gated and predictor else []) + (["up"] if gated or predictor else []) + ["down"]
        row = N_EMBD // 32 * 34  # Q8_0
        segment = -(-row // 64) * 64
        stride = segment * len(parts) + 64 * (len(parts) == 1)  # not a multiple of 512
        bundles = np.zeros((n * N_FF, stride), np.uint8)
        for i in range(len(parts)):
            weights = rng.standard_normal((n * N_FF, N_EMBD)).astype(np.float32) / 16
            packed = np.zeros((n * N_FF, row), np.uint8)
            source = ffi.from_buffer("float[]", np.ascontiguousarray(weights))
            assert lib.pi_quantize(Q8_0, source, ffi.from_buffer(packed), n * N_FF, N_EMBD) == 0
            bundles[:, i * segment : i * segment + row] = packed
        self.spec = ffi.new("struct pi_layer_spec[1]")
        spec = self.spec[0]
        self.kept = [ffi.new("char[]", f"blk.0.ffn_{part}.weight".encode()) for part in ("gate", "up", "down")]
        spec.gated, spec.down_name = gated, self.kept[2]
        if "gate" in parts:
            spec.gate_name, spec.gate_type, spec.gate_offset = self.kept[0], Q8_0, 0
        if "up" in parts:
            spec.up_name, spec.up_type, spec.up_offset = self.kept[1], Q8_0, segment * parts.index("up")
        spec.down_type, spec.down_source_type, spec.down_offset = Q8_0, Q8_0, segment * parts.index("down")
        spec.n_embd, spec.n_ff, spec.n_expert, spec.stride = N_EMBD, N_FF, experts, stride
        spec.file_offset, content = 4096, bytes(4096) + bundles.tobytes()
        if order:
            self.order = np.ascontiguousarray(np.argsort(rng.random((n, N_FF)), axis=1).astype(np.int32))
            spec.order = ffi.cast("int32_t *", self.order.ctypes.data)
        if threshold:
            spec.threshold_offset = len(content)
            content += rng.uniform(0, 0.5, n * N_FF).astype(np.float32).tobytes()
        if predictor:
            n_in = N_EMBD if predictor == DIRECT else RANK
            spec.predictor, spec.rank, spec.pred_a_type, spec.pred_b_type = predictor, RANK, F32, F32
            spec.pred_a_offset = len(content)
            content += rng.standard_normal((RANK, N_EMBD)).astype(np.float32).tobytes()
            spec.pred_b_offset = len(content)
            content += rng.standard_normal((N_FF, n_in)).astype(np.float32).tobytes()
            spec.pred_bias_offset = len(content)
            content += np.full(N_FF, -16 if predictor == DIRECT else -68, np.float32).tobytes()
        path.write_bytes(content)
        self.path = path

    def open(self, activation: int, slots: int = 0, hot: int = 0, engine: str = "io_uring", gap: int = 2048,
             policy: int = 0, depth: int = 8, flight: int = 0, transit: int = 0,
             frequency: np.ndarray | None = None) -> Any:
        """struct pi_model; with slots it is streamed. transit: units that transit memory has room for."""
        ffi, lib = native()
        self.spec[0].n_slots, self.spec[0].n_hot = slots, hot
        self.spec[0].frequency = ffi.NULL if frequency is None else ffi.from_buffer("float[]", frequency)
        flash = ffi.new("struct pi_flash_spec *", {"engine": ENGINES[engine], "depth": depth, "gap": gap,
                                                   "flight": flight, "run": 16384, "policy": policy,
                                                   "transit": transit * (-(-self.spec[0].stride // 64) * 64)})
        message = ffi.new("char[]", 256)
        with open(self.path, "rb") as file:
            flash = flash if slots else ffi.NULL
            model = lib.pi_model_open([file.fileno()], 1, 1, self.spec, 0, ffi.NULL, activation, flash,
                                      message, 256)
            assert model != ffi.NULL, ffi.string(message)
            model = ffi.gc(model, lib.pi_model_close)
            assert lib.pi_model_read(model, file.fileno(), 1, message, 256) == 0, ffi.string(message)
        return model

    def run(self, model: Any, rows: int, threads: int, seed: int) -> tuple[int, np.ndarray, np.ndarray]:
        """pi_ffn's answer, the outputs and the activations."""
        ffi, lib = native()
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((rows, N_EMBD)).astype(np.float32)
        g = rng.standard_normal((rows, N_FF)).astype(np.float32) - 0.8
        if not self.gated:
            g = np.maximum(g, 0)
        expert = np.sort(rng.integers(0, EXPERTS, rows).astype(np.int32))
        rng.shuffle(expert)
        h, out = np.zeros_like(g), np.zeros((rows, N_EMBD), np.float32)
        up = self.gated or self.predictor != NONE

        def pointer(array: np.ndarray | None, kind: str = "float[]") -> Any:
            return ffi.NULL if array is None else ffi.from_buffer(kind, array)

        code = lib.pi_ffn(model, 0, rows, pointer(expert if self.experts else None, "int32_t[]"),
                          pointer(x if up else None), pointer(None if self.predictor else g),
                          pointer(h if up else None), pointer(out), threads)
        return code, out, h


CASES = {
    "gated": (dict(gated=True), RELU),
    "gated in another order": (dict(gated=True, order=True), DRELU),
    "ungated": (dict(gated=False), RELU2),
    "mixture": (dict(gated=True, experts=EXPERTS), RELU),
    "thresholds": (dict(gated=True, threshold=True), SILU),
    "predicted": (dict(gated=True, predictor=LOWRANK), RELU),
    "predicted, linear": (dict(gated=True, predictor=LINEAR), RELU),
    "predicted directly, ungated": (dict(gated=False, predictor=DIRECT), RELU2),
}


@pytest.fixture(params=[0, -1], ids=["tiles by default", "tiles always"])
def least_wanted(request: pytest.FixtureRequest) -> Iterator[None]:
    """When rows are computed in tiles: where that is faster, or always (where the machine has the instructions)."""
    _, lib = native()
    lib.pi_tiles_force(request.param, -1)
    yield
    lib.pi_tiles_force(0, -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("least_wanted")
def test_streamed_is_resident_bit_for_bit(tmp_path: Path, case: str, engine: str) -> None:
    options, activation = CASES[case]
    file = File(tmp_path / "bundles", **options)
    ffi, lib = native()
    units = N_FF * max(file.experts, 1)
    resident = file.open(activation)
    work = [(1, 1, 3), (1, 2, 4), (1, 2, 5), (7, 2, 6), (40, 2, 7), (300, 3, 8), (1, 2, 9)]
    expected = [file.run(resident, *job) for job in work]
    assert all(code == 0 and np.isfinite(out).all() and out.any() for code, out, _ in expected)
    caches = [(1, 0, 0, 0, 0), (2, 1, 2048, 1, 0), (17, 3, 0, 0, 0), (100, 40, 2048, 1, 0), (units, 10, 512, 0, 40)]
    caches += [(1, 0, 0, 0, 1), (2, 1, 2048, 1, 3), (100, 40, 2048, 0, 1), (60, 20, 1024, 0, 17), (100, 0, 0, 1, 400)]
    for slots, hot, gap, policy, transit in caches:
        flight = (0, 1, 8192)[slots % 3]  # bytes; 1: one read at a time
        streamed = file.open(activation, slots, hot, engine, gap, policy, flight=flight, transit=transit)
        for job, (_, out, h) in zip(work, expected, strict=True):
            code, again, activations = file.run(streamed, *job)
            assert code == 0
            assert np.array_equal(out, again), (slots, transit, job)
            assert np.array_equal(h, activations), (slots, transit, job)
        stats = ffi.new("struct pi_flash_stats *")
        assert lib.pi_model_flash_stats(streamed, 0, stats) == 0
        assert stats.wanted > 0
        assert (stats.missed == 0) == (slots == units)


def test_what_is_wanted_often_stays(tmp_path: Path) -> None:
    """With transit memory a cache keeps what is wanted most, however much is wanted once in between."""
    file = File(tmp_path / "bundles", gated=False)
    ffi, lib = native()
    often = np.arange(N_FF) % 4 == 1  # not the first ones, which are in memory when it starts
    rng = np.random.default_rng(2)

    def tokens(model: Any, n: int) -> int:
        """Runs n tokens; bytes read in the last eight."""
        for i in range(n):
            if i == n - 8:
                lib.pi_model_reset_stats(model)
            g = (often | (rng.random(N_FF) < 0.3)).astype(np.float32)[None]
            out = np.zeros((1, N_EMBD), np.float32)
            assert lib.pi_ffn(model, 0, 1, ffi.NULL, ffi.NULL, ffi.from_buffer("float[]", g), ffi.NULL,
                              ffi.from_buffer("float[]", out), 2) == 0
        stats = ffi.new("struct pi_flash_stats *")
        assert lib.pi_model_flash_stats(model, 0, stats) == 0
        return stats.bytes // file.spec[0].stride

    n = int(often.sum())
    others = 8 * (N_FF - n) * 0.3  # these are read, except for a few that are in transit memory still
    learnt = tokens(file.open(RELU2, n, transit=100), 60)
    assert others * 0.4 < learnt < others * 1.1
    told = np.where(often, 1.0, 0.3).astype(np.float32)
    at_once = tokens(file.open(RELU2, n, transit=100, frequency=told), 16)
    assert others * 0.4 < at_once < others * 1.1


def test_a_predictor_selects_what_it_says(tmp_path: Path) -> None:
    file = File(tmp_path / "bundles", gated=True, predictor=LOWRANK)
    ffi, lib = native()
    model = file.open(RELU)
    _, _, sparse = file.run(model, 4, 2, 11)  # too few rows for tiles, whose dot products are summed in another order
    lib.pi_model_set_dense(model, True)
    _, _, dense = file.run(model, 4, 2, 11)
    fired = sparse != 0
    assert 0.005 < fired.mean() < 0.9 * (dense != 0).mean()
    assert np.array_equal(sparse[fired], dense[fired])  # what is computed is exact
    stats = ffi.new("struct pi_layer_stats *")
    lib.pi_model_stats(model, 0, 1, stats)
    assert stats.fired == fired.sum() + (dense != 0).sum()


@pytest.mark.parametrize("case", ["predicted", "predicted directly, ungated", "dReLU"])
@pytest.mark.parametrize("slots", [0, 40])
def test_verification_counts_what_was_missed(tmp_path: Path, case: str, slots: int) -> None:
    """Against numpy; and it changes nothing in the output."""
    options, activation = CASES.get(case, (dict(gated=True, predictor=LINEAR), DRELU))
    file = File(tmp_path / "bundles", **options)
    ffi, lib = native()
    spec = file.spec[0]
    content = file.path.read_bytes()

    def floats(offset: int, n: int) -> np.ndarray:
        return np.frombuffer(content, np.float32, n * N_FF if n else N_FF, offset)

    raw = np.frombuffer(content, np.uint8, N_FF * spec.stride, 4096).reshape(N_FF, -1)
    width = N_EMBD // 32 * 34
    g, u = (quants.dequantise(Q8_0, raw[:, at : at + width], N_EMBD) for at in (spec.gate_offset, spec.up_offset))
    a = np.frombuffer(content, np.float32, RANK * N_EMBD, spec.pred_a_offset).reshape(RANK, -1)
    bias = floats(spec.pred_bias_offset, 0)
    b = floats(spec.pred_b_offset, N_EMBD if file.predictor == DIRECT else RANK).reshape(N_FF, -1)
    fired = missed = 0
    plain, model = file.open(activation, slots), file.open(activation, slots)
    lib.pi_model_set_verify(model, 2)
    for seed in range(12):
        before = file.run(plain, 1, 2, seed)
        after = file.run(model, 1, 2, seed)
        assert after[0] == 0 and np.array_equal(before[1], after[1]) and np.array_equal(before[2], after[2])
        if seed % 2:
            continue
        x = np.random.default_rng(seed).standard_normal((1, N_EMBD)).astype(np.float32)
        fires = (rounded(Q8_0, x) @ g.T > 0)[0]
        if activation == DRELU:
            fires &= (rounded(Q8_0, x) @ u.T > 0)[0]
        z = x if file.predictor == DIRECT else x @ a.T
        selected = ((np.maximum(z, 0) if file.predictor == LOWRANK else z) @ b.T + bias > 0)[0]
        fired += np.count_nonzero(fires)
        missed += np.count_nonzero(fires & ~selected)
    stats = ffi.new("struct pi_layer_stats *")
    lib.pi_model_stats(model, 0, 0, stats)
    assert (stats.verified, stats.true_fired, stats.missed) == (6, fired, missed)
    assert 0 < missed < fired
    assert file.run(model, 30, 2, 99)[0] == 0  # of a batch, one row
    lib.pi_model_stats(model, 0, 1, stats)
    assert stats.verified == 1 and 0 < stats.missed < stats.true_fired < N_FF
    lib.pi_model_reset_stats(model)
    lib.pi_model_set_verify(model, 0)
    assert file.run(model, 1, 2, 0)[0] == 0
    lib.pi_model_stats(model, 0, 0, stats)
    assert (stats.calls, stats.verified) == (1, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_shrinks_while_it_runs_is_an_error_and_not_a_crash(tmp_path: Path, engine: str) -> None:
    file = File(tmp_path / "bundles", gated=True)
    ffi, lib = native()
    whole = file.path.read_bytes()
    model = file.open(RELU, 20, 0, engine)
    assert file.run(model, 3, 2, 1)[0] == 0
    os.truncate(file.path, 8192)
    assert file.run(model, 3, 2, 1)[0] == -1
    where, offset = ffi.new("int *"), ffi.new("int64_t *")
    assert lib.pi_model_error(model, where, offset) != 0
    assert offset[0] >= 4096
    assert lib.pi_model_error(model, where, offset) == errno.ESTALE  # and so it stays
    file.path.write_bytes(whole)  # a changed file stays refused
    assert file.run(model, 40, 2, 1)[0] == -1
