"""The reference: what a model's logits are, computed in plain numpy.

Float32 from the first operation to the last, weights dequantised by gguf's numpy code, no ggml and no
sparsity: it shares nothing with the engine under test. It is the only judge of FFNs that stock llama.cpp
cannot run (relu, relu2 or drelu in a `llama` graph), and is itself checked against stock on those it can.

Teacher-forced: give it tokens, it returns the logits after each. No KV cache, no sampling. The graphs are
those of llama.cpp's src/models/{llama,arcee,nemotron,smallthinker}.cpp, the operations those of its
src/llama-graph.cpp (build_norm, build_qkv, build_attn, build_ffn, build_moe_ffn).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

ACTIVATIONS = ("relu", "relu2", "drelu", "silu", "gelu")

Array = np.ndarray
Weights = dict[str, Array]  # a layer's tensors, named without the "blk.N." in front


@dataclass(frozen=True)
class _Family:
    """What distinguishes an architecture's graph from the others'."""

    activation: str  # native
    gated: bool = True
    dense: bool = True  # layers may have one FFN
    experts: bool = False  # layers may have routed experts
    layer_norm: bool = False  # LayerNorm with a bias instead of RMSNorm
    neox: bool = False  # rotary pairs lie half a head apart instead of side by side
    rope_factors: bool = False  # divides the rotary frequencies by the tensor rope_freqs, where there is one


_FAMILIES = {
    "llama": _Family("silu", experts=True, rope_factors=True),
    "arcee": _Family("relu2", gated=False, rope_factors=True),
    "nemotron": _Family("relu2", gated=False, layer_norm=True, neox=True),
    "smallthinker": _Family("relu", dense=False, experts=True, neox=True),
}
_NORMS = ("attn_norm", "ffn_norm")
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_FFN = ("ffn_gate", "ffn_up", "ffn_down")
_ROUTER = "ffn_gate_inp.weight"

# llama_expert_gating_func_type in llama.cpp's src/llama-hparams.h
_GATING = {1: "softmax", 2: "sigmoid", 3: "softmax_weight", 4: "sqrt_softplus"}
_SWA_WINDOW = 4096  # smallthinker's window in llama.cpp, whatever the file's sliding_window says
_NO_ROPE_STEP = 4  # smallthinker with a window: every fourth layer goes without rope
_MIN_WEIGHT_SUM = np.float32(6.103515625e-5)  # build_moe_ffn clamps here so as not to divide by zero


class Reference:
    """A GGUF file (the stock or source file, not a sparse one) as a numpy model.

    activation: what the FFN computes; None for the file's `powerinfer.activation`, else the architecture's
    own. Gated FFNs take any of `ACTIVATIONS`, ungated ones only their own.
    keep: called for every dense FFN with the layer, its input [n, n_embd] and the activated gate (up where there
    is none) [n, n_ff]; the neurons where it returns false, bool [n, n_ff], count as silent. This is how predictors
    and thresholds are judged.
    Raises ValueError, naming the file, where it asks for anything not implemented here: an unknown
    architecture, a rope scaling other than linear, a tensor that would not be read. OSError if unreadable.
    """

    def __init__(
        self,
        path: str | Path,
        activation: str | None = None,
        keep: Callable[[int, Array, Array], Array] | None = None,
    ) -> None:
        self.path = Path(path)
        self._keep = keep
        self._open()
        self.activation = self._choose_activation(activation)
        self._read_hyperparameters()
        self._read_positions()
        self._read_weights()
        self._fired = np.zeros(self.n_layer)  # per layer: neurons that fired ...
        self._offered = np.zeros(self.n_layer)  # ... out of this many

    # -- what callers use --------------------------------------------------------------------------------

    def logits(self, tokens: Array | list[int]) -> Array:
        """Token ids [n_tokens] -> float32 logits [n_tokens, n_vocab], row i after seeing tokens[: i + 1].

        The tokens are taken as they are, no BOS is added. Time and memory grow with n_tokens squared: cut
        long texts into windows. Raises ValueError for ids outside the vocabulary."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= self.n_vocab:
            raise ValueError(f"tokens must be a non-empty list of ids from 0 to {self.n_vocab - 1}")
        x = self._embedding[ids]
        for layer, w in enumerate(self._layers):
            x = self._block(layer, w, x)
        return self._norm(x, self._output, "output_norm") @ self._head.T

    @property
    def ffn_activity(self) -> Array:
        """[n_layer] share of FFN neurons whose activation was not zero, over all tokens since the last reset.

        In a mixture the neurons of the chosen experts count. NaN before the first token."""
        with np.errstate(invalid="ignore"):
            return self._fired / self._offered

    def reset_activity(self) -> None:
        """Start the count behind `ffn_activity` afresh."""
        self._fired[:] = 0
        self._offered[:] = 0

    # -- reading the file --------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, TypeError) as e:
            raise ValueError(f"{self.path}: not a GGUF file that can be read ({e})") from e
        # the vocabulary is long and not needed
        fields = (f for f in reader.fields.values() if not f.name.startswith("tokenizer."))
        self._metadata = {f.name: f.contents() for f in fields if f.types}
        self._tensors = {t.name: t for t in reader.tensors}
        self.arch = self._metadata.get("general.architecture")
        if self.arch not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise ValueError(f"{self.path}: no numpy reference for architecture '{self.arch}', only {known}")
        if "powerinfer.version" in self._metadata:
            raise ValueError(f"{self.path} is a sparse-GGUF: the reference needs the file it was made from")
        self._family = _FAMILIES[self.arch]

    def _choose_activation(self, wanted: str | None) -> str:
        native = self._family.activation
        activation = wanted or self._metadata.get("powerinfer.activation") or native
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"{self.path}: unknown activation '{activation}', known are {known}")
        if not self._family.gated and activation != native:
            raise ValueError(
                f"{self.path}: the ungated FFN of '{self.arch}' computes {native} and not {activation}; "
                "only a gated FFN's activation can be replaced"
            )
        return activation

    def _number(self, name: str, default: float | None = None) -> float:
        """The number at `<arch>.<name>`. Raises ValueError for a list, and if absent without a default."""
        value = self._metadata.get(f"{self.arch}.{name}", default)
        if not isinstance(value, (int, float)):
            found = "is missing" if value is None else "is not one number, which is not implemented"
            raise ValueError(f"{self.path}: metadata '{self.arch}.{name}' {found}")
        return value

    def _read_hyperparameters(self) -> None:
        number, family = self._number, self._family
        self.n_layer = int(number("block_count"))
        self.n_embd = int(number("embedding_length"))
        self._n_head = int(number("attention.head_count"))
        self._n_head_kv = int(number("attention.head_count_kv", self._n_head))
        self._head_dim = int(number("attention.key_length", self.n_embd // self._n_head))
        if number("attention.value_length", self._head_dim) != self._head_dim:
            raise ValueError(f"{self.path}: keys and values of different length are not implemented")
        self._eps = np.float32(number(f"attention.layer_norm_{'' if family.layer_norm else 'rms_'}epsilon"))
        self._n_expert_used = int(number("expert_used_count", 0))
        gating = number("expert_gating_func") if self.arch == "smallthinker" else 1  # llama.cpp fixes llama's
        if gating not in _GATING:
            raise ValueError(f"{self.path}: expert_gating_func is {gating}, known are {list(_GATING)}")
        self._gating = _GATING[gating]

    def _read_positions(self) -> None:
        """Per layer: the base of the rotary frequencies (0: no rope) and the window (0: none)."""
        scaling = self._metadata.get(f"{self.arch}.rope.scaling.type", "linear")
        if scaling not in ("none", "linear") or self._number("rope.scaling.attn_factor", 1.0) != 1.0:
            raise ValueError(f"{self.path}: rope scaling '{scaling}' is not implemented, only plain 'linear'")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        self._position_scale = 1 / factor if factor and scaling == "linear" else 1.0
        self._n_rot = int(self._number("rope.dimension_count", self._head_dim))
        base = self._number("rope.freq_base", 10000.0)
        self._rope_base = [base] * self.n_layer
        self._window = [0] * self.n_layer
        if self.arch != "smallthinker" or not self._number("attention.sliding_window", 0):
            return
        pattern = self._metadata.get("smallthinker.attention.sliding_window_pattern", 4)
        for i in range(self.n_layer):
            local = pattern[i] if isinstance(pattern, list) else not pattern or i % pattern != 0
            self._window[i] = _SWA_WINDOW if local else 0
            self._rope_base[i] = self._number("rope.freq_base_swa", base) if local else base
            # llama.cpp takes a step equal to the number of layers for "rope everywhere", hence the first test
            if self.n_layer != _NO_ROPE_STEP and i % _NO_ROPE_STEP == 0:
                self._rope_base[i] = 0

    def _read_weights(self) -> None:
        """Dequantise every tensor the graph reads, and insist that this is every tensor there is."""
        self._embedding = self._take("token_embd.weight")
        self.n_vocab = len(self._embedding)
        self._head = self._take("output.weight") if "output.weight" in self._tensors else self._embedding
        self._rope_factors: Array | float = 1.0
        if self._family.rope_factors and "rope_freqs.weight" in self._tensors:
            self._rope_factors = self._take("rope_freqs.weight")
        self._output = {n: self._take(n) for n in self._norm_tensors("output_norm")}
        self._layers = [self._read_layer(f"blk.{i}.") for i in range(self.n_layer)]
        if self._tensors:
            name = min(self._tensors)
            raise ValueError(f"{self.path}: tensor '{name}' has no place in the reference's '{self.arch}'")

    def _norm_tensors(self, name: str) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"] if self._family.layer_norm else [f"{name}.weight"]

    def _read_layer(self, prefix: str) -> Weights:
        family = self._family
        routed = family.experts and (prefix + _ROUTER in self._tensors or not family.dense)
        ffn = _FFN if family.gated else _FFN[1:]
        names = [t for norm in _NORMS for t in self._norm_tensors(norm)]
        names += [f"{m}.weight" for m in _ATTENTION]
        if routed:
            names += [_ROUTER, *(f"{m}_exps.weight" for m in ffn)]
            if self._n_expert_used < 1:
                raise ValueError(f"{self.path}: metadata '{self.arch}.expert_used_count' must be at least 1")
        else:
            names += [f"{m}.weight" for m in ffn]
        biased = _ATTENTION if routed else (*_ATTENTION, *ffn)
        names += [f"{m}.bias" for m in biased if f"{prefix}{m}.bias" in self._tensors]
        return {n: self._take(prefix + n) for n in names}

    def _take(self, name: str) -> Array:
        """The tensor as float32 in numpy's order (ggml's reversed); it is struck off the list of tensors."""
        t = self._tensors.pop(name, None)
        if t is None:
            raise ValueError(f"{self.path}: tensor '{name}' is missing")
        try:
            values = dequantize(t.data, t.tensor_type)
        except NotImplementedError as e:
            raise ValueError(f"{self.path}: tensor '{name}' has type {t.tensor_type.name}: {e}") from e
        # a copy, so that nothing keeps the file mapped
        return np.array(values, dtype=np.float32).reshape([int(n) for n in reversed(t.shape)])

    # -- the graph ---------------------------------------------------------------------------------------

    def _block(self, layer: int, w: Weights, x: Array) -> Array:
        """One transformer block. x: the residual stream, [n_tokens, n_embd], here and below."""
        routing_input = x  # smallthinker's router reads the raw residual, before the attention
        x = x + self._attention(layer, w, self._norm(x, w, "attn_norm"))
        h = self._norm(x, w, "ffn_norm")
        if _ROUTER not in w:
            return x + self._ffn(layer, w, h)
        if self.arch != "smallthinker":
            routing_input = h
        return x + self._mixture(layer, w, h, routing_input @ w[_ROUTER].T)

    def _norm(self, x: Array, w: Weights, name: str) -> Array:
        """RMSNorm (arXiv 1910.07467), or LayerNorm with a bias (arXiv 1607.06450)."""
        if self._family.layer_norm:
            x = x - x.mean(axis=-1, keepdims=True)
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps) * w[f"{name}.weight"]
        return y + w[f"{name}.bias"] if self._family.layer_norm else y

    def _rotate(self, x: Array, base: float) -> Array:
        """Rotary embedding (arXiv 2104.09864) of the first n_rot channels. x: [n_tokens, heads, head_dim].

        The pairs are (2i, 2i+1), or (i, i + n_rot/2) in the NEOX layout (llama_model_rope_type)."""
        half = self._n_rot // 2
        frequency = self._position_scale * base ** (-np.arange(half) / half) / self._rope_factors
        angle = np.arange(len(x))[:, None, None] * frequency
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first = slice(0, half) if self._family.neox else slice(0, self._n_rot, 2)
        second = slice(half, self._n_rot) if self._family.neox else slice(1, self._n_rot, 2)
        a, b = x[..., first], x[..., second]
        out = x.copy()
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        return out

    def _attention(self, layer: int, w: Weights, x: Array) -> Array:
        """Causal grouped-query attention (arXiv 2305.13245), in some layers over a sliding window."""
        n = len(x)
        q = _linear(x, w, "attn_q").reshape(n, self._n_head, self._head_dim)
        k = _linear(x, w, "attn_k").reshape(n, self._n_head_kv, self._head_dim)
        v = _linear(x, w, "attn_v").reshape(n, self._n_head_kv, self._head_dim)
        if base := self._rope_base[layer]:
            q, k = self._rotate(q, base), self._rotate(k, base)
        age = np.arange(n)[:, None] - np.arange(n)  # how far key j lies behind query i
        hidden = (age < 0) | (age >= (self._window[layer] or n))
        out = np.empty_like(q)
        for head in range(self._n_head):
            kv = head * self._n_head_kv // self._n_head
            scores = q[:, head] @ k[:, kv].T / np.sqrt(np.float32(self._head_dim))
            scores[hidden] = -np.inf
            out[:, head] = _softmax(scores) @ v[:, kv]
        return _linear(out.reshape(n, -1), w, "attn_output")

    def _ffn(self, layer: int, w: Weights, x: Array) -> Array:
        """The dense FFN, gated (arXiv 2002.05202) or not (squared ReLU, arXiv 2109.08668)."""
        up = _linear(x, w, "ffn_up")
        h = self._activate(layer, _linear(x, w, "ffn_gate") if self._family.gated else up, up, x)
        return _linear(h, w, "ffn_down")

    def _mixture(self, layer: int, w: Weights, x: Array, router_logits: Array) -> Array:
        """Routed gated experts. router_logits: [n_tokens, n_expert]."""
        chosen, weights = self._route(router_logits)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            token, slot = np.nonzero(chosen == expert)  # a token never chooses an expert twice
            up = x[token] @ w["ffn_up_exps.weight"][expert].T
            h = self._activate(layer, x[token] @ w["ffn_gate_exps.weight"][expert].T, up)
            out[token] += weights[token, slot, None] * (h @ w["ffn_down_exps.weight"][expert].T)
        return out

    def _route(self, logits: Array) -> tuple[Array, Array]:
        """Router logits -> the experts chosen and their weights, both [n_tokens, n_expert_used]."""
        if self._gating == "softmax":
            probs = _softmax(logits)
        elif self._gating == "sigmoid":
            probs = _sigmoid(logits)
        elif self._gating == "sqrt_softplus":
            probs = np.sqrt(np.logaddexp(0, logits))
        else:
            probs = logits
        chosen = np.argsort(-probs, axis=-1, kind="stable")[:, : self._n_expert_used]
        weights = np.take_along_axis(probs, chosen, axis=-1)
        if self._gating == "softmax_weight":
            weights = _softmax(weights)
        return chosen, weights / np.maximum(weights.sum(axis=-1, keepdims=True), _MIN_WEIGHT_SUM)

    def _activate(self, layer: int, gate: Array, up: Array, x: Array | None = None) -> Array:
        """What goes into `down`, and count it. gate, up: [n, n_ff], gate is up where the FFN is not gated. x: the
        FFN's input where `keep` has a say."""
        h = _ACTIVATE[self.activation](gate)
        if self._keep is not None and x is not None:
            h = np.where(self._keep(layer, x, h), h, np.float32(0))
        if self._family.gated:
            h = h * (_relu(up) if self.activation == "drelu" else up)
        self._fired[layer] += np.count_nonzero(h)
        self._offered[layer] += h.size
        return h


def _linear(x: Array, w: Weights, name: str) -> Array:
    """x W^T + b, the bias where there is one."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow, unlike 1 / (1 + exp(-x))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _gelu(x: Array) -> Array:
    """The tanh approximation (arXiv 1606.08415), as in ggml."""
    return 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


_ACTIVATE: dict[str, Callable[[Array], Array]] = {
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "drelu": _relu,  # the gate's; up's is applied where the two are multiplied (arXiv 2406.05955)
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
}
