"""PowerInfer's own files (magic PWRI): hand-made here with numpy, struct and the gguf package, converted and run."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from handmade import QT, Raw, string
from tiny_models import make, quantise

from gguf_tools import ConversionError, FormatError, GGUFFile, SparseGGUF, convert, export, quants
from gguf_tools.convert import Calibration
from gguf_tools.inspect import inspect
from gguf_tools.powerinfer_import import ZERO_FIRES, PowerInferFile, open_source
from powerinfer_ext import Llama
from powerinfer_ext.reference import Reference

N_EMBD, N_FF, RANK, LAYERS = 256, 512, 64, 2
EXACT = ("F32", "F16")  # types whose transposition loses nothing
# Greatest difference from float32 arithmetic over the logits' standard deviation, two to three times what is seen.
TOLERANCE = {"F32": 1e-5, "F16": 5e-3, "Q8_0": 0.1, "Q4_0": 0.1}
TYPES = {"F32": QT.F32, "F16": QT.F16, "Q8_0": QT.Q8_0, "Q4_0": QT.Q4_0}
ACTIVATION = {"llama": "relu", "bamboo": "drelu"}
TOKENS = np.random.default_rng(5).integers(0, 512, 48).tolist()


def predictor(index: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(100 + index)
    fc1 = rng.standard_normal((rank, N_EMBD)).astype(np.float32) / 16
    return fc1, rng.standard_normal((N_FF, rank)).astype(np.float32) / 8


def write_pwri(
    path: Path,
    stock: Path,
    quant: str,
    *,
    architecture: str = "llama",
    magic: bytes = b"PWRI",
    rank: int = RANK,
    threshold: float | None = None,
    change: Callable[[str, np.ndarray], tuple[str, np.ndarray] | None] = lambda name, values: (name, values),
    gpu_split: bool = False,
) -> Path:
    """The model `stock` (F32) as PowerInfer would keep it, its matrices of type `quant`.

    change: gets every tensor's name and float32 values, and returns them, others, or None to leave it out.
    """
    reader = gguf.GGUFReader(stock)
    writer = gguf.GGUFWriter(path, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "powerinfer.activation"):
            continue
        kinds = entry.types
        sub = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", f"{architecture}."), entry.contents(), kinds[0], sub)
    if threshold is not None:
        writer.add_float32("powerinfer.sparse_threshold", threshold)
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = np.array(tensor.data).reshape([int(n) for n in reversed(tensor.shape)])
        if ".ffn_down." in tensor.name:
            index = int(tensor.name.split(".")[1])
            tensors[tensor.name.replace("ffn_down", "ffn_down_t")] = np.ascontiguousarray(values.T)
            tensors[f"blk.{index}.fc1.weight"], tensors[f"blk.{index}.fc2.weight"] = predictor(index, rank)
        else:
            tensors[tensor.name] = values
    for name, values in tensors.items():
        changed = change(name, values)
        if changed is not None:
            kind = quant if changed[1].ndim == 2 else "F32"
            writer.add_tensor(changed[0], quantise(changed[1], kind), raw_dtype=TYPES[kind])
    if gpu_split:
        writer.add_tensor("blk.0.gpu_idx", np.zeros(N_FF, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(path.read_bytes())
    raw[:4] = magic
    if gpu_split:  # I32 had another number in December 2023
        at = raw.index(b"blk.0.gpu_idx") + len("blk.0.gpu_idx") + 12
        assert raw[at : at + 4] == struct.pack("<I", QT.I32)
        raw[at : at + 4] = struct.pack("<I", 18)
    path.write_bytes(raw)
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By activation, the stock GGUF (F32, llama graph) with the hint."""
    folder = tmp_path_factory.mktemp("stock")
    return {
        activation: make(
            folder / f"{activation}.gguf",
            "llama",
            n_embd=N_EMBD,
            n_ff=N_FF,
            n_layer=LAYERS,
            density=0.2,
            hint_activation=activation,
        )
        for activation in ("relu", "drelu")
    }


