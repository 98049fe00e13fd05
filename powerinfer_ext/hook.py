"""The one hook into llama-cpp-python: the function that loads a model file.

`llama_cpp._internals.LlamaModel` looks `llama_model_load_from_file` up in the module `llama_cpp.llama_cpp`
every time it loads a model. We put a dispatcher there: a sparse-GGUF goes to our loader, any other file to
the function that was there before. There are two ways to switch it on:

    install()            for the whole process, until uninstall()
    sparse_loading(...)  for the current thread (or asyncio task), inside a `with`; everybody else sees stock

A reference taken earlier (`from llama_cpp import llama_model_load_from_file` before `install()`) is not
reached.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

from gguf_tools.errors import FormatError
from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import K_VERSION
from powerinfer_ext import loader
from powerinfer_ext.errors import PowerInferError

_FUNCTION = "llama_model_load_from_file"
_PLACES = (bindings, llama_cpp)  # where it is defined and looked up, and where it is re-exported

_lock = threading.RLock()  # guards the next two and the attributes they stand for
_installed: loader.Options | None = None  # those of install(), None when it is not active
_scopes = 0  # how many sparse_loading() blocks are open, in all threads

_scoped: ContextVar[loader.Options | None] = ContextVar("powerinfer_sparse_loading", default=None)

# llama-cpp-python silences a load (verbose=False) by redirecting the stdout and stderr of the whole process;
# two loads at once can restore them in the wrong order and leave them at /dev/null. So ours take turns.
_one_load_at_a_time = threading.RLock()


class SparseModelPointer(int):
    """A `llama_model_p` that keeps the `SparseModel` behind it alive.

    llama-cpp-python stores what the load function returned and forgets it right after `llama_model_free`. So
    our handle lives exactly as long as the model, with no registry to keep in step and nothing to hook when
    it is freed.
    """

    sparse: loader.SparseModel

    @classmethod
    def of(cls, address: int, sparse: loader.SparseModel) -> SparseModelPointer:
        pointer = cls(address)
        pointer.sparse = sparse
        return pointer


def install(*, sparse_mode: str = "exact", memory: int | str | None = None, io: str = "auto") -> None:
    """Make every `llama_cpp.Llama` of this process open sparse-GGUF files too (idempotent).

    Existing code, llama-cpp-python's server and frameworks built on it need no edit. A second call only
    changes the options. Raises PowerInferError when somebody has replaced the load function after the first
    call.
    """
    global _installed
    options = loader.Options(sparse_mode, memory, io)
    with _lock:
        if _installed is not None:
            _refuse_if_covered("change the options of")
        _installed = options
        for dispatcher in _put():
            dispatcher.permanent = True


def uninstall() -> None:
    """Undo `install()` (idempotent). Models that are open stay usable.

    Raises PowerInferError, and stays installed, when somebody has replaced the load function after
    `install()`.
    """
    global _installed
    with _lock:
        if _installed is None:
            return
        _refuse_if_covered("uninstall")
        _installed = None
        for dispatcher in _put():
            dispatcher.permanent = False
        if _scopes == 0:
            _remove()


@contextlib.contextmanager
def sparse_loading(options: loader.Options) -> Iterator[None]:
    """Inside this block the current thread's `llama_cpp` loads sparse-GGUF files, with these options."""
    global _scopes
    with _one_load_at_a_time:
        with _lock:
            _scopes += 1
            _put()
        token = _scoped.set(options)
        try:
            yield
        finally:
            _scoped.reset(token)
            with _lock:
                _scopes -= 1
                if _scopes == 0:
                    _remove()


class _Dispatcher:
    """What takes the place of `original`. A class, so that a wrapper around it is not mistaken for it."""

    def __init__(self, original: Callable[..., int | None]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.permanent = False  # put there, or taken over, by install()

    def __call__(self, path_model: bytes, params: Any, /) -> int | None:
        scoped = _scoped.get()
        options = scoped if scoped is not None else _installed
        if options is None or path_model is None:
            return self.original(path_model, params)
        path = os.fsdecode(path_model)
        unreadable: ValueError | None = None
        try:
            loaded = loader.load(path, params, options)
        except FormatError as error:
            if _is_ours(path):
                raise
            unreadable, loaded = error, None  # stock decides: it may read what our strict reader does not
        except OSError:
            if scoped is not None:
                raise
            loaded = None
        if loaded is not None:
            return SparseModelPointer.of(*loaded)
        pointer = self.original(path_model, params)
        if pointer is None and unreadable is not None:
            raise unreadable  # says why; LlamaModel's ValueError is just "Failed to load model from file"
        return pointer


def _is_ours(path: str) -> bool:
    """Whether the file's header can be read and says that it is a sparse-GGUF."""
    try:
        with GGUFFile.open(path) as file:
            return K_VERSION in file.fields
    except (OSError, ValueError):
        return False


def _put() -> list[_Dispatcher]:
    """Have a dispatcher on top of every place, and return those (call with `_lock` held)."""
    on_top = []
    for place in _PLACES:
        current = getattr(place, _FUNCTION)
        if not isinstance(current, _Dispatcher):
            current = _Dispatcher(current)
            setattr(place, _FUNCTION, current)
        on_top.append(current)
    return on_top


def _remove() -> None:
    """Put back what dispatchers that nobody needs replaced (call with `_lock` held).

    One that is covered by somebody else's patch stays, and passes everything on.
    """
    for place in _PLACES:
        current = getattr(place, _FUNCTION)
        if isinstance(current, _Dispatcher) and not current.permanent:
            setattr(place, _FUNCTION, current.original)


def _refuse_if_covered(verb: str) -> None:
    """Raise PowerInferError unless what install() put is still on top."""
    for place in _PLACES:
        current = getattr(place, _FUNCTION)
        if not (isinstance(current, _Dispatcher) and current.permanent):
            raise PowerInferError(
                f"cannot {verb} powerinfer_ext: {place.__name__}.{_FUNCTION} was replaced by somebody else "
                "after powerinfer_ext.install(); undo that replacement first"
            )
