"""Conversion to sparse-GGUF and back, against transpositions computed here with numpy and the gguf
package.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from handmade import QT, Model, tiny_model
from rich.console import Console

from gguf_tools import ConversionError, FormatError, GGUFFile, SparseGGUF, convert, export, quants
from gguf_tools.activations import NATIVE
from gguf_tools.convert import DOWN_TYPES
from gguf_tools.inspect import inspect, render
from gguf_tools.stream import WORKERS
from gguf_tools.writer import GGUFWriter, NewTensor

TYPES = [QT.F32, QT.F16, QT.BF16, QT.Q8_0, QT.Q4_0, QT.Q4_K, QT.Q5_K, QT.Q6_K]
KINDS = {
    "dense": dict(),
    "ungated": dict(gated=False),
    "experts": dict(n_expert=3),
    "ungated experts": dict(gated=False, n_expert=3),
}
K_QUANTS = (QT.Q4_K, QT.Q5_K, QT.Q6_K)


def sizes(ggml_type: QT) -> dict:
    return dict(n_embd=256, n_ff=512) if ggml_type in K_QUANTS else dict(n_embd=64, n_ff=96)


def random_orders(model: Model, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = np.tile(np.arange(model.n_ff), (max(1, model.n_expert), 1))
    return {i: rng.permuted(rows, axis=1) for i in model.layers}


def floats(model: Model, name: str, ggml_type: QT) -> np.ndarray:
    """A tensor's values by the gguf package: float32 [experts, rows, columns]."""
    raw = model.tensors[name]
    values = gguf.quants.dequantize(raw.reshape(-1, raw.shape[-1]), ggml_type)
    return values.reshape(max(1, model.n_expert), -1, values.shape[-1])


