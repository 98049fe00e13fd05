"""The C FFN engine on plain arrays against float64 numpy: every weight type, family, row count and thread count."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tiny_models import quantise

from powerinfer_ext.loader import native

TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
NATIVE, RELU, RELU2, DRELU = range(4)
N_EMBD, N_FF = 256, 192


@dataclass
class Layer:
    """A layer's weights as float64 [n_expert or 1, n_ff, n_embd] and the open struct pi_model."""

    up: np.ndarray | None
    down: np.ndarray
    model: Any


def open_layer(
    folder: Path,
    rng: np.random.Generator,
    quant: str,
    *,
    gated: bool,
    experts: int = 0,
    activation: int = RELU,
) -> Layer:
    """Random weights, stored as bundles in a file and read by pi_model_open."""
    ffi, lib = native()
    shape = (max(experts, 1) * N_FF, N_EMBD)
    columns = [rng.standard_normal(shape).astype(np.float32) / 16 for _ in range(1 + gated)]
    raw = [quantise(matrix, quant).view(np.uint8).reshape(shape[0], -1) for matrix in columns]
    exact = [
        dequantize(r, gguf.GGMLQuantizationType[quant]) if quant != "F32" else m
        for r, m in zip(raw, columns, strict=True)
    ]
    exact = [m.astype(np.float64).reshape(-1, N_FF, N_EMBD) for m in exact]
    segment = -(-raw[0].shape[1] // 64) * 64
    bundles = np.zeros((shape[0], segment * len(raw)), np.uint8)
    for i, part in enumerate(raw):
        bundles[:, i * segment : i * segment + part.shape[1]] = part
    path = folder / "bundles"
    path.write_bytes(b"\0" * 128 + bundles.tobytes())
    names = [ffi.new("char[]", name) for name in (b"blk.7.ffn_up.weight", b"blk.7.ffn_down.weight")]
    spec = ffi.new("struct pi_layer_spec[1]")
    spec[0].index, spec[0].down_name = 7, names[1]
    if gated:
        spec[0].gated, spec[0].up_name, spec[0].up_type = True, names[0], TYPES[quant]
    spec[0].n_embd, spec[0].n_ff, spec[0].n_expert = N_EMBD, N_FF, experts
    spec[0].stride, spec[0].down_offset = bundles.shape[1], segment * gated
    spec[0].down_type, spec[0].down_source_type = TYPES[quant], 0
    spec[0].file_offset = 128
    message = ffi.new("char[]", 256)
    with open(path, "rb") as file:
        model = lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, activation, ffi.NULL, message, 256)
        assert model != ffi.NULL, ffi.string(message)
        assert lib.pi_model_read(model, file.fileno(), 2, message, 256) == 0, ffi.string(message)
    up, down = (exact[0], exact[1]) if gated else (None, exact[0])
    return Layer(up, down, ffi.gc(model, lib.pi_model_close))


