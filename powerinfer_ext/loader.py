"""Loading a model into stock llama.cpp with part of it in our hands: the Python half of the seam (docs/SEAM.md).

What happens, in order: the file is checked (`gguf_tools`); it is decided what is kept in memory and what is
streamed (`placement`); the C backend meets the process's libggml and registers its device (once); stock's loader
is given a stream that looks like the source GGUF (`gguf_tools.virtual`) with our buffer type named for the
tensors that are ours, so that it reads everything else; beside that the C backend reads what it keeps of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings
import numpy as np

from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import SparseLayer
from gguf_tools.virtual import ModelFiles, Source, virtual_header
from powerinfer_ext import disk
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.placement import DEPTH, RUN, TRANSIT, Context, Placement, place

SUPPORTED_VERSIONS = ("0.3.36",)
MODES = ("exact", "dense")
IO_ENGINES = {"auto": 0, "io_uring": 1, "threads": 2}  # enum io_engine

# enum pi_activation. silu and gelu stay stock's to compute, except where there are thresholds.
_ACTIVATIONS = {"relu": 1, "relu2": 2, "drelu": 3, "silu": 4, "gelu": 5}
_KINDS = {"experts": 0, "tiles": 1, "rows": 2, "router": 3}  # enum pi_slab_kind
_PREDICTORS = {"lowrank": 1, "direct": 2, "linear": 3}  # enum pi_predictor
_COUNTERS = (
    *("calls", "rows", "neurons", "selected", "fired", "touched", "ns"),
    *("verified", "true_fired", "missed"),
)  # of struct pi_layer_stats
_PRODUCTS = re.compile(r"blk\.[0-9]+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.weight")
_Q4_0 = 2  # ggml's number
_ERROR_SIZE = 512
_M_MMAP_THRESHOLD = -3  # malloc.h

_lock = threading.Lock()
_native: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Options:
    """How to run a model.

    mode: "exact" computes the neurons that fire (or, where the file has predictors, those they select), "dense"
    computes all of them. memory: a budget for the whole process, in bytes, or as "4GiB" or "50%" of the model's
    file; None keeps everything in memory if it fits. io: "auto", "io_uring" or "threads". context: what the
    budget has to leave room for. prefetch: read, before they are needed, experts that a router names or that the
    next layer's would, and neurons that the next layer's predictor names for this layer's input. verify: the share
    of a predicted layer's evaluations, 0 to 1, after which it is
    looked what the predictor missed.
    """

    mode: str = "exact"
    memory: int | str | None = None
    io: str = "auto"
    context: Context = Context()
    prefetch: bool = True
    verify: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PowerInferError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.io not in IO_ENGINES:
            raise PowerInferError(f"I/O engine {self.io!r} is not one of {', '.join(IO_ENGINES)}")
        if not 0 <= self.verify <= 1:
            raise PowerInferError(f"verify is a share of the evaluations, from 0 to 1, not {self.verify:g}")


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
    """The engine behind one loaded model: what it holds of it, and its counters.

    llama.cpp's buffers hold references of their own, so the weights outlive this object where they must.
    """

    def __init__(self, path: str, files: list[str], placement: Placement, handle: Any) -> None:
        self.path = path
        self.placement = placement
        self._files = files
        self._layers = [(bundles.layer.index, bundles.layer.n_ff) for bundles in placement.bundles]
        self._ffi, self._lib = native()
        self._handle = handle

    def stats(self) -> dict[str, Any]:
        """Counters since loading or the last reset.

        Returns:
            density: share of neurons that the deciding product (or predictor) let through, mean over the layers; None
                before the first token.
            tokens: tokens counted, by the layer that saw most (the last one skips tokens whose logits nobody wants).
            missed: share of the neurons firing in truth that predictors missed, and `verified`, in how many evaluations
                (a token in a layer) that was looked at, see `set_verify`; None and 0 without.
            layers: for every FFN layer: `layer` (index), `density`, `neurons` (per FFN or expert), `selected` and
                `fired` (neuron evaluations let through, and of those with an activation other than zero), `tokens`
                (rows: in a mixture one per token and routed expert), `seconds`, `verified` (rows), `true_fired` and
                `missed` (neurons, of those rows), and `decode`, the same counts for one-token steps alone.
            flash: None when nothing is streamed, else `hit_rate` (share of wanted neurons, experts, tiles that were in
                memory), `wanted`, `missed`, `unit_bytes` (of units that were read), `read_bytes` (what was really read,
                alignment and gaps included; this and `reads` count from loading on), `reads`, `wait_seconds` (threads'
                time spent waiting for it, all threads together), `prefetched`, `useful`, `wasted`,
                `prefetch_accuracy` (share of what was read ahead and then used or dropped, that was used), `engine`,
                `slots_bytes`, `budget`.
        """
        layers = []
        for position, (index, neurons) in enumerate(self._layers):
            decode, batched = (self._counters(position, phase) for phase in (0, 1))
            total = {key: decode[key] + batched[key] for key in decode}
            layers.append({"layer": index, "neurons": neurons, **_summary(total), "decode": _summary(decode)})
        true_fired = sum(layer["true_fired"] for layer in layers)
        densities = [layer["density"] for layer in layers if layer["density"] is not None]
        return {
            "density": sum(densities) / len(densities) if densities else None,
            "tokens": max((layer["tokens"] for layer in layers), default=0),
            "missed": sum(layer["missed"] for layer in layers) / true_fired if true_fired else None,
            "verified": sum(layer["verified"] for layer in layers),
            "layers": layers,
            "flash": self._flash() if self.placement.streams else None,
        }

    def _flash(self) -> dict[str, Any]:
        stats = self._ffi.new("struct pi_flash_stats *")
        total = dict.fromkeys(("wanted", "missed", "bytes", "prefetched", "useful", "wasted", "wait_ns"), 0)
        for i in range(len(self.placement.bundles) + len(self.placement.matrices)):
            self._lib.pi_model_flash_stats(self._handle, i, stats)
            for key in total:
                total[key] += getattr(stats, key)
        settled = total["useful"] + total["wasted"]
        engine = self._lib.pi_model_io_engine(self._handle)
        return {
            "hit_rate": 1 - total["missed"] / total["wanted"] if total["wanted"] else None,
            "wanted": total["wanted"],
            "missed": total["missed"],
            "unit_bytes": total["bytes"],
            "read_bytes": stats.read_bytes,
            "reads": stats.reads,
            "wait_seconds": total["wait_ns"] / 1e9,
            "prefetched": total["prefetched"],
            "useful": total["useful"],
            "wasted": total["wasted"],
            "prefetch_accuracy": total["useful"] / settled if settled else None,
            "engine": next(name for name, number in IO_ENGINES.items() if number == engine),
            "slots_bytes": self.placement.slots_bytes,
            "budget": self.placement.budget,
        }

    def failure(self) -> str | None:
        """What went wrong with reading since the last call, in a sentence, or None."""
        file, offset = self._ffi.new("int *"), self._ffi.new("int64_t *")
        code = self._lib.pi_model_error(self._handle, file, offset)
        if code == 0:
            return None
        path = self._files[file[0]]
        if code == errno.ESTALE:
            return f"{path} has changed since it was opened (seen when reading at offset {offset[0]}); load it again"
        reason = "the file ended early" if code == errno.ENODATA else os.strerror(code)
        return f"{path}: reading at offset {offset[0]} failed: {reason}"

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._lib.pi_model_reset_stats(self._handle)

    def set_mode(self, mode: str) -> None:
        """Switch between "exact" and "dense" from the next evaluation on."""
        self._lib.pi_model_set_dense(self._handle, Options(mode).mode == "dense")

    def set_verify(self, share: float) -> None:
        """Look again at that share of the evaluations of each predicted layer: what fires in truth, and was missed?

        Each time all bundles of the layer are read and multiplied, by one thread: 8 ms of CPU time for a layer of
        Mistral 7B's size in Q4_0 (Zen 4), and where neurons are streamed, reading it. 0 switches it off.
        """
        share = Options(verify=share).verify
        self._lib.pi_model_set_verify(self._handle, round(1 / share) if share else 0)

    def _counters(self, position: int, phase: int) -> dict[str, int]:
        stats = self._ffi.new("struct pi_layer_stats *")
        self._lib.pi_model_stats(self._handle, position, phase, stats)
        return {key: getattr(stats, key) for key in _COUNTERS}


def _summary(counts: dict[str, int]) -> dict[str, Any]:
    return {
        "density": counts["selected"] / counts["neurons"] if counts["neurons"] else None,
        "selected": counts["selected"],
        "fired": counts["fired"],
        "touched": counts["touched"],
        "tokens": counts["rows"],
        "calls": counts["calls"],
        "seconds": counts["ns"] / 1e9,
        "verified": counts["verified"],
        "true_fired": counts["true_fired"],
        "missed": counts["missed"],
    }


def load(
    path: str | os.PathLike[str] | GGUFFile, params: Any, options: Options | None = None
) -> tuple[int, SparseModel] | None:
    """Load a sparse-GGUF, or stream a stock GGUF, with stock llama.cpp.

    Args:
        path: the file, or the file already open (it is taken over and closed).
        params: `llama_model_params`. Loading through a stream sets `load_mode` (no mmap, no mlock), `check_tensors`
            and `tensor_buft_overrides`; everything else is used as given. Without `use_extra_bufts` we, too, leave
            attention, deciding products and the head to stock's plain kernels.
        options: how to run it.

    Returns the `llama_model_p` (free it with `llama_model_free`) and the engine behind it; None for a stock GGUF of
    which nothing has to be streamed: that is stock's own to load.
    Raises FormatError for a damaged file, PowerInferError when it cannot be loaded, OSError.
    """
    options = options or Options()
    with ModelFiles.open(path) as files:
        placement = place(files, options.memory, options.context)
        if files.sparse is None and not placement.streams:
            return None
        if params.vocab_only or params.no_alloc:
            placement = Placement(None, [])
        return _load(files, placement, params, options)


def _load(files: ModelFiles, placement: Placement, params: Any, options: Options) -> tuple[int, SparseModel]:
    ffi, lib = native()
    message = ffi.new("char[]", _ERROR_SIZE)
    if placement.streams:
        _return_freed_memory()

    def check(ok: bool) -> None:
        if not ok:
            raise PowerInferError(f"{files.path}: {ffi.string(message).decode()}")

    model = _open_model(ffi, lib, files, placement, options, message)
    check(model != ffi.NULL)
    model = ffi.gc(model, lib.pi_model_close)
    lib.pi_model_set_dense(model, options.mode == "dense")
    panels = _panels(lib, files, placement, params)
    holes = [matrix.source.name for matrix in placement.matrices] + [source.name for source in panels]
    header, extents = virtual_header(files, holes)
    virtual = lib.pi_vgguf_open(
        files.fds,
        len(files.fds),
        placement.budget is not None,
        header,
        len(header),
        [tuple(extent) for extent in extents],
        len(extents),
        message,
        _ERROR_SIZE,
    )
    check(virtual != ffi.NULL)
    virtual = ffi.gc(virtual, lib.pi_vgguf_close)
    # Bundles are read beside stock's own loading, which uses one thread.
    with ThreadPoolExecutor(max_workers=1) as beside:
        threads = max(1, len(os.sched_getaffinity(0)) - 1)
        reading = beside.submit(lib.pi_model_read, model, files.fds[0], threads, message, _ERROR_SIZE)
        pointer = _load_stream(ffi, lib, virtual, [source.name for source in panels], model, placement, params)
    try:
        check(reading.result() == 0)
        if pointer is not None:
            check(_read_panels(ffi, lib, files, model, panels, placement.budget is not None, message) == 0)
        files.check_unchanged()
    except BaseException:
        if pointer is not None:
            bindings.llama_model_free(pointer)
        raise
    if pointer is None:
        file, offset = ffi.new("int *"), ffi.new("int64_t *")
        code = lib.pi_vgguf_error(virtual, file, offset)
        if code != 0:
            name = files.files[file[0]].path
            raise PowerInferError(f"{name}: reading at offset {offset[0]} failed: {os.strerror(code)}")
        raise PowerInferError(
            f"{files.path}: llama.cpp refuses the model that this file holds; load its source with llama_cpp.Llama("
            "verbose=True) to see why"
        )
    sparse = SparseModel(files.path, [str(file.path) for file in files.files], placement, model)
    sparse.set_verify(options.verify)
    return pointer, sparse


def _return_freed_memory() -> None:
    """Have large blocks go back to the system when they are freed.

    glibc raises the size from which blocks are mapped on their own whenever a mapped one is freed, and what llama.cpp
    and Python free while loading then stays with the process: 15 MiB of a budget that has none to spare.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)
        libc.malloc_trim(0)


