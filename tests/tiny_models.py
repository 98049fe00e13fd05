"""Small random GGUF models that stock llama.cpp loads and decodes: the material of the tests.

The weights are random but well behaved: the residual stream keeps a standard deviation near one, attention
scores and router logits are spread, and the logits have a standard deviation of about three, so that a wrong
FFN shows.

The share of FFN neurons that fire can be set. Every token's embedding carries `N_CONST` constant channels (+1
and -1 by turns, so that LayerNorm's mean does not remove them) that no layer ever writes to; they pass every
norm, and a row of the deciding matrix (gate, or up when the FFN is not gated) that weighs them negatively has
a bias. They fill a whole quantisation block of 32, so a quantised bias does not coarsen the weights next to
it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quant_shape_to_byte_shape
from scipy.stats import norm as normal

from powerinfer_ext.loader import native as native_library

ARCHITECTURES = ("llama", "arcee", "nemotron", "smallthinker", "qwen3moe", "nemotron_h", "nemotron_h_moe")
QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")

N_CONST = 32  # constant channels of the residual stream
MAMBA = {"conv_kernel": 4, "state_size": 32, "group_count": 1, "time_step_rank": 4}  # nemotron_h layers
_UNGATED = ("arcee", "nemotron", "nemotron_h", "nemotron_h_moe")
_ALWAYS_MOE = ("smallthinker", "qwen3moe", "nemotron_h_moe")
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class _Shape:
    """Everything a layer needs to know, plus the random generator, the open writer and the storage type."""

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_expert: int
    n_expert_used: int
    quant: str
    density: float | None
    activation: str
    ffn_bias: bool
    rng: np.random.Generator
    writer: gguf.GGUFWriter
    head_dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.head_dim = self.n_embd // self.n_head

    def kind(self, layer: int) -> str:
        """What block `layer` holds: nemotron_h one thing per block, the others attention and FFN in each."""
        if not self.arch.startswith("nemotron_h"):
            return "both"
        return ("mamba", "ffn", "attention")[layer % 3]


def make(
    path: str | Path,
    arch: str,
    *,
    n_layer: int | None = None,
    n_embd: int = 256,
    n_ff: int = 512,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_vocab: int = 512,
    n_expert: int = 0,
    n_expert_used: int = 0,
    quant: str = "F32",
    seed: int = 0,
    density: float | None = None,
    ffn_bias: bool = False,
    hint_activation: str | None = None,
    tied: bool = False,
    sliding_window: int | None = None,
    gating: int = 1,
    rope_factors: bool = False,
) -> Path:
    """Write a random model of architecture `arch` to `path` and return the path.

    n_layer: 2 where None, 3 for `nemotron_h*`, whose blocks are mamba, FFN, attention by turns (stock
        llama.cpp aborts without one layer of each kind of memory).
    n_embd, n_ff: n_ff counts the neurons of the FFN, of each expert where there are experts. Multiples of 256
        where `quant` is a K type.
    n_expert: 0 makes `llama` dense; `smallthinker`, `qwen3moe` and `nemotron_h_moe` get 4 and use 2 of them.
    quant: type of the attention and FFN matrices; the embedding and the head have the same float type, or
        Q8_0 where `quant` is a block type; norms, routers and biases are F32.
    density: about this share of the neurons fires (about half where None).
    ffn_bias: bias vectors on up, gate and down (`llama` without experts, `nemotron`, `nemotron_h`).
    hint_activation: written as `powerinfer.activation`; the weights are scaled for it.
    tied: no separate output matrix.
    sliding_window, gating: `smallthinker` only; a window selects its sliding-window graph, gating is
        llama.cpp's number for softmax (1), sigmoid (2), softmax of the chosen (3), root of softplus (4).
    rope_factors: adds a `rope_freqs` tensor (`llama`, `arcee`).
    Raises ValueError where stock llama.cpp would refuse the combination.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no tiny model of architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if quant not in QUANTS:
        raise ValueError(f"no tiny model of type {quant!r}; known: {', '.join(QUANTS)}")
    if arch in _ALWAYS_MOE and n_expert == 0:
        n_expert, n_expert_used = 4, 2
    if n_expert and arch not in (*_ALWAYS_MOE, "llama"):
        raise ValueError(f"{arch} has no experts in llama.cpp")
    if ffn_bias and (n_expert or arch not in ("llama", "nemotron", "nemotron_h")):
        raise ValueError(f"{arch}{' with experts' if n_expert else ''} takes no FFN biases in llama.cpp")
    if tied and arch == "nemotron":
        raise ValueError("nemotron has no tied output matrix in llama.cpp")
    least = 3 if arch.startswith("nemotron_h") else 1
    n_layer = max(2, least) if n_layer is None else n_layer
    if n_layer < least:
        raise ValueError(f"{arch} needs {least} layers: mamba, FFN, attention")
    native = "relu2" if arch in _UNGATED else "relu" if arch == "smallthinker" else "silu"
    path = Path(path)
    writer = gguf.GGUFWriter(path, arch)
    s = _Shape(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_vocab=n_vocab,
        n_expert=n_expert,
        n_expert_used=n_expert_used or min(2, n_expert),
        quant=quant,
        density=density,
        activation=hint_activation or native,
        ffn_bias=ffn_bias,
        rng=np.random.default_rng(seed),
        writer=writer,
    )
    _write_metadata(s, hint_activation, sliding_window, gating)
    _write_vocabulary(writer, n_vocab)
    _write_tensors(s, tied, rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(s: _Shape, hint: str | None, sliding_window: int | None, gating: int) -> None:
    w = s.writer
    w.add_name(f"tiny {s.arch}")
    w.add_quantization_version(2)
    w.add_context_length(4096)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_head_count(s.n_head)
    kinds = [s.kind(layer) for layer in range(s.n_layer)]
    hybrid = s.arch.startswith("nemotron_h")
    w.add_head_count_kv([s.n_head_kv if k == "attention" else 0 for k in kinds] if hybrid else s.n_head_kv)
    w.add_feed_forward_length([s.n_ff if k == "ffn" else 0 for k in kinds] if hybrid else s.n_ff)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(s.head_dim // 2 if s.arch == "nemotron" else s.head_dim)
    w.add_layer_norm_eps(1e-5) if s.arch.startswith("nemotron") else w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(s.n_vocab)
    if s.n_expert:
        w.add_expert_count(s.n_expert)
        w.add_expert_used_count(s.n_expert_used)
        if s.arch != "llama":
            w.add_expert_feed_forward_length(s.n_ff)
    if s.arch == "nemotron_h_moe":
        w.add_expert_shared_count(1)
        w.add_expert_shared_feed_forward_length(s.n_ff)
        w.add_expert_weights_norm(True)
        w.add_expert_weights_scale(2.5)
    if hybrid:
        w.add_ssm_conv_kernel(MAMBA["conv_kernel"])
        w.add_ssm_inner_size(s.n_embd)
        w.add_ssm_state_size(MAMBA["state_size"])
        w.add_ssm_time_step_rank(MAMBA["time_step_rank"])
        w.add_ssm_group_count(MAMBA["group_count"])
    if s.arch == "smallthinker":
        w.add_uint32("smallthinker.expert_gating_func", gating)
        if sliding_window:
            w.add_sliding_window(sliding_window)
    if hint:
        w.add_string("powerinfer.activation", hint)


def _write_vocabulary(w: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level BPE (GPT-2's): 256 bytes, 3 specials, merges of two common letters until it is full."""
    if n_vocab < 259:
        raise ValueError(f"a vocabulary of {n_vocab} tokens cannot hold 256 bytes and 3 specials")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = "\u0120etaoinsrhldcumfpgwybvk(._),=:"  # U+0120 is the space in GPT-2's alphabet
    merges = [f"{a} {b}" for a in letters for b in letters][: n_vocab - 256 - len(specials)]
    tokens = list(_byte_alphabet()) + [m.replace(" ", "") for m in merges]
    filler = n_vocab - len(tokens) - len(specials)
    tokens += [f"<unused{i}>" for i in range(filler)] + specials
    types = [gguf.TokenType.NORMAL] * (256 + len(merges)) + [gguf.TokenType.UNUSED] * filler
    types += [gguf.TokenType.CONTROL] * len(specials)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(merges or ["t h"])  # llama.cpp insists on the key, and the writer on an entry
    w.add_bos_token_id(n_vocab - 3)
    w.add_eos_token_id(n_vocab - 1)
    w.add_add_bos_token(False)
    w.add_chat_template(_CHATML)


def _byte_alphabet() -> str:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order (openai/gpt-2, encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(spare)) for b in range(256))


def _write_tensors(s: _Shape, tied: bool, rope_factors: bool) -> None:
    head_type = s.quant if s.quant in ("F32", "F16", "BF16") else "Q8_0"
    embedding = s.rng.standard_normal((s.n_vocab, s.n_embd), dtype=np.float32)
    embedding[:, :N_CONST] = _constants()
    _store(s, "token_embd.weight", embedding, head_type)
    if rope_factors:
        _store(s, "rope_freqs.weight", s.rng.uniform(1, 8, s.head_dim // 2).astype(np.float32), "F32")
    written = 0.0  # variance that the layers have added to the residual stream so far
    for layer in range(s.n_layer):
        kind = s.kind(layer)
        if kind in ("attention", "both"):
            _attention(s, layer)
            written += 0.02
        if kind == "mamba":
            _mamba(s, layer)
            written += 0.02
        if kind in ("ffn", "both"):
            _ffn(s, layer, float(np.sqrt((s.n_embd - N_CONST) * (1 + written))))
            written += 0.25
    output_norm = 1 + 0.1 * s.rng.standard_normal(s.n_embd, dtype=np.float32)
    if tied:
        # the embedding's entries are of size one; random signs, or every token would predict itself
        output_norm *= s.rng.choice(np.float32([-3, 3]), s.n_embd) / np.float32(np.sqrt(s.n_embd))
        output_norm[:N_CONST] = 0  # else the constants would add the same large number to every logit
    _store(s, "output_norm.weight", output_norm, "F32")
    if s.arch == "nemotron":
        _store(s, "output_norm.bias", 0.05 * s.rng.standard_normal(s.n_embd, dtype=np.float32), "F32")
    if not tied:
        _store(s, "output.weight", _matrix(s, s.n_vocab, s.n_embd, gain=3.0), head_type)


def _constants() -> np.ndarray:
    return np.where(np.arange(N_CONST) % 2, -1, 1).astype(np.float32)


def _matrix(s: _Shape, rows: int, cols: int, *, gain: float = 1.0, reads: bool = True) -> np.ndarray:
    """[rows, cols] float32 with outputs of standard deviation `gain` for inputs of one.

    reads: it reads the residual stream, so it must ignore the constant channels (columns)."""
    m = s.rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(gain / np.sqrt(cols))
    if reads:
        m[:, :N_CONST] = 0
    return m


def _writes(m: np.ndarray) -> np.ndarray:
    """The matrix with the rows that write to the constant channels of the residual stream set to zero."""
    m[..., :N_CONST, :] = 0
    return m


def _norm(s: _Shape, name: str) -> None:
    weight = 1 + 0.1 * s.rng.standard_normal(s.n_embd, dtype=np.float32)
    weight[:N_CONST] = 1
    _store(s, f"{name}.weight", weight, "F32")
    if s.arch == "nemotron":
        bias = 0.05 * s.rng.standard_normal(s.n_embd, dtype=np.float32)
        bias[:N_CONST] = 0
        _store(s, f"{name}.bias", bias, "F32")


def _attention(s: _Shape, layer: int) -> None:
    b = f"blk.{layer}"
    _norm(s, f"{b}.attn_norm")
    kv = s.n_head_kv * s.head_dim
    _store(s, f"{b}.attn_q.weight", _matrix(s, s.n_embd, s.n_embd, gain=1.5), s.quant)
    _store(s, f"{b}.attn_k.weight", _matrix(s, kv, s.n_embd, gain=1.5), s.quant)
    _store(s, f"{b}.attn_v.weight", _matrix(s, kv, s.n_embd), s.quant)
    out = _matrix(s, s.n_embd, s.n_embd, gain=0.4, reads=False)
    _store(s, f"{b}.attn_output.weight", _writes(out), s.quant)
    if s.arch == "qwen3moe":
        for name in ("attn_q_norm", "attn_k_norm"):
            _store(s, f"{b}.{name}.weight", s.rng.uniform(0.8, 1.5, s.head_dim).astype(np.float32), "F32")


def _ffn(s: _Shape, layer: int, residual_length: float) -> None:
    """The FFN of a block and the norm before it. residual_length: |x| without the constant channels."""
    b = f"blk.{layer}"
    gated = s.arch not in _UNGATED
    _norm(s, f"{b}.attn_norm" if s.kind(layer) == "ffn" else f"{b}.ffn_norm")
    z = _threshold(s)
    gain = 0.5 / _activation_rms(s.activation, gated, z)

    def deciding(n_ff: int) -> np.ndarray:
        m = _matrix(s, n_ff, s.n_embd)
        m[:, :N_CONST] = -_constants() * np.float32(z * residual_length / np.sqrt(s.n_embd) / N_CONST)
        return m

    def up(n_ff: int) -> np.ndarray:
        return _matrix(s, n_ff, s.n_embd) if gated else deciding(n_ff)

    def down(n_ff: int) -> np.ndarray:
        return _writes(_matrix(s, s.n_embd, n_ff, gain=gain, reads=False))

    if not s.n_expert:
        if gated:
            _store(s, f"{b}.ffn_gate.weight", deciding(s.n_ff), s.quant)
        _store(s, f"{b}.ffn_up.weight", up(s.n_ff), s.quant)
        _store(s, f"{b}.ffn_down.weight", down(s.n_ff), s.quant)
        if s.ffn_bias:
            _ffn_biases(s, b, gated)
        return
    router = _matrix(s, s.n_expert, s.n_embd, gain=1.5)
    _store(s, f"{b}.ffn_gate_inp.weight", router, "F32")

    def stack(one: Callable[[int], np.ndarray]) -> np.ndarray:
        return np.stack([one(s.n_ff) for _ in range(s.n_expert)])

    if gated:
        _store(s, f"{b}.ffn_gate_exps.weight", stack(deciding), s.quant)
    _store(s, f"{b}.ffn_up_exps.weight", stack(up), s.quant)
    _store(s, f"{b}.ffn_down_exps.weight", stack(down), s.quant)
    if s.arch == "nemotron_h_moe":
        _store(s, f"{b}.exp_probs_b.bias", 0.2 * s.rng.standard_normal(s.n_expert, dtype=np.float32), "F32")
        _store(s, f"{b}.ffn_up_shexp.weight", up(s.n_ff), s.quant)
        _store(s, f"{b}.ffn_down_shexp.weight", down(s.n_ff), s.quant)


def _threshold(s: _Shape) -> float:
    """How many standard deviations the deciding product must exceed so that `density` of the neurons fires.

    With drelu the up product must be positive as well, which is so for half of the neurons."""
    if s.density is None:
        return 0.0
    share = min(2 * s.density, 0.999) if s.activation == "drelu" else s.density
    return float(normal.isf(share))


@cache
def _activation_rms(activation: str, gated: bool, z: float) -> float:
    """Root mean square of the activated product of a unit normal gate shifted by -z and a unit normal up."""
    gate, up = np.random.default_rng(1).standard_normal((2, 20000))
    relu = np.maximum(gate - z, 0)
    shape = {"relu": relu, "drelu": relu, "relu2": relu**2, "silu": (gate - z) / (1 + np.exp(z - gate))}
    shape["gelu"] = (gate - z) * normal.cdf(gate - z)
    h = shape[activation]
    if gated:
        h = h * (np.maximum(up, 0) if activation == "drelu" else up)
    return float(np.sqrt(np.mean(h**2)))


def _ffn_biases(s: _Shape, block: str, gated: bool) -> None:
    down = 0.05 * s.rng.standard_normal(s.n_embd, dtype=np.float32)
    down[:N_CONST] = 0
    _store(s, f"{block}.ffn_down.bias", down, "F32")
    for name in ("ffn_gate", "ffn_up") if gated else ("ffn_up",):
        _store(s, f"{block}.{name}.bias", 0.1 * s.rng.standard_normal(s.n_ff, dtype=np.float32), "F32")


def _mamba(s: _Shape, layer: int) -> None:
    """A Mamba-2 block, tensors as in llama.cpp's src/models/nemotron-h.cpp and mamba-base.cpp."""
    b, d_inner = f"blk.{layer}", s.n_embd
    heads, d_bc = MAMBA["time_step_rank"], 2 * MAMBA["group_count"] * MAMBA["state_size"]
    _norm(s, f"{b}.attn_norm")
    _store(s, f"{b}.ssm_in.weight", _matrix(s, 2 * d_inner + d_bc + heads, s.n_embd), s.quant)
    conv = s.rng.standard_normal((d_inner + d_bc, MAMBA["conv_kernel"]), dtype=np.float32) / 2
    _store(s, f"{b}.ssm_conv1d.weight", conv, "F32")
    bias = 0.1 * s.rng.standard_normal(d_inner + d_bc, dtype=np.float32)
    _store(s, f"{b}.ssm_conv1d.bias", bias, "F32")  # optional for the loader, not for the graph
    _store(s, f"{b}.ssm_dt.bias", s.rng.uniform(-3, -1, heads).astype(np.float32), "F32")
    _store(s, f"{b}.ssm_a", -s.rng.uniform(1, 4, (heads, 1)).astype(np.float32), "F32")
    _store(s, f"{b}.ssm_d", s.rng.uniform(0.5, 1.5, (heads, 1)).astype(np.float32), "F32")
    groups = MAMBA["group_count"]
    _store(s, f"{b}.ssm_norm.weight", np.ones((groups, d_inner // groups), np.float32), "F32")
    out = _matrix(s, s.n_embd, d_inner, gain=0.15, reads=False)
    _store(s, f"{b}.ssm_out.weight", _writes(out), s.quant)


def _store(s: _Shape, name: str, values: np.ndarray, quant: str) -> None:
    kind = gguf.GGMLQuantizationType[quant]
    s.writer.add_tensor(name, quantise(values, quant), raw_dtype=kind)


def quantise(values: np.ndarray, quant: str) -> np.ndarray:
    """float32 [..., n] -> what a GGUF stores for the type named `quant`.

    F32 and F16 come back as arrays of their own type, the others as uint8 [..., bytes of a row]. The work is
    ggml's own (ggml_quantize_chunk in ggml/include/ggml.h): gguf.quants cannot write K types."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if quant == "F32":
        return values
    if quant == "F16":
        return values.astype(np.float16)
    kind = gguf.GGMLQuantizationType[quant]
    out = np.empty(quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    n = values.shape[-1]
    size = _quantize_chunk()(kind, values.ctypes.data, out.ctypes.data, 0, values.size // n, n, None)
    if size != out.nbytes:
        raise RuntimeError(f"ggml wrote {size} bytes of {quant}, expected {out.nbytes}")
    return out


def rounded(values: np.ndarray, kind: int) -> np.ndarray:
    """Rows as ggml rounds the inputs of dot products, as float64."""
    ffi, lib = native_library()
    values = np.ascontiguousarray(values, np.float32)
    back, packed = np.zeros_like(values), np.zeros(values.shape[1] * 4 + 512, np.uint8)
    for row, to in zip(values, back, strict=True):
        lib.pi_kernel_round_input(kind, row.size, ffi.from_buffer("float[]", row), ffi.from_buffer(packed))
        lib.pi_kernel_dequantize(kind, row.size, ffi.from_buffer(packed), ffi.from_buffer("float[]", to))
    return back.astype(np.float64)


@cache
def _quantize_chunk() -> ctypes._CFuncPtr:
    # .so.0: the wheel's other names for the library are copies, and loading one would make a second ggml
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
    fn = lib.ggml_quantize_chunk
    fn.restype = ctypes.c_size_t
    fn.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    return fn