def open_scaled_layer(
    folder: Path, rng: np.random.Generator, order: np.ndarray | None, experts: int
) -> tuple[np.ndarray, Any]:
    """An ungated layer of I8 columns: float64 [n_expert or 1, n_ff, n_embd] in stored order, struct pi_model."""
    ffi, lib = native()
    n = max(experts, 1)
    order = np.broadcast_to(np.arange(N_FF, dtype=np.int32), (n, N_FF)) if order is None else order
    columns = rng.integers(-128, 128, (n, N_FF, N_EMBD)).astype(np.int8)
    scales = rng.uniform(-0.01, 0.01, (n, N_FF // 32, N_EMBD)).astype(np.float16)
    scales[0, 0, :4] = [0, 6e-8, -3e-5, 6e4]  # zero, subnormals, large
    path = folder / "scaled"
    path.write_bytes(columns.tobytes() + scales.tobytes())
    order = np.ascontiguousarray(order)
    spec = ffi.new("struct pi_layer_spec[1]")
    name = ffi.new("char[]", b"blk.0.ffn_down.weight")
    spec[0].down_name, spec[0].n_embd, spec[0].n_ff, spec[0].n_expert = name, N_EMBD, N_FF, experts
    spec[0].stride, spec[0].down_type, spec[0].down_source_type = N_EMBD, 24, 0
    spec[0].scale_offset = columns.nbytes
    spec[0].order = ffi.cast("int32_t *", order.ctypes.data)
    message = ffi.new("char[]", 256)
    with open(path, "rb") as file:
        model = lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, NATIVE, ffi.NULL, message, 256)
        assert model != ffi.NULL, ffi.string(message)
        assert lib.pi_model_read(model, file.fileno(), 1, message, 256) == 0, ffi.string(message)
        spec[0].scale_offset += 2
        assert lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, NATIVE, ffi.NULL, message, 256) == ffi.NULL
        assert b"table of scales" in ffi.string(message)
    table = np.take_along_axis(scales.astype(np.float64), (order // 32)[:, :, None], axis=1)
    return columns * table, ffi.gc(model, lib.pi_model_close)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_columns_of_integers_find_their_scales(tmp_path: Path, experts: int, shuffle: bool) -> None:
    rng = np.random.default_rng(8)
    order = rng.permuted(np.broadcast_to(np.arange(N_FF, dtype=np.int32), (max(experts, 1), N_FF)), axis=1)
    down, model = open_scaled_layer(tmp_path, rng, order if shuffle else None, experts)
    layer = Layer(None, down, model)
    for rows in (1, 2, 40):
        h = sparse_values(rng, rows, 0.3)
        expert = rng.integers(0, experts, rows).astype(np.int32) if experts else None
        out, _ = run(layer, h, None, expert, 2)
        assert_close(out, expected(layer, h, None, expert, NATIVE)[0], 1e-6)


def pointer(array: np.ndarray | None) -> Any:
    ffi, _ = native()
    kind = "int32_t *" if array is not None and array.dtype == np.int32 else "float *"
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


def run(
    layer: Layer,
    g: np.ndarray,
    x: np.ndarray | None,
    expert: np.ndarray | None,
    threads: int,
    *,
    in_place: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """out [n_rows, n_embd] and h [n_rows, n_ff] from pi_ffn."""
    _, lib = native()
    out = np.full((len(g), N_EMBD), np.nan, np.float32)
    g = g.copy()
    h = None if x is None else g if in_place else np.full_like(g, np.nan)
    assert (
        lib.pi_ffn(
            layer.model, 0, len(g), pointer(expert), pointer(x), pointer(g), pointer(h), pointer(out), threads
        )
        == 0
    )
    return out, h


def expected(
    layer: Layer, g: np.ndarray, x: np.ndarray | None, expert: np.ndarray | None, activation: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64. The input of up is rounded as ggml rounds it only up to the tolerance of the test."""
    expert = np.zeros(len(g), np.int32) if expert is None else expert
    h = g.astype(np.float64)
    if x is not None:
        u = np.einsum("rne,re->rn", layer.up[expert], x.astype(np.float64))
        r = np.maximum(h, 0)
        h = {RELU: r * u, RELU2: r * r * u, DRELU: r * np.maximum(u, 0)}[activation]
    return np.einsum("rn,rne->re", h, layer.down[expert]), h


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    assert np.isfinite(got).all() and error < tolerance, error


def sparse_values(rng: np.random.Generator, rows: int, density: float) -> np.ndarray:
    """Deciding values of which about `density` are positive; the first rows are all negative and all positive."""
    g = rng.standard_normal((rows, N_FF)).astype(np.float32)
    g = np.where(rng.random(g.shape) < density, np.abs(g), -np.abs(g))
    if rows >= 3:
        g[0], g[1] = -np.abs(g[0]), np.abs(g[1])
    return g


# ggml rounds the input of up to Q8 for quantised weights and to half precision for F16: that is all the error there is.
TOLERANCE = {"F32": 1e-6, "F16": 1e-3, "BF16": 6e-3}


@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 33, 70])
def test_gated_layers_compute_what_numpy_computes(tmp_path: Path, quant: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for activation, experts in ((RELU, 0), (RELU2, 0), (DRELU, 0), (RELU, 5), (DRELU, 3)):
        layer = open_layer(tmp_path, rng, quant, gated=True, experts=experts, activation=activation)
        g, x = sparse_values(rng, rows, 0.2), rng.standard_normal((rows, N_EMBD)).astype(np.float32)
        expert = rng.integers(0, experts, rows).astype(np.int32) if experts else None
        out, h = run(layer, g, x, expert, 2)
        want_out, want_h = expected(layer, g, x, expert, activation)
        assert_close(out, want_out, TOLERANCE.get(quant, 2e-2))
        assert_close(h, want_h, TOLERANCE.get(quant, 2e-2))
        assert (h[g <= 0] == 0).all()


@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("experts", [0, 4])
def test_down_alone_skips_zeros_and_nothing_else(tmp_path: Path, quant: str, experts: int) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(1)
    layer = open_layer(tmp_path, rng, quant, gated=False, experts=experts)
    for rows in (1, 2, 40):
        h = sparse_values(rng, rows, 0.3)
        h[:, ::2] = 0  # negative activations count (LoRA, silu), zeros do not
        expert = rng.integers(0, experts, rows).astype(np.int32) if experts else None
        want = expected(layer, h, None, expert, NATIVE)[0]
        out, _ = run(layer, h, None, expert, 2)
        # Factors of 4-bit columns may be rounded to bfloat16 (kernels.h), which moves the sums; nothing else may.
        coarse = ffi.string(lib.pi_kernel_level()) == b"avx512bf16" and quant in ("Q4_0", "Q4_K")
        assert_close(out, want, 0.0025 if coarse else 1e-6)
        lib.pi_kernel_force(b"portable")
        try:
            out, _ = run(layer, h, None, expert, 2)
        finally:
            lib.pi_kernel_force(ffi.NULL)
        assert_close(out, want, 1e-6)


def test_counters_tell_what_was_computed(tmp_path: Path) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(2)
    layer = open_layer(tmp_path, rng, "F32", gated=True, activation=DRELU)
    g, x = sparse_values(rng, 5, 0.25), rng.standard_normal((5, N_EMBD)).astype(np.float32)
    _, h = run(layer, g, x, None, 2)
    stats = ffi.new("struct pi_layer_stats *")
    assert lib.pi_model_stats(layer.model, 0, 1, stats) == 0
    assert (stats.calls, stats.rows, stats.neurons) == (1, 5, 5 * N_FF)
    assert stats.selected == (g > 0).sum()
    assert stats.fired == (h != 0).sum() < stats.selected
    assert stats.touched == (g > 0).any(axis=0).sum()
    lib.pi_model_reset_stats(layer.model)
    assert lib.pi_model_stats(layer.model, 0, 1, stats) == 0 and stats.neurons == 0
    assert lib.pi_model_stats(layer.model, 1, 0, stats) == -1


def test_activations_may_overwrite_the_deciding_product(tmp_path: Path) -> None:
    """ggml's allocator lets GLU write over its input."""
    rng = np.random.default_rng(3)
    layer = open_layer(tmp_path, rng, "Q8_0", gated=True)
    for rows in (1, 50):
        g, x = sparse_values(rng, rows, 0.3), rng.standard_normal((rows, N_EMBD)).astype(np.float32)
        apart, together = run(layer, g, x, None, 2), run(layer, g, x, None, 2, in_place=True)
        assert (apart[0] == together[0]).all() and (apart[1] == together[1]).all()


def test_dense_mode_computes_the_same(tmp_path: Path) -> None:
    _, lib = native()
    rng = np.random.default_rng(4)
    layer = open_layer(tmp_path, rng, "F32", gated=True)
    g, x = sparse_values(rng, 40, 0.3), rng.standard_normal((40, N_EMBD)).astype(np.float32)
    sparse = run(layer, g, x, None, 2)
    lib.pi_model_set_dense(layer.model, True)
    dense = run(layer, g, x, None, 2)
    assert_close(dense[0], sparse[0], 1e-6)
    assert (dense[1] == sparse[1]).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_repeat_bit_for_bit(tmp_path: Path, threads: int) -> None:
    rng = np.random.default_rng(5)
    layer = open_layer(tmp_path, rng, "Q4_0", gated=True, experts=3)
    g, x = sparse_values(rng, 45, 0.2), rng.standard_normal((45, N_EMBD)).astype(np.float32)
    expert = rng.integers(0, 3, 45).astype(np.int32)
    first, again = run(layer, g, x, expert, threads), run(layer, g, x, expert, threads)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert_close(first[0], expected(layer, g, x, expert, RELU)[0], 2e-2)


def test_not_a_number_stays_visible_where_stock_shows_it(tmp_path: Path) -> None:
    """relu(NaN) is 0 in ggml; a NaN behind the gate must not vanish."""
    rng = np.random.default_rng(6)
    layer = open_layer(tmp_path, rng, "F32", gated=True)
    g, x = sparse_values(rng, 1, 0.3), rng.standard_normal((1, N_EMBD)).astype(np.float32)
    clean, _ = run(layer, np.where(g > 0, g, -1).astype(np.float32), x, None, 2)
    g[g <= 0] = np.nan
    assert (run(layer, g, x, None, 2)[0] == clean).all()
    g[0, 5], x[0, 0] = 1.0, np.nan
    assert np.isnan(run(layer, g, x, None, 2)[0]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stride": 1024}, "stride"),
        ({"stride": 2**40}, "stride"),
        ({"down_offset": -64}, "down offset"),
        ({"down_offset": 1}, "down offset"),
        ({"n_ff": 0}, "n_ff"),
        ({"n_ff": 2**31}, "n_ff"),
        ({"n_ff": N_FF + 1}, "end of the file"),
        ({"n_embd": -1}, "n_embd"),
        ({"n_expert": 2}, "end of the file"),
        ({"n_expert": -1}, "n_expert"),
        ({"down_type": 99}, "down type"),
        ({"down_type": 4}, "down type"),
        ({"up_type": -1}, "up type"),
        ({"down_source_type": 77}, "down source type"),
        ({"file_offset": 129}, "end of the file"),
        ({"file_offset": -1}, "end of the file"),
        ({"file_offset": 2**62}, "end of the file"),
    ],
)
def test_specs_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    ffi, lib = native()
    path = tmp_path / "bundles"
    path.write_bytes(bytes(128 + N_FF * 2048))
    up, down = ffi.new("char[]", b"blk.0.ffn_up.weight"), ffi.new("char[]", b"blk.0.ffn_down.weight")
    spec = ffi.new("struct pi_layer_spec[1]")
    values = {
        "n_embd": N_EMBD,
        "n_ff": N_FF,
        "stride": 2048,
        "down_offset": 1024,
        "file_offset": 128,
        "gated": True,
        "up_name": up,
        "down_name": down,
        **change,
    }
    for name, value in values.items():
        setattr(spec[0], name, value)
    message = ffi.new("char[]", 256)
    live = lib.pi_model_count()
    with open(path, "rb") as file:
        model = lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, RELU, ffi.NULL, message, 256)
    assert model == ffi.NULL
    assert words in ffi.string(message).decode()
    assert lib.pi_model_count() == live


@pytest.mark.parametrize("kept", [64, 128 + N_FF * N_EMBD, 128 + N_FF * N_EMBD + 10])
def test_a_file_that_shrinks_before_it_is_read_is_an_error(tmp_path: Path, kept: int) -> None:
    ffi, lib = native()
    path = tmp_path / "bundles"
    table = N_FF // 32 * N_EMBD * 2
    path.write_bytes(bytes(128 + N_FF * N_EMBD + table))
    name = ffi.new("char[]", b"blk.0.ffn_down.weight")
    spec = ffi.new("struct pi_layer_spec[1]")
    spec[0].down_name, spec[0].n_embd, spec[0].n_ff, spec[0].stride = name, N_EMBD, N_FF, N_EMBD
    spec[0].down_type, spec[0].file_offset, spec[0].scale_offset = 24, 128, 128 + N_FF * N_EMBD
    message = ffi.new("char[]", 256)
    with open(path, "rb") as file:
        model = lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, NATIVE, ffi.NULL, message, 256)
        assert model != ffi.NULL, ffi.string(message)
        model = ffi.gc(model, lib.pi_model_close)
        assert lib.pi_model_read(model, file.fileno(), 2, message, 256) == 0
        os.truncate(path, kept)
        assert lib.pi_model_read(model, file.fileno(), 2, message, 256) == -1
    assert b"layer 0: reading" in ffi.string(message)


def test_a_file_that_cannot_be_read_is_an_error() -> None:
    ffi, lib = native()
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    spec = ffi.new("struct pi_layer_spec[1]")
    message = ffi.new("char[]", 256)
    assert lib.pi_model_open([reader], 1, 1, spec, 0, ffi.NULL, RELU, ffi.NULL, message, 256) == ffi.NULL
    assert "stat" in ffi.string(message).decode()


class VirtualFile:
    """pi_vgguf through the C library's stdio, as llama.cpp reads it."""

    def __init__(self, path: Path, header: bytes, extents: list[tuple[int, int, int]]) -> None:
        ffi, lib = native()
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.fread.restype = ctypes.c_size_t
        self.libc.fread.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        self.libc.fseek.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
        self.libc.ftell.argtypes = [ctypes.c_void_p]
        self.libc.ftell.restype = ctypes.c_long
        message = ffi.new("char[]", 256)
        with open(path, "rb") as file:
            handle = lib.pi_vgguf_open(
                [file.fileno()], 1, False, header, len(header), [(*e, 0) for e in extents], len(extents), message, 256
            )
        if handle == ffi.NULL:
            raise ValueError(ffi.string(message).decode())
        self.handle = ffi.gc(handle, lib.pi_vgguf_close)
        self.stream = int(ffi.cast("uintptr_t", lib.pi_vgguf_file(handle)))

    def read(self, offset: int, size: int, fill: int = 0xAB) -> bytes:
        assert self.libc.fseek(self.stream, offset, 0) == 0
        buffer = (ctypes.c_ubyte * size)(*[fill] * size)
        got = self.libc.fread(buffer, 1, size, self.stream)
        return bytes(buffer[:got])

    def size(self) -> int:
        assert self.libc.fseek(self.stream, 0, 2) == 0
        return self.libc.ftell(self.stream)


def test_the_virtual_file_shows_header_file_bytes_and_padding(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    real = rng.bytes(40_000)
    path = tmp_path / "real"
    path.write_bytes(real)
    header = rng.bytes(5_000)
    virtual = VirtualFile(path, header, [(6_000, 20_000, 123), (30_000, 9_000, -1), (39_000, 1_000, 39_000)])
    whole = header + bytes(1_000) + real[123:20_123] + bytes(4_000)
    assert virtual.size() == 40_000
    for offset, size in [(0, 10), (0, 30_000), (4_990, 2_000), (5_999, 1), (20_000, 8_000), (25_990, 20)]:
        assert virtual.read(offset, size) == whole[offset : offset + size]
    assert virtual.read(39_000, 5_000) == real[39_000:]
    assert len(virtual.read(30_000, 9_000)) == 9_000


@pytest.mark.parametrize(
    "extents",
    [
        [(100, 10, 0)],  # inside the header
        [(5_000, 100, 0), (5_050, 10, 0)],  # overlap
        [(5_000, 100, 950)],  # past the real file's end
        [(5_000, -1, 0)],
        [(5_000, 2**63 - 1, -1)],
        [(5_000, 10, -2)],
        [(5_000, 10, 2**62)],
    ],
)
def test_extents_that_do_not_fit_are_refused(tmp_path: Path, extents: list[tuple[int, int, int]]) -> None:
    path = tmp_path / "real"
    path.write_bytes(bytes(1_000))
    with pytest.raises(ValueError, match="extents overlap or reach past"):
        VirtualFile(path, bytes(1_000), extents)


def test_a_virtual_file_whose_file_was_truncated_reports_where(tmp_path: Path) -> None:
    ffi, lib = native()
    path = tmp_path / "real"
    path.write_bytes(bytes(100_000))
    virtual = VirtualFile(path, bytes(64), [(64, 100_000, 0)])
    os.truncate(path, 50_000)
    assert len(virtual.read(64, 100_000)) < 100_000
    which, offset = ffi.new("int *"), ffi.new("int64_t *")
    assert lib.pi_vgguf_error(virtual.handle, which, offset) != 0
    assert which[0] == 0
    assert offset[0] >= 50_000
