"""`powerinfer plan`: where a model's parts would go for a memory budget, and how fast that would be, before it runs.

The cost of a decoded token is predicted from what it touches and what it misses:

    compute   bytes of the weights it touches over the speed at which this machine multiplies such weights: stock's
              matrix products for attention, head and deciding matrices, our kernels for neurons and experts (all
              measured in a second, not derived from bandwidth), and a constant for every block
    disk      reads x (latency + `_READ`) + missing bytes / bandwidth (`disk.DiskCost`, measured at places that were
              read before), and a round trip for every layer that has to wait. Missing is what is asked for and not in
              a cache of the slots that `placement` would give out (`hits`)
    token     what is computed outside the blocks (the head), when nobody knows yet what to read; of the rest the slower
              of the two and a part of the other: reading hides the computing of the neurons that are there already;
              of predicted neurons, which are read a layer ahead, of experts and tiles `_OVERLAP`

`powerinfer bench --memory` stores the prediction beside what it measures (`plan` in its JSON).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gguf_tools.activations import NATIVE
from gguf_tools.reader import row_bytes
from gguf_tools.virtual import ModelFiles, Source
from powerinfer_ext import disk, hits, machine
from powerinfer_ext.errors import BudgetError, PowerInferError
from powerinfer_ext.placement import (
    DENSE_FFN,
    EXPERTS,
    GAP,
    RUN,
    Bundles,
    Context,
    Matrix,
    Placement,
    choose_ubatch,
    parse_memory,
    place,
)

DENSITY = 0.1  # of a sparse model whose file does not say how often its neurons fire
# Measured on two Zen 4 cores (bench/results): what the model above does not derive.
_BLOCK = 0.6e-3  # seconds that a block takes besides its matrices: attention, norms, waiting for the slowest thread
_READ = 3e-6  # seconds of a read beside the device's: finding a slot, submitting, copying, while others compute
# Share of reading or computing that the other one hides; a layer's predicted neurons are mostly read while the one
# before it is computed.
_OVERLAP = {"experts": 0.6, "tiles": 0.5, "predicted neurons": 0.8}
_FIRST = 2.0  # times as long that first readings of a place have to take to be mentioned
_MMAP_SHARE = 0.3  # of the disk's bandwidth that page faults with a read-ahead of 128 KiB reach
_WHOLE = 128 << 20  # bytes that speeds are measured on, at least
_I8 = 24
_UP = re.compile(r"blk\.([0-9]+)\.ffn_up(_exps\.weight|\.weight)")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Speeds:
    """Bytes of weights per second with all threads: stock's products, ours with matrices in panels, our kernels on
    whole rows (`experts`) and on scattered neurons; plain reading from memory; and the disk, None where it cannot be
    measured.
    """

    stock: float
    panels: float
    experts: float
    neurons: float
    memory: float
    disk: disk.DiskCost | None


@dataclass(frozen=True)
class Model:
    """What is planned for. files: a `ModelFiles`, or for a shape something that looks like one.

    density: share of a layer's (routed) neurons that are computed; density_from: who says so.
    """

    name: str
    files: Any
    density: float
    density_from: str
    hit_rate: hits.HitRate
    tile_hits: hits.HitRate = field(default_factory=hits.dense)

    @property
    def sources(self) -> list[Source]:
        """All tensors, as stock sees them."""
        return self.files.tensors()

    @property
    def blocks(self) -> int:
        """How many there are."""
        metadata = self.files.first.metadata
        return int(metadata.get(f"{metadata.get('general.architecture')}.block_count", 0))

    @cached_property
    def panels(self) -> frozenset[str]:
        """The tensors that are multiplied in panels where we load the model."""
        from powerinfer_ext.loader import panel_names

        return frozenset(panel_names(self.sources, self.files.sparse is not None))

    @property
    def mixture(self) -> bool:
        """Has it experts?"""
        return any(EXPERTS.fullmatch(tensor.name) for tensor in self.sources)

    @property
    def routed(self) -> float:
        """Share of the experts that a token uses; 1 for a dense model."""
        metadata = self.files.first.metadata
        arch = metadata.get("general.architecture")
        experts, used = (metadata.get(f"{arch}.{key}") for key in ("expert_count", "expert_used_count"))
        return min(1.0, used / experts) if experts and used else 1.0


@dataclass(frozen=True)
class Row:
    """A placement and what it would be like. decode_tps None: it does not fit, and `reason` says what it takes.

    Bytes and reads are per decoded token; seconds too. memory: what the process would take at most, and predicted_slots
    the part of it in which streamed neurons that predictors select are kept.
    """

    placement: str
    decode_tps: float | None
    memory: int | None
    compute_s: float | None = None
    disk_s: float | None = None
    touched_bytes: float | None = None
    missing_bytes: float | None = None
    reads: float | None = None
    hit_rate: float | None = None
    reason: str = ""
    ours: bool = True
    predicted_slots: int = 0


# ---- models ----------------------------------------------------------------------------------------


@contextmanager
def open_model(
    name: str, *, quant: str | None = None, layers: int | None = None, density: float | None = None
) -> Iterator[list[Model]]:
    """The model at a path, or of a shape's name, and, where it is a stock one whose neurons can stay silent, as it
    would be after `powerinfer convert`. Raises FormatError, ConversionError, PowerInferError, OSError."""
    from gguf_tools.shapes import SHAPES

    if not os.path.exists(name) and name in SHAPES:
        yield _of_shape(name, quant, layers, density)
        return
    if quant is not None or layers is not None:
        raise PowerInferError(f"{name}: --quant and --layers are for the name of a shape, a file has its own")
    with ModelFiles.open(name) as files:
        yield _models(name, files, density, _activation(files))


def _activation(files: ModelFiles) -> str | None:
    metadata = files.first.metadata
    return metadata.get("powerinfer.activation", NATIVE.get(metadata.get("general.architecture"), (None,))[0])


def _models(name: str, files: Any, density: float | None, activation: str | None) -> list[Model]:
    """`files` as they are, and as they would be converted."""
    if files.sparse is not None:
        known = [layer.frequency for layer in files.sparse.layers if layer.frequency is not None]
        if density is not None:
            share, source = density, "given"
        elif (selected := hits.computed(files.sparse.layers)) is not None:
            share, source = selected, "the file's predictors"
        elif known:
            share, source = float(np.mean([layer.mean() for layer in known])), hits.FREQUENCIES
        else:
            share, source = DENSITY, "assumed: the file has no profile"
        return [Model(name, files, share, source, hits.of_neurons(known, share))]
    mixture = any(EXPERTS.fullmatch(tensor.name) for tensor in files.tensors())
    whole = Model(name, files, 1.0, "all are computed", hits.of_experts() if mixture else hits.dense())
    if activation not in ("relu", "relu2", "drelu"):
        return [whole]
    given = (density, "given") if density is not None else (DENSITY, "assumed")
    return [whole, Model(f"{name}, converted", _converted(files), *given, hits.of_neurons(None))]


def _of_shape(name: str, quant: str | None, layers: int | None, density: float | None) -> list[Model]:
    from gguf_tools.shapes import find, metadata
    from gguf_tools.synth import layout

    shape = find(name)
    tensors = layout(shape, layers=layers, quant=quant)
    sources = [Source(tensor.name, tensor.type, tuple(tensor.shape), 0, 0) for tensor in tensors]
    fields = {entry.name: entry.value for entry in metadata(shape, layers or shape.n_layer, "")}
    return _models(name, _Header(name, fields, sources), density, shape.activation)


@dataclass(frozen=True)
class _Header:
    """What planning wants of a `ModelFiles`, for a model that is no file."""

    path: str
    metadata: Mapping[str, Any]
    sources: list[Source]
    sparse: Any = None
    nbytes_given: int | None = None

    @property
    def first(self) -> _Header:
        return self

    @property
    def nbytes(self) -> int:
        return self.nbytes_given or sum(source.nbytes for source in self.sources)

    def tensors(self) -> list[Source]:
        return self.sources


def _converted(files: Any) -> _Header:
    """The sparse-GGUF that `powerinfer convert` would make, in exact mode, as far as sizes go."""
    named = {source.name: source for source in files.tensors()}
    layers, hidden = [], set()
    for name, up in named.items():
        found = _UP.fullmatch(name)
        if found is None:
            continue
        gate, down = (named.get(f"blk.{found[1]}.ffn_{part}{found[2]}") for part in ("gate", "down"))
        if down is None:
            continue
        n_embd, n_ff, *experts = up.shape
        segments = [-(-row_bytes(down.type, n_embd) // 64) * 64]
        hidden.add(down.name)
        if gate is not None:
            segments.append(-(-row_bytes(up.type, n_embd) // 64) * 64)
            hidden.add(name)
        layers.append(
            SimpleNamespace(
                index=int(found[1]),
                gated=gate is not None,
                n_embd=n_embd,
                n_ff=n_ff,
                n_expert=experts[0] if experts else 0,
                stride=sum(segments),
                hot_count=0,
                decider=gate or up,
                decider_name=(gate or up).name,
                up_type=up.type if gate is not None else None,
                gate_type=None,
                down_type=down.type,
                frequency=None,
                scale_tensor=None,
                threshold_tensor=None,
                predictor=None,
            )  # fmt: skip
        )
    sources = [replace(source, file=-1) if source.name in hidden else source for source in named.values()]
    sparse = SimpleNamespace(layers=layers)
    return _Header(str(files.path), files.first.metadata, sources, sparse, files.nbytes)


# ---- speeds ----------------------------------------------------------------------------------------


def measure(model: Model, threads: int, path: str | os.PathLike[str] | None, fresh: bool = False) -> Speeds:
    """The speeds that matter for `model`. path: a file on the disk that it lies on (None: the home folder).
    fresh: measure it even where that was done before.
    """
    sizes: dict[int, int] = {}
    for source in model.sources:
        if len(source.shape) > 1:
            sizes[source.type] = sizes.get(source.type, 0) + source.nbytes
    main = max(sizes, key=lambda kind: sizes[kind])
    n_embd = int(
        model.files.first.metadata.get(f"{model.files.first.metadata['general.architecture']}.embedding_length")
    )
    whole = max(_WHOLE, 4 * machine.last_level_cache())
    layer = model.files.sparse.layers[0] if model.files.sparse is not None and model.files.sparse.layers else None
    experts = _kernel_rate(main, main, n_embd, row_bytes(main, n_embd), whole, threads, False)
    neurons = experts
    if layer is not None:
        kinds = [kind for kind in (layer.up_type, layer.gate_type) if kind is not None]
        neurons = _kernel_rate(kinds[0] if kinds else None, layer.down_type, n_embd, layer.stride, whole, threads, True)
    stock = _stock_rate(main, n_embd, whole, threads)
    panels = _panel_rate(main, n_embd, whole, threads) or stock
    return Speeds(stock, panels, experts, neurons, _memory(), _disk(path, fresh))


def mean(measured: list[Speeds]) -> Speeds:
    """Of measurements at several times: a machine's speed changes, and a prediction is for all of the time."""

    def means(things: list[Any], *names: str) -> list[float]:
        return [float(np.mean([getattr(thing, name) for thing in things])) for name in names]

    disks = [each.disk for each in measured if each.disk is not None]
    device = disk.DiskCost(*means(disks, "latency", "bandwidth", "round_trip", "first")) if disks else None
    return Speeds(*means(measured, "stock", "panels", "experts", "neurons", "memory"), device)


