"""FFNs of many tokens in tiles (cpatch/ffn_tiles.c) against float64 numpy: every weight type and family, with a
bound on the error; and the promise that forms, threads and cuts into sets change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from tiny_models import quantise, rounded

from powerinfer_ext.loader import native
from powerinfer_ext.machine import parse_cpuinfo

TYPES = {"BF16": 30, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "I8": 24}
NATIVE, RELU, RELU2, DRELU = range(4)
NONE, DIRECT = 0, 2
Q8_0, Q8_K = 8, 15
EXPERTS = 3
ALWAYS, NEVER, DEFAULT = -1, 10**6, 0  # rows that must want a neuron
BF16_ERROR = 2.0**-8  # of a product of two values that were rounded to 8 bits each


@pytest.fixture(autouse=True)
def tiles(with_vnni: None) -> Iterator[Any]:
    """Tiles everywhere; a function that forces something else."""
    _, lib = native()
    if not lib.pi_tiles_available():
        _, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
        assert "avx512_bf16" not in flags
        pytest.skip("tiles need AVX-512 BF16")
    lib.pi_tiles_force(ALWAYS, -1)
    yield lib.pi_tiles_force
    lib.pi_tiles_force(DEFAULT, -1)


@dataclass
class Layer:
    """float64 weights [experts or 1, n_ff, n_embd], and where they are; `options` as for open_layer."""

    weights: dict[str, np.ndarray]
    order: np.ndarray
    options: dict[str, Any]
    model: Any


def open_layer(folder: Path, up: str, down: str, *, n_embd: int, n_ff: int, gated: bool = True, experts: int = 0,
               activation: int = RELU, predicted: bool = False, reordered: bool = False, seed: int = 1) -> Layer:
    """A layer of random weights; down's source is Q8_0, so that stock would round activations to 8 bits."""
    ffi, lib = native()
    rng = np.random.default_rng(seed)
    n = max(experts, 1)
    parts = (["gate"] if gated and predicted else []) + (["up"] if gated or predicted else []) + ["down"]
    weights, segments, content = {}, {}, []
    order = np.stack([rng.permutation(n_ff) if reordered else np.arange(n_ff) for _ in range(n)]).astype(np.int32)
    scales = (rng.uniform(0.5, 1.5, (n, n_ff // 32, n_embd)) / 1000).astype(np.float16)
    at = 0
    for part in parts:
        kind = down if part == "down" else up
        values = (rng.standard_normal((n * n_ff, n_embd)) / 16).astype(np.float32)
        if kind == "I8":
            raw = rng.integers(-128, 128, values.shape).astype(np.int8)
            group = np.take_along_axis(scales.astype(np.float64), (order // 32)[:, :, None].astype(np.int64), axis=1)
            exact = raw.astype(np.float64).reshape(n, n_ff, n_embd) * group
        else:
            raw = quantise(values, kind).view(np.uint8).reshape(n * n_ff, -1)
            exact = dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64).reshape(n, n_ff, n_embd)
        weights[part], segments[part] = exact, at
        content.append((at, raw.view(np.uint8).reshape(n * n_ff, -1)))
        at = -(-(at + content[-1][1].shape[1]) // 64) * 64
    bundles = np.zeros((n * n_ff, at), np.uint8)
    for first, raw in content:
        bundles[:, first : first + raw.shape[1]] = raw
    spec = ffi.new("struct pi_layer_spec[1]")
    names = {part: ffi.new("char[]", f"blk.0.ffn_{part}.weight".encode()) for part in ("gate", "up", "down")}
    for part in parts:
        setattr(spec[0], f"{part}_name", names[part])
        setattr(spec[0], f"{part}_type", TYPES[down if part == "down" else up])
        setattr(spec[0], f"{part}_offset", segments[part])
    spec[0].gated, spec[0].n_embd, spec[0].n_ff, spec[0].n_expert = gated, n_embd, n_ff, experts
    spec[0].stride, spec[0].down_source_type = at, Q8_0
    if reordered:
        spec[0].order = ffi.cast("int32_t *", order.ctypes.data)
    blob = bundles.tobytes()
    spec[0].scale_offset = len(blob)
    blob += scales.tobytes()
    if predicted:  # direct, with weights of zero: the bias alone decides, and selects every neuron
        spec[0].predictor, spec[0].pred_b_type, spec[0].pred_b_offset = DIRECT, 0, len(blob)
        blob += bytes(n_ff * n_embd * 4)
        spec[0].pred_bias_offset = len(blob)
        blob += np.ones(n_ff, np.float32).tobytes()
    path = folder / "bundles"
    path.write_bytes(blob)
    message = ffi.new("char[]", 256)
    with open(path, "rb") as file:
        model = lib.pi_model_open([file.fileno()], 1, 1, spec, 0, ffi.NULL, activation, ffi.NULL, message, 256)
        assert model != ffi.NULL, ffi.string(message)
        assert lib.pi_model_read(model, file.fileno(), 1, message, 256) == 0, ffi.string(message)
    options = dict(up=up, gated=gated, experts=experts, activation=activation, predicted=predicted)
    return Layer(weights, order, options, ffi.gc(model, lib.pi_model_close))


@dataclass
class Inputs:
    x: np.ndarray
    g: np.ndarray
    expert: np.ndarray


def make_inputs(layer: Layer, rows: int, density: float, seed: int = 2) -> Inputs:
    rng = np.random.default_rng(seed)
    n_ff, n_embd = layer.weights["down"].shape[1:]
    g = np.abs(rng.standard_normal((rows, n_ff))).astype(np.float32)
    sign = np.where(rng.random(g.shape) < density, 1, -1)
    if rows > 3:
        sign[0], sign[1] = 1, -1  # every neuron, and none
    g = g * sign if layer.options["gated"] else g * (sign > 0)
    return Inputs(
        rng.standard_normal((rows, n_embd)).astype(np.float32),
        g.astype(np.float32),
        rng.integers(0, max(layer.options["experts"], 1), rows).astype(np.int32),
    )


def run(layer: Layer, inputs: Inputs, threads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [rows, n_embd] and activations [rows, n_ff] of pi_ffn."""
    ffi, lib = native()
    g, h = inputs.g.copy(), np.full_like(inputs.g, np.nan)
    out = np.full((len(g), inputs.x.shape[1]), np.nan, np.float32)
    up = "up" in layer.weights

    def pointer(array: np.ndarray, wanted: bool, kind: str = "float[]") -> Any:
        return ffi.from_buffer(kind, array) if wanted else ffi.NULL

    assert lib.pi_ffn(layer.model, 0, len(g), pointer(inputs.expert, layer.options["experts"] > 0, "int32_t[]"),
                      pointer(inputs.x, up), pointer(g, not layer.options["predicted"]), pointer(h, up),
                      pointer(out, True), threads) == 0
    return out, h if up else g


def expected(layer: Layer, inputs: Inputs, *, rounds: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64; rounds: with inputs and, unless predicted, activations rounded as stock rounds them."""
    options = layer.options
    x = rounded(inputs.x, Q8_K if options["up"].endswith("K") else Q8_0) if rounds else inputs.x.astype(np.float64)

    def product(part: str) -> np.ndarray:
        return np.einsum("rne,re->rn", layer.weights[part][inputs.expert], x)

    g = inputs.g.astype(np.float64)
    if options["predicted"]:
        g = product("gate" if options["gated"] else "up")
    u = product("up") if options["gated"] else 1.0
    r = np.maximum(g, 0)
    h = {NATIVE: g, RELU: r * u, RELU2: r * r * u, DRELU: r * np.maximum(u, 0)}[options["activation"]]
    if not rounds or options["predicted"]:
        return np.einsum("rn,rne->re", h, layer.weights["down"][inputs.expert]), h
    source = np.zeros_like(h)
    np.put_along_axis(source, layer.order[inputs.expert].astype(np.int64), h, axis=1)
    used = np.take_along_axis(rounded(source, Q8_0), layer.order[inputs.expert].astype(np.int64), axis=1)
    return np.einsum("rn,rne->re", used, layer.weights["down"][inputs.expert]), h


def distance(got: np.ndarray, want: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(layer: Layer, inputs: Inputs) -> None:
    """Dot products are exact but for float32; the rest is bfloat16, and less than what stock's rounding costs."""
    out, h = run(layer, inputs)
    want_out, want_h = expected(layer, inputs, rounds=True)
    assert distance(h, want_h) < 2e-6
    assert ((h == 0) == (want_h == 0)).mean() > 0.999
    error = distance(out, want_out)
    assert error < BF16_ERROR
    if not layer.options["predicted"] or layer.options["gated"]:
        assert error < distance(want_out, expected(layer, inputs, rounds=False)[0])


SHAPES = {"Q4_0": 288, "Q8_0": 544, "Q4_K": 768, "Q5_K": 512}  # n_embd: whole and broken groups of 512 and 256


@pytest.mark.parametrize("quant", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
def test_tiles_compute_what_numpy_computes(tmp_path: Path, quant: str, rows: int) -> None:
    for activation, experts, density in ((RELU, 0, 0.1), (RELU2, 0, 0.9), (DRELU, EXPERTS, 0.5)):
        layer = open_layer(tmp_path, quant, quant, n_embd=SHAPES[quant], n_ff=192, experts=experts,
                           activation=activation)
        check(layer, make_inputs(layer, rows, density))


@pytest.mark.parametrize("down", TYPES)
@pytest.mark.parametrize("reordered", [False, True])
def test_columns_of_every_type_are_added(tmp_path: Path, down: str, reordered: bool) -> None:
    for gated, experts in ((True, 0), (False, EXPERTS)):
        layer = open_layer(tmp_path, "Q4_0", down, n_embd=512, n_ff=352, gated=gated, experts=experts,
                           activation=RELU if gated else NATIVE, reordered=reordered)
        check(layer, make_inputs(layer, 40, 0.3))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("down", TYPES)
def test_predicted_layers_compute_the_deciding_product_too(tmp_path: Path, gated: bool, down: str) -> None:
    layer = open_layer(tmp_path, "Q4_0", down, n_embd=512, n_ff=320, gated=gated, activation=RELU2, predicted=True)
    check(layer, make_inputs(layer, 50, 0.3))


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_forms_threads_and_neighbours_change_no_bit(tmp_path: Path, tiles: Any, density: float) -> None:
    layer = open_layer(tmp_path, "Q4_0", "Q4_0", n_embd=512, n_ff=608, experts=EXPERTS, reordered=True)
    inputs = make_inputs(layer, 301, density)
    out, h = run(layer, inputs)
    for share, threads in ((0, 1), (2, 1), (0, 3), (2, 7), (-1, 2)):
        tiles(ALWAYS, share)
        again = run(layer, inputs, threads)
        assert np.array_equal(out, again[0])
        assert np.array_equal(h, again[1])
    some = slice(100, 137)
    alone = run(layer, Inputs(inputs.x[some], inputs.g[some], inputs.expert[some]))
    assert np.array_equal(out[some], alone[0])
    assert np.array_equal(h[some], alone[1])


def test_tiles_are_used_where_enough_rows_want_a_neuron(tmp_path: Path, tiles: Any) -> None:
    layer = open_layer(tmp_path, "Q4_0", "Q4_0", n_embd=512, n_ff=320)
    for rows, density, used in ((4, 1.0, False), (40, 0.05, False), (40, 0.5, True), (8, 1.0, True)):
        inputs, answers = make_inputs(layer, rows, density), {}
        for least in (ALWAYS, NEVER, DEFAULT):
            tiles(least, -1)
            answers[least] = run(layer, inputs)[0]
        assert not np.array_equal(answers[ALWAYS], answers[NEVER])
        assert np.array_equal(answers[DEFAULT], answers[ALWAYS if used else NEVER])
        assert distance(answers[ALWAYS], answers[NEVER]) < BF16_ERROR
