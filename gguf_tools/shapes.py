"""The shapes of published models: what `powerinfer synth` needs to write a file that costs what the real one
costs.

Dimensions, attention and vocabulary sizes are those of the models' published configurations; metadata keys
and tensors are what llama.cpp's `src/models/*.cpp` (0c1e57098) asks for. Left out on purpose, as it costs no
computation: YaRN rescaling of positions (arcee-4.5b, gpt-oss-20b).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from gguf_tools.errors import ConversionError
from gguf_tools.reader import BOOL, F32, I32, STRING, U32, Field

MAMBA, ATTENTION, FFN = "mamba", "attention", "ffn"
_KINDS = {"M": MAMBA, "*": ATTENTION, "E": FFN}
LEAST_VOCABULARY = 259 + 8  # 256 bytes and the special tokens


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 block: inner width, heads, groups, state size and convolution kernel."""

    d_inner: int
    n_head: int
    n_group: int
    d_state: int
    d_conv: int


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model. n_ff counts the neurons of the FFN, of each expert where there are experts."""

    name: str
    arch: str  # llama.cpp's architecture, whose graph runs it
    note: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    context: int
    rope_base: float
    activation: str  # what the FFN computes: relu, relu2 (neurons stay silent), silu, swiglu_oai (none does)
    head_dim: int = 128
    rotary: float = 1.0  # share of a head's dimensions that are rotated; 0: no positions at all
    norm_eps: float = 1e-5
    layer_norm: bool = False  # LayerNorm with biases instead of RMSNorm
    gated: bool = True
    tied: bool = False  # the output matrix is the embedding
    tokenizer: str = (
        "llama"  # "llama": SentencePiece with byte fallback; else the pre-tokenizer of a byte-level BPE
    )
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_shared: int = 0  # neurons of the shared expert
    expert_scale: float = 0.0
    sliding_window: int = 0
    pattern: str = ""  # hybrid models: M mamba, * attention, E experts; one per block
    mamba: Mamba | None = None

    @property
    def sparse(self) -> bool:
        """Whether its FFN neurons can stay silent."""
        return self.activation in ("relu", "relu2")

    @property
    def hint(self) -> str | None:
        """The activation that stock's graph does not compute and a converter has to be told."""
        return "relu" if self.arch == "llama" and self.activation == "relu" else None

    @property
    def least_layers(self) -> int:
        """Fewer blocks than this do not load: a hybrid model needs one of each kind."""
        return len(set(self.pattern)) or 1

    def blocks(self, n_layer: int) -> list[str]:
        """The kinds of the first `n_layer` blocks: `ATTENTION` means attention and an FFN where there is no
        pattern.

        A hybrid model cut before its first attention block gets it in place of its last Mamba block.
        """
        if not self.pattern:
            return [ATTENTION] * n_layer
        kinds = self.pattern[:n_layer]
        if "*" not in kinds:
            at = kinds.rindex("M")
            kinds = kinds[:at] + "*" + kinds[at + 1 :]
        return [_KINDS[kind] for kind in kinds]


