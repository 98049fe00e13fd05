"""Whole models through stock llama.cpp's scheduler and our backend: against stock itself where its graph is right, and
against the numpy reference where it is not (activation overrides)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest
import tiny_models

from gguf_tools import GGUFFile, convert
from powerinfer_ext import Llama
from powerinfer_ext.reference import Reference

SETTINGS = {
    "n_ctx": 256,
    "n_batch": 256,
    "logits_all": True,
    "verbose": False,
    "n_threads": 2,
    "n_threads_batch": 2,
    "type_k": 0,
    "type_v": 0,
}  # an F16 KV cache would amplify rounding
TOKENS = np.random.default_rng(0).integers(3, 250, 48).tolist()
NATIVE = ["arcee", "nemotron", "smallthinker", "nemotron_h_moe"]
QUANTS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(want: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence in nats."""
    p, q = log_softmax(want), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def logits(llama: llama_cpp.Llama, tokens: list[int] = TOKENS, step: int | None = None) -> np.ndarray:
    """Teacher-forced, `step` tokens at a time (None: all at once)."""
    llama.reset()
    for i in range(0, len(tokens), step or len(tokens)):
        llama.eval(tokens[i : i + (step or len(tokens))])
    return llama.scores[: len(tokens)].copy()


def make_sparse(folder: Path, arch: str, **options: Any) -> tuple[Path, Path]:
    """A tiny model and its conversion; conversion options start with convert_."""
    ours = {
        key.removeprefix("convert_"): value for key, value in options.items() if key.startswith("convert_")
    }
    theirs = {key: value for key, value in options.items() if not key.startswith("convert_")}
    dense = tiny_models.make(folder / "dense.gguf", arch, **theirs)
    sparse = folder / "model.sparse.gguf"
    convert(dense, sparse, **ours)
    return dense, sparse


# As near to stock as stock's prefill is to its own token-by-token decode: what differs is the order of sums.
BOUND = {"F32": 1e-9, "F16": 1e-6}
LOSSLESS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
)  # the others' down is re-quantised, which is not what is tested here


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("arch", NATIVE)
def test_natively_sparse_models_agree_with_stock(tmp_path: Path, arch: str, quant: str) -> None:
    down_type = "auto" if quant in LOSSLESS else "f32"
    dense, sparse = make_sparse(tmp_path, arch, quant=quant, density=0.15, convert_down_type=down_type)
    stock, ours = llama_cpp.Llama(str(dense), **SETTINGS), Llama(sparse, **SETTINGS)
    want = logits(stock)
    assert divergence(want, logits(ours)) < BOUND.get(quant, 1e-5)
    assert divergence(logits(stock, step=1), logits(ours, step=1)) < BOUND.get(quant, 1e-5)
    stats = ours.sparse_stats()
    assert 0.05 < stats["density"] < 0.35
    assert all(layer["selected"] > 0 for layer in stats["layers"])


# Quantised mixtures are left out: rounding flips their routers, the reference does not round, and nothing can be told.
@pytest.mark.parametrize(("experts", "quant"), [(0, "F32"), (0, "Q8_0"), (0, "Q4_K"), (4, "F32"), (4, "F16")])
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
def test_overridden_activations_agree_with_the_reference(
    tmp_path: Path, activation: str, quant: str, experts: int
) -> None:
    dense, sparse = make_sparse(
        tmp_path,
        "llama",
        quant=quant,
        density=0.2,
        hint_activation=activation,
        n_expert=experts,
        convert_down_type="f32",
    )
    want = Reference(dense).logits(np.array(TOKENS))
    ours = Llama(sparse, **SETTINGS)
    bound = {"F32": 1e-6, "F16": 1e-5}.get(quant, 5e-3)  # the reference does not round activations to 8 bits
    assert divergence(want, logits(ours)) < bound
    assert divergence(want, logits(ours, step=1)) < bound
    stock = llama_cpp.Llama(str(dense), **SETTINGS)
    assert divergence(want, logits(stock)) > 0.01  # or the test could not tell


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_smooth_activations_run_densely_and_right(tmp_path: Path, arch: str) -> None:
    dense, sparse = make_sparse(tmp_path, arch, quant="F32")
    ours = Llama(sparse, **SETTINGS)
    assert divergence(logits(llama_cpp.Llama(str(dense), **SETTINGS)), logits(ours)) < 1e-9
    assert ours.sparse_stats()["density"] > 0.99


@pytest.mark.parametrize(("arch", "activation"), [("llama", "drelu"), ("llama", None), ("nemotron", None)])
def test_ffn_biases_stay_with_their_neurons(tmp_path: Path, arch: str, activation: str | None) -> None:
    rng = np.random.default_rng(3)
    order = {layer: rng.permutation(512).astype(np.int32) for layer in range(2)}
    dense, sparse = make_sparse(
        tmp_path,
        arch,
        quant="F32",
        density=0.3,
        ffn_bias=True,
        hint_activation=activation,
        convert_order=order,
    )
    want = Reference(dense).logits(np.array(TOKENS))
    assert divergence(want, logits(Llama(sparse, **SETTINGS))) < 1e-6


