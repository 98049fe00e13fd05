"""`Llama`: a `llama_cpp.Llama` that also opens sparse-GGUF files."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import llama_cpp

from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.hook import sparse_loading
from powerinfer_ext.loader import Options


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` with the same arguments and methods, for stock GGUF and sparse-GGUF files alike.

    Args:
        model_path: a GGUF file. A stock one runs as it always did.
        sparse_mode: for a sparse-GGUF, "exact" computes only the neurons that fire, "dense" all of them (the
            answer is the same; it is there to compare with).
        **kwargs: everything `llama_cpp.Llama` takes.

    Raises:
        ValueError: no such file, not a model, or (gguf_tools.FormatError) a damaged sparse-GGUF.
        PowerInferError: the sparse-GGUF is fine but cannot run here; the text says why.
    """

    def __init__(
        self, model_path: str | os.PathLike[str], *, sparse_mode: str = "exact", **kwargs: Any
    ) -> None:
        self._stack = contextlib.ExitStack()  # what close() needs, should the next lines raise
        options = Options(sparse_mode)
        self.sparse_mode = sparse_mode
        with sparse_loading(options):
            super().__init__(os.fspath(model_path), **kwargs)
        if self.lora_path and not self._lora_adapter:  # a null pointer: llama-cpp-python takes it for success
            self.close()
            raise PowerInferError(
                f"LoRA adapter {self.lora_path} cannot be applied to {model_path}: it is damaged, made for "
                "another model, or adapts an FFN whose neurons the conversion reordered (convert without a "
                "profile for LoRA)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "sparse_mode": self.sparse_mode}

    def sparse_stats(self) -> dict[str, Any]:
        """What the sparse engine did since loading or the last `reset_sparse_stats()`; see `sparse_stats`."""
        return sparse_stats(self)

    def reset_sparse_stats(self) -> None:
        """Start counting anew (nothing to do for a stock GGUF)."""
        sparse = _sparse_model(self)
        if sparse is not None:
            sparse.reset_stats()


def sparse_stats(llama: llama_cpp.Llama) -> dict[str, Any]:
    """What the sparse engine did for `llama`; a plain `llama_cpp.Llama` opened under `install()` will do.

    Returns what `SparseModel.stats` does: `density` (share of neurons computed, mean over the layers, None
    before the first token), `tokens`, and `layers`, a dict for each sparse FFN with `layer` (its index),
    `neurons`, `density`, `selected`, `fired`, `tokens`, `seconds` and more. For a stock GGUF `density` is
    None and `layers` is empty: nothing is measured there.

    Raises PowerInferError when the model has been closed.
    """
    sparse = _sparse_model(llama)
    return {"density": None, "tokens": 0, "layers": []} if sparse is None else sparse.stats()


def _sparse_model(llama: llama_cpp.Llama) -> Any:
    """The `SparseModel` behind an open Llama, None when it runs a stock GGUF."""
    pointer = llama.model
    if pointer is None:
        raise PowerInferError("the model has been closed; read its sparse statistics before close()")
    return getattr(pointer, "sparse", None)
