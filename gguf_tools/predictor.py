"""Predictors as they are stored, and what they would select: the arithmetic of the engine in numpy.

How they are made is in `training.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.reader import BLOCKS, TensorInfo, row_bytes, type_name
from gguf_tools.sparse import DIRECT, LOWRANK, PREDICTORS, RANK_STEP, SparseLayer

_BLOCK_OF_8_BITS = {2: 32, 3: 32, 6: 32, 7: 32, 8: 32, 20: 32}  # types whose products take Q8_0 or Q8_1 inputs
_FLOATS = (quants.F32, quants.F16, quants.BF16)


@dataclass(frozen=True)
class Predictor:
    """The predictor of one FFN as it is stored, neurons numbered as in the source.

    A neuron is selected when its score is positive: B . relu(A x) + bias (lowrank), B . (A x) + bias (linear) or
    B . x + bias (direct), x being the FFN's input. `a` and `b` are uint8 [rows, bytes of a row] of ggml types
    `a_type` and `b_type`; A has `rank` rows and none where kind is "direct". recall and computed: share of the
    firing neurons that it selects, and of all neurons that it selects, on tokens that it was not trained on.
    """

    kind: str
    b_type: int
    b: np.ndarray
    bias: np.ndarray  # float32 [n_ff]
    a_type: int = -1
    a: np.ndarray | None = None
    recall: float | None = None
    computed: float | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else len(self.a)

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads."""
        return (0 if self.a is None else self.a.nbytes) + self.b.nbytes + 4 * len(self.bias)

    @property
    def label(self) -> str:
        """For tables, such as "linear 64 Q4_0"."""
        rank = f" {self.rank}" if self.rank else ""
        return f"{self.kind}{rank} {type_name(self.b_type)}"

    def check(self, where: str, n_embd: int, n_ff: int) -> None:
        """Raise ConversionError unless types and sizes fit an FFN of n_ff neurons that read n_embd values."""
        if self.kind not in PREDICTORS or (self.kind == DIRECT) != (self.a is None):
            raise ConversionError(
                f"predictor of {where}: kind {self.kind!r} is not lowrank or linear (with A), or direct"
            )
        if self.a is not None and (not self.rank or self.rank % RANK_STEP):
            raise ConversionError(f"predictor of {where}: rank {self.rank} is not a multiple of {RANK_STEP}")
        matrices = [("B", self.b_type, self.b, n_ff, self.rank or n_embd)]
        if self.a is not None:
            matrices.append(("A", self.a_type, self.a, self.rank, n_embd))
        for name, ggml_type, rows, n_rows, width in matrices:
            if ggml_type not in BLOCKS or ggml_type in quants.NOT_FOR_WEIGHTS or width % BLOCKS[ggml_type][0]:
                raise ConversionError(
                    f"predictor of {where}: {name} cannot be {type_name(ggml_type)} with rows of {width} values"
                )
            if rows.shape != (n_rows, row_bytes(ggml_type, width)) or rows.dtype != np.uint8:
                raise ConversionError(f"predictor of {where}: {name} is not {n_rows} rows of {width} values")
        if self.bias.shape != (n_ff,) or np.isnan(self.bias).any():
            raise ConversionError(f"predictor of {where}: the bias is not {n_ff} numbers")

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float32 [tokens, n_ff] for inputs [tokens, n_embd], rounded as the engine rounds what it multiplies."""
        if self.a is not None:
            hidden = product(self.a_type, self.a, x)
            x = np.maximum(hidden, 0) if self.kind == LOWRANK else hidden
        scores = product(self.b_type, self.b, x)
        scores += self.bias
        return scores


def product(ggml_type: int, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 [tokens, n_rows]: x [tokens, n] times stored rows, x rounded as ggml's vec_dot for the type wants it."""
    return rounded(ggml_type, x) @ quants.dequantise(ggml_type, rows, x.shape[1]).T


def rounded(ggml_type: int, x: np.ndarray) -> np.ndarray:
    """x as a product with rows of that type sees it: 8-bit integers in blocks, or half precision for F16."""
    if ggml_type in _FLOATS:
        return quants.dequantise(ggml_type, quants.quantise(ggml_type, x), x.shape[1])
    if ggml_type in _BLOCK_OF_8_BITS:
        return quants.dequantise(quants.Q8_0, quants.quantise(quants.Q8_0, x), x.shape[1])
    blocks = np.asarray(x, np.float32).reshape(len(x), -1, 256)  # Q8_K; its scales are F32
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    return (np.rint(blocks / np.maximum(scale, 1e-30)) * scale).reshape(x.shape)


def stored_predictor(layer: SparseLayer) -> Predictor:
    """The predictor of a layer of a sparse-GGUF, neurons in stored order."""
    tensors = layer.predictor
    assert tensors is not None

    def rows(tensor: TensorInfo) -> np.ndarray:
        return np.frombuffer(layer.file.data(tensor.name), np.uint8).reshape(tensor.shape[1], -1)

    a, b = tensors.a_tensor, tensors.b_tensor
    bias = np.frombuffer(layer.file.data(tensors.bias_tensor.name), "<f4")
    predictor = Predictor(tensors.kind, b.type, rows(b), bias, recall=tensors.recall, computed=tensors.computed)
    return predictor if a is None else replace(predictor, a_type=a.type, a=rows(a))


def stored_rows(layer: SparseLayer, part: str) -> np.ndarray:
    """float32 [n_ff, n_embd]: the gate or up rows in a dense layer's bundle, in stored order."""
    ggml_type, offset = (
        (layer.gate_type, layer.gate_offset) if part == "gate" else (layer.up_type, layer.up_offset)
    )
    bundle = np.frombuffer(layer.file.data(layer.bundle.name), np.uint8).reshape(layer.n_ff, layer.stride)
    width = row_bytes(ggml_type, layer.n_embd)
    return quants.dequantise(ggml_type, bundle[:, offset : offset + width], layer.n_embd)
