"""The four models, in PyTorch, computing what stock llama.cpp computes for the same architecture names.

Shapes: B sequences of T tokens, D = 256 model width, F neurons per FFN, E experts of which K are used, V
tokens in the vocabulary. Sources of truth: llama.cpp src/models/arcee.cpp, smallthinker.cpp and llama.cpp,
and build_moe_ffn in src/llama-graph.cpp. The one that stock llama.cpp does not compute is dReLU, from Turbo
Sparse (arXiv 2406.05955): it is stored as a `llama` model, and our converter replaces the activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """One bundled model: its architecture, and the training choices that differ between the four."""

    name: str
    architecture: str  # the GGUF architecture: arcee, smallthinker, llama
    activation: str  # relu2 (ungated), relu (ReGLU), drelu, silu (SwiGLU)
    layers: int
    ffn: int  # neurons per layer, or per expert
    experts: int = 0
    experts_used: int = 0
    width: int = 256
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 4096
    context: int = 256
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    target_density: float = 0.0  # share of (token, neuron) pairs that should fire; 0 leaves the model alone
    l1_least: float = 1e-3  # where the strength of the L1 term starts, and its lower limit
    l1_gain: float = 0.03  # how fast it follows the density
    steps: int = 0
    title: str = ""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"

    @property
    def rope_interleaved(self) -> bool:
        """True for llama.cpp's NORM rope (pairs 2i, 2i+1), False for NEOX (pairs i, i + head_dim/2)."""
        return self.architecture != "smallthinker"


@dataclass
class FfnTrace:
    """What one FFN did in one forward pass; scalars that the training loss and the reports are made of."""

    penalty: Tensor  # scale-free L1 of the activations, see `scale_free_l1`
    density: Tensor  # share of (token, neuron) pairs whose activation is not zero
    gate_density: Tensor  # the same for the gate alone (equal to density but for drelu)
    balance: Tensor | None = None  # load-balancing loss (1 when all experts are used alike) and router z-loss
    load: Tensor | None = None  # [E] share of the routed tokens each expert got
    fired: Tensor | None = field(default=None, repr=False)  # bool [F or E, F], only if asked for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its RMS, in float32 as llama.cpp does, returned in x's type."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def scale_free_l1(h: Tensor) -> Tensor:
    """mean |h| over the RMS of h, for h >= 0: L1 that cannot be lowered by shrinking all of h.

    Plain L1 (ProSparse, arXiv 2402.13516) needs its strength chosen for the scale of h and can be evaded by
    scaling `down` up. The ratio (DeepHoyer, arXiv 1908.09979) has no gradient along the scale; its square
    estimates the share of neurons that are active.
    """
    h = h.float()
    return h.mean() * torch.rsqrt(h.square().mean() + 1e-12)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, optionally, fewer KV heads than query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        b, t, _ = x.shape
        c = self.config
        q = self._rotate(self.q(x).view(b, t, c.heads, c.head_dim), rope).transpose(1, 2)
        k = self._rotate(self.k(x).view(b, t, c.kv_heads, c.head_dim), rope).transpose(1, 2)
        v = self.v(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        if c.kv_heads != c.heads:
            k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
            v = v.repeat_interleave(c.heads // c.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))

    def _rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, heads, head_dim]; rope: cos and sin [T, 1, head_dim/2]."""
        cos, sin = rope[0][: x.shape[1]].to(x.dtype), rope[1][: x.shape[1]].to(x.dtype)
        if self.config.rope_interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class DenseFfn(nn.Module):
    """down(act(up x)) or down(act(gate x) * up x); relu2, drelu or silu."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = nn.Linear(config.width, config.ffn, bias=False) if config.gated else None
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor, trace: bool) -> tuple[Tensor, FfnTrace | None]:
        """x [B, T, D] -> [B, T, D]."""
        if self.activation == "relu2":
            gate = F.relu(self.up(x))
            h = gate.square()
            penalised = gate
        elif self.activation == "drelu":
            gate = F.relu(self.gate(x))
            h = gate * F.relu(self.up(x))
            penalised = None
        else:
            gate = F.silu(self.gate(x))
            h = gate * self.up(x)
            penalised = gate
        out = self.down(h)
        if not trace:
            return out, None
        if penalised is not None:
            penalty = scale_free_l1(penalised)
        else:  # dReLU: the product, and the gate too, because an engine that decides by the gate skips on it
            penalty = 0.5 * (scale_free_l1(h) + scale_free_l1(gate))
        with torch.no_grad():
            active = h != 0
            result = FfnTrace(penalty, active.float().mean(), (gate != 0).float().mean())
            if not self.training:
                result.fired = active.flatten(0, -2).any(0)
        return out, result