@pytest.mark.parametrize("arch", NATIVE)
def test_any_ubatch_size_gives_the_same_logits(tmp_path: Path, arch: str) -> None:
    _, sparse = make_sparse(tmp_path, arch, quant="F32", density=0.15)
    tokens = np.random.default_rng(1).integers(3, 250, 140).tolist()
    want = None
    for n_ubatch in (140, 1, 2, 3, 31, 32, 33, 64, 100):
        ours = Llama(sparse, **{**SETTINGS, "n_ubatch": n_ubatch})
        got = logits(ours, tokens)
        want = got if want is None else want
        assert divergence(want, got) < 1e-9, n_ubatch


def test_a_stored_order_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for arch, shape in (
        ("arcee", (512,)),
        ("llama", (512,)),
        ("smallthinker", (4, 512)),
        ("nemotron_h_moe", (4, 512)),
    ):
        folder = tmp_path / arch
        folder.mkdir()
        dense = tiny_models.make(folder / "dense.gguf", arch, quant="F32", density=0.2)
        plain, shuffled = folder / "plain.gguf", folder / "shuffled.gguf"
        report = convert(dense, plain)
        del report
        with GGUFFile.open(plain) as file:
            layers = [int(name.split(".")[1]) for name in file.tensors if "ffn_bundle" in name]
        orders = {
            layer: rng.permuted(np.broadcast_to(np.arange(512), shape), axis=-1).astype(np.int32)
            for layer in layers
        }
        convert(dense, shuffled, order=orders)
        want, got = (logits(Llama(path, **SETTINGS)) for path in (plain, shuffled))
        assert divergence(want, got) < 1e-9, arch


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_counts_change_only_the_rounding(tmp_path: Path, threads: int) -> None:
    _, sparse = make_sparse(tmp_path, "smallthinker", quant="F32", density=0.2)
    want = logits(Llama(sparse, **SETTINGS))
    other = Llama(sparse, **{**SETTINGS, "n_threads": threads, "n_threads_batch": threads})
    assert divergence(want, logits(other)) < 1e-9
    assert divergence(want, logits(other, step=1)) < 1e-9


def test_dense_mode_is_the_reference_path(tmp_path: Path) -> None:
    _, sparse = make_sparse(tmp_path, "smallthinker", quant="Q8_0", density=0.2)
    exact, dense = (Llama(sparse, sparse_mode=mode, **SETTINGS) for mode in ("exact", "dense"))
    assert divergence(logits(exact), logits(dense)) < 1e-9
    touched = [llama.sparse_stats()["layers"][0]["touched"] for llama in (exact, dense)]
    assert touched[0] < touched[1]


def evaluate_with_callback(path: Path, load: Callable[..., Any], wanted: str) -> tuple[np.ndarray, set[str]]:
    """Logits of TOKENS while an eval callback asks for every node whose name contains `wanted`."""
    seen = set()

    @bindings.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, _: Any) -> bool:
        name = ctypes.string_at(tensor + 256, 64).split(b"\0")[0].decode()
        if ask:
            return wanted in name
        seen.add(name)
        return True

    default = bindings.llama_context_default_params

    def with_callback() -> Any:
        params = default()
        params.cb_eval = callback
        return params

    bindings.llama_context_default_params = with_callback
    try:
        llama = load(str(path), **SETTINGS)
    finally:
        bindings.llama_context_default_params = default
    return logits(llama), seen


@pytest.mark.parametrize("arch", ["llama", "smallthinker", "arcee"])
@pytest.mark.parametrize("wanted", ["ffn", "ffn_up", "ffn_moe_up", "glu"])
def test_an_eval_callback_breaks_the_chain_but_not_the_answer(tmp_path: Path, arch: str, wanted: str) -> None:
    hint = "drelu" if arch == "llama" else None
    dense, sparse = make_sparse(tmp_path, arch, quant="F32", density=0.2, hint_activation=hint)
    want = Reference(dense).logits(np.array(TOKENS))
    got, seen = evaluate_with_callback(sparse, Llama, wanted)
    assert seen or (arch, wanted) in {
        ("arcee", "ffn_moe_up"),
        ("arcee", "glu"),
        ("llama", "ffn_moe_up"),
        ("smallthinker", "ffn_up"),
    }
    assert divergence(want, got) < 1e-6


