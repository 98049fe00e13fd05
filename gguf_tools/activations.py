"""What the FFN of each architecture computes in stock llama.cpp, for the architectures we vouch for.

Taken from the `build_ffn` / `build_moe_ffn` calls of llama.cpp's `src/models/*.cpp` (0c1e57098).
Architectures whose FFN is something else (gpt-oss's clamped SwiGLU, apertus's xIELU, kimi-k3's SiTU...) or
that keep it under other names are left out on purpose: converting them must fail rather than guess.
"""

from __future__ import annotations

# architecture -> (activation, whether the FFN has a gate)
NATIVE: dict[str, tuple[str, bool]] = {}


def _declare(activation: str, gated: bool, architectures: str) -> None:
    NATIVE.update(dict.fromkeys(architectures.split(), (activation, gated)))


_declare("relu2", False, "arcee nemotron jais2 plm nemotron_h nemotron_h_moe")
_declare("relu", True, "smallthinker")
_declare(
    "silu",
    True,
    """ llama llama4 llama-embed mistral3 mistral4 deci baichuan stablelm qwen qwen2 qwen2moe qwen2vl qwen3
    qwen3moe qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe plamo orion internlm2 minicpm minicpm3 jamba
    falcon-h1 xverse command-r cohere2 cohere2moe dbrx olmo olmo2 olmoe openelm arctic deepseek deepseek2
    deepseek2-ocr deepseek32 glm4moe glm-dsa jais exaone exaone4 exaone-moe granite granitemoe granitehybrid
    chameleon bailingmoe bailingmoe2 dots1 afmoe ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl
    smollm3 lfm2 lfm2moe dream llada llada-moe seed_oss grovemoe minimax-01 minimax-m2 cogvlm rnd1
    pangu-embedded paddleocr mimo2 maincoder kimi-linear refact eurobert bitnet talkie mellum nanbeige
    muse-glimmer
    """,
)
_declare("gelu", True, "gemma gemma2 gemma3 gemma3n gemma4 gemma-embedding grok")
_declare("gelu", False, "falcon gpt2 gptneox mpt starcoder starcoder2 codeshell bloom phi2")