class MoeFfn(nn.Module):
    """SmallThinker's mixture: sum over the K chosen experts of w_e * down_e(relu(gate_e x) * up_e x).

    The router reads the layer's raw input (before attention and its norm), its scores are a softmax, and the
    K largest are normalised to sum to one. Stock supports sigmoids as well; on an input that no norm bounds,
    ours saturated at 1.0, and in the last layer one token in twelve had its experts chosen among exact ties.
    Balance loss: Switch Transformer (arXiv 2101.03961), with the z-loss of ST-MoE (arXiv 2202.08906), which
    keeps the router's logits small.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.used = config.experts, config.experts_used
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(config.experts, config.ffn, config.width))
        self.up = nn.Parameter(torch.empty(config.experts, config.ffn, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, config.ffn))

    def forward(self, x: Tensor, layer_input: Tensor, trace: bool) -> tuple[Tensor, FfnTrace | None]:
        """x (normed, after attention), layer_input (the residual stream before it): [B, T, D] -> [B, T, D].

        Tokens are sorted by expert and each expert multiplies its own rows: K/E of the dense einsum's work.
        """
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(-1, width)
        with torch.autocast("cpu", enabled=False):
            logits = self.router(layer_input.reshape(-1, width).float())  # [N, E]
            scores = logits.softmax(-1)
        weight, chosen = scores.topk(self.used, dim=-1)  # [N, K]
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(6.103515625e-5)

        outputs, gate, hidden, counts = self._routed(x, chosen)
        out = (outputs.view(-1, self.used, width) * weight.to(outputs.dtype).unsqueeze(-1)).sum(1).view(shape)
        if not trace:
            return out, None
        load = counts / counts.sum()
        with torch.no_grad():
            density = (gate != 0).float().mean()
        balance = self.experts * (load * scores.mean(0)).sum() + 0.1 * logits.logsumexp(-1).square().mean()
        result = FfnTrace(scale_free_l1(gate), density, density, balance, load)
        if not self.training:
            result.fired = torch.stack([(h != 0).any(0) for h in hidden])
        return out, result

    @torch.compiler.disable  # the shapes depend on the routing
    def _routed(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """x [N, D], chosen [N, K] -> each expert's output for each token, and what went into them.

        Returns outputs [N*K, D] in x's order; gate [N*K, F] and hidden, E times [n_e, F], both grouped by
        expert; and counts [E], the rows of each expert.
        """
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = torch.bincount(flat, minlength=self.experts)
        rows = _Permute.apply(x.repeat_interleave(self.used, 0), order, inverse).split(counts.tolist())
        gates = [F.relu(F.linear(r, g)) for r, g in zip(rows, self.gate, strict=True)]
        hidden = [a * F.linear(r, u) for a, r, u in zip(gates, rows, self.up, strict=True)]
        outputs = torch.cat([F.linear(h, d) for h, d in zip(hidden, self.down, strict=True)])
        return _Permute.apply(outputs, inverse, order), torch.cat(gates), hidden, counts


class _Permute(torch.autograd.Function):
    """x[order] for a permutation; its gradient is a gather by the inverse, not a slow scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class Block(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.attention = Attention(config)
        self.ffn_norm = nn.Parameter(torch.ones(config.width))
        self.ffn = MoeFfn(config) if config.experts else DenseFfn(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], trace: bool) -> tuple[Tensor, FfnTrace | None]:
        """x [B, T, D] -> [B, T, D]."""
        layer_input = x
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), rope)
        normed = rms_norm(x, self.ffn_norm, self.eps)
        if isinstance(self.ffn, MoeFfn):
            y, result = self.ffn(normed, layer_input, trace)
        else:
            y, result = self.ffn(normed, trace)
        return x + y, result


class LanguageModel(nn.Module):
    """Token embedding, blocks, final norm, and the embedding again as the output matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = nn.Parameter(torch.ones(config.width))
        half = config.head_dim // 2
        frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(8 * config.context, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angle.sin().float().unsqueeze(1), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            into_residual = name.endswith(("attention.out.weight", "ffn.down.weight", "ffn.down"))
            nn.init.normal_(p, std=0.03 / (math.sqrt(2 * config.layers) if into_residual else 1.0))

    def hidden(self, tokens: Tensor, trace: bool = False) -> tuple[Tensor, list[FfnTrace]]:
        """tokens [B, T] -> the normed residual stream [B, T, D] and, if asked for, each layer's trace."""
        x = F.embedding(tokens, self.embedding)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        traces = []
        for block in self.blocks:
            x, result = block(x, (self.cos, self.sin), trace)
            if result is not None:
                traces.append(result)
        return rms_norm(x, self.output_norm, self.config.norm_eps), traces

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> float32 [B, T, V]."""
        return F.linear(self.hidden(tokens)[0], self.embedding).float()

    def loss(self, tokens: Tensor, trace: bool = False) -> tuple[Tensor, list[FfnTrace]]:
        """tokens [B, T+1] -> mean cross-entropy in nats of tokens 1..T, and the traces."""
        x, traces = self.hidden(tokens[:, :-1], trace)
        logits = F.linear(x, self.embedding).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten()), traces

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


MODELS: dict[str, ModelConfig] = {
    c.name: c
    for c in (
        ModelConfig(
            "arcee-relu2",
            "arcee",
            "relu2",
            layers=6,
            ffn=1024,
            target_density=0.10,
            steps=700,
            title="Arcee ReLU^2 6M",
        ),
        ModelConfig(
            "smallthinker-reglu-moe",
            "smallthinker",
            "relu",
            layers=4,
            ffn=256,
            experts=8,
            experts_used=2,
            target_density=0.15,
            l1_least=0.02,
            l1_gain=0.06,
            steps=600,
            title="SmallThinker ReGLU MoE 8x 8M",
        ),
        ModelConfig(
            "llama-drelu",
            "llama",
            "drelu",
            layers=6,
            ffn=768,
            target_density=0.08,
            l1_least=0.02,
            l1_gain=0.06,
            steps=500,
            title="Llama dReLU 6M",
        ),
        ModelConfig(
            "llama-swiglu",
            "llama",
            "silu",
            layers=6,
            ffn=768,
            steps=500,
            title="Llama SwiGLU 6M",
        ),
    )
}
