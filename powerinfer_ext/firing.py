"""How well the predictors of a sparse-GGUF do on a text: recall and precision per layer.

The model runs as it always does; an evaluation callback looks at the FFNs' inputs. For each of them the truth (which
neurons fire, by the rows in the bundle) and the selection (by the predictor) are worked out with numpy.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_tools.predictor import rounded, stored_predictor, stored_rows
from gguf_tools.sparse import SparseGGUF, SparseLayer
from powerinfer_ext.graph import Handler, Watcher, open_watched

TOKENS = 1024  # looked at by default: the truth takes as many operations as a dense run, at numpy's speed
# What an FFN reads: the norm before it. Blocks that hold nothing else have that norm under attention's name.
_INPUT = re.compile(r"^(?:attn_norm|ffn_norm)-(\d+)$")


@dataclass
class Firing:
    """What a predicted layer did: neuron evaluations that fire, are selected, and both; of how many."""

    layer: int
    neurons: int = 0
    fired: int = 0
    selected: int = 0
    both: int = 0
    predictor_share: float = 0.0  # bytes of the predictor, of the FFN's

    def json(self) -> dict[str, Any]:
        """recall: share of the firing neurons that is selected; precision: of the selected that fire."""
        return {
            "recall": self.both / self.fired if self.fired else None,
            "precision": self.both / self.selected if self.selected else None,
            "fired_share": self.fired / self.neurons if self.neurons else None,
            "computed_share": self.selected / self.neurons if self.neurons else None,
            "predictor_share": self.predictor_share,
        }


def firing(
    path: str, windows: list[list[int]], *, threads: int = 1, progress: Callable[[int], None] | None = None
) -> dict[int, Firing]:
    """By layer what the predicted layers of the sparse-GGUF at `path` do on windows of tokens.

    progress is called with the tokens of each window read. Empty for a file without predictors.
    """
    with SparseGGUF.open(path) as view:
        layers = {layer.index: layer for layer in view.layers if layer.predictor}
        if not layers:
            return {}
        inputs = _inputs(path, windows, set(layers), threads, progress)
        return {index: _count(layer, view.activation, inputs[index]) for index, layer in layers.items()}


def _inputs(
    path: str,
    windows: list[list[int]],
    layers: set[int],
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[int, np.ndarray]:
    """float32 [tokens, n_embd] by layer."""
    seen: dict[int, np.ndarray] = {}

    def wanted(name: str) -> Handler | None:
        match = _INPUT.match(name)
        if match is None or int(match[1]) not in layers:
            return None
        return lambda values: seen.__setitem__(int(match[1]), values.copy())  # the last norm of a layer stays

    watcher = Watcher(wanted)
    size = max(map(len, windows))
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    with contextlib.ExitStack() as stack:
        _, context, batch = open_watched(stack, path, size, size, threads, watcher.callback)
        for window in windows:
            context.kv_cache_clear()
            batch.set_batch(window, n_past=0, logits_all=True)
            context.decode(batch)
            watcher.check()
            for layer, values in seen.items():
                found[layer].append(values)
            seen.clear()
            if progress:
                progress(len(window))
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _count(layer: SparseLayer, activation: str, x: np.ndarray) -> Firing:
    assert layer.predictor is not None
    deciding_type = layer.gate_type if layer.gated else layer.up_type
    deciding = stored_rows(layer, "gate" if layer.gated else "up")
    up = stored_rows(layer, "up") if activation == "drelu" else None
    predictor = stored_predictor(layer)
    whole = layer.bundle.nbytes if layer.scale_tensor is None else layer.bundle.nbytes + layer.scale_tensor.nbytes
    result = Firing(layer.index, predictor_share=layer.predictor.nbytes / whole)
    for part in np.array_split(x, max(1, len(x) // 256)):
        fired = _rounded_product(deciding_type, deciding, part) > 0
        if up is not None:
            fired &= _rounded_product(layer.up_type, up, part) > 0
        selected = predictor.scores(part) > 0
        result.neurons += fired.size
        result.fired += int(fired.sum())
        result.selected += int(selected.sum())
        result.both += int((fired & selected).sum())
    return result


def _rounded_product(ggml_type: int, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    return rounded(ggml_type, x) @ rows.T
