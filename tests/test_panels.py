"""Matrices in panels (cpatch/panels.c) against float64 numpy; how they get into the layout and out again; and models
whose attention, deciding product and head are computed so, against stock llama.cpp."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tiny_models import quantise, rounded

from powerinfer_ext.loader import native

pytestmark = pytest.mark.usefixtures("with_vnni")
TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
INPUTS = {"Q4_0": 8, "Q8_0": 8, "Q4_K": 15, "Q5_K": 15, "Q6_K": 15}  # Q8_0, Q8_K


def matrix(name: str, n_out: int, n_in: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random weights: as quantised bytes [n_out, row], and the float64 values those stand for [n_out, n_in]."""
    values = np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)
    packed = quantise(values, name)
    return packed, dequantize(packed, gguf.GGMLQuantizationType(TYPES[name])).astype(np.float64)


def products(name: str, packed: np.ndarray, xs: np.ndarray, threads: int = 2) -> np.ndarray:
    """[n_x, n_out] as the C code computes them, with guards behind the result."""
    ffi, lib = native()
    n_out = packed.shape[0]
    out = np.full(xs.shape[0] * n_out + 16, np.float32(-7))
    failed = lib.pi_panel_products(
        TYPES[name],
        xs.shape[1],
        n_out,
        ffi.from_buffer("uint8_t[]", np.ascontiguousarray(packed)),
        ffi.from_buffer("float[]", np.ascontiguousarray(xs, np.float32)),
        xs.shape[0],
        ffi.from_buffer("float[]", out),
        threads,
    )
    assert not failed
    assert (out[xs.shape[0] * n_out :] == -7).all()
    return out[: xs.shape[0] * n_out].reshape(xs.shape[0], n_out)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("n_out", "n_in"), [(16, 256), (1, 512), (48, 2304), (37, 1280), (160, 768)])
@pytest.mark.parametrize("n_x", [1, 2, 3, 4, 7, 70])
def test_products(name: str, n_out: int, n_in: int, n_x: int) -> None:
    """Every number of rows, of inputs, and of blocks: the error is that of a sum of floats."""
    packed, weights = matrix(name, n_out, n_in)
    xs = np.random.default_rng(1).normal(size=(n_x, n_in)).astype(np.float32)
    x = rounded(xs, INPUTS[name])
    bound = 1e-6 * (np.abs(x) @ np.abs(weights).T) + 1e-6
    assert (np.abs(products(name, packed, xs) - x @ weights.T) <= bound).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_blocks_of_32(name: str) -> None:
    """Rows need not be a multiple of 256."""
    packed, weights = matrix(name, 32, 192)
    xs = np.random.default_rng(1).normal(size=(5, 192)).astype(np.float32)
    np.testing.assert_allclose(products(name, packed, xs), rounded(xs, 8) @ weights.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_extremes(name: str) -> None:
    """All bits set and all clear in weights, inputs at the ends of their range: nothing overflows."""
    packed, _ = matrix(name, 16, 512)
    blocks = packed.copy()
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(TYPES[name])][1]
    halves = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]  # where scales are
    for row, fill in zip(blocks, [0x00, 0xFF] * 8, strict=True):
        keep = row.reshape(-1, size).copy()
        row[:] = fill
        if name == "Q8_0":
            row[:] = 0x80 if fill else 0x7F  # -128 and 127
        for at in halves:
            row.reshape(-1, size)[:, at : at + 2] = keep[:, at : at + 2]
    weights = dequantize(blocks, gguf.GGMLQuantizationType(TYPES[name])).astype(np.float64)
    xs = np.ones((3, 512), np.float32)
    xs[1] = -1
    xs[2, ::2] = -1
    x = rounded(xs, INPUTS[name])
    np.testing.assert_allclose(products(name, blocks, xs), x @ weights.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", TYPES)
def test_the_same_bits_alone_and_together(name: str) -> None:
    """A token's products depend neither on the others in its batch nor on threads."""
    packed, _ = matrix(name, 80, 1024)
    xs = np.random.default_rng(2).normal(size=(9, 1024)).astype(np.float32)
    together = products(name, packed, xs)
    assert (together == products(name, packed, xs, 1)).all()
    assert (together == products(name, packed, xs, 5)).all()
    for i in range(9):
        assert (together[i] == products(name, packed, xs[i : i + 1])[0]).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("cut", [1, 7, 300, 1 << 20])
def test_layout_is_reversible(name: str, cut: int) -> None:
    """Bytes that were written in pieces of any size are read back, the last panel's missing rows or not."""
    ffi, lib = native()
    for n_out in (16, 33):
        packed, _ = matrix(name, n_out, 512)
        copy = np.zeros_like(packed)
        source = ffi.from_buffer("uint8_t[]", np.ascontiguousarray(packed))
        assert lib.pi_panel_copy(TYPES[name], 512, n_out, source, cut, ffi.from_buffer("uint8_t[]", copy)) == 0
        assert (copy == packed).all()


def test_what_cannot_be_kept() -> None:
    """Types without a form, rows that blocks do not divide, experts that panels do not."""
    _, lib = native()
    assert lib.pi_panel_has_type(2, 4096, 100, 1)
    assert lib.pi_panel_has_type(2, 4096, 96, 8)
    assert not lib.pi_panel_has_type(2, 4096, 100, 8)
    assert not lib.pi_panel_has_type(12, 4096 + 32, 96, 1)
    for kind in (0, 1, 30, 39, 3, -1, 1000):
        assert not lib.pi_panel_has_type(kind, 4096, 96, 1)
    assert not lib.pi_panel_has_type(2, 96, 96, 1)
    assert not lib.pi_panel_has_type(2, 0, 96, 1)
    assert not lib.pi_panel_has_type(2, 4096, 0, 1)
