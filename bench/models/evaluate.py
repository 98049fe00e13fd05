"""What is measured on held-out text: perplexity, bits per byte, and how many neurons fire."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from corpus import SEPARATOR_ID
from model import LanguageModel
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Measurement:
    """Held-out figures of one model; the lists have one entry per layer."""

    tokens: int
    loss: float  # nats per predicted token
    bits_per_byte: float
    density: list[float]  # share of (token, neuron) pairs that are not zero; MoE: of the routed experts
    gate_density: list[float]  # the same for act(gate) alone
    never_fired: list[float]  # share of neurons that no held-out token fired
    expert_load: list[list[float]]  # share of the routed tokens per expert, empty for dense models

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def measure(model: LanguageModel, tokenizer: Tokenizer, text: str, windows_at_once: int = 16) -> Measurement:
    """Run `text` through the model in float32 and report.

    Protocol: the text is tokenised as a whole and cut into consecutive windows of context - 1 tokens, each
    fed after one separator (BOS) token; every token of every window counts, the short last window is dropped.
    """
    was_training = model.training
    model.eval()
    context = model.config.context
    ids = torch.tensor(tokenizer.encode(text).ids)
    count = len(ids) // (context - 1)
    windows = ids[: count * (context - 1)].view(count, context - 1)
    bytes_scored = len(tokenizer.decode(windows.flatten().tolist(), skip_special_tokens=False).encode())
    separators = torch.full((count, 1), SEPARATOR_ID)
    inputs = torch.cat((separators, windows), dim=1)

    layers = model.config.layers
    total, weight = 0.0, 0
    density, gate_density = torch.zeros(layers), torch.zeros(layers)
    fired: list[torch.Tensor | None] = [None] * layers
    loads = torch.zeros(layers, max(model.config.experts, 1))
    for batch in inputs.split(windows_at_once):
        x, traces = model.hidden(batch[:, :-1], trace=True)
        logits = F.linear(x, model.embedding).float().flatten(0, 1)
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
        share = len(batch) / count
        weight += batch[:, 1:].numel()
        for i, t in enumerate(traces):
            density[i] += share * t.density
            gate_density[i] += share * t.gate_density
            fired[i] = t.fired if fired[i] is None else fired[i] | t.fired
            if t.load is not None:
                loads[i] += share * t.load
    model.train(was_training)
    return Measurement(
        tokens=weight,
        loss=total / weight,
        bits_per_byte=total / math.log(2) / bytes_scored,
        density=density.tolist(),
        gate_density=gate_density.tolist(),
        never_fired=[1.0 - f.float().mean().item() for f in fired],
        expert_load=loads.tolist() if model.config.experts else [],
    )


@torch.no_grad()
def complete(model: LanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int = 96) -> str:
    """Continue `prompt` greedily with PyTorch; for models that stock llama.cpp computes differently."""
    model.eval()
    ids = [SEPARATOR_ID, *tokenizer.encode(prompt).ids]
    for _ in range(tokens):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == SEPARATOR_ID:
            break
    return tokenizer.decode(ids[1:])
