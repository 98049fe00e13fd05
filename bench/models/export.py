"""Write a trained model as GGUF, read one back into PyTorch, and keep `models.json`."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import gguf
import numpy as np
import torch
from corpus import PRE_TOKENIZER, SEPARATOR_ID, Corpus, vocabulary
from evaluate import Measurement
from gguf import GGMLQuantizationType as Type
from model import LanguageModel, ModelConfig
from tokenizers import Tokenizer

HELD_OUT = "heldout.txt"
CALIBRATION = "calibration.txt"
LICENCE = "MIT"

# A base model has no turns: the template gives it the messages as one text to continue.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Map this package's parameter names to the GGUF tensor names of the architecture."""
    names = {"embedding": "token_embd.weight", "output_norm": "output_norm.weight"}
    for i in range(config.layers):
        a, b = f"blocks.{i}.", f"blk.{i}."
        names[a + "attention_norm"] = b + "attn_norm.weight"
        names[a + "ffn_norm"] = b + "ffn_norm.weight"
        for ours, theirs in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("out", "attn_output")):
            names[f"{a}attention.{ours}.weight"] = f"{b}{theirs}.weight"
        if config.experts:
            names[a + "ffn.router.weight"] = b + "ffn_gate_inp.weight"
            for part in ("gate", "up", "down"):
                names[f"{a}ffn.{part}"] = f"{b}ffn_{part}_exps.weight"
        else:
            for part in ("gate", "up", "down") if config.gated else ("up", "down"):
                names[f"{a}ffn.{part}.weight"] = f"{b}ffn_{part}.weight"
    return names


def provenance(corpus: Corpus, steps: int, tokens: int) -> str:
    """Where the weights come from, in one sentence."""
    return (
        f"Trained from scratch on CPU by bench/models/train.py: {steps} steps, {tokens} tokens of the "
        f"standard library sources of Python {platform.python_version()} "
        f"(corpus SHA-256 {corpus.digest[:16]})."
    )


def write_gguf(
    path: Path, model: LanguageModel, tokenizer: Tokenizer, source: str, kind: Type = Type.Q8_0
) -> None:
    """Write `model` to `path`; matrices as `kind` (Q8_0 or F32), norms and routers as F32."""
    c = model.config
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, c.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(c.title)
    writer.add_basename(c.name)
    writer.add_author("powerinfer-ext authors")
    writer.add_license(LICENCE)
    writer.add_description(
        f"Small {c.activation} language model of Python sources, bundled with powerinfer-ext for tests and "
        f"demonstrations. {source}"
    )
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "powerinfer-ext", c.activation])
    writer.add_string("powerinfer.provenance", source)
    if c.activation == "drelu":  # stock llama.cpp would compute SwiGLU; the converter reads this
        writer.add_string("powerinfer.activation", c.activation)

    writer.add_block_count(c.layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocabulary)
    if c.experts:
        writer.add_expert_count(c.experts)
        writer.add_expert_used_count(c.experts_used)
        writer.add_expert_feed_forward_length(c.ffn)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == Type.Q8_0 else gguf.LlamaFileType.ALL_F32)

    tokens, merges = vocabulary(tokenizer)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[SEPARATOR_ID] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(SEPARATOR_ID)
    writer.add_eos_token_id(SEPARATOR_ID)
    writer.add_eot_token_id(SEPARATOR_ID)
    writer.add_pad_token_id(SEPARATOR_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    state = model.state_dict()
    for ours, theirs in tensor_names(c).items():
        data = state[ours].detach().float().contiguous().numpy()
        stored = kind if data.ndim > 1 and "gate_inp" not in theirs else Type.F32
        writer.add_tensor(theirs, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)  # whoever has the old file mapped keeps it


def read_gguf(path: Path, config: ModelConfig) -> LanguageModel:
    """Return the model with the weights of the file, dequantised to float32."""
    model = LanguageModel(config)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    state = {}
    for ours, theirs in tensor_names(config).items():
        tensor = stored.pop(theirs)
        state[ours] = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    if stored:
        raise ValueError(f"{path} has tensors that {config.name} does not: {sorted(stored)}")
    model.load_state_dict(state)
    return model


def write_record(
    folder: Path,
    model: LanguageModel,
    measured: Measurement,
    steps: int,
    tokens: int,
    seconds: float,
    source: str,
) -> None:
    """Put the model's entry into `folder`/models.json, in place of an older one of the same name."""
    c = model.config
    entry = {
        "name": c.name,
        "architecture": c.architecture,
        "activation": c.activation,
        "moe": bool(c.experts),
        "file": f"{c.name}.gguf",
        "heldout_text": HELD_OUT,
        "calibration_text": CALIBRATION,
        "parameters": model.parameter_count,
        "heldout_ppl": round(measured.perplexity, 4),
        "bits_per_byte": round(measured.bits_per_byte, 4),
        "heldout_tokens": measured.tokens,
        "density": round(float(np.mean(measured.density)), 4),
        "density_layers": [round(d, 4) for d in measured.density],
        "gate_density_layers": [round(d, 4) for d in measured.gate_density],
        "never_fired_layers": [round(d, 4) for d in measured.never_fired],
        "expert_load_layers": [[round(v, 4) for v in layer] for layer in measured.expert_load],
        "training_steps": steps,
        "training_tokens": tokens,
        "training_seconds": round(seconds),
        "licence": LICENCE,
        "provenance": source,
    }
    path = folder / "models.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    entries = [e for e in entries if e["name"] != c.name] + [entry]
    entries.sort(key=lambda e: e["name"])
    path.write_text(json.dumps(entries, indent=2) + "\n")
