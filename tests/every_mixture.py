"""Small random models of every mixture architecture that the installed llama.cpp can build.

llama.cpp itself is asked which tensors a set of metadata calls for (`llama_model_init_from_user`); what it asks for
is then written as a stock GGUF with random weights, experts in any type. The metadata follow llama.cpp's own
tests/test-llama-archs.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings
import numpy as np
from tiny_models import quantise

from gguf_tools.reader import BOOL, F32, STRING, U32, Field
from gguf_tools.writer import GGUFWriter, NewTensor

# Every name in llama.cpp's table of architectures (0c1e57098) whose graph can hold a mixture.
ARCHITECTURES = (
    "llama", "llama4", "cohere2moe", "grok", "qwen2moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "qwen35moe", "phimoe",
    "dbrx", "olmoe", "arctic", "deepseek", "deepseek2", "deepseek32", "glm4moe", "glm-dsa", "exaone-moe", "bailingmoe",
    "bailingmoe2", "dots1", "afmoe", "ernie4_5-moe", "hunyuan-moe", "gpt-oss", "lfm2moe", "smallthinker", "llada-moe",
    "grovemoe", "minimax-m2", "rnd1", "mimo2", "kimi-linear", "step35", "mistral4", "mellum", "refact", "minicpm",
    "granite", "granitemoe", "granitehybrid", "mistral3", "jamba", "nemotron_h_moe", "gemma4",
)  # fmt: skip
_MLA = ("deepseek2", "deepseek32", "glm-dsa", "kimi-linear", "mistral4")
_HYBRID = ("jamba", "granitehybrid", "lfm2moe", "kimi-linear", "nemotron_h_moe")
_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "BF16": 30,
          "MXFP4": 39}  # fmt: skip
VOCABULARY = 512


def metadata(arch: str, n_expert: int = 8, n_used: int = 2) -> list[Field]:
    """What describes a model of this architecture with two or a few small layers."""
    n_layer = {"llama4": 4, "nemotron_h_moe": 3, "gemma4": 5}.get(arch, 2)
    n_embd, n_head, n_ff = 256, 1 if arch in _MLA else 2, 256
    n_ctx, head = 256, n_embd // n_head
    heads: Any = [n_head if i != 1 else 0 for i in range(n_layer)] if arch in _HYBRID else n_head
    pattern: Any = [i % 2 for i in range(n_layer)] if arch in ("cohere2moe", "mimo2", "step35") else 2
    delta = arch in ("qwen3next", "qwen35moe")
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "features_length": n_embd,
        "block_count": n_layer,
        "leading_dense_block_count": 1,
        "feed_forward_length": [0, 0, n_ff] if arch == "nemotron_h_moe" else n_ff,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "full_attention_interval": 2,
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.q_lora_rank": 512,
        "attention.kv_lora_rank": 512,
        "attention.sliding_window": n_ctx // 8,
        "attention.sliding_window_pattern": [i < 4 for i in range(n_layer)] if arch == "gemma4" else pattern,
        "attention.indexer.head_count": 1,
        "attention.indexer.key_length": 64,
        "attention.indexer.top_k": 8,
        "rope.dimension_sections": [head // 4] * 4,
        "rope.freq_base": 10000.0,
        "expert_feed_forward_length": n_ff,
        "expert_shared_feed_forward_length": n_ff,
        "interleave_moe_layer_step": 2,
        "expert_count": n_expert,
        "expert_used_count": n_used,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_group_scale": 1.0,
        "experts_per_group": 1,
        "expert_weights_scale": 1.5,
        "ssm.inner_size": 256 if delta else 2 * n_embd,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": n_head,
        "ssm.group_count": 2,
        "kda.head_dim": 128,
        "shortconv.l_cache": 3,
    }
    if arch in _MLA:
        values |= {
            "attention.key_length": 576,
            "attention.value_length": 512,
            "rope.dimension_count": 64,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }
    if arch == "gemma4":
        values |= {
            "embedding_length_per_layer_input": n_embd // 2,
            "attention.shared_kv_layers": 0,
            "attention.key_length_swa": head,
            "attention.value_length_swa": head,
            "rope.freq_base_swa": 10000.0,
        }
    names = {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab"}
    fields = [Field.scalar(key, STRING, value) for key, value in names.items()]
    return fields + [_field(f"{arch}.{key}", value) for key, value in values.items()]


def _field(name: str, value: Any) -> Field:
    if isinstance(value, list):
        return Field.array(name, BOOL if isinstance(value[0], bool) else U32, value)
    return Field.scalar(name, BOOL if isinstance(value, bool) else U32 if isinstance(value, int) else F32, value)


class _Tensor(ctypes.Structure):
    """The head of struct ggml_tensor (ggml.h)."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