def _memory() -> float:
    try:
        return machine.memory_bandwidth(0.3)
    except MemoryError:
        return 0.0


def _disk(path: str | os.PathLike[str] | None, fresh: bool) -> disk.DiskCost | None:
    if path is not None:
        return disk.cost(path, remeasure=fresh)
    try:
        with machine.direct_file(Path.home() if os.access(Path.home(), os.W_OK) else Path("."), 64 << 20) as (fd, _):
            return disk.cost(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def _kernel_rate(dots: int | None, axpys: int, n: int, stride: int, size: int, threads: int, scattered: bool) -> float:
    """Bytes per second of our kernels on rows of n values, stride bytes apart in a buffer of that size."""
    from powerinfer_ext.loader import native

    ffi, lib = native()
    count = size // stride
    buffer = np.full(count * stride + 64, 17, np.uint8)
    chosen = np.arange(count, dtype=np.int32)
    if scattered:
        chosen = np.sort(np.random.default_rng(0).choice(count, count // 8, replace=False)).astype(np.int32)
    rows = ffi.from_buffer("int32_t[]", chosen)
    jobs = [(0, dots)] if dots is not None else []
    if scattered:
        jobs.append((1, axpys))
    touched, seconds = 0, 0.0
    for op, kind in jobs:
        scales = np.full((count // 32 + 1) * n, 0x2000, np.uint16)
        given = np.ones(n * 8 + 64, np.uint8)
        job = ffi.new("struct pi_kernel_job *")
        job.op, job.type, job.n, job.stride = op, kind, n, stride
        job.buffer, job.input = ffi.from_buffer(buffer), ffi.from_buffer(given)
        job.scales = ffi.from_buffer(scales) if kind == _I8 else ffi.NULL
        found = [lib.pi_kernel_seconds(job, rows, len(chosen), threads) for _ in range(5)]
        if min(found) <= 0:
            raise MemoryError("there is no memory to measure the kernels in")
        seconds += min(found)
        touched += len(chosen) * (n if kind == _I8 else row_bytes(kind, n))
    return touched / seconds


def _panel_rate(kind: int, n: int, size: int, threads: int) -> float | None:
    """Bytes of weights per second of products with one vector in panels; None where matrices do not become panels."""
    from powerinfer_ext.loader import native

    ffi, lib = native()
    rows = size // row_bytes(kind, n)
    if not lib.pi_panel_available() or not lib.pi_panel_has_type(kind, n, rows, 1):
        return None
    buffer = np.full(rows * row_bytes(kind, n) + (1 << 16), 17, np.uint8)
    found = [lib.pi_panel_seconds(kind, n, rows, ffi.from_buffer(buffer), threads) for _ in range(5)]
    if min(found) <= 0:
        raise MemoryError("there is no memory to measure panels in")
    return rows * row_bytes(kind, n) / min(found)


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_P, _I = ctypes.c_void_p, ctypes.c_int
_GGML = {  # function -> result, arguments
    "base": {
        "ggml_init": (_P, _InitParams),
        "ggml_free": (None, _P),
        "ggml_new_tensor_2d": (_P, _P, _I, ctypes.c_int64, ctypes.c_int64),
        "ggml_mul_mat": (_P, _P, _P, _P),
        "ggml_new_graph": (_P, _P),
        "ggml_build_forward_expand": (None, _P, _P),
        "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
        "ggml_backend_buffer_free": (None, _P),
        "ggml_backend_tensor_set": (None, _P, _P, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
        "ggml_backend_dev_buffer_type": (_P, _P),
        "ggml_backend_dev_backend_reg": (_P, _P),
        "ggml_backend_dev_init": (_P, _P, ctypes.c_char_p),
        "ggml_backend_reg_get_proc_address": (_P, _P, ctypes.c_char_p),
        "ggml_backend_graph_compute": (_I, _P, _P),
        "ggml_backend_free": (None, _P),
    },
    "": {"ggml_backend_dev_by_type": (_P, _I)},
}
_CPU = 0  # enum ggml_backend_dev_type


def _ggml() -> SimpleNamespace:
    """The functions above, of the libggml that llama.cpp uses."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)  # else every tensor that is repacked is a line on stderr
    folder = Path(llama_cpp.__file__).resolve().parent / "lib"
    found = SimpleNamespace()
    for part, functions in _GGML.items():
        library = ctypes.CDLL(str(folder / f"libggml{'-' if part else ''}{part}.so.0"))
        for name, (result, *arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(found, name, function)
    return found


def _stock_rate(kind: int, n: int, size: int, threads: int, seconds: float = 0.3) -> float:
    """Bytes of weights per second of stock's products of matrices of a type with one vector, in the layout that stock
    repacks that type to. Raises MemoryError, PowerInferError."""
    ggml, n_rows = _ggml(), 4096
    device = ggml.ggml_backend_dev_by_type(_CPU)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    proc = ggml.ggml_backend_reg_get_proc_address
    extra = proc(registry, b"ggml_backend_dev_get_extra_bufts")
    layouts = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(extra)(device) if extra else []
    types = list(itertools.takewhile(bool, layouts)) + [ggml.ggml_backend_dev_buffer_type(device)]
    matrix = row_bytes(kind, n) * n_rows
    content = np.full(matrix, 17, np.uint8)
    with contextlib.ExitStack() as stack:

        def kept(thing: Any, free: Callable[[Any], None]) -> Any:
            if not thing:
                raise MemoryError("there is no memory to measure stock's kernels in")
            stack.callback(free, thing)
            return thing

        weights, rest = (kept(ggml.ggml_init(_InitParams(8 << 20, None, True)), ggml.ggml_free) for _ in range(2))
        given = ggml.ggml_new_tensor_2d(rest, 0, n, 1)
        tensors = [ggml.ggml_new_tensor_2d(weights, kind, n, n_rows) for _ in range(max(1, size // matrix))]
        graph = ggml.ggml_new_graph(rest)
        for tensor in tensors:
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(rest, tensor, given))
        layout = _layout(ggml, device, types, kind, n)
        kept(ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, layout), ggml.ggml_backend_buffer_free)
        kept(ggml.ggml_backend_alloc_ctx_tensors_from_buft(rest, types[-1]), ggml.ggml_backend_buffer_free)
        ones = np.ones(n, np.float32)
        ggml.ggml_backend_tensor_set(given, ones.ctypes.data, 0, ones.nbytes)
        for tensor in tensors:
            ggml.ggml_backend_tensor_set(tensor, content.ctypes.data, 0, matrix)
        backend = kept(ggml.ggml_backend_dev_init(device, None), ggml.ggml_backend_free)
        ctypes.CFUNCTYPE(None, _P, _I)(proc(registry, b"ggml_backend_set_n_threads"))(backend, threads)
        best, deadline = 0.0, time.perf_counter() + seconds
        while not best or time.perf_counter() < deadline:
            start = time.perf_counter()
            if ggml.ggml_backend_graph_compute(backend, graph) != 0:
                raise PowerInferError("ggml cannot compute the products to measure; run: powerinfer doctor")
            best = max(best, len(tensors) * matrix / (time.perf_counter() - start))
        return best


def _layout(ggml: Any, device: Any, layouts: list[Any], kind: int, n: int) -> Any:
    """The first buffer type in which the device multiplies with matrices of a type: stock's own choice for weights."""
    for layout in layouts:
        with contextlib.ExitStack() as probe:
            trial = ggml.ggml_init(_InitParams(1 << 20, None, True))
            probe.callback(ggml.ggml_free, trial)
            one = ggml.ggml_new_tensor_2d(trial, kind, n, 64)
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(trial, layout)
            if not buffer:
                continue
            probe.callback(ggml.ggml_backend_buffer_free, buffer)
            product = ggml.ggml_mul_mat(trial, one, ggml.ggml_new_tensor_2d(trial, 0, n, 1))
            if ggml.ggml_backend_dev_supports_op(device, product):
                return layout
    return layouts[-1]


# ---- the cost model --------------------------------------------------------------------------------


@dataclass
class _Cost:
    """What a token costs, added up over the layers."""

    compute: float = 0.0
    outside: float = 0.0  # of compute, what is not in a block
    neurons: float = 0.0  # of compute, what the neurons of streamed layers take that are in memory
    disk: float = 0.0
    touched: float = 0.0
    missing: float = 0.0
    reads: float = 0.0
    wanted: float = 0.0  # bytes of units
    missed: float = 0.0


def predict(model: Model, placement: Placement, speeds: Speeds) -> Row:
    """What decoding a token would be like with `placement`."""
    cost = _Cost(compute=model.blocks * _BLOCK)
    ours = {matrix.source.name for matrix in placement.matrices if matrix.kind in ("experts", "tiles")}
    tied = all(source.name != "output.weight" for source in model.sources)
    loaded_by_us = model.files.sparse is not None or placement.streams
    panels = model.panels if loaded_by_us else frozenset()
    for source in model.sources:
        looked_up = source.name == "token_embd.weight" and not tied
        if source.name in ours or source.file < 0 or looked_up:
            continue
        share = model.routed if "_exps." in source.name else 1.0
        cost.touched += source.nbytes * share
        seconds = source.nbytes * share / (speeds.panels if source.name in panels else speeds.stock)
        cost.compute += seconds
        cost.outside += 0.0 if source.name.startswith("blk.") else seconds
    waits: dict[int, str] = {}
    for bundle in placement.bundles:
        _add_neurons(cost, model, bundle, speeds)
        if 0 < bundle.slots < bundle.units:
            ahead = bundle.layer.predictor is not None and bundle.layer.predictor.kind != "direct"
            waits[bundle.layer.index] = "predicted neurons" if ahead else "neurons"
    for matrix in placement.matrices:
        if matrix.source.name not in ours:
            continue
        _add_units(cost, model, matrix, speeds)
        if matrix.slots < matrix.units:
            waits.setdefault(matrix.group, matrix.kind)
    name, memory = _name(placement), _memory_of(model, placement)
    overlap, blocks = 1.0, cost.compute - cost.outside
    if waits and speeds.disk is None:
        return Row(name, None, memory, reason="the disk cannot be measured")
    if waits and speeds.disk is not None:
        cost.disk += len(waits) * speeds.disk.round_trip
        kinds = list(waits.values())
        shares = {**_OVERLAP, "neurons": cost.neurons / blocks}
        overlap = sum(shares[kind] for kind in kinds) / len(kinds)
    seconds = cost.outside + max(blocks, cost.disk) + (1 - overlap) * min(blocks, cost.disk)
    return Row(
        name,
        1 / seconds,
        memory,
        cost.compute,
        cost.disk,
        cost.touched,
        cost.missing,
        cost.reads,
        1 - cost.missed / cost.wanted if cost.wanted else None,
        predicted_slots=sum(
            b.slots * b.unit_bytes for b in placement.bundles if b.slots < b.units and b.layer.predictor is not None
        ),
    )


def _memory_of(model: Model, placement: Placement) -> int:
    """Bytes that the process takes at most; what is left to stock when nothing is streamed counts too."""
    if model.files.sparse is not None or placement.streams:
        return placement.total
    streamable = EXPERTS if model.mixture else DENSE_FFN
    return placement.total + sum(s.nbytes for s in model.sources if streamable.fullmatch(s.name))


def _add_neurons(cost: _Cost, model: Model, bundle: Bundles, speeds: Speeds) -> None:
    """The neurons of a layer: read in runs of neighbours where gaps between them are cheap."""
    wanted = bundle.units * model.routed * model.density
    n_bytes = wanted * bundle.unit_bytes
    cost.touched += n_bytes
    cost.compute += n_bytes / speeds.neurons
    if bundle.slots == 0 or bundle.slots >= bundle.units:
        return
    hit_rate = model.hit_rate(bundle.slots / bundle.units)
    cost.neurons += hit_rate * n_bytes / speeds.neurons
    missed = wanted * (1 - hit_rate)
    # A mixture's misses are among the routed experts' neurons; the most frequent ones, stored first, are not missed.
    within = (bundle.units - bundle.slots) * model.routed
    reads, read = runs(missed, within, bundle.unit_bytes, speeds.disk.gap if speeds.disk else GAP)
    _add_reads(cost, speeds, n_bytes, missed * bundle.unit_bytes, reads, read)


def runs(missed: float, within: float, unit: int, gap: int) -> tuple[float, float]:
    """(reads, bytes) for so many missed units scattered over `within`, when gaps of up to `gap` bytes are read through.

    Gaps between units at random places have a geometric distribution.
    """
    if missed <= 0:
        return 0.0, 0.0
    p = min(0.999, missed / max(within, 1.0))
    most = max(0, min(gap, RUN - 2 * unit) // unit)  # units between two that are read through at most
    through = 1 - (1 - p) ** (most + 1)  # probability that the next missed unit joins the run
    between = sum(k * p * (1 - p) ** k for k in range(most + 1))  # expected units read for nothing per missed unit
    longest = RUN / unit / (1 + between / through)  # missed units that fit into the longest read
    reads = missed / min(1 / max(1 - through, 1e-9), max(longest, 1.0))
    return reads, (missed + missed * between) * unit + reads * 512


def _add_units(cost: _Cost, model: Model, matrix: Matrix, speeds: Speeds) -> None:
    """Experts or tiles of a matrix in stock's layout."""
    experts = matrix.kind == "experts"
    wanted = matrix.units * (model.routed if experts else 1.0)
    n_bytes = wanted * matrix.unit_bytes
    cost.touched += n_bytes
    cost.compute += n_bytes / speeds.experts
    if matrix.slots >= matrix.units:
        return
    curve = (hits.of_experts() if model.mixture else hits.dense()) if experts else model.tile_hits
    missed = wanted * (1 - curve(matrix.slots / matrix.units))
    _add_reads(cost, speeds, n_bytes, missed * matrix.unit_bytes, missed, missed * (matrix.unit_bytes + 512))


def _add_reads(cost: _Cost, speeds: Speeds, wanted: float, missed: float, reads: float, read: float) -> None:
    cost.wanted += wanted
    cost.missed += missed
    cost.reads += reads
    cost.missing += read
    if speeds.disk is not None:
        cost.disk += speeds.disk.seconds(read, reads) + reads * _READ


def _name(placement: Placement) -> str:
    kinds = {matrix.kind for matrix in placement.matrices}
    if not placement.streams:
        return "all in memory"
    if placement.bundles:
        deciding = "streamed" if kinds & {"experts", "tiles"} else "kept"
        return f"neurons streamed, deciding matrices {deciding}"
    return "experts streamed" if "experts" in kinds else "FFN weights streamed in tiles"


def _stock(model: Model, budget: int | None, speeds: Speeds, process: int) -> Row:
    """Stock llama.cpp on the stock file, mapped: what does not fit is read by page faults, one after the other."""
    total = touched = chosen = 0.0
    tied = all(source.name != "output.weight" for source in model.sources)
    for source in model.sources:
        total += source.nbytes
        if source.name == "token_embd.weight" and not tied:
            continue
        routed = "_exps." in source.name
        touched += source.nbytes * (model.routed if routed else 1.0)
        chosen += source.nbytes if routed else 0
    compute = touched / speeds.stock + model.blocks * _BLOCK
    if budget is None or total + process <= budget:
        return Row("stock, mapped", 1 / compute, round(total + process), compute, 0.0, touched, 0.0, 0.0, ours=False)
    if speeds.disk is None:
        return Row("stock, mapped", None, budget, reason="the disk cannot be measured", ours=False)
    room = max(0.0, budget - process)
    if chosen:
        always = total - chosen
        share = min(1.0, max(0.0, (room - always) / chosen))
        wanted = chosen * model.routed
        missing = wanted * (1 - hits.of_experts()(share))
    else:
        wanted = missing = touched  # least recently used, all of it used in turn: nothing survives until its next use
    seconds = missing / (_MMAP_SHARE * speeds.disk.bandwidth)
    return Row("stock, mapped", 1 / (compute + seconds), budget, compute, seconds, touched, missing, missing / 131072,
               1 - missing / wanted, ours=False)  # fmt: skip


def rows(model: Model, budget: int | None, context: Context, speeds: Speeds) -> list[Row]:
    """All placements of one model for a budget, those that do not fit too."""
    found: list[Row] = []
    for memory, deciders in ((1 << 60, None), (budget, "kept"), (budget, "streamed")):
        if memory is None or (deciders == "streamed" and model.files.sparse is None):
            continue
        try:
            placement = place(model.files, memory, context, deciders)
        except BudgetError as error:
            name = f"neurons streamed, deciding matrices {deciders}" if model.files.sparse is not None else "streamed"
            found.append(Row(name, None, error.least, reason=f"takes {_mb(error.least)} at least"))
            continue
        row = predict(model, placement, speeds)
        if memory == 1 << 60 and budget is not None and (row.memory or 0) > budget:
            row = Row(row.placement, None, row.memory, reason=f"takes {_mb(row.memory)}")
        if row.placement not in [other.placement for other in found]:
            found.append(row)
    return found


def plan(
    name: str,
    memory: str | int | None,
    *,
    quant: str | None = None,
    layers: int | None = None,
    density: float | None = None,
    n_ctx: int = 512,
    threads: int | None = None,
    speeds: Speeds | None = None,
    process: int | None = None,
    step: Progress = lambda text: None,
) -> dict[str, Any]:
    """The JSON of `powerinfer plan`.

    name: a file, or the name of a shape (then quant and layers say more). density: share of the neurons that is
    computed, where the file's own profile is not to count. speeds, process: measured if not given.
    Raises PowerInferError for a budget that makes no sense, FormatError, ConversionError, OSError.
    """
    threads = threads or len(os.sched_getaffinity(0))
    with open_model(name, quant=quant, layers=layers, density=density) as models:
        first = models[0]
        budget = parse_memory(memory, first.files.nbytes)
        if speeds is None:
            step("Measuring how fast this machine computes and reads")
            speeds = measure(models[-1], threads, name if os.path.exists(name) else None, fresh=True)
        if process is None:
            process = _PROCESS
        context = Context(n_ctx, n_ctx, min(n_ctx, 512), process=process)
        smaller = choose_ubatch(models[-1].files, budget, context) if budget is not None else None  # as loading does
        context = replace(context, n_ubatch=smaller or context.n_ubatch)
        table: list[tuple[Model, Row]] = [(m, row) for m in models for row in rows(m, budget, context, speeds)]
        stock = _stock(first, budget, speeds, process) if first.files.sparse is None else None
        chosen = _choose(models, budget, context, speeds)
        return {
            "model": name,
            "bytes": first.files.nbytes,
            "budget": budget,
            "n_ctx": n_ctx,
            "threads": threads,
            "placements": [{"model": m.name, **asdict(row)} for m, row in table]
            + ([{"model": name, **asdict(stock)}] if stock else []),
            "choice": chosen,
            "assumptions": [
                *(
                    line
                    for m in models
                    for line in (
                        f"{m.name}: {m.density:.1%} of the (routed) neurons are computed ({m.density_from})",
                        f"{m.name}: hit rates of the cache from {m.hit_rate.source}",
                    )
                ),
                *_about_first_reads(chosen, speeds.disk),
            ],
            "speeds": {
                "stock_gbps": speeds.stock / 1e9,
                "panels_gbps": speeds.panels / 1e9,
                "experts_gbps": speeds.experts / 1e9,
                "neurons_gbps": speeds.neurons / 1e9,
                "memory_gbps": speeds.memory / 1e9,
                "disk": asdict(speeds.disk) if speeds.disk else None,
            },
        }


_PROCESS = 52 << 20  # bytes that Python, llama.cpp's libraries and ours take before a model


def _choose(models: list[Model], budget: int | None, context: Context, speeds: Speeds) -> dict[str, Any] | None:
    """The placement that loading each of the models makes, the fastest of them, and why."""
    found = []
    for model in models:
        try:
            found.append((model, predict(model, place(model.files, budget or 1 << 60, context), speeds)))
        except BudgetError:
            continue
    found = [(model, row) for model, row in found if row.decode_tps]
    if not found:
        return None
    model, best = max(found, key=lambda pair: pair[1].decode_tps)
    reason = "everything fits" if best.placement == "all in memory" else _why(best)
    if len(found) > 1:
        others = ", ".join(f"{other.decode_tps:.1f} tokens/s as {m.name}" for m, other in found if other is not best)
        reason += f"; {others}"
    return {"model": model.name, **asdict(best), "reason": reason}


def _about_first_reads(chosen: dict[str, Any] | None, device: disk.DiskCost | None) -> list[str]:
    if chosen is None or not chosen["missing_bytes"] or device is None or device.first < _FIRST:
        return []
    return [
        f"what is streamed has been read before; here a first reading takes {device.first:.0f} times as long, so the "
        "first tokens will be slower"
    ]


def _why(row: Row) -> str:
    slower, faster = ("reading", "computing") if row.disk_s > row.compute_s else ("computing", "reading")
    return (
        f"it is the one that fits: {1000 * row.disk_s:.1f} ms of reading and {1000 * row.compute_s:.1f} ms of "
        f"computing per token, so {slower} decides and hides part of the {faster}"
    )


def _mb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f} MB"


# ---- the command -----------------------------------------------------------------------------------

EXAMPLES = (
    "powerinfer plan model.sparse.gguf --memory 50%",
    "powerinfer plan qwen3-30b-a3b --memory 8GiB --quant Q4_0",
    "powerinfer plan smallthinker-21b-a3b --memory 4GiB --density 0.4 --json",
)


def render(result: dict[str, Any], console: Console) -> None:
    """Print what `plan` returned."""
    budget = result["budget"]
    console.print(
        f"{result['model']}: {_mb(result['bytes'])}, "
        + ("no budget" if budget is None else f"a budget of {_mb(budget)} ({budget / result['bytes']:.0%})"),
        markup=False,
    )
    several = len({entry["model"] for entry in result["placements"]}) > 1
    columns = ("placement", "tokens/s", "memory", "hits", "missing/token", "reads", "disk ms", "compute ms")
    table = Table(*(("model",) if several else ()), *columns, box=SIMPLE_HEAD)
    for entry in result["placements"]:
        cells = [entry["model"]] if several else []
        if entry["decode_tps"] is None:
            table.add_row(*cells, entry["placement"], "-", entry["reason"], *[""] * 5, style="dim")
            continue
        table.add_row(
            *cells,
            entry["placement"],
            f"{entry['decode_tps']:.1f}",
            _mb(entry["memory"]),
            "-" if entry["hit_rate"] is None else f"{entry['hit_rate']:.0%}",
            f"{entry['missing_bytes'] / 1e6:.1f} MB",
            f"{entry['reads']:.0f}",
            f"{1000 * entry['disk_s']:.1f}",
            f"{1000 * entry['compute_s']:.1f}",
        )
    console.print(table)
    choice = result["choice"]
    if choice is None:
        console.print("No placement fits: take the least budget above, or a model with fewer bytes.", markup=False)
    else:
        console.print(
            f"Choice: {choice['placement']} ({choice['model']}), about {choice['decode_tps']:.1f} tokens/s: "
            f"{choice['reason']}.",
            markup=False,
        )
    if choice is not None and choice["predicted_slots"]:
        size = f"{choice['predicted_slots'] / 1e6:.0f}"
        console.print(
            f"Streamed neurons have {size} MB of memory: predictors made for that read least "
            f"(powerinfer convert --mode predict --hot-memory {size}).",
            markup=False,
        )
    for line in result["assumptions"]:
        console.print(f"Assumed: {line}.", markup=False)


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A GGUF or sparse-GGUF file, or the name of a shape (powerinfer synth)."),
    ],
    memory: Annotated[
        str | None,
        typer.Option(metavar="BUDGET", help="Memory for the whole process: 4GiB, 800MB, or 50% of the model's file."),
    ] = None,
    quant: Annotated[
        str | None, typer.Option(help="For a shape: the type of its matrices.", show_default="Q4_0")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="For a shape: how many of its layers.")] = None,
    density: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1, help="Share of the neurons that is computed.", show_default="the file's, or 0.1"
        ),
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Context length in tokens.")] = 512,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="as many as there are CPUs to use")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Say what of a model would be kept in memory and what streamed, and how fast that would be, without running it.

    Answers for a shape's name without any file. Memory, kernels and disk of this machine are measured (a second).
    """
    with Console(stderr=True).status("") as status:
        result = plan(
            _named(model), memory, quant=quant, layers=layers, density=density, n_ctx=ctx, threads=threads,
            step=lambda what: status.update(f"{what} ..."),
        )  # fmt: skip
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        render(result, Console(highlight=False))
    if result["choice"] is None:
        raise typer.Exit(1)


def _named(model: str) -> str:
    """The path of a model given as a path or as the name of a bundled one; the name of a shape as it is."""
    from gguf_tools.shapes import SHAPES
    from powerinfer_ext.models import find

    if os.path.exists(model) or model in SHAPES or "/" in model or model.endswith(".gguf"):
        return model
    try:
        return str(find(model).path)
    except ValueError as error:
        raise PowerInferError(f"{model}: there is no such file, and {error}; shapes are {', '.join(SHAPES)}") from None
