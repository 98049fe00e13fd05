"""A token's products with its context (cpatch/attention.c): against float64 numpy, and in models against stock's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_models
from test_backend import BOUND, divergence, logits

from gguf_tools import convert
from powerinfer_ext import Llama
from powerinfer_ext.loader import native

pytestmark = pytest.mark.usefixtures("with_vnni")
SETTINGS = {"n_ctx": 256, "logits_all": True, "verbose": False, "n_threads": 2, "n_threads_batch": 2}


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 100, 128, 256, 300])
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 128, 131])
@pytest.mark.parametrize("n_x", [1, 2, 3, 4, 7])
def test_dots(n: int, n_rows: int, n_x: int) -> None:
    """Every tail of rows, values and inputs; what lies between rows, and behind the last, is not looked at. Inputs that
    share the rows get the bits that they get alone."""
    ffi, lib = native()
    rng = np.random.default_rng(n * 1000 + n_rows)
    stride = n + 3
    rows = np.full(n_rows * stride, np.nan, np.float16)
    weights = rng.normal(size=(n_rows, n)).astype(np.float16)
    for j in range(n_rows):
        rows[j * stride : j * stride + n] = weights[j]
    rows = rows[: (n_rows - 1) * stride + n].copy()
    xs = rng.normal(size=(n_x, n)).astype(np.float32)

    def dots(xs: np.ndarray) -> np.ndarray:
        out = np.full(len(xs) * n_rows + 16, np.float32(-7))
        from_rows, from_xs = ffi.from_buffer("uint8_t[]", rows), ffi.from_buffer("float[]", xs)
        to = ffi.from_buffer("float[]", out)
        assert lib.pi_attention_dots(from_rows, 2 * stride, n, n_rows, from_xs, len(xs), to) == 0
        assert (out[len(xs) * n_rows :] == -7).all()
        return out[: len(xs) * n_rows].reshape(len(xs), n_rows)

    out = dots(xs)
    rounded, exact = xs.astype(np.float16).astype(np.float64), weights.astype(np.float64)
    bound = 1e-6 * (np.abs(rounded) @ np.abs(exact).T) + 1e-7
    assert (np.abs(out - rounded @ exact.T) <= bound).all()
    for i in range(n_x):
        assert (dots(xs[i : i + 1])[0] == out[i]).all()


@pytest.mark.parametrize("arch", ["arcee", "smallthinker"])
@pytest.mark.parametrize("step", [1, 5])
def test_decoding_is_stock(tmp_path: Path, arch: str, step: int) -> None:
    """A cache of F16, as users have it, token by token and in small batches; several query heads share a head of it."""
    dense = tiny_models.make(tmp_path / "dense.gguf", arch, quant="Q8_0")
    convert(dense, tmp_path / "s.gguf")
    stock, ours = llama_cpp.Llama(str(dense), **SETTINGS), Llama(tmp_path / "s.gguf", **SETTINGS)
    together = divergence(logits(stock), logits(ours))  # of many tokens, attention is stock's
    assert divergence(logits(stock, step=step), logits(ours, step=step)) < 1.1 * together + BOUND["F16"]


RUN = """
import sys
from powerinfer_ext import Llama
llama = Llama(sys.argv[1], n_ctx=256, verbose=True, type_k=int(sys.argv[2]), type_v=1)
llama.eval([1, 2, 3])
llama.eval(list(range(40)))
"""


@pytest.mark.parametrize("type_k", [1, 0])
def test_who_computes_it(tmp_path: Path, type_k: int) -> None:
    """ggml's own account of who computes what: F16 keys and values of a few tokens are ours, other types stock's, and
    everything where attention's matrices are not in panels because the CPU has AMX."""
    dense = tiny_models.make(tmp_path / "dense.gguf", "arcee", quant="Q8_0")
    convert(dense, tmp_path / "s.gguf")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "s.gguf"), str(type_k)],
        env={**os.environ, "GGML_SCHED_DEBUG": "2", "POWERINFER_KERNELS": ""},  # the best, as the fixture has it
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = [line for line in done.stderr.splitlines() if "(   MUL_MAT)" in line]
    keys = {"[POWER" in line.split("use=")[0] for line in nodes if " kq-0 " in line}
    values = {"[POWER" in line.split("use=")[0] for line in nodes if " kqv-0 " in line}
    _, lib = native()
    some = {True, False} if lib.pi_panel_available() else {False}  # false: of forty tokens
    assert keys == (some if type_k == 1 else {False})
    assert values == some