_SET_DATA = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Tensor), ctypes.c_void_p)


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so.0"))  # .so.0: see tiny_models
    llama = bindings._lib
    make = llama.llama_model_init_from_user
    make.restype = ctypes.c_void_p
    make.argtypes = [ctypes.c_void_p, _SET_DATA, ctypes.c_void_p, bindings.llama_model_params]
    base.gguf_init_empty.restype = ctypes.c_void_p
    base.ggml_get_name.restype = ctypes.c_char_p
    base.ggml_get_name.argtypes = [ctypes.POINTER(_Tensor)]
    return base, llama


def tensors_of(fields: Sequence[Field]) -> dict[str, tuple[int, ...]] | None:
    """The tensors that llama.cpp asks for, by name, shapes in ggml's order; None when it refuses."""
    base, llama = _libraries()
    gguf = ctypes.c_void_p(base.gguf_init_empty())
    kinds = {U32: ("u32", ctypes.c_uint32), F32: ("f32", ctypes.c_float), BOOL: ("bool", ctypes.c_bool)}
    for field in fields:
        key, value = field.name.encode(), field.value
        if isinstance(value, str):
            base.gguf_set_val_str(gguf, key, value.encode())
        elif isinstance(value, list | tuple):
            kind = ctypes.c_bool if field.item_type == BOOL else ctypes.c_uint32
            base.gguf_set_arr_data(gguf, key, field.item_type, (kind * len(value))(*value), ctypes.c_size_t(len(value)))
        else:
            name, kind = kinds[field.type]
            getattr(base, f"gguf_set_val_{name}")(gguf, key, kind(value))
    found: dict[str, tuple[int, ...]] = {}

    @_SET_DATA
    def note(tensor: Any, _: Any) -> None:
        shape = list(tensor.contents.ne)
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        found[base.ggml_get_name(tensor).decode()] = tuple(shape)

    model = llama.llama_model_init_from_user(gguf, note, None, bindings.llama_model_default_params())
    base.gguf_free(gguf)
    if not model:
        return None
    bindings.llama_model_free(model)
    return found


def make_mixture(
    path: Path, arch: str, quant: str = "F32", *, seed: int = 1, splits: int = 1, **counts: int
) -> Path | None:
    """Write a model of the architecture whose experts have the type `quant`; None when llama.cpp refuses it.

    splits: into so many files; the path of the first is returned.
    """
    fields = metadata(arch, **counts)
    shapes = tensors_of(fields)
    if shapes is None:
        return None
    rng = np.random.default_rng(seed)
    tensors, contents = [], []
    for name, shape in shapes.items():
        expert = name.endswith("_exps.weight") and len(shape) == 3
        values = rng.standard_normal(shape[::-1], dtype=np.float32)
        if len(shape) == 1 or "norm" in name:
            values = values * 0.1 + (1 if name.endswith("norm.weight") else 0)
        elif name != "token_embd.weight":
            values /= np.sqrt(shape[0])
        if name.endswith("ssm_a"):
            values = -np.abs(values)
        if name.endswith("scale"):  # of quantised weights; near one
            values = 1 + values
        tensors.append(NewTensor(name, _TYPES[quant] if expert else 0, shape))
        contents.append(quantise(values, quant).tobytes() if expert else values.tobytes())
    return write_model(path, fields, tensors, contents, splits)


def write_model(
    path: Path, fields: Sequence[Field], tensors: Sequence[NewTensor], contents: Sequence[bytes], splits: int = 1
) -> Path:
    """A GGUF, in one file or as split files; returns the path of the first."""
    bounds = np.linspace(0, len(tensors), splits + 1).astype(int)
    paths = [path.with_name(f"{path.stem}-{i + 1:05d}-of-{splits:05d}.gguf") for i in range(splits)]
    if splits == 1:
        paths = [path]
    for i, part in enumerate(paths):
        mine = slice(bounds[i], bounds[i + 1])
        some = list(fields) if i == 0 else []
        if splits > 1:
            some += [Field.scalar("split.no", 2, i), Field.scalar("split.count", 2, splits)]
            some += [Field.scalar("split.tensors.count", 5, len(tensors))]
        with GGUFWriter(part, some, tensors[mine], alignment=32) as writer:
            for tensor, content in zip(tensors[mine], contents[mine], strict=True):
                writer.begin(tensor.name)
                writer.write(content)
    return paths[0]
