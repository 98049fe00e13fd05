"""Loading a sparse-GGUF into stock llama.cpp: the Python half of the seam (docs/SEAM.md).

What happens, in order: the file is checked (`gguf_tools.SparseGGUF`); the C backend meets the process's libggml and
registers its device (once); stock's loader is given a stream that looks like the source GGUF (`gguf_tools.virtual`)
with our buffer type named for the FFN tensors, so that it reads everything else; beside that the C backend reads the
neuron bundles into memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import SparseGGUF, SparseLayer
from gguf_tools.virtual import virtual_header
from powerinfer_ext.errors import PowerInferError

SUPPORTED_VERSIONS = ("0.3.36",)
MODES = ("exact", "dense")

# enum pi_activation. silu and gelu stay stock's to compute, except where there are thresholds.
_ACTIVATIONS = {"relu": 1, "relu2": 2, "drelu": 3, "silu": 4, "gelu": 5}
_PREDICTORS = {"lowrank": 1, "direct": 2, "linear": 3}  # enum pi_predictor
_ERROR_SIZE = 512

_lock = threading.Lock()
_native: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Options:
    """How to run a sparse-GGUF. mode: "exact" computes the neurons that fire, "dense" computes all of them."""

    mode: str = "exact"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PowerInferError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")


class _BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override: the bindings leave it undeclared."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def native() -> tuple[Any, Any]:
    """The C backend as cffi's (ffi, lib), registered with this process's libggml on the first call.

    Raises PowerInferError when the extension is not built or does not fit the installed llama-cpp-python.
    """
    global _native
    with _lock:
        if _native is not None:
            return _native
        if llama_cpp.__version__ not in SUPPORTED_VERSIONS:
            raise PowerInferError(
                f"llama-cpp-python {llama_cpp.__version__} is not supported: this build of powerinfer-ext works with "
                f"{', '.join(SUPPORTED_VERSIONS)}; install one of those"
            )
        try:
            from powerinfer_ext._cpatch import ffi, lib
        except ImportError as error:
            raise PowerInferError(
                f"the C extension of powerinfer-ext cannot be loaded ({error}); reinstall it with: "
                "pip install --force-reinstall --no-deps powerinfer-ext"
            ) from None
        message = ffi.new("char[]", _ERROR_SIZE)
        directory = Path(llama_cpp.__file__).resolve().parent / "lib"
        if lib.pi_init(os.fsencode(directory), message, _ERROR_SIZE) != 0:
            raise PowerInferError(
                f"llama-cpp-python {llama_cpp.__version__} in {directory} does not fit this build of powerinfer-ext "
                f"({ffi.string(message).decode()}); it works with {', '.join(SUPPORTED_VERSIONS)}: reinstall that, or "
                "run: powerinfer doctor"
            )
        _native = (ffi, lib)
        return _native


class SparseModel:
    """The engine behind one loaded model: its bundles in memory and its counters.

    llama.cpp's buffers hold references of their own, so the weights outlive this object where they must.
    """

    def __init__(self, path: str, layers: list[SparseLayer], handle: Any) -> None:
        self.path = path
        self._layers = [(layer.index, layer.n_ff) for layer in layers]
        self._ffi, self._lib = native()
        self._handle = handle

    def stats(self) -> dict[str, Any]:
        """Counters since loading or the last reset.

        Returns:
            density: share of neurons that the deciding product let through, mean over the layers; None before the
                first token.
            tokens: tokens counted, by the layer that saw most (the last one skips tokens whose logits nobody wants).
            layers: for every FFN layer: `layer` (index), `density`, `neurons` (per FFN or expert), `selected` and
                `fired` (neuron evaluations let through, and of those with an activation other than zero), `tokens`
                (rows: in a mixture one per token and routed expert), `seconds`, and `decode`, the same counts for
                one-token steps alone.
        """
        layers = []
        for position, (index, neurons) in enumerate(self._layers):
            decode, batched = (self._counters(position, phase) for phase in (0, 1))
            total = {key: decode[key] + batched[key] for key in decode}
            layers.append({"layer": index, "neurons": neurons, **_summary(total), "decode": _summary(decode)})
        densities = [layer["density"] for layer in layers if layer["density"] is not None]
        return {
            "density": sum(densities) / len(densities) if densities else None,
            "tokens": max((layer["tokens"] for layer in layers), default=0),
            "layers": layers,
        }

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._lib.pi_model_reset_stats(self._handle)

    def set_mode(self, mode: str) -> None:
        """Switch between "exact" and "dense" from the next evaluation on."""
        self._lib.pi_model_set_dense(self._handle, Options(mode).mode == "dense")

    def _counters(self, position: int, phase: int) -> dict[str, int]:
        stats = self._ffi.new("struct pi_layer_stats *")
        self._lib.pi_model_stats(self._handle, position, phase, stats)
        return {key: getattr(stats, key) for key in ("calls", "rows", "neurons", "selected", "fired", "touched", "ns")}


def _summary(counts: dict[str, int]) -> dict[str, Any]:
    return {
        "density": counts["selected"] / counts["neurons"] if counts["neurons"] else None,
        "selected": counts["selected"],
        "fired": counts["fired"],
        "touched": counts["touched"],
        "tokens": counts["rows"],
        "calls": counts["calls"],
        "seconds": counts["ns"] / 1e9,
    }


def load(
    path: str | os.PathLike[str] | GGUFFile, params: Any, options: Options | None = None
) -> tuple[int, SparseModel]:
    """Load a sparse-GGUF with stock llama.cpp.

    Args:
        path: the sparse-GGUF, or the file already open (it is taken over and closed).
        params: `llama_model_params`. Loading through a stream sets `load_mode` (no mmap, no mlock), `check_tensors`
            and `tensor_buft_overrides`; everything else is used as given.
        options: how to run it.

    Returns the `llama_model_p` (free it with `llama_model_free`) and the engine behind it.
    Raises FormatError for a damaged file, PowerInferError when it cannot be loaded, OSError.
    """
    options = options or Options()
    ffi, lib = native()
    with SparseGGUF.open(path) as sparse:
        name = sparse.path
        header, extents = virtual_header(sparse)
        layers = [] if params.vocab_only or params.no_alloc else sparse.layers
        message = ffi.new("char[]", _ERROR_SIZE)
        model = _open_model(ffi, lib, sparse, layers, message, name)
        lib.pi_model_set_dense(model, options.mode == "dense")
        virtual = ffi.gc(
            lib.pi_vgguf_open(
                sparse.file.fd,
                header,
                len(header),
                [tuple(extent) for extent in extents],
                len(extents),
                message,
                _ERROR_SIZE,
            ),
            lib.pi_vgguf_close,
        )
        if virtual == ffi.NULL:
            raise PowerInferError(f"{name}: {ffi.string(message).decode()}")
        # Bundles are read beside stock's own loading, which uses one thread.
        with ThreadPoolExecutor(max_workers=1) as beside:
            threads = max(1, len(os.sched_getaffinity(0)) - 1)
            reading = beside.submit(lib.pi_model_read, model, sparse.file.fd, threads, message, _ERROR_SIZE)
            pointer = _load_stream(ffi, lib, virtual, model, layers, params)
        try:
            sparse.check_unchanged()
            if reading.result() != 0:
                raise PowerInferError(f"{name}: {ffi.string(message).decode()}")
        except BaseException:
            if pointer is not None:
                bindings.llama_model_free(pointer)
            raise
        if pointer is None:
            offset = ffi.new("int64_t *")
            code = lib.pi_vgguf_error(virtual, offset)
            if code != 0:
                raise PowerInferError(f"{name}: reading at offset {offset[0]} failed: {os.strerror(code)}")
            raise PowerInferError(
                f"{name}: llama.cpp refuses the model that this file holds; load its source with llama_cpp.Llama("
                "verbose=True) to see why"
            )
        return pointer, SparseModel(name, layers, model)


def _open_model(ffi: Any, lib: Any, sparse: SparseGGUF, layers: list[SparseLayer], message: Any, name: str) -> Any:
    """struct pi_model *, its bundles not read yet; garbage collected."""
    specs = ffi.new("struct pi_layer_spec[]", max(len(layers), 1))
    kept: list[Any] = []  # what the specs point to, until pi_model_open has copied it
    for spec, layer in zip(specs, layers, strict=False):
        _fill_spec(ffi, spec, layer, kept)
    activation = _ACTIVATIONS[sparse.activation]
    model = lib.pi_model_open(sparse.file.fd, len(layers), specs, activation, ffi.NULL, message, _ERROR_SIZE)
    if model == ffi.NULL:
        raise PowerInferError(f"{name}: {ffi.string(message).decode()}")
    return ffi.gc(model, lib.pi_model_close)


def _fill_spec(ffi: Any, spec: Any, layer: SparseLayer, kept: list[Any]) -> None:
    """struct pi_layer_spec of a layer; what it points to is appended to `kept`."""

    def name(text: str | None) -> Any:
        if text is None:
            return ffi.NULL
        kept.append(ffi.new("char[]", text.encode()))
        return kept[-1]

    spec.index, spec.gated = layer.index, layer.gated
    spec.gate_name, spec.up_name, spec.down_name = (name(tensor) for tensor in _bundled_names(layer))
    spec.n_embd, spec.n_ff, spec.n_expert = layer.n_embd, layer.n_ff, layer.n_expert
    spec.stride, spec.file_offset = layer.stride, layer.bundle.offset
    spec.gate_offset, spec.up_offset, spec.down_offset = layer.gate_offset or 0, layer.up_offset, layer.down_offset
    spec.gate_type = -1 if layer.gate_type is None else layer.gate_type
    spec.up_type = -1 if layer.up_type is None else layer.up_type
    spec.down_type, spec.down_source_type = layer.down_type, layer.source_down_type
    if (layer.order != range(layer.n_ff)).any():
        kept.append(ffi.from_buffer("int32_t[]", layer.order))
        spec.order = kept[-1]
    if layer.scale_tensor is not None:
        spec.scale_offset = layer.scale_tensor.offset
    if layer.threshold_tensor is not None:
        spec.threshold_offset = layer.threshold_tensor.offset
    predictor = layer.predictor
    if predictor is not None:
        spec.predictor, spec.rank = _PREDICTORS[predictor.kind], predictor.rank
        if predictor.a_tensor is not None:
            spec.pred_a_type, spec.pred_a_offset = predictor.a_tensor.type, predictor.a_tensor.offset
        spec.pred_b_type, spec.pred_b_offset = predictor.b_tensor.type, predictor.b_tensor.offset
        spec.pred_bias_offset = predictor.bias_tensor.offset


def _bundled_names(layer: SparseLayer) -> tuple[str | None, str | None, str]:
    """Names of the source's gate, up and down tensor, as far as they are in the bundle."""
    gate = layer.gate_name if layer.gate_type is not None else None
    return gate, layer.up_name if layer.up_type is not None else None, layer.down_name


def _load_stream(ffi: Any, lib: Any, virtual: Any, model: Any, layers: list[SparseLayer], params: Any) -> int | None:
    """Have stock llama.cpp load the virtual file; None when it refuses. `params` is left as it was given."""
    ours = type(params).from_buffer_copy(params)
    ours.load_mode = bindings.LLAMA_LOAD_MODE_NONE  # a stream cannot be mapped
    ours.check_tensors = False  # would look at the bytes of holes
    overrides = (_BufferTypeOverride * 2)()
    if layers:
        names = [name for layer in layers for name in _bundled_names(layer) if name is not None]
        overrides[0].pattern = rf"^({'|'.join(map(re.escape, names))})$".encode()
        overrides[0].buffer_type = int(ffi.cast("uintptr_t", lib.pi_model_buft(model)))
        ours.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    stream = int(ffi.cast("uintptr_t", lib.pi_vgguf_file(virtual)))
    return bindings.llama_model_load_from_file_ptr(stream, ours)