def _open_model(
    ffi: Any, lib: Any, files: ModelFiles, placement: Placement, options: Options, message: Any
) -> Any:
    """struct pi_model *, nothing read yet; NULL with a sentence in `message`."""
    kept: list[Any] = []  # what the specs point to, until pi_model_open has copied it
    specs = ffi.new("struct pi_layer_spec[]", len(placement.bundles) + 1)
    for spec, bundles in zip(specs, placement.bundles, strict=False):
        _fill_spec(ffi, spec, bundles.layer, kept)
        spec.n_slots, spec.n_hot = bundles.slots, bundles.hot
        frequency = bundles.layer.frequency if bundles.slots else None
        if frequency is not None:
            kept.append(ffi.from_buffer("float[]", np.ascontiguousarray(frequency, np.float32)))
            spec.frequency = kept[-1]
    slabs = ffi.new("struct pi_slab_spec[]", len(placement.matrices) + 1)
    for spec, matrix in zip(slabs, placement.matrices, strict=False):
        kept.append(ffi.new("char[]", matrix.source.name.encode()))
        spec.name, spec.group, spec.type = kept[-1], matrix.group, matrix.source.type
        spec.n_in, spec.n_out = matrix.source.shape[:2]
        spec.n_expert, spec.tile, spec.n_slots = matrix.n_expert, matrix.tile, matrix.slots
        spec.kind, spec.norm_offset, spec.n_used = _KINDS[matrix.kind], matrix.norm_offset, matrix.n_used
        spec.file, spec.offset = matrix.source.file, matrix.source.offset
    flash = ffi.new("struct pi_flash_spec *")
    flash.engine, flash.depth, flash.run = IO_ENGINES[options.io], DEPTH, RUN
    if placement.streams:
        flash.gap, flash.flight = disk.gap(files.first.path), disk.flight(files.first.path)
    flash.ahead = options.prefetch
    flash.transit = TRANSIT if placement.bundles else 0
    return lib.pi_model_open(
        files.fds,
        len(files.fds),
        len(placement.bundles),
        specs,
        len(placement.matrices),
        slabs,
        _ACTIVATIONS[files.sparse.activation] if files.sparse is not None else 0,
        flash if placement.streams else ffi.NULL,
        message,
        _ERROR_SIZE,
    )


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


