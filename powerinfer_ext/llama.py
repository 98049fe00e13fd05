"""`Llama`: a `llama_cpp.Llama` that also opens sparse-GGUF files."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import llama_cpp

from gguf_tools.reader import BLOCKS
from gguf_tools.virtual import ModelFiles
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.hook import sparse_loading
from powerinfer_ext.loader import Options
from powerinfer_ext.placement import Context, choose_ubatch

_F16 = 1  # ggml's number: what keys and values are kept as by default


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` with the same arguments and methods, for stock GGUF and sparse-GGUF files alike.

    Args:
        model_path: a GGUF file. A stock one runs as it always did.
        sparse_mode: for a sparse-GGUF, "exact" computes only the neurons that fire, "dense" all of them (the
            answer is the same; it is there to compare with).
        memory: a budget for the whole process in bytes, or as "4GiB" or "50%" (of the model's file). What does not
            fit is streamed from flash: neurons of a sparse-GGUF, experts of a mixture (any GGUF, split files too),
            FFN weights of any other. None: everything is kept in memory if it fits, else what is available is the
            budget.
        io: how to read what is streamed: "io_uring", "threads", or "auto".
        verify: for a file with predictors, the share of a layer's evaluations after which all of its neurons are
            looked at; `sparse_stats()` then says under `missed` what share of those that fire the predictors missed.
            Costs about a dense evaluation of the layer on one thread each time.
        **kwargs: everything `llama_cpp.Llama` takes.

    Raises:
        ValueError: no such file, not a model, or (gguf_tools.FormatError) a damaged sparse-GGUF.
        PowerInferError: the file is fine but cannot run here, or not within the budget; the text says why. Also while
            generating, when reading from flash fails: the text names file and offset.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        sparse_mode: str = "exact",
        memory: int | str | None = None,
        io: str = "auto",
        verify: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # what close() needs, should the next lines raise
        options = Options(sparse_mode, memory, io, _context(kwargs), verify=verify)
        self.sparse_mode, self.memory, self.io, self.verify = sparse_mode, memory, io, verify
        if memory is not None and "n_ubatch" not in kwargs:
            with ModelFiles.open(model_path) as files:
                smaller = choose_ubatch(files, memory, options.context)
            if smaller is not None:
                kwargs["n_ubatch"] = smaller
                options = replace(options, context=replace(options.context, n_ubatch=smaller))
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
        ours = {key: getattr(self, key) for key in ("sparse_mode", "memory", "io", "verify")}
        return {**super().__getstate__(), **ours}

    def eval(self, tokens: Any) -> None:
        """`llama_cpp.Llama.eval`; when reading from flash failed, the exception says where."""
        try:
            super().eval(tokens)
        except RuntimeError as error:
            sparse = _sparse_model(self)
            failure = sparse.failure() if sparse is not None else None
            if failure is None:
                raise
            raise PowerInferError(failure) from error

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """`llama_cpp.Llama._init_sampler`, which leaves the last answer's sampler to Python's garbage collector: it is
        part of a cycle, and until that is found holds 12 bytes for every token of the vocabulary."""
        last, self._sampler = self._sampler, None
        if last is not None:
            last.close()
        return super()._init_sampler(*args, **kwargs)

    def sparse_stats(self) -> dict[str, Any]:
        """What the sparse engine did since loading or the last `reset_sparse_stats()`; see `sparse_stats`."""
        return sparse_stats(self)

    def reset_sparse_stats(self) -> None:
        """Start counting anew (nothing to do for a stock GGUF)."""
        sparse = _sparse_model(self)
        if sparse is not None:
            sparse.reset_stats()


def _context(kwargs: dict[str, Any]) -> Context:
    """What the context that `llama_cpp.Llama(**kwargs)` makes will take."""
    n_batch = kwargs.get("n_batch", 512)
    kinds = [_F16 if kwargs.get(key) is None else kwargs[key] for key in ("type_k", "type_v")]
    return Context(
        n_ctx=kwargs.get("n_ctx", 512),
        n_batch=n_batch,
        n_ubatch=min(n_batch, kwargs.get("n_ubatch", 512)),
        kv_bytes=sum(BLOCKS[kind][1] / BLOCKS[kind][0] for kind in kinds) / 2,
        flash_attention=bool(kwargs.get("flash_attn", False)),
        logits_all=bool(kwargs.get("logits_all", False)),
    )


def sparse_stats(llama: llama_cpp.Llama) -> dict[str, Any]:
    """What the sparse engine did for `llama`; a plain `llama_cpp.Llama` opened under `install()` will do.

    Returns what `SparseModel.stats` does: `density` (share of neurons computed, mean over the layers, None
    before the first token), `tokens`, and `layers`, a dict for each sparse FFN with `layer` (its index),
    `neurons`, `density`, `selected`, `fired`, `tokens`, `seconds` and more. For a stock GGUF `density` is
    None and `layers` is empty: nothing is measured there.

    Raises PowerInferError when the model has been closed.
    """
    sparse = _sparse_model(llama)
    nothing = {"density": None, "tokens": 0, "missed": None, "verified": 0, "layers": [], "flash": None}
    return nothing if sparse is None else sparse.stats()


def _sparse_model(llama: llama_cpp.Llama) -> Any:
    """The `SparseModel` behind an open Llama, None when it runs a stock GGUF."""
    pointer = llama.model
    if pointer is None:
        raise PowerInferError("the model has been closed; read its sparse statistics before close()")
    return getattr(pointer, "sparse", None)
