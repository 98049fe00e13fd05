"""Watching llama.cpp's graph as it is computed, through its evaluation callback (`llama_context_params.cb_eval`).

llama.cpp asks about every node before it computes it; those that somebody wants are handed out once they hold
their values, before anything reads them. So a watcher can look at activations, and change them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals as internals

from gguf_tools import quants
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.hook import sparse_loading
from powerinfer_ext.loader import Options

Handler = Callable[[np.ndarray], None]

_DTYPES = {0: np.float32, 26: np.int32}  # ggml types of activations and of indices


class Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h) up to its data; `tensor_values` checks it against ggml's own functions."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    ]


def ggml_functions() -> ctypes.CDLL:
    """ggml with the functions that say what a tensor is, their types declared."""
    ggml = quants.library()
    results = {"get_name": ctypes.c_char_p, "get_data": ctypes.c_void_p, "nelements": ctypes.c_int64}
    for name, result in results.items():
        function = getattr(ggml, f"ggml_{name}")
        function.restype, function.argtypes = result, [ctypes.c_void_p]
    return ggml


def tensor_values(ggml: ctypes.CDLL, address: int) -> np.ndarray:
    """What a tensor in host memory holds, in place: axes in numpy's order, leading axes of one dropped.

    Raises PowerInferError when ggml's tensors are not laid out as declared here.
    """
    tensor = Tensor.from_address(address)
    shape, strides = list(tensor.ne)[::-1], list(tensor.nb)[::-1]
    known = tensor.type in _DTYPES and int(np.prod(shape)) == ggml.ggml_nelements(address)
    if not known or tensor.data != ggml.ggml_get_data(address):
        raise PowerInferError(
            "llama.cpp's tensors are not laid out as expected; run powerinfer doctor to see whether the "
            "installed llama-cpp-python is supported"
        )
    dtype = np.dtype(_DTYPES[tensor.type])
    span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
    array = np.ndarray(shape, dtype, (ctypes.c_char * span).from_address(tensor.data), strides=strides)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


def open_watched(
    stack: contextlib.ExitStack, model: str, n_ctx: int, n_batch: int, threads: int, callback: Any
) -> tuple[Any, Any, Any]:
    """The model (stock or sparse), a context of n_ctx tokens in batches of n_batch whose graphs `callback` watches,
    and a batch: llama_cpp's own objects. `stack` closes them, in reverse order.
    """
    with sparse_loading(Options()):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        llama = internals.LlamaModel(path_model=model, params=params, verbose=False)
    stack.enter_context(contextlib.closing(llama))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = n_ctx, n_batch, n_batch
    settings.n_threads = settings.n_threads_batch = threads
    settings.cb_eval = callback
    context = internals.LlamaContext(model=llama, params=settings, verbose=False)
    stack.enter_context(contextlib.closing(context))
    batch = internals.LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=1, verbose=False)
    stack.enter_context(contextlib.closing(batch))
    return llama, context, batch


class Watcher:
    """The callback. `wanted(name)` is called for every node of every graph and returns who wants its values.

    A handler gets the values in place, axes in numpy's order and leading axes of one dropped: a view that is valid
    until the handler returns, and may be written to. `callback` goes into `cb_eval` and must live as long as the
    context. What a handler raises cannot travel through C: computing stops, and `check` raises it.
    """

    def __init__(self, wanted: Callable[[str], Handler | None]) -> None:
        self._wanted = wanted
        self._error: BaseException | None = None
        self._ggml = ggml_functions()
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def check(self) -> None:
        """Raise what a handler raised since the last check."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, tensor: int, ask: bool, user_data: Any) -> bool:
        try:
            handler = self._wanted(self._ggml.ggml_get_name(tensor).decode())
            if ask:
                return handler is not None
            if handler is not None:
                handler(tensor_values(self._ggml, tensor))
            return True
        except BaseException as error:
            self._error = error
            return False