def equivalent(path: Path, stock: Path, quant: str, activation: str) -> Path:
    """The stock GGUF with matrices of type `quant`. Its down has the values of PowerInfer's columns: as F32 where
    `quant` has blocks, for those run along the columns."""
    writer = gguf.GGUFWriter(path, "llama")
    reader = gguf.GGUFReader(stock)
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = entry.types
            sub = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), kinds[0], sub)
    for tensor in reader.tensors:
        values = np.array(tensor.data).reshape([int(n) for n in reversed(tensor.shape)])
        kind = quant if values.ndim == 2 else "F32"
        if ".ffn_down." in tensor.name:
            columns = quantise(np.ascontiguousarray(values.T), quant)
            values = gguf.quants.dequantize(columns, TYPES[quant]).reshape(N_FF, N_EMBD).T
            kind = quant if quant in EXACT else "F32"
        writer.add_tensor(tensor.name, quantise(values, kind), raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(path: Path) -> np.ndarray:
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    settings |= {"type_k": 0, "type_v": 0}  # F32, as the reference computes
    with closing(Llama(str(path), **settings)) as llama:
        llama.eval(TOKENS[:32])  # a prefill,
        for token in TOKENS[32:]:  # and decoding
            llama.eval([token])
        return np.array(llama.scores[: len(TOKENS)])


@pytest.mark.parametrize("architecture", ACTIVATION)
@pytest.mark.parametrize("quant", TYPES)
def test_the_same_bundles_and_output_as_the_equivalent_gguf(tmp_path, stock, quant, architecture):
    activation = ACTIVATION[architecture]
    pwri = write_pwri(tmp_path / "p.gguf", stock[activation], quant, architecture=architecture)
    same = equivalent(tmp_path / "e.gguf", stock[activation], quant, activation)
    report = convert(pwri, tmp_path / "p.sparse.gguf", calibration=Calibration({}))
    convert(same, tmp_path / "e.sparse.gguf", down_type=quant)  # rounding what was rounded changes nothing
    assert (report.architecture, report.activation, report.mode) == ("llama", activation, "exact")
    assert report.requantised == []
    with SparseGGUF.open(tmp_path / "p.sparse.gguf") as ours, SparseGGUF.open(tmp_path / "e.sparse.gguf") as theirs:
        assert ours.source_format == "powerinfer" and theirs.source_format == "gguf"
        assert ours.source_tensors == theirs.source_tensors
        assert ours.file.tensors.keys() == theirs.file.tensors.keys()
        for name in ours.file.tensors:
            assert ours.file.data(name) == theirs.file.data(name), name
        assert ours.file.metadata["llama.block_count"] == LAYERS
        assert not any(key.startswith("bamboo.") for key in ours.file.fields)
    logits = run(tmp_path / "p.sparse.gguf")
    if quant in EXACT:
        assert np.array_equal(logits, run(tmp_path / "e.sparse.gguf"))
    expected = Reference(same, activation).logits(TOKENS)
    assert np.abs(logits - expected).max() < TOLERANCE[quant] * expected.std()


@pytest.mark.parametrize("quant", TYPES)
def test_columns_are_the_bytes_of_the_file(tmp_path, stock, quant):
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], quant)
    order = np.random.default_rng(1).permutation(N_FF)
    convert(pwri, tmp_path / "s.gguf", order={1: order}, calibration=Calibration({}))
    stored = {t.name: t.data for t in gguf.GGUFReader(as_gguf(pwri)).tensors}
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        for layer in view.layers:
            rows = np.frombuffer(view.file.data(layer.bundle.name), np.uint8).reshape(N_FF, -1)
            columns = stored[f"blk.{layer.index}.ffn_down_t.weight"].view(np.uint8).reshape(N_FF, -1)
            if layer.index == 1:
                columns = columns[order]
            at = layer.down_offset
            assert np.array_equal(rows[:, at : at + columns.shape[1]], columns)


def as_gguf(pwri: Path) -> Path:
    """A copy with the magic that the gguf package reads."""
    copy = pwri.with_suffix(".copy.gguf")
    copy.write_bytes(b"GGUF" + pwri.read_bytes()[4:])
    return copy