def write_lora(path: Path, arch: str, targets: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    """A LoRA adapter of rank 4; targets: tensor name -> shape of the weight in numpy order (experts, out, in)."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, (*experts, n_out, n_in) in targets.items():
        scale = 1 / np.sqrt(n_in)
        writer.add_tensor(
            f"{name}.lora_a", (rng.standard_normal((*experts, 4, n_in)) * scale).astype(np.float32)
        )
        writer.add_tensor(
            f"{name}.lora_b", (rng.standard_normal((*experts, n_out, 4)) * 0.2).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LORA_TARGETS = {
    "arcee": {"blk.0.ffn_up.weight": (512, 256), "blk.1.ffn_down.weight": (256, 512)},
    "llama": {
        "blk.0.ffn_up.weight": (512, 256),
        "blk.0.ffn_gate.weight": (512, 256),
        "blk.1.ffn_down.weight": (256, 512),
        "blk.0.attn_q.weight": (256, 256),
    },
    "smallthinker": {"blk.0.ffn_up_exps.weight": (4, 512, 256), "blk.1.ffn_down_exps.weight": (4, 256, 512)},
}


@pytest.mark.parametrize("arch", LORA_TARGETS)
def test_lora_adapters_on_ffn_weights(tmp_path: Path, arch: str) -> None:
    dense, sparse = make_sparse(tmp_path, arch, quant="F32", density=0.3)
    lora = str(write_lora(tmp_path / "lora.gguf", arch, LORA_TARGETS[arch]))
    stock = llama_cpp.Llama(str(dense), lora_path=lora, **SETTINGS)
    without = logits(llama_cpp.Llama(str(dense), **SETTINGS))
    ours = Llama(sparse, lora_path=lora, **SETTINGS)
    want = logits(stock)
    assert divergence(without, want) > 1e-3  # the adapter does something
    assert divergence(want, logits(ours)) < 1e-9
    assert divergence(want, logits(ours, step=1)) < 1e-9


def test_lora_with_an_overridden_activation(tmp_path: Path) -> None:
    """The adapter sits between up and GLU, so the chain does not match; the activation must still be the model's."""
    dense, sparse = make_sparse(tmp_path, "llama", quant="F32", density=0.3, hint_activation="drelu")
    targets = LORA_TARGETS["llama"]
    lora = write_lora(tmp_path / "lora.gguf", "llama", targets)
    adapter = gguf.GGUFReader(lora)
    parts = {tensor.name: np.array(tensor.data) for tensor in adapter.tensors}
    reference = Reference(dense)
    merged = merge_lora(dense, tmp_path / "merged.gguf", parts, list(targets))
    want = Reference(merged).logits(np.array(TOKENS))
    assert divergence(reference.logits(np.array(TOKENS)), want) > 1e-3
    got = logits(Llama(sparse, lora_path=str(lora), **SETTINGS))
    assert divergence(want, got) < 1e-6


def merge_lora(source: Path, output: Path, parts: dict[str, np.ndarray], names: list[str]) -> Path:
    """The source with W + B A in place of W (alpha = rank, so the scale is 1)."""
    data = bytearray(source.read_bytes())
    with GGUFFile.open(source) as file:
        for name in names:
            info = file.tensors[name]
            weight = np.frombuffer(file.data(name), np.float32).reshape(info.shape[::-1])
            merged = weight + parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
            data[info.offset : info.offset + info.nbytes] = merged.astype(np.float32).tobytes()
    output.write_bytes(data)
    return output


def test_lora_on_reordered_neurons_is_refused(tmp_path: Path) -> None:
    dense = tiny_models.make(tmp_path / "dense.gguf", "arcee", density=0.3)
    convert(dense, tmp_path / "model.gguf", order={0: np.arange(512, dtype=np.int32)[::-1].copy()})
    lora = write_lora(tmp_path / "lora.gguf", "arcee", {"blk.0.ffn_down.weight": (256, 512)})
    with pytest.raises(RuntimeError, match="LoRA"):
        Llama(tmp_path / "model.gguf", lora_path=str(lora), **SETTINGS)


def test_several_sequences_in_one_batch(tmp_path: Path) -> None:
    dense, sparse = make_sparse(tmp_path, "smallthinker", quant="F32", density=0.2)
    assert np.allclose(embeddings(llama_cpp.Llama, dense), embeddings(Llama, sparse), atol=1e-4)


def embeddings(cls: type, path: Path) -> np.ndarray:
    """Four texts at once: llama-cpp-python puts them into one batch as four sequences."""
    llama = cls(str(path), embedding=True, n_ctx=256, n_batch=256, verbose=False, pooling_type=1)
    return np.array(llama.embed(["one text", "another, longer text", "x", "and the last of them"]))


def test_saving_a_loaded_model_gives_the_source_back(tmp_path: Path) -> None:
    """llama_model_save_to_file reads every weight through our buffer type."""
    for arch, quant in (("llama", "Q8_0"), ("smallthinker", "F16"), ("arcee", "F32")):
        folder = tmp_path / arch
        folder.mkdir()
        dense, sparse = make_sparse(folder, arch, quant=quant, convert_down_type="f32")
        ours = Llama(sparse, **SETTINGS)
        saved = folder / "saved.gguf"
        bindings.llama_model_save_to_file(ours.model, str(saved).encode())
        with GGUFFile.open(dense) as source, GGUFFile.open(saved) as copy:
            for name in source.tensors:
                assert source.tensors[name].type == copy.tensors[name].type
                assert source.data(name) == copy.data(name), name