def panel_names(tensors: list[Source], sparse: bool) -> list[str]:
    """The tensors that cpatch/panels.c is to multiply with: those that all architectures use in products and, if it is
    the head too, in look-ups, and nowhere else.

    sparse: is it a sparse-GGUF? Whether a model is streamed should not change a bit of its answers. Panels' products
    are those of stock, bit for bit, in Q4_0 alone; of other types only what is never streamed may be in panels, and
    nothing of a stock GGUF, which stock itself runs when it fits.
    """
    _, lib = native()

    def fits(tensor: Source) -> bool:
        n_in, n_out, n_expert = (*tensor.shape, 1, 1, 1)[:3]
        as_stock = tensor.type == _Q4_0 or (sparse and ".ffn_" not in tensor.name)
        return as_stock and lib.pi_panel_has_type(tensor.type, n_in, n_out, n_expert)

    names = {tensor.name for tensor in tensors if fits(tensor)}
    head = "output.weight" if any(tensor.name == "output.weight" for tensor in tensors) else "token_embd.weight"
    return sorted(name for name in names if name == head or _PRODUCTS.fullmatch(name))


def _panels(lib: Any, files: ModelFiles, placement: Placement, params: Any) -> list[Source]:
    """The tensors that are to be kept in panels, if any are."""
    if not lib.pi_panel_available() or not params.use_extra_bufts:
        return []
    taken = {matrix.source.name for matrix in placement.matrices}
    names = set(panel_names(files.tensors(), files.sparse is not None)) - taken
    return [source for source in files.tensors() if source.name in names and source.file >= 0]


