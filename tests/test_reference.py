"""The numpy reference: against stock llama.cpp where stock's graph is right, against plain loops elsewhere.

Stock runs with float32 weights and a float32 KV cache here, so that both compute the same thing: what is left
is the order of float32 sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from llama_cpp import GGML_TYPE_F32, Llama

from powerinfer_ext.reference import ACTIVATIONS, Reference

FAMILIES = {
    "llama": {"arch": "llama"},
    "llama-tied": {"arch": "llama", "tied": True},
    "llama-bias-rope": {"arch": "llama", "ffn_bias": True, "rope_factors": True},
    "llama-moe": {"arch": "llama", "n_expert": 4, "n_expert_used": 2, "n_ff": 256},
    "arcee": {"arch": "arcee", "density": 0.1},
    "arcee-rope": {"arch": "arcee", "rope_factors": True},
    "nemotron": {"arch": "nemotron"},
    "nemotron-bias": {"arch": "nemotron", "ffn_bias": True, "density": 0.2},
    "smallthinker": {"arch": "smallthinker", "n_ff": 256, "density": 0.2},
    "smallthinker-sigmoid": {"arch": "smallthinker", "n_ff": 256, "gating": 2},
    "smallthinker-softmax-weight": {"arch": "smallthinker", "n_ff": 256, "gating": 3},
    "smallthinker-softplus": {"arch": "smallthinker", "n_ff": 256, "gating": 4},
    "smallthinker-window": {"arch": "smallthinker", "n_ff": 256, "n_layer": 5, "sliding_window": 4096},
    "smallthinker-window-4-layers": {"arch": "smallthinker", "n_ff": 256, "n_layer": 4, "sliding_window": 1},
}
SMALL = {"n_embd": 64, "n_ff": 96, "n_head": 2, "n_head_kv": 1, "n_vocab": 260}  # for the plain loops


def some_tokens(n: int, n_vocab: int = 512) -> np.ndarray:
    return np.random.default_rng(7).integers(0, n_vocab, n)


def stock_logits(path: Path, tokens: np.ndarray, *, step: int) -> np.ndarray:
    """Stock llama.cpp's logits [n_tokens, n_vocab], the tokens given `step` at a time."""
    llama = Llama(
        str(path),
        n_ctx=len(tokens),
        n_batch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    try:
        for i in range(0, len(tokens), step):
            llama.eval(tokens[i : i + step].tolist())
        return llama.scores[: len(tokens)].copy()
    finally:
        llama.close()


def mean_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the distributions, in nats."""
    p, q = (x.astype(np.float64) - x.max(axis=1, keepdims=True) for x in (p_logits, q_logits))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def assert_same(stock: np.ndarray, reference: np.ndarray) -> None:
    assert reference.dtype == np.float32 and reference.shape == stock.shape
    assert np.abs(stock - reference).max() < 1e-4 * stock.std()
    assert mean_kl(stock, reference) < 1e-9
    assert (stock.argmax(axis=1) == reference.argmax(axis=1)).all()


# -- against stock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_equals_stock_in_prefill_and_token_by_token(family: str, tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", seed=3, **FAMILIES[family])
    tokens = some_tokens(48)
    logits = Reference(path).logits(tokens)
    assert_same(stock_logits(path, tokens, step=48), logits)
    assert_same(stock_logits(path, tokens, step=1), logits)


def test_reference_equals_stock_beyond_the_sliding_window(tmp_path: Path) -> None:
    path = tiny_models.make(
        tmp_path / "m.gguf", "smallthinker", sliding_window=4096, **(SMALL | {"n_head": 1, "n_ff": 32})
    )
    tokens = some_tokens(4160, 260)
    assert_same(stock_logits(path, tokens, step=512)[4032:], Reference(path).logits(tokens)[4032:])


# Stock rounds activations to the type its kernels take (float16, bfloat16, 8 bits); the reference does not.
@pytest.mark.parametrize(
    ("quant", "kl"),
    [("F16", 2e-6), ("BF16", 1e-4), *((q, 2e-3) for q in ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"))],
)
def test_reference_dequantises_every_type(quant: str, kl: float, tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "arcee", quant=quant)
    tokens = some_tokens(48)
    assert mean_kl(stock_logits(path, tokens, step=48), Reference(path).logits(tokens)) < kl


# -- against loops: one token, so that attention is its own value and rope does nothing ---------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


LOOP_FFN: dict[str, Callable[[float, float], float]] = {
    "relu": lambda gate, up: max(gate, 0) * up,
    "relu2": lambda gate, up: max(gate, 0) ** 2 * up,
    "drelu": lambda gate, up: max(gate, 0) * max(up, 0),
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
}


def loop_ffn(
    x: list[float], gate: list, up: list, down: list, biases: list[list], activation: str
) -> list[float]:
    """One gated FFN in float64, neuron by neuron. gate, up: a row per neuron; down: a row per channel."""
    gate_bias, up_bias, down_bias = biases
    out = list(down_bias)
    for i in range(len(gate)):
        g = gate_bias[i] + sum(a * b for a, b in zip(gate[i], x, strict=True))
        u = up_bias[i] + sum(a * b for a, b in zip(up[i], x, strict=True))
        h = LOOP_FFN[activation](g, u)
        for channel in range(len(out)):
            out[channel] += h * down[channel][i]
    return out


def loop_logits(path: Path, token: int, activation: str) -> np.ndarray:
    """float64 logits [n_vocab] of a tiny `llama` after this one token, FFNs by `loop_ffn`."""
    tensors = gguf.GGUFReader(path).tensors
    w = {t.name: t.data.reshape([*reversed(t.shape.tolist())]).astype(np.float64) for t in tensors}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + 1e-5) * w[name]

    x = w["token_embd.weight"][token]
    layer = 0
    while (b := f"blk.{layer}.") + "attn_norm.weight" in w:
        value = w[b + "attn_v.weight"] @ norm(x, b + "attn_norm.weight")
        x = x + w[b + "attn_output.weight"] @ np.tile(value, 2)  # two query heads share the one value head
        h = norm(x, b + "ffn_norm.weight")
        for share, suffix, pick in experts_of(w, b, h):
            matrices = [pick(w[f"{b}ffn_{m}{suffix}.weight"]).tolist() for m in ("gate", "up", "down")]
            sizes = {"gate": 96, "up": 96, "down": 64}
            biases = [w.get(f"{b}ffn_{m}.bias", np.zeros(n)).tolist() for m, n in sizes.items()]
            x = x + share * np.array(loop_ffn(h.tolist(), *matrices, biases, activation))
        layer += 1
    return w["output.weight"] @ norm(x, "output_norm.weight")


def experts_of(w: dict, block: str, h: np.ndarray) -> list[tuple[float, str, Callable]]:
    """(weight, tensor suffix, how to take it out of the tensor): the dense FFN, or the best two experts."""
    if block + "ffn_gate_inp.weight" not in w:
        return [(1.0, "", lambda m: m)]
    scores = np.exp(w[block + "ffn_gate_inp.weight"] @ h)
    best = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
    total = sum(scores[e] for e in best)
    return [(scores[e] / total, "_exps", lambda m, e=e: m[e]) for e in best]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [{}, {"ffn_bias": True}, {"n_expert": 3, "n_expert_used": 2}], ids=str)
def test_every_gated_activation_equals_the_loops(activation: str, kind: dict, tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "llama", density=0.4, **SMALL, **kind)
    reference = Reference(path, activation)
    for token in (0, 17):
        expected = loop_logits(path, token, activation)
        np.testing.assert_allclose(reference.logits([token])[0], expected, atol=2e-5 * expected.std())


# -- choosing the activation, counting ---------------------------------------------------------------------


def test_the_activation_comes_from_the_argument_else_the_file_else_the_architecture(tmp_path: Path) -> None:
    plain = tiny_models.make(tmp_path / "plain.gguf", "llama", **SMALL)
    hinted = tiny_models.make(tmp_path / "hinted.gguf", "llama", hint_activation="drelu", **SMALL)
    assert Reference(plain).activation == "silu"
    assert Reference(hinted).activation == "drelu"
    assert Reference(hinted, "relu").activation == "relu"
    assert Reference(tiny_models.make(tmp_path / "s.gguf", "smallthinker", **SMALL)).activation == "relu"
    assert Reference(tiny_models.make(tmp_path / "a.gguf", "arcee", **SMALL)).activation == "relu2"


def test_activity_is_the_share_of_firing_neurons(tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "llama", ffn_bias=True, density=0.3, **SMALL)
    tokens = some_tokens(40, 260)
    activity = {}
    for activation in ("relu", "drelu", "silu"):
        reference = Reference(path, activation)
        assert np.isnan(reference.ffn_activity).all()
        reference.logits(tokens[:20])
        reference.logits(tokens[20:])
        activity[activation] = reference.ffn_activity
        reference.reset_activity()
        assert np.isnan(reference.ffn_activity).all()
    assert activity["relu"].shape == (2,)
    np.testing.assert_allclose(activity["relu"], 0.3, atol=0.06)
    np.testing.assert_allclose(activity["drelu"], 0.15, atol=0.05)  # up is positive half of the time
    assert (activity["silu"] == 1).all()


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    reference = Reference(tiny_models.make(tmp_path / "m.gguf", "nemotron"))
    tokens = some_tokens(40)
    np.testing.assert_allclose(reference.logits(tokens)[:15], reference.logits(tokens[:15]), atol=1e-4)


# -- what it refuses ---------------------------------------------------------------------------------------


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "qwen3moe", **SMALL)
    with pytest.raises(ValueError, match="m.gguf.*'qwen3moe'.*llama, arcee, nemotron, smallthinker"):
        Reference(path)


@pytest.mark.parametrize(
    ("arch", "activation", "message"),
    [
        ("arcee", "drelu", "ungated FFN of 'arcee' computes relu2"),
        ("llama", "tanh", "unknown activation 'tanh'"),
    ],
)
def test_impossible_activation_is_refused(arch: str, activation: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"m.gguf.*{message}"):
        Reference(tiny_models.make(tmp_path / "m.gguf", arch, **SMALL), activation)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF" + bytes(40)])
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="m.gguf"):
        Reference(tmp_path / "m.gguf")


def rewritten(path: Path, *, drop: str = "", tensor: str = "", **keys: int | str | float) -> Path:
    """A copy of a GGUF's single-valued keys and tensors, but for the key or tensor `drop`, with `keys` set
    (__ for a dot) and a tensor named `tensor` added."""
    reader = gguf.GGUFReader(path)
    out = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    fields = {k.replace("__", "."): v for k, v in keys.items()}
    for f in reader.fields.values():
        if (
            f.types
            and f.types[0] != gguf.GGUFValueType.ARRAY
            and f.name not in (drop, "general.architecture")
        ):
            fields.setdefault(f.name, f.contents())
    for name, value in fields.items():
        kind = {int: "UINT32", float: "FLOAT32", str: "STRING", bool: "BOOL"}[type(value)]
        if not name.startswith("GGUF."):
            writer.add_key_value(name, value, gguf.GGUFValueType[kind])
    for t in reader.tensors:
        if t.name != drop:
            writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    if tensor:
        writer.add_tensor(tensor, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"powerinfer__version": 1}, "is a sparse-GGUF"),
        ({"drop": "llama.block_count"}, "'llama.block_count' is missing"),
        ({"drop": "blk.1.ffn_up.weight"}, "'blk.1.ffn_up.weight' is missing"),
        ({"tensor": "blk.0.attn_q_norm.weight"}, "'blk.0.attn_q_norm.weight' has no place"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__attention__value_length": 16}, "different length"),
    ],
    ids=lambda c: " ".join(c) if isinstance(c, dict) else "",
)
def test_what_is_not_implemented_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    path = rewritten(tiny_models.make(tmp_path / "m.gguf", "llama", **SMALL), **change)
    with pytest.raises(ValueError, match=f"changed.gguf.*{message}"):
        Reference(path)


def test_linear_rope_scaling_is_honoured(tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "llama")
    tokens = some_tokens(48)
    changed = rewritten(path, tokenizer__ggml__model="none", llama__rope__scaling__factor=4.0)
    logits = Reference(changed).logits(tokens)
    assert_same(stock_logits(changed, tokens, step=48), logits)
    assert np.abs(logits - Reference(path).logits(tokens)).max() > 0.1


@pytest.mark.parametrize("gating", [0, 5])
def test_unknown_gating_function_is_refused(gating: int, tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", "smallthinker", gating=gating, **SMALL)
    with pytest.raises(ValueError, match=f"expert_gating_func is {gating}"):
        Reference(path)


@pytest.mark.parametrize("tokens", [[], [260], [-1], [[1, 2]]])
def test_bad_tokens_are_refused(tokens: list, tmp_path: Path) -> None:
    reference = Reference(tiny_models.make(tmp_path / "m.gguf", "llama", **SMALL))
    with pytest.raises(ValueError, match="ids from 0 to 259"):
        reference.logits(tokens)


# -- the tiny models themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K"])  # the others: see the dequantisation test
@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_stock_decodes_every_tiny_model(arch: str, quant: str, tmp_path: Path) -> None:
    path = tiny_models.make(tmp_path / "m.gguf", arch, quant=quant, n_ff=256)
    logits = stock_logits(path, some_tokens(12), step=12)
    assert np.isfinite(logits).all()
    assert 2 < logits.std(axis=1).mean() < 4


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("arch", ["arcee", "nemotron", "smallthinker"])
def test_tiny_models_have_the_density_asked_for(arch: str, density: float, tmp_path: Path) -> None:
    reference = Reference(tiny_models.make(tmp_path / "m.gguf", arch, n_ff=256, n_layer=4, density=density))
    reference.logits(some_tokens(64))
    assert (np.abs(reference.ffn_activity / density - 1) < 0.35).all()


def test_the_tiny_vocabulary_encodes_and_decodes(tmp_path: Path) -> None:
    llama = Llama(str(tiny_models.make(tmp_path / "m.gguf", "llama")), n_ctx=64, verbose=False)
    text = "the cat said: (é, 猫) = 1\n".encode()
    tokens = llama.tokenize(text, add_bos=False)
    assert len(tokens) < len(text) and llama.detokenize(tokens) == text
    assert llama.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=2)["choices"]
    llama.close()
