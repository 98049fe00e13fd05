"""Predictors: what names the neurons of an FFN that fire, before any of its rows is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.reader import BLOCKS, row_bytes, type_name
from gguf_tools.sparse import DIRECT, LOWRANK, RANK_STEP


@dataclass(frozen=True)
class Predictor:
    """The predictor of one FFN as it is stored, neurons numbered as in the source.

    A neuron is selected when its score is positive: B . relu(A x) + bias (lowrank) or B . x + bias (direct), x
    being the FFN's input. `a` and `b` are uint8 [rows, bytes of a row] of ggml types `a_type` and `b_type`; A has
    `rank` rows and none where kind is "direct". recall and computed: share of the firing neurons that it
    selects, and of all neurons that it selects, on tokens that it was not trained on.
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

    def check(self, where: str, n_embd: int, n_ff: int) -> None:
        """Raise ConversionError unless types and sizes fit an FFN of n_ff neurons that read n_embd values."""
        if self.kind not in (LOWRANK, DIRECT) or (self.kind == LOWRANK) != (self.a is not None):
            raise ConversionError(f"predictor of {where}: kind {self.kind!r} is not lowrank (with A) or direct")
        if self.kind == LOWRANK and (not self.rank or self.rank % RANK_STEP):
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