def _read_panels(
    ffi: Any, lib: Any, files: ModelFiles, model: Any, panels: list[Source], drop: bool, message: Any
) -> int:
    sources = ffi.new("struct pi_panel_source[]", len(panels) + 1)
    names = [ffi.new("char[]", source.name.encode()) for source in panels]
    for to, name, source in zip(sources, names, panels, strict=False):
        to.name, to.file, to.offset = name, source.file, source.offset
    threads = len(os.sched_getaffinity(0))
    return lib.pi_model_read_panels(
        model, files.fds, len(files.fds), len(panels), sources, drop, threads, message, _ERROR_SIZE
    )


def _load_stream(
    ffi: Any, lib: Any, virtual: Any, panels: list[str], model: Any, placement: Placement, params: Any
) -> int | None:
    """Have stock llama.cpp load the virtual file; None when it refuses. `params` is left as it was given."""
    ours = type(params).from_buffer_copy(params)
    ours.load_mode = bindings.LLAMA_LOAD_MODE_NONE  # a stream cannot be mapped
    ours.check_tensors = False  # would look at the bytes of holes
    names = [name for bundles in placement.bundles for name in _bundled_names(bundles.layer) if name is not None]
    names += [matrix.source.name for matrix in placement.matrices]
    overrides = (_BufferTypeOverride * 3)()  # the last one is empty
    used = 0
    for chosen, buffer_type in ((names, lib.pi_model_buft(model)), (panels, lib.pi_model_panel_buft(model))):
        if chosen:
            overrides[used].pattern = rf"^({'|'.join(map(re.escape, chosen))})$".encode()
            overrides[used].buffer_type = int(ffi.cast("uintptr_t", buffer_type))
            used += 1
    if used:
        ours.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    stream = int(ffi.cast("uintptr_t", lib.pi_vgguf_file(virtual)))
    return bindings.llama_model_load_from_file_ptr(stream, ours)