def _declare(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


SHAPES: dict[str, Shape] = _declare(
    Shape(
        "llama2-7b",
        "llama",
        "ReGLU in place of SwiGLU, as ReluLLaMA and ProSparse do",
        32,
        4096,
        11008,
        32,
        32,
        32000,
        4096,
        1e4,
        "relu",
    ),
    Shape(
        "mistral-7b",
        "llama",
        "version 0.1; ReGLU in place of SwiGLU",
        32,
        4096,
        14336,
        32,
        8,
        32000,
        32768,
        1e4,
        "relu",
    ),
    Shape(
        "llama2-13b",
        "llama",
        "ReGLU in place of SwiGLU",
        40,
        5120,
        13824,
        40,
        40,
        32000,
        4096,
        1e4,
        "relu",
    ),
    Shape(
        "falcon-40b-like",
        "nemotron",
        "Falcon-40B's dimensions on the nemotron graph: LayerNorm and an FFN without a gate, but squared "
        "ReLU, for which stock has a graph; attention and FFN one after the other",
        60,
        8192,
        32768,
        128,
        8,
        65024,
        2048,
        1e4,
        "relu2",
        head_dim=64,
        layer_norm=True,
        gated=False,
        tokenizer="falcon",
    ),
    Shape(
        "arcee-4.5b",
        "arcee",
        "AFM-4.5B",
        36,
        2560,
        18432,
        20,
        4,
        128005,
        65536,
        1e4,
        "relu2",
        gated=False,
        tokenizer="llama-bpe",
    ),
    Shape(
        "nemotron-4b",
        "nemotron",
        "Minitron-4B",
        32,
        3072,
        9216,
        24,
        8,
        256000,
        4096,
        1e4,
        "relu2",
        rotary=0.5,
        layer_norm=True,
        gated=False,
    ),
    Shape(
        "mixtral-8x7b",
        "llama",
        "SwiGLU: experts are sparse, neurons are not",
        32,
        4096,
        14336,
        32,
        8,
        32000,
        32768,
        1e6,
        "silu",
        n_expert=8,
        n_expert_used=2,
    ),
    Shape(
        "qwen3-30b-a3b",
        "qwen3moe",
        "SwiGLU: experts are sparse, neurons are not",
        48,
        2048,
        768,
        32,
        4,
        151936,
        40960,
        1e6,
        "silu",
        norm_eps=1e-6,
        tokenizer="qwen2",
        n_expert=128,
        n_expert_used=8,
    ),
    Shape(
        "smallthinker-4b-a0.6b",
        "smallthinker",
        "ReGLU experts, router before attention",
        32,
        1536,
        768,
        12,
        2,
        151936,
        32768,
        1.5e6,
        "relu",
        norm_eps=1e-6,
        tied=True,
        tokenizer="qwen2",
        n_expert=32,
        n_expert_used=4,
    ),
    Shape(
        "smallthinker-21b-a3b",
        "smallthinker",
        "ReGLU experts, router before attention",
        52,
        2560,
        768,
        28,
        4,
        151936,
        16384,
        1.5e6,
        "relu",
        norm_eps=1e-6,
        tokenizer="qwen2",
        n_expert=64,
        n_expert_used=6,
        sliding_window=4096,
    ),
    Shape(
        "nemotron3-nano-30b-a3b",
        "nemotron_h_moe",
        "Mamba-2, attention and squared-ReLU experts with a shared one",
        52,
        2688,
        1856,
        32,
        2,
        131072,
        262144,
        1e4,
        "relu2",
        rotary=0.0,
        gated=False,
        tokenizer="pixtral",
        n_expert=128,
        n_expert_used=6,
        n_ff_shared=3712,
        expert_scale=2.5,
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        mamba=Mamba(4096, 64, 8, 128, 4),
    ),
    Shape(
        "gpt-oss-20b",
        "gpt-oss",
        "clamped SwiGLU experts with biases, attention sinks",
        24,
        2880,
        2880,
        64,
        8,
        201088,
        131072,
        1.5e5,
        "swiglu_oai",
        head_dim=64,
        tokenizer="gpt-4o",
        n_expert=32,
        n_expert_used=4,
        sliding_window=128,
    ),
)


def find(name: str) -> Shape:
    """The shape of that name. Raises ConversionError naming the known ones."""
    if name not in SHAPES:
        raise ConversionError(f"there is no shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def metadata(shape: Shape, n_layer: int, description: str) -> list[Field]:
    """The GGUF metadata of a model of this shape with `n_layer` blocks, vocabulary included."""
    arch = shape.arch
    fields = [
        Field.scalar("general.architecture", STRING, arch),
        Field.scalar("general.type", STRING, "model"),
        Field.scalar("general.name", STRING, f"{shape.name} (synthetic)"),
        Field.scalar("general.description", STRING, description),
        Field.scalar("general.quantization_version", U32, 2),
    ]

    def add(key: str, kind: int, value: object) -> None:
        fields.append(Field.scalar(f"{arch}.{key}", kind, value))

    def per_block(key: str, wanted: str, value: int) -> None:
        """One value, or in a hybrid model an array with 0 for the blocks of other kinds."""
        if not shape.pattern:
            return add(key, U32, value)
        values = [value if kind == wanted else 0 for kind in shape.blocks(n_layer)]
        fields.append(Field.array(f"{arch}.{key}", I32, values))

    add("block_count", U32, n_layer)
    add("context_length", U32, shape.context)
    add("embedding_length", U32, shape.n_embd)
    per_block("feed_forward_length", FFN, shape.n_ff)
    add("attention.head_count", U32, shape.n_head)
    per_block("attention.head_count_kv", ATTENTION, shape.n_head_kv)
    add("attention.key_length", U32, shape.head_dim)
    add("attention.value_length", U32, shape.head_dim)
    add("rope.dimension_count", U32, int(shape.head_dim * (shape.rotary or 1.0)))
    add("rope.freq_base", F32, shape.rope_base)
    add("vocab_size", U32, shape.n_vocab)
    add("attention.layer_norm_rms_epsilon", F32, shape.norm_eps)
    if shape.layer_norm or shape.mamba:
        add("attention.layer_norm_epsilon", F32, shape.norm_eps)
    if shape.sliding_window:
        add("attention.sliding_window", U32, shape.sliding_window)
    if shape.n_expert:
        add("expert_count", U32, shape.n_expert)
        add("expert_used_count", U32, shape.n_expert_used)
        add("expert_feed_forward_length", U32, shape.n_ff)
    if arch == "smallthinker":
        add("expert_gating_func", U32, 2)  # sigmoid
    if shape.n_ff_shared:
        add("expert_shared_count", U32, 1)
        add("expert_shared_feed_forward_length", U32, shape.n_ff_shared)
        add("expert_weights_norm", BOOL, True)
        add("expert_weights_scale", F32, shape.expert_scale)
    if shape.mamba:
        add("ssm.conv_kernel", U32, shape.mamba.d_conv)
        add("ssm.inner_size", U32, shape.mamba.d_inner)
        add("ssm.state_size", U32, shape.mamba.d_state)
        add("ssm.time_step_rank", U32, shape.mamba.n_head)
        add("ssm.group_count", U32, shape.mamba.n_group)
    if shape.hint:
        fields.append(Field.scalar("powerinfer.activation", STRING, shape.hint))
    return fields + list(_vocabulary(shape))


# ---- vocabulary --------------------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6  # llama.cpp's token types
_LETTERS = "etaoinsrhldcumfpgwybvk(._),=:"


def _vocabulary(shape: Shape) -> Iterator[Field]:
    """A synthetic vocabulary of the true size and of the family's kind: any text can be tokenised and back.

    SentencePiece: specials, 256 byte tokens, letters, pairs of letters. Byte-level BPE: GPT-2's 256 byte
    letters, merges of two common ones, specials. The rest of the size is filled with unused tokens that no
    text gives.
    """
    if shape.n_vocab < LEAST_VOCABULARY:
        raise ConversionError(
            f"a vocabulary of {shape.n_vocab} tokens is too small; it takes {LEAST_VOCABULARY}"
        )
    tokens, types, merges = (_sentencepiece if shape.tokenizer == "llama" else _byte_level)(shape.n_vocab)
    yield Field.scalar("tokenizer.ggml.model", STRING, "llama" if shape.tokenizer == "llama" else "gpt2")
    yield Field.scalar(
        "tokenizer.ggml.pre", STRING, "default" if shape.tokenizer == "llama" else shape.tokenizer
    )
    yield Field.array("tokenizer.ggml.tokens", STRING, tokens)
    yield Field.array("tokenizer.ggml.token_type", I32, types)
    if shape.tokenizer == "llama":
        yield Field.array("tokenizer.ggml.scores", F32, [-float(i) for i in range(len(tokens))])
        specials = {"unknown": 0, "bos": 1, "eos": 2}
    else:
        yield Field.array("tokenizer.ggml.merges", STRING, merges)
        specials = {"bos": len(tokens) - 2, "eos": len(tokens) - 1}
    for name, number in specials.items():
        yield Field.scalar(f"tokenizer.ggml.{name}_token_id", U32, number)
    yield Field.scalar("tokenizer.ggml.add_bos_token", BOOL, shape.tokenizer == "llama")
    yield Field.scalar("tokenizer.ggml.add_eos_token", BOOL, False)


def _sentencepiece(size: int) -> tuple[list[str], list[int], list[str]]:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    letters = "\u2581" + "".join(map(chr, range(33, 127)))  # U+2581 is SentencePiece's space
    pairs = ["".join(pair) for pair in itertools.product("\u2581" + _LETTERS, _LETTERS)]
    words = [*letters, *pairs][: size - len(tokens)]
    tokens += words
    filler = size - len(tokens)
    types += [_NORMAL] * len(words) + [_UNUSED] * filler
    return tokens + [f"<unused{i}>" for i in range(filler)], types, []


def _byte_level(size: int) -> tuple[list[str], list[int], list[str]]:
    letters = "\u0120" + _LETTERS  # U+0120 is the space in GPT-2's alphabet
    merges = [f"{a} {b}" for a, b in itertools.product(letters, _LETTERS)][: size - 256 - 2]
    tokens = [*_gpt2_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    filler = size - len(tokens) - 2
    types = [_NORMAL] * len(tokens) + [_UNUSED] * filler + [_CONTROL] * 2
    return tokens + [f"<unused{i}>" for i in range(filler)] + ["<|begin|>", "<|end|>"], types, merges


def _gpt2_alphabet() -> str:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(spare)) for b in range(256))