@pytest.mark.parametrize("permuted", [False, True], ids=["identity", "permuted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_bundles_and_the_way_back(tmp_path, ggml_type, kind, permuted):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=ggml_type, bias=True, **KINDS[kind], **sizes(ggml_type))
    orders = random_orders(model) if permuted else {}
    identity = np.tile(np.arange(model.n_ff), (max(1, model.n_expert), 1))
    report = convert(model.path, tmp_path / "s.gguf", order=orders, down_type="same")
    lossless = ggml_type in (QT.F32, QT.F16, QT.BF16)
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert len(view.layers) == len(model.layers)
        for layer, said in zip(view.layers, report.layers, strict=True):
            order = orders.get(layer.index, identity)
            assert np.array_equal(layer.order, order)
            rows = np.frombuffer(view.file.data(layer.bundle.name), np.uint8)
            rows = rows.reshape(max(1, model.n_expert), model.n_ff, layer.stride)
            assert layer.up_offset % 64 == layer.down_offset % 64 == layer.stride % 64 == 0
            prefix = f"blk.{layer.index}.ffn_"

            def in_order(name, order=order):
                raw = model.tensors[name]
                raw = raw.reshape(max(1, model.n_expert), model.n_ff, -1)
                return np.take_along_axis(raw, order[:, :, None], axis=1)

            decider = f"{prefix}{'gate' if model.gated else 'up'}{model.suffix}"
            assert view.file.data(f"{decider}.weight") == in_order(f"{decider}.weight").tobytes()
            bias = np.take_along_axis(
                model.tensors[f"{decider}.bias"].view("<f4").reshape(order.shape), order, 1
            )
            assert view.file.data(f"{decider}.bias") == bias.tobytes()
            if model.gated:
                up = in_order(f"{prefix}up{model.suffix}.weight")
                assert np.array_equal(rows[:, :, : up.shape[-1]], up)
                assert not rows[:, :, up.shape[-1] : layer.down_offset].any()

            columns = floats(model, f"{prefix}down{model.suffix}.weight", ggml_type).transpose(0, 2, 1)
            columns = np.take_along_axis(columns, order[:, :, None], axis=1)
            width = gguf.quants.quant_shape_to_byte_shape((model.n_embd,), ggml_type)[0]
            down = rows[:, :, layer.down_offset : layer.down_offset + width]
            assert not rows[:, :, layer.down_offset + width :].any()
            if ggml_type in K_QUANTS:  # the gguf package cannot write these
                stored = gguf.quants.dequantize(np.ascontiguousarray(down), ggml_type)
                error = np.linalg.norm(stored - columns) / np.linalg.norm(columns)
                assert 0 < error < {QT.Q4_K: 0.1, QT.Q5_K: 0.05, QT.Q6_K: 0.03}[ggml_type]
                assert said.relative_rms == pytest.approx(error, rel=1e-3)
            else:
                expected = gguf.quants.quantize(np.ascontiguousarray(columns), ggml_type).view(np.uint8)
                assert np.array_equal(down, expected)
                assert (said.relative_rms == 0) == (not said.requantised) == lossless

    back = export(tmp_path / "s.gguf", tmp_path / "back.gguf")
    assert back.identical == lossless
    assert (back.sha256 == report.source_sha256) == lossless
    assert hashlib.sha256((tmp_path / "back.gguf").read_bytes()).hexdigest() == back.sha256
    downs = [f"blk.{i}.ffn_down{model.suffix}.weight" for i in model.layers]
    assert back.requantised == ([] if lossless else downs)
    with GGUFFile.open(model.path) as source, GGUFFile.open(tmp_path / "back.gguf") as result:
        assert list(source.fields.values()) == list(result.fields.values())
        assert list(source.tensors.values()) == list(result.tensors.values())
        for name in source.tensors:
            if name not in back.requantised:
                assert source.data(name) == result.data(name), name


def test_sources_come_back_bit_for_bit(tmp_path):
    """Alignments given or not, hints, version 2, unpadded and padded ends, layers without an FFN, one
    expert.
    """
    for i, options in enumerate(
        (
            dict(alignment=32),
            dict(alignment=256, hint="drelu"),
            dict(alignment=8192),
            dict(layers=(1, 3, 4), n_expert=1),
            dict(strings={"powerinfer.provenance": "ours", "zzz": "last"}, hint="relu"),
            dict(gated=False, hint="relu2"),
        )
    ):
        model = tiny_model(tmp_path / f"{i}.gguf", ggml_type=QT.F16, **options)
        for change in ("none", "version 2", "cut padding", "more padding"):
            raw = bytearray(model.path.read_bytes())
            with GGUFFile.open(model.path) as file:
                end = file.data_end
            if change == "version 2":
                raw[4] = 2
            elif change == "cut padding":
                raw = raw[:end]
            elif change == "more padding":
                raw += bytes(100)
            (tmp_path / "in.gguf").write_bytes(raw)
            convert(tmp_path / "in.gguf", tmp_path / "s.gguf", order=random_orders(model))
            assert export(tmp_path / "s.gguf", tmp_path / "back.gguf").identical, (options, change)
            assert (tmp_path / "back.gguf").read_bytes() == raw


@pytest.mark.parametrize("down_type", [name for name in DOWN_TYPES if name != "i8"])
def test_every_down_type(tmp_path, down_type):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.F16, n_embd=256, n_ff=256, layers=(0,))
    report = convert(model.path, tmp_path / "s.gguf", down_type=down_type)
    assert report.layers[0].down_type == down_type.upper()
    assert report.layers[0].requantised == (down_type not in ("f16", "f32"))
    limit = {
        "f32": 0,
        "f16": 0,
        "bf16": 2e-3,
        "q8_0": 7e-3,
        "q6_k": 0.03,
        "q5_k": 0.05,
        "q5_0": 0.05,
        "q5_1": 0.05,
    }
    coarse = {"q1_0": 0.9, "iq1_s": 0.7, "iq1_m": 0.7, "tq1_0": 0.9, "tq2_0": 0.9}
    assert report.layers[0].relative_rms <= limit.get(down_type, coarse.get(down_type, 0.45))
    back = export(tmp_path / "s.gguf", tmp_path / "back.gguf")
    assert back.identical == (down_type in ("f16", "f32"))
    inspect(tmp_path / "s.gguf")


def test_default_down_type(tmp_path):
    def stored(ggml_type, n_embd, n_ff):
        model = tiny_model(tmp_path / "m.gguf", ggml_type=ggml_type, n_embd=n_embd, n_ff=n_ff, gated=False)
        return convert(model.path, tmp_path / "s.gguf").layers[0].down_type

    expected = [("I8" if t == QT.Q8_0 else t.name) for t in TYPES]
    assert [stored(t, 256, 512) for t in TYPES] == expected
    model = tiny_model(tmp_path / "m.gguf", n_embd=96, n_ff=256)
    down = quants.quantise(int(QT.Q4_K), np.ones((96, 256), np.float32))
    assert swapped(model, "blk.0.ffn_down.weight", QT.Q4_K, (256, 96), down).layers[0].down_type == "Q8_0"
    model = tiny_model(tmp_path / "m.gguf", n_embd=40, n_ff=64)
    down = quants.quantise(int(QT.Q8_0), np.ones((40, 64), np.float32))
    assert swapped(model, "blk.0.ffn_down.weight", QT.Q8_0, (64, 40), down).layers[0].down_type == "I8"
    model = tiny_model(tmp_path / "m.gguf", n_embd=64, n_ff=256)
    down = quants.quantise(int(QT.Q2_K), np.ones((64, 256), np.float32))
    assert swapped(model, "blk.0.ffn_down.weight", QT.Q2_K, (256, 64), down).layers[0].down_type == "Q8_0"


@pytest.mark.parametrize("ggml_type", [QT.Q8_0, QT.Q4_0], ids=lambda t: t.name)
@pytest.mark.parametrize(("gated", "n_expert"), [(True, 0), (False, 0), (True, 3), (False, 2)])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "reordered"])
def test_columns_of_integers_lose_nothing(tmp_path, ggml_type, gated, n_expert, shuffle):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=ggml_type, gated=gated, n_expert=n_expert, n_ff=96)
    order = random_orders(model) if shuffle else None
    report = convert(model.path, tmp_path / "s.gguf", down_type="i8", order=order)
    assert not report.requantised and all(layer.relative_rms == 0 for layer in report.layers)
    assert export(tmp_path / "s.gguf", tmp_path / "back.gguf").identical
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        for layer in view.layers:
            down = floats(model, layer.down_name, ggml_type).reshape(-1, layer.n_embd, layer.n_ff)
            rows = np.frombuffer(view.file.data(layer.bundle.name), np.int8).reshape(-1, layer.n_ff, layer.stride)
            columns = rows[:, :, layer.down_offset : layer.down_offset + layer.n_embd]
            table = np.frombuffer(view.file.data(layer.scale_tensor.name), np.float16)
            table = table.reshape(-1, layer.n_ff // 32, layer.n_embd).astype(np.float32)
            for expert, original in enumerate(layer.order):
                want = down[expert].T[original]
                assert (columns[expert] * table[expert, original // 32] == want).all()


def test_columns_of_integers_need_single_scales(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.F16)
    with pytest.raises(ConversionError, match="I8 keeps the integers of Q4_0, Q8_0.*is F16"):
        convert(model.path, tmp_path / "s.gguf", down_type="i8")
    assert not (tmp_path / "s.gguf").exists()


def test_types_that_want_an_importance_matrix_come_back(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", n_embd=256, n_ff=256)
    down = quants.quantise(int(QT.IQ2_XXS), np.random.default_rng(1).standard_normal((256, 256), np.float32))
    swapped(model, "blk.0.ffn_down.weight", QT.IQ2_XXS, (256, 256), down)
    export(tmp_path / "swapped.sparse.gguf", tmp_path / "back.gguf")
    with GGUFFile.open(tmp_path / "back.gguf") as file:
        assert file.tensors["blk.0.ffn_down.weight"].type == QT.IQ2_XXS


def swapped(model: Model, name: str, ggml_type: QT, shape: tuple[int, ...], data: np.ndarray):
    """Convert `model` with one tensor replaced by another of a different type."""
    path = model.path.with_name("swapped.gguf")
    with GGUFFile.open(model.path) as file:
        infos = [
            NewTensor(name, int(ggml_type), shape) if t.name == name else NewTensor(t.name, t.type, t.shape)
            for t in file.tensors.values()
        ]
        with GGUFWriter(path, file.fields.values(), infos, alignment=32) as writer:
            for info in infos:
                writer.begin(info.name)
                writer.write(data if info.name == name else file.data(info.name))
    return convert(path, model.path.with_name("swapped.sparse.gguf"))


# ---- activation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [
        (dict(), None, "silu"),
        (dict(), "drelu", "drelu"),
        (dict(hint="drelu"), None, "drelu"),
        (dict(hint="drelu"), "relu", "relu"),
        (dict(architecture="gemma2"), None, "gelu"),
        (dict(n_expert=2), None, "relu"),
        (dict(gated=False), None, "relu2"),
        (dict(gated=False), "relu2", "relu2"),
        (dict(gated=False, architecture="gpt2"), None, "gelu"),
        (dict(architecture="somenew"), "relu", "relu"),
    ],
)
def test_activation(tmp_path, options, asked, expected):
    model = tiny_model(tmp_path / "m.gguf", **options)
    report = convert(model.path, tmp_path / "s.gguf", activation=asked)
    assert report.activation == expected
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert view.activation == expected
        assert view.source_activation == options.get("hint")


REFUSED = {
    "unknown activation": (dict(), dict(activation="tanh"), "'tanh', which is not one of relu, relu2"),
    "unknown hint": (dict(hint="swish"), dict(), "hint powerinfer.activation is 'swish'"),
    "unknown architecture": (
        dict(architecture="somenew"),
        dict(),
        "say what its FFN computes with --activation",
    ),
    "unknown ungated": (
        dict(architecture="somenew", gated=False),
        dict(activation="relu"),
        "cannot be overridden",
    ),
    "unknown ungated, not asked": (
        dict(architecture="somenew", gated=False),
        dict(),
        "'somenew' is not known",
    ),
    "ungated override": (dict(gated=False), dict(activation="relu"), "it stays relu2"),
    "ungated dReLU": (dict(gated=False), dict(activation="drelu"), "it stays relu2"),
    "gate unlike the table": (dict(architecture="arcee"), dict(), "'arcee' with a gate is not known"),
    "down type": (dict(), dict(down_type="q9"), "down type 'q9' is not one of auto, same, f32"),
    "down type block": (dict(), dict(down_type="q4_k"), "Q4_K has blocks of 256 values, which do not divide"),
    "order length": (dict(), dict(order={0: np.arange(95)}), "neuron order of layer 0 is not 1 permutation"),
    "order twice": (dict(), dict(order={1: np.zeros(96, int)}), "neuron order of layer 1"),
    "order experts": (dict(n_expert=2), dict(order={0: np.arange(96)}), "layer 0 is not 2 permutation(s)"),
    "order layer": (dict(), dict(order={7: np.arange(96)}), "layers without an FFN: [7]"),
    "no FFN": (dict(layers=()), dict(), "has no FFN tensors"),
    "split": (dict(numbers={"split.count": 2}), dict(), "llama-gguf-split --merge"),
    "own key": (
        dict(strings={"powerinfer.source.x": "y"}),
        dict(),
        "powerinfer.source.x: a key of the sparse-GGUF",
    ),
    "merged gate and up": (
        dict(extra={"blk.0.ffn_gate_up_exps.weight": np.zeros((2, 4, 4), np.float32)}),
        dict(),
        "blk.0.ffn_gate_up_exps.weight: gate and up merged",
    ),
    "scale": (
        dict(extra={"blk.0.ffn_up.scale": np.zeros(1, np.float32)}),
        dict(),
        "ffn_up.scale: FFN weights with scales",
    ),
    "sub norm": (
        dict(extra={"blk.1.ffn_sub_norm.weight": np.zeros(96, np.float32)}),
        dict(),
        "ffn_sub_norm.weight: a norm",
    ),
    "old experts": (
        dict(extra={"blk.0.ffn_up.0.weight": np.zeros((4, 4), np.float32)}),
        dict(),
        "one tensor per expert",
    ),
    "odd bias": (
        dict(extra={"blk.0.ffn_up.bias": np.zeros(95, np.float32)}),
        dict(),
        "ffn_up.bias has shape [95]",
    ),
    "reserved name": (
        dict(extra={"blk.0.ffn_bundle.weight": np.zeros(4, np.float32)}),
        dict(),
        "tensor blk.0.ffn_bundle.weight",
    ),
    "reserved name of an order": (
        dict(extra={"blk.1.ffn_order.weight": np.zeros(4, np.float32)}),
        dict(),
        "tensor blk.1.ffn_order.weight",
    ),
    "half an FFN": (
        dict(extra={"blk.5.ffn_up.weight": np.zeros((4, 4), np.float32)}),
        dict(),
        "blk.5.ffn_down.weight is missing",
    ),
    "up doubled": (
        dict(
            gated=False,
            extra={
                "blk.5.ffn_up.weight": np.zeros((8, 6), np.float32),
                "blk.5.ffn_down.weight": np.zeros((6, 4), np.float32),
            },
        ),
        dict(),
        "blk.5.ffn_up.weight holds gate and up merged",
    ),
    "down shape": (
        dict(
            gated=False,
            extra={
                "blk.5.ffn_up.weight": np.zeros((8, 6), np.float32),
                "blk.5.ffn_down.weight": np.zeros((6, 7), np.float32),
            },
        ),
        dict(),
        "blk.5.ffn_down.weight has shape [7, 6], expected [8, 6]",
    ),
    "mixed gates": (
        dict(
            extra={
                "blk.5.ffn_up.weight": np.zeros((8, 6), np.float32),
                "blk.5.ffn_down.weight": np.zeros((6, 8), np.float32),
            }
        ),
        dict(),
        "some layers have a gate and some have none",
    ),
    "NaN": (
        dict(
            gated=False,
            extra={
                "blk.5.ffn_up.weight": np.zeros((32, 32), np.float32),
                "blk.5.ffn_down.weight": np.full((32, 32), np.nan, np.float32),
            },
        ),
        dict(down_type="q8_0"),
        "tensor blk.5.ffn_down.weight: values as large as nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    options, arguments, message = REFUSED[case]
    model = tiny_model(tmp_path / "m.gguf", **options)
    with pytest.raises(ConversionError) as error:
        convert(model.path, tmp_path / "s.gguf", **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["m.gguf"]


def test_refuses_its_own_output(tmp_path):
    model = tiny_model(tmp_path / "m.gguf")
    convert(model.path, tmp_path / "s.gguf")
    with pytest.raises(ConversionError, match="is a sparse-GGUF already"):
        convert(tmp_path / "s.gguf", tmp_path / "t.gguf")
    with pytest.raises(FormatError, match="this is not a sparse-GGUF"):
        export(model.path, tmp_path / "t.gguf")
    os.link(model.path, tmp_path / "link.gguf")
    for output in (model.path, tmp_path / "link.gguf"):
        with pytest.raises(ConversionError, match="is the source itself"):
            convert(model.path, output)
    with pytest.raises(ConversionError, match="is the source itself"):
        export(tmp_path / "s.gguf", tmp_path / "s.gguf")
    assert sorted(os.listdir(tmp_path)) == ["link.gguf", "m.gguf", "s.gguf"]


def test_every_known_architecture_is_one_of_the_gguf_package():
    # Architectures of the pinned llama.cpp that the gguf package on the index does not list yet.
    newer = {"cohere2moe", "deepseek32", "minimax-01", "talkie", "mellum", "nanbeige", "muse-glimmer"}
    assert NATIVE.keys() - set(gguf.MODEL_ARCH_NAMES.values()) <= newer


# ---- interruptions, resources ------------------------------------------------------------------------------


def test_interrupted_conversions_leave_nothing(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "m.gguf")
    convert(model.path, tmp_path / "s.gguf")
    good = (tmp_path / "s.gguf").read_bytes()

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model.path, tmp_path / "s.gguf", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "s.gguf", tmp_path / "back.gguf", progress=interrupt)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConversionError, match=r"s\.gguf: needs .* MB but its disk has 0\.0 MB free"):
        convert(model.path, tmp_path / "s.gguf")
    with pytest.raises(ConversionError, match=r"back\.gguf: needs .* MB"):
        export(tmp_path / "s.gguf", tmp_path / "back.gguf")
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "s.gguf"]
    assert (tmp_path / "s.gguf").read_bytes() == good


def test_sources_that_change_are_noticed(tmp_path):
    model = tiny_model(tmp_path / "m.gguf")
    convert(model.path, tmp_path / "s.gguf")

    def touch(path):
        return lambda *progress: os.utime(path, ns=(1, 1))

    with pytest.raises(FormatError, match=r"m\.gguf: the file changed"):
        convert(model.path, tmp_path / "t.gguf", progress=touch(model.path))
    with pytest.raises(FormatError, match=r"s\.gguf: the file changed"):
        export(tmp_path / "s.gguf", tmp_path / "t.gguf", progress=touch(tmp_path / "s.gguf"))
    with pytest.raises(FormatError, match="truncated meanwhile"):
        convert(model.path, tmp_path / "t.gguf", progress=lambda *_: os.truncate(model.path, 3000))
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "s.gguf"]


def test_progress_reaches_its_total(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.Q8_0, n_expert=2)
    for run in (
        lambda note: convert(model.path, tmp_path / "s.gguf", progress=note),
        lambda note: export(tmp_path / "s.gguf", tmp_path / "back.gguf", progress=note),
    ):
        calls = []
        run(lambda *call, calls=calls: calls.append(call))
        done = [call[0] for call in calls]
        assert done == sorted(done) and len({call[1] for call in calls}) == 1
        assert 0.5 < done[-1] / calls[-1][1] <= 1
        assert all(isinstance(call[2], str) for call in calls)


PEAK = """
import re, sys
from gguf_tools import convert, export
convert(sys.argv[1], sys.argv[2], down_type="same")
export(sys.argv[2], sys.argv[3])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("ggml_type", [QT.F16, QT.Q8_0], ids=lambda t: t.name)
def test_memory_stays_below_twice_the_largest_tensor(tmp_path, ggml_type):
    def peak(model: Model) -> int:
        paths = [str(model.path), str(tmp_path / "s.gguf"), str(tmp_path / "back.gguf")]
        command = [sys.executable, "-c", PEAK, *paths]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        return int(output) * 1024

    n_ff = 8192 if ggml_type == QT.F16 else 16384
    small = tiny_model(tmp_path / "small.gguf", ggml_type=ggml_type)
    large = tiny_model(tmp_path / "large.gguf", ggml_type=ggml_type, n_embd=2048, n_ff=n_ff, layers=(0,))
    assert large.path.stat().st_size > 100e6
    largest = large.tensors[
        "blk.0.ffn_down.weight"
    ].nbytes  # of the source, not the bundle, which is twice that
    buffers = (
        12 << 20
    )  # the floats of a strip and its transposed copies, per worker; more cores, more workers
    assert peak(large) - peak(small) < 2 * largest + WORKERS * buffers + (8 << 20)


# ---- inspect -----------------------------------------------------------------------------------------------


def shown(info: dict) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    render(info, console)
    return console.export_text()


def test_inspect_sparse(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.F16, n_expert=3, layers=(0, 1, 2, 5))
    report = convert(model.path, tmp_path / "s.gguf", down_type="q8_0")
    info = inspect(tmp_path / "s.gguf")
    json.dumps(info)
    assert (info["format"], info["version"], info["architecture"]) == ("sparse-gguf", 1, "smallthinker")
    assert (info["activation"], info["gated"]) == ("relu", True)
    assert info["source"]["sha256"] == report.source_sha256
    assert [layer["index"] for layer in info["layers"]] == [0, 1, 2, 5]
    layer = info["layers"][0]
    assert (layer["kind"], layer["n_embd"], layer["n_ff"], layer["n_expert"]) == ("moe", 64, 96, 3)
    assert (layer["up_type"], layer["down_type"], layer["down_source_type"]) == ("F16", "Q8_0", "F16")
    assert layer["bytes_per_neuron"] == 256 and layer["hot_count"] == 0
    assert layer["bytes"] == (256 + 128) * 96 * 3
    assert info["ffn_bytes"] == 4 * layer["bytes"]
    assert info["ffn_share"] == info["ffn_bytes"] / (tmp_path / "s.gguf").stat().st_size
    text = shown(info)
    assert "sparse-GGUF version 1" in text and "0-2" in text and "Q8_0 (was F16)" in text and "m.gguf" in text


def test_inspect_stock(tmp_path):
    info = inspect(tiny_model(tmp_path / "m.gguf", hint="drelu").path)
    json.dumps(info)
    assert (info["format"], info["activation"], info["obstacle"]) == ("gguf", "drelu", None)
    assert info["layers"][1]["bytes_per_neuron"] == 3 * 64 * 4
    assert "possible" in shown(info)
    merged = {"blk.0.ffn_gate_up_exps.weight": np.zeros((2, 4, 4), np.float32)}
    info = inspect(tiny_model(tmp_path / "m.gguf", extra=merged).path)
    assert info["obstacle"].startswith("tensor blk.0.ffn_gate_up_exps.weight: gate and up merged")
    assert info["activation"] == "silu" and "not possible: tensor blk.0" in shown(info)
    info = inspect(tiny_model(tmp_path / "m.gguf", layers=(), architecture="mamba").path)
    assert info["layers"] == [] and info["gated"] is None and "no FFN" in shown(info)


def test_inspect_shows_hostile_names_harmlessly(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", architecture="x\x1b[2J[bold]")
    text = shown(inspect(model.path))
    assert "\x1b" not in text and "[bold]" in text


def test_inspect_refuses_newer_versions(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", numbers={"powerinfer.version": 2})
    with pytest.raises(FormatError, match=r"powerinfer\.version"):
        inspect(model.path)