@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_export_gives_the_stock_gguf(tmp_path, stock, quant):
    """Nothing is lost where values are moved one by one: the exported file has the tensors of the stock one."""
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], quant)
    convert(pwri, tmp_path / "s.gguf")
    report = export(tmp_path / "s.gguf", tmp_path / "x.gguf")
    assert not report.identical and report.requantised == []
    exported = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    original = gguf.GGUFReader(stock["relu"])
    assert exported.keys() == {t.name for t in original.tensors}
    for tensor in original.tensors:
        values = np.array(tensor.data).reshape([int(n) for n in reversed(tensor.shape)])
        kind = quant if values.ndim == 2 else "F32"
        assert np.array_equal(exported[tensor.name].data, quantise(values, kind)), tensor.name
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.metadata["powerinfer.activation"] == "relu"


# ---- predictors --------------------------------------------------------------------------------------------


def selected(view: SparseGGUF, index: int, x: np.ndarray) -> np.ndarray:
    """Which neurons, in the order of the source, the file's predictor selects for inputs x [n, n_embd]."""
    layer = view.layers[index]
    p = layer.predictor

    def matrix(tensor):
        raw = np.frombuffer(view.file.data(tensor.name), np.uint8).reshape(tensor.shape[1], -1)
        return gguf.quants.dequantize(raw, QT(tensor.type)).reshape(tensor.shape[1], tensor.shape[0])

    bias = np.frombuffer(view.file.data(p.bias_tensor.name), "<f4")
    scores = np.maximum(x @ matrix(p.a_tensor).T, 0) @ matrix(p.b_tensor).T + bias
    out = np.empty(scores.shape, bool)
    out[:, layer.order[0]] = scores > 0
    return out


@pytest.mark.parametrize("rank", [RANK, 40])  # 40 is not a rank that the format has: it is filled up
@pytest.mark.parametrize("quant", ["F32", "F16"])
def test_predictors_select_what_powerinfer_would(tmp_path, stock, quant, rank):
    """PowerInfer's predictor reads the residual stream h; ours its norm. The choice is the same."""
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], quant, rank=rank)
    report = convert(pwri, tmp_path / "s.gguf", order={0: np.random.default_rng(2).permutation(N_FF)})
    assert report.mode == "predict" and report.notes == []
    rng = np.random.default_rng(3)
    h = rng.standard_normal((64, N_EMBD)).astype(np.float32) * rng.uniform(0.1, 10, (64, 1)).astype(np.float32)
    norms = {t.name: np.array(t.data) for t in gguf.GGUFReader(stock["relu"]).tensors if "ffn_norm" in t.name}
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert [layer.predictor.rank for layer in view.layers] == [-(-rank // 32) * 32] * LAYERS
        for index in range(LAYERS):
            fc1, fc2 = (quantise(m, quant).astype(np.float32) for m in predictor(index, rank))
            scores = np.maximum(h @ fc1.T, 0) @ fc2.T
            x = h / np.sqrt(np.mean(h**2, axis=1, keepdims=True)) * norms[f"blk.{index}.ffn_norm.weight"]
            wrong = selected(view, index, x) != (scores >= 0)
            # fc1 divided by the norm's weights is rounded to half precision: scores near zero may fall either way
            assert np.abs(scores[wrong]).max(initial=0) < 0.005 * scores.std()
            assert wrong.mean() < 0.002


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_quantised_predictors_keep_fc2(tmp_path, stock, quant):
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], quant)
    convert(pwri, tmp_path / "s.gguf")
    stored = {t.name: t.data for t in gguf.GGUFReader(as_gguf(pwri)).tensors}
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        p = view.layers[0].predictor
        assert view.file.data(p.b_tensor.name) == stored["blk.0.fc2.weight"].tobytes()
        assert p.a_tensor.type == quants.Q8_0


@pytest.mark.parametrize("architecture", ACTIVATION)
def test_predicted_output(tmp_path, stock, architecture):
    """What is run is the model with the neurons that the predictors name, and no others."""
    activation = ACTIVATION[architecture]
    pwri = write_pwri(tmp_path / "p.gguf", stock[activation], "F32", architecture=architecture)
    convert(pwri, tmp_path / "s.gguf")
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        predicted = Reference(stock[activation], activation, keep=lambda layer, x, h: selected(view, layer, x))
        expected = predicted.logits(TOKENS)
    exact = Reference(stock[activation], activation).logits(TOKENS)
    assert np.abs(expected - exact).max() > 0.5 * exact.std()  # the predictors are random: it must show
    # A score may be so close to zero that the order of additions decides: that changes few tokens, and little.
    off = np.abs(run(tmp_path / "s.gguf") - expected).max(axis=1) / exact.std()
    assert np.quantile(off, 0.9) < 1e-5 and off.max() < 0.3


def test_a_score_of_zero_counts_as_firing(tmp_path, stock):
    """Where no hidden unit fires, PowerInfer (scores below the threshold are skipped) computes every neuron."""
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F32")
    convert(pwri, tmp_path / "s.gguf")
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert selected(view, 0, np.zeros((1, N_EMBD), np.float32)).all()
    assert 0 < ZERO_FIRES < 1e-20


def test_thresholds_of_predictors(tmp_path, stock):
    """Above zero they are replaced by zero, which selects more; below zero the predictors cannot be carried over."""
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F16", threshold=0.25)
    assert convert(pwri, tmp_path / "s.gguf").mode == "predict"
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F16", threshold=-0.25)
    report = convert(pwri, tmp_path / "s.gguf")
    assert report.mode == "exact"
    assert "predictors were left out" in report.notes[0] and "sparse_threshold is -0.25" in report.notes[0]


def test_files_without_predictors_and_with_gpu_splits(tmp_path, stock):
    def no_predictors(name, values):
        return None if ".fc" in name else (name, values)

    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F16", change=no_predictors, gpu_split=True)
    assert convert(pwri, tmp_path / "s.gguf").mode == "exact"
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert not any("gpu" in name or ".fc" in name for name in view.file.tensors)


def test_the_first_files_were_called_gguf(tmp_path, stock):
    old = write_pwri(tmp_path / "p.gguf", stock["relu"], "F16", magic=b"GGUF")
    with open_source(old) as file:
        assert isinstance(file, PowerInferFile) and file.predicted_layers == [0, 1]
    assert convert(old, tmp_path / "s.gguf").mode == "predict"


# ---- bad input ---------------------------------------------------------------------------------------------


def test_other_commands_say_what_it_is(tmp_path, stock):
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F16")
    with pytest.raises(FormatError, match="PowerInfer model.*powerinfer convert"):
        inspect(pwri)


@pytest.mark.parametrize(
    ("architecture", "reason"), [("falcon", "GELU"), ("opt", "no such"), ("mpt", "no sparse graph")]
)
def test_architectures_that_stock_cannot_run(tmp_path, architecture, reason):
    raw = Raw(magic=b"PWRI")
    raw.fields[0] = ("general.architecture", struct.pack("<I", 8) + string(architecture))
    (tmp_path / "p.gguf").write_bytes(raw.encode())
    with pytest.raises(ConversionError, match=f"p.gguf: general.architecture: .*{architecture}.*{reason}"):
        convert(tmp_path / "p.gguf", tmp_path / "s.gguf")
    assert not (tmp_path / "s.gguf").exists()


def drop(target: str) -> Callable:
    return lambda name, values: None if name == target else (name, values)


def reshape(target: str, *cut: slice) -> Callable:
    return lambda name, values: (name, np.ascontiguousarray(values[cut]) if name == target else values)


def rename(target: str, to: str) -> Callable:
    return lambda name, values: (to if name == target else name, values)


def poison(target: str, value: float) -> Callable:
    def change(name, values):
        values = values.copy()
        if name == target:
            values.flat[7] = value
        return name, values

    return change


HALF = slice(0, N_EMBD // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blk.1.fc2.weight"), "tensor blk.1.fc2.weight: is missing"),
        (drop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight: is missing"),
        (drop("blk.1.ffn_down_t.weight"), "blk.1.fc1.weight: is a predictor, but blk.1.ffn_down_t.weight is missing"),
        (drop("blk.0.ffn_norm.weight"), "tensor blk.0.ffn_norm.weight: is missing"),
        (reshape("blk.0.ffn_down_t.weight", HALF), r"shape of tensor blk.0.ffn_down_t.weight: \[256, 128\], expected"),
        (reshape("blk.0.fc1.weight", slice(None), HALF), r"shape of tensor blk.0.fc1.weight: \[128, 64\], expected"),
        (reshape("blk.0.fc2.weight", HALF), r"shape of tensor blk.0.fc2.weight: \[64, 128\], expected"),
        (poison("blk.0.ffn_norm.weight", 0.0), "tensor blk.0.ffn_norm.weight: has weights of zero"),
        (poison("blk.0.fc2.weight", np.nan), "tensor blk.0.fc2.weight: has values that are not finite"),
        (rename("blk.0.attn_q.weight", "blk.0.ffn_down.weight"), "ffn_down_t.weight: is present beside"),
    ],
)
def test_broken_files(tmp_path, stock, change, message):
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "F32", change=change)
    with pytest.raises(FormatError, match=f"p.gguf: .*{message}"):
        convert(pwri, tmp_path / "s.gguf")
    assert not (tmp_path / "s.gguf").exists()


def test_nothing_to_import(tmp_path):
    (tmp_path / "p.gguf").write_bytes(Raw(magic=b"PWRI").encode())
    with pytest.raises(FormatError, match="no blk.N.ffn_down_t.weight"):
        convert(tmp_path / "p.gguf", tmp_path / "s.gguf")


def test_down_types(tmp_path, stock):
    pwri = write_pwri(tmp_path / "p.gguf", stock["relu"], "Q8_0")
    with pytest.raises(ConversionError, match="ffn_down_t.weight is not blocked along neurons"):
        convert(pwri, tmp_path / "s.gguf", down_type="i8")
    report = convert(pwri, tmp_path / "s.gguf", down_type="q4_0")
    assert len(report.requantised) == LAYERS
    assert all(0.01 < layer.relative_rms < 0.2 for layer in report.layers)
    assert convert(pwri, tmp_path / "s.gguf", down_type="same").requantised == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<If", 6, np.nan), "is nan, expected a finite f32"),
        (struct.pack("<II", 4, 1), "has type u32, expected a finite f32"),
    ],
)
def test_thresholds_that_are_none(tmp_path, value, message):
    raw = Raw(magic=b"PWRI")
    raw.fields.append(("powerinfer.sparse_threshold", value))
    (tmp_path / "p.gguf").write_bytes(raw.encode())
    with pytest.raises(FormatError, match=f"powerinfer.sparse_threshold: {message}"):
        open_source(tmp_path / "p.gguf")


def test_damaged_files_are_refused_with_a_sentence(tmp_path):
    """Every way to break a header: FormatError or ConversionError, nothing else."""
    stock = make(tmp_path / "m.gguf", "llama", n_embd=64, n_ff=64, n_head=2, n_layer=1, n_vocab=260)
    small = write_pwri(tmp_path / "p.gguf", stock, "F32", change=shrink)
    whole = small.read_bytes()
    with open_source(small) as file:
        end = file.header_end
        tensors = whole.index(b"token_embd.weight")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(4, end) if rng.random() < 0.3 else rng.integers(tensors, end))
            raw[at] = int(rng.integers(256))
        cut = len(raw) if rng.random() < 0.8 else int(rng.integers(4, len(raw)))
        small.write_bytes(raw[:cut])
        try:
            with open_source(small) as file:
                for index in file.predicted_layers:
                    file.predictor(index)
        except (FormatError, ConversionError):
            refused += 1
    assert 200 < refused < 400


def shrink(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Predictors for an FFN of 64 neurons."""
    if name.endswith("fc1.weight"):
        return name, np.ascontiguousarray(values[:, :64])
    return name, np.ascontiguousarray(values[:64]) if name.endswith("fc2.weight") else values
