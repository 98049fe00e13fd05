"""What of a model is kept in memory and what is streamed from flash, for a budget of bytes.

The budget is for the whole process, as a memory cgroup counts it: what Python and its libraries already take,
the weights that are kept, the KV cache, llama.cpp's compute buffers, our own buffers, and with what is left
slots for streamed units (cpatch/store.h): neurons of bundles, experts of mixtures, tiles of dense matrices.

    what                              streamed as                   unless
    bundles of a sparse-GGUF          neurons                       all of them fit
    experts of a stock GGUF           experts, at their offsets     all of them fit
    deciding matrices (exact mode)    experts or tiles of rows      they fit beside slots for a tenth of the bundles
    FFNs of a dense stock GGUF        tiles of rows                 all of them fit
    everything else                   never
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gguf_tools.reader import row_bytes
from gguf_tools.sparse import SparseLayer
from gguf_tools.virtual import ModelFiles, Source
from powerinfer_ext import machine
from powerinfer_ext.errors import BudgetError, PowerInferError

EXPERTS = re.compile(r"blk\.([0-9]+)\..*_exps\.weight")
DENSE_FFN = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.weight")
TILE_BYTES = 1 << 18  # about what a unit of a dense matrix has: reads of this size run at the disk's bandwidth
DEPTH = 128  # reads in flight
GAP = 16 << 10  # bytes cheaper to read through than to skip, where the device cannot be measured
RUN = 64 << 10  # longest read of several neurons
STAGING = 64  # such reads for which there are buffers (LONG_READS in cpatch/store.c)
TRANSIT = 7 << 20  # memory for neurons that are wanted once and not kept: about what a token misses in a layer
STREAM_ROWS = 256  # rows computed together when bundles are streamed (SET_ROWS in cpatch/ffn.c)
_LEAST_NEURONS = 64  # slots of a layer
_HOT_SHARE = 0.25  # of a layer's neurons: PowerInfer (arXiv 2312.12456) finds 26 % to make 80 % of the firings
_SPARE_TILES = 12  # slots that tiles pass through (cpatch/slab.c)
_ROWS = 1024  # slots of a streamed embedding
_EARLY_ROUTERS = ("smallthinker",)  # these read the residual stream, before attention and without a norm
_F32 = 0  # ggml's number
_TOKEN_BYTES = 240  # of llama.cpp's tables, measured with 32 000 and 152 000 tokens
_UBATCHES = (512, 256, 128, 64)
_LAST_UBATCHES = (32, 16)  # where nothing else fits: prompts read most neurons anew for each ubatch


@dataclass(frozen=True)
class Context:
    """The llama_context the model will get, as far as its memory goes. n_ctx 0: what the model was trained with."""

    n_ctx: int = 512
    n_batch: int = 512
    n_ubatch: int = 512
    kv_bytes: float = 2.0  # of one value, mean of K and V
    flash_attention: bool = False  # scores are then not kept
    logits_all: bool = False
    process: int | None = None  # bytes that the process takes already; None: what this one takes

    @property
    def rows(self) -> int:
        """Tokens that are computed together at most."""
        return max(1, min(self.n_ubatch, self.n_batch, self.n_ctx or self.n_batch))


@dataclass(frozen=True)
class Matrix:
    """A tensor in stock's layout that is ours.

    kind: "experts" and "tiles" (of `tile` rows) are streamed, "rows" are looked up (an embedding), a "router" is
    kept: its products tell early what to read. group: the layer. norm_offset: where the norm lies that scales
    the router's input (0: none), n_used: how many experts a token uses.
    """

    source: Source
    kind: str
    group: int
    slots: int = 0
    tile: int = 0
    norm_offset: int = 0
    n_used: int = 0

    @property
    def n_expert(self) -> int:
        """0 unless units are experts."""
        return self.source.shape[2] if self.kind == "experts" else 0

    @property
    def units(self) -> int:
        """How many there are."""
        return self.n_expert or self.source.shape[1] // max(self.tile, 1)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one, as it is read."""
        return self.source.nbytes // self.units

    @property
    def slots_bytes(self) -> int:
        """Memory for its slots."""
        return self.slots * _slot(self.unit_bytes)


@dataclass(frozen=True)
class Bundles:
    """The neurons of a sparse layer: how many have a slot (0: all are kept), of them the first `hot` for good."""

    layer: SparseLayer
    slots: int = 0
    hot: int = 0

    @property
    def units(self) -> int:
        """Neurons of the layer, of all its experts."""
        return self.layer.n_ff * (self.layer.n_expert or 1)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one."""
        return self.layer.stride


@dataclass(frozen=True)
class Placement:
    """Where everything goes. budget None: everything is kept in memory, as long as it may take.

    parts: bytes of what is not slots. slots_bytes: bytes of all slots. least: the smallest budget that works.
    """

    budget: int | None
    bundles: list[Bundles]
    matrices: list[Matrix] = field(default_factory=list)
    parts: Mapping[str, int] = field(default_factory=dict)
    slots_bytes: int = 0
    least: int = 0

    @property
    def streams(self) -> bool:
        """Is anything read while the model runs?"""
        return bool(self.matrices) or any(layer.slots for layer in self.bundles)

    @property
    def total(self) -> int:
        """What the process is expected to take at most."""
        return sum(self.parts.values()) + self.slots_bytes


def parse_memory(memory: int | str | None, model_bytes: int) -> int | None:
    """Bytes of a budget given as bytes, "4GiB", "800MB", or "50%" of the model's file. None: none was given.

    Raises PowerInferError when it is none of these.
    """
    if memory is None or (isinstance(memory, int) and memory > 0):
        return memory
    from powerinfer_ext.memory_limit import parse_limit

    try:
        return parse_limit(str(memory), model_bytes)
    except ValueError as error:
        raise PowerInferError(f"memory={memory!r}: {error}") from None


def place(
    model: ModelFiles, memory: int | str | None, context: Context, deciders: str | None = None
) -> Placement:
    """Decide for a budget; without one, keep everything if it fits into the memory that is available.

    deciders: "kept" or "streamed", to have the deciding matrices of a sparse-GGUF so; None chooses.
    Raises PowerInferError when the budget is too small, naming the least one that works.
    """
    layers = model.sparse.layers if model.sparse is not None else []
    everything = Placement(None, [Bundles(layer) for layer in layers])
    budget = parse_memory(memory, model.nbytes)
    parts = _fixed_parts(model, context)
    stock = _stock_matrices(model.tensors()) if model.sparse is None else []
    bundled = sum(x.units * x.unit_bytes for x in everything.bundles)
    resident = sum(parts.values()) + bundled + sum(matrix.source.nbytes for matrix in stock)
    if budget is None:
        available = machine.available_memory()
        if available == 0 or resident - parts["process"] <= available * 0.97:
            return replace(everything, parts=parts, slots_bytes=bundled)
        budget = int(available * 0.95) + parts["process"]
    elif resident <= budget:
        return replace(everything, budget=budget, parts=parts, slots_bytes=bundled)
    return _stream(model, everything, stock, parts, budget, context, deciders)


def choose_ubatch(model: ModelFiles, memory: int | str | None, context: Context) -> int | None:
    """A smaller `n_ubatch` than the context's, where its buffers would take much of a budget; None: leave it."""
    best, fits = None, False
    for n in (*_UBATCHES, *_LAST_UBATCHES):
        if fits and n in _LAST_UBATCHES:
            break
        try:
            placement = place(model, memory, replace(context, n_ubatch=min(n, context.n_ubatch)))
        except PowerInferError:
            continue
        if not placement.streams:
            return best
        fits, best = True, n if n < context.n_ubatch else None
        buffers = placement.parts["compute"] + placement.parts["streaming"] - STAGING * RUN - TRANSIT
        if buffers <= 0.1 * placement.slots_bytes:
            break
    return best


def _stream(
    model: ModelFiles,
    everything: Placement,
    stock: list[Matrix],
    parts: dict[str, int],
    budget: int,
    context: Context,
    wish: str | None = None,
) -> Placement:
    sources = {tensor.name: tensor for tensor in model.tensors()}
    deciders = _decider_matrices(everything.bundles, sources)
    staging = STAGING * (RUN + 8192) + (TRANSIT if everything.bundles else 0)
    # cpatch/ffn.c: per row two accumulators, rounded activations, what is wanted and a list; tiles: sums and an input
    work = [
        (15 * b.layer.n_embd + 9 * b.layer.n_ff) * (STREAM_ROWS if b.layer.n_expert else min(STREAM_ROWS, context.rows))
        for b in everything.bundles
    ]
    parts = {**parts, "streaming": staging + max(work, default=0)}
    embedding = _embedding(sources)
    rows = [embedding] if embedding is not None else []
    parts["weights"] -= sum(matrix.source.nbytes - matrix.slots_bytes for matrix in rows)
    if not stock and not everything.bundles:
        raise BudgetError(
            f"{model.path}: a budget of {_shown(budget)} is too small, and this model has no FFN to stream; "
            f"it takes {_shown(sum(parts.values()))}",
            sum(parts.values()),
        )
    bundled = sum(b.units * b.unit_bytes for b in everything.bundles)
    choices = [(stock, parts, bundled // 10)]  # matrices, what else is kept, slots that there should be at least
    if deciders:
        kept = parts["weights"] - sum(matrix.source.nbytes for matrix in deciders)
        choices.append((deciders, {**parts, "weights": kept}, 0))
    if wish is not None:
        choices = [(stock, parts, 0)] if wish == "kept" else choices[-1:]
    least = min(sum(fixed.values()) + _least_slots(everything.bundles, matrices) for matrices, fixed, _ in choices)
    for matrices, fixed, wanted in choices:
        room = budget - sum(fixed.values())
        slots = _least_slots(everything.bundles, matrices)
        if room < slots or (room < wanted and deciders):
            continue
        bundles, matrices, used = _fill(everything.bundles, matrices, room)
        return Placement(budget, bundles, [*matrices, *rows, *_routers(model, sources, matrices)], fixed, used, least)
    taken = ", ".join(f"{name} {_shown(size)}" for name, size in choices[-1][1].items())
    raise BudgetError(
        f"{model.path}: a budget of {_shown(budget)} is too small; the least that works is {_shown(least)} ({taken}). "
        "A shorter context (n_ctx) or a smaller n_batch takes less",
        least,
    )


def _stock_matrices(sources: Iterable[Source]) -> list[Matrix]:
    """What of a stock GGUF can be streamed: its experts, or, where it has none, its FFNs in tiles."""
    sources = list(sources)
    for pattern, experts in ((EXPERTS, True), (DENSE_FFN, False)):
        found = [(t, pattern.fullmatch(t.name)) for t in sources]
        matrices = [
            Matrix(t, "experts", int(match[1])) if experts else Matrix(t, "tiles", int(match[1]), tile=_tile(t))
            for t, match in found
            if match and len(t.shape) == (3 if experts else 2)
        ]
        if matrices:
            return matrices
    return []


def _decider_matrices(bundles: list[Bundles], sources: Mapping[str, Source]) -> list[Matrix]:
    """The deciding matrices of exact layers, which stock computes unless they are streamed."""
    matrices = []
    for bundle in bundles:
        layer = bundle.layer
        if layer.decider is None:
            continue
        source = sources[layer.decider_name]
        if layer.n_expert:
            matrices.append(Matrix(source, "experts", layer.index))
        else:
            matrices.append(Matrix(source, "tiles", layer.index, tile=_tile(source)))
    return matrices


def _embedding(sources: Mapping[str, Source]) -> Matrix | None:
    """The embedding, of which a token needs one row; not where it is the output matrix too."""
    source = sources.get("token_embd.weight")
    if source is None or "output.weight" not in sources or source.file < 0:
        return None
    return Matrix(source, "rows", -1, min(_ROWS, source.shape[1]), tile=1)


def _routers(model: ModelFiles, sources: Mapping[str, Source], matrices: list[Matrix]) -> list[Matrix]:
    """The routers of layers whose experts are streamed, as far as they are of a kind that can be read ahead from."""
    metadata = model.first.metadata
    used = metadata.get(f"{metadata.get('general.architecture', '')}.expert_used_count", 0)
    routers = []
    for group in sorted({matrix.group for matrix in matrices if matrix.kind == "experts"}):
        source = sources.get(f"blk.{group}.ffn_gate_inp.weight")
        if source is None or source.type != _F32 or len(source.shape) != 2 or not isinstance(used, int):
            continue
        norm = sources.get(f"blk.{group}.ffn_norm.weight")
        near = norm is not None and norm.type == _F32 and norm.file == source.file and norm.shape == source.shape[:1]
        scaled = near and metadata.get("general.architecture") not in _EARLY_ROUTERS
        routers.append(Matrix(source, "router", group, tile=1, norm_offset=norm.offset if scaled else 0, n_used=used))
    return routers


def _tile(source: Source) -> int:
    """Rows of a tile: a divisor of the matrix's rows, about TILE_BYTES."""
    row, rows = row_bytes(source.type, source.shape[0]), source.shape[1]
    wanted = max(1, TILE_BYTES // row)
    return max(n for n in range(1, min(wanted, rows) + 1) if rows % n == 0)


def _slot(unit_bytes: int) -> int:
    """Bytes of a slot: units longer than a run keep the alignment that they were read with."""
    return unit_bytes + 8192 if unit_bytes > RUN else -(-unit_bytes // 64) * 64


def _least(thing: Bundles | Matrix) -> int:
    """The fewest slots that make sense."""
    if isinstance(thing, Bundles):
        return min(_LEAST_NEURONS, thing.units)
    return min(_SPARE_TILES if thing.kind == "tiles" else 2, thing.units)


def _least_slots(bundles: list[Bundles], matrices: list[Matrix]) -> int:
    return sum(_least(thing) * _slot(thing.unit_bytes) for thing in (*bundles, *matrices))


def _fill(bundles: list[Bundles], matrices: list[Matrix], room: int) -> tuple[list[Bundles], list[Matrix], int]:
    """Give out slots. First to the hottest neurons: reads of single neurons are an order of magnitude slower than
    others, and hot ones are wanted for most tokens. Then to tiles, which are wanted for every token; then to the rest.
    """
    things: list[Bundles | Matrix] = [*bundles, *matrices]
    slots = [_least(thing) for thing in things]
    room -= sum(n * _slot(thing.unit_bytes) for n, thing in zip(slots, things, strict=True))
    for chosen, share in (("neurons", _HOT_SHARE), ("tiles", 1.0), (None, 1.0)):
        some = [
            i
            for i, thing in enumerate(things)
            if chosen in (None, "neurons" if isinstance(thing, Bundles) else thing.kind)
        ]
        more = {i: max(0, int(things[i].units * share) - slots[i]) for i in some}
        wanted = sum(n * _slot(things[i].unit_bytes) for i, n in more.items())
        for i, n in more.items():
            given = int(n * min(1.0, room / max(wanted, 1)))
            slots[i] += given
            wanted -= n * _slot(things[i].unit_bytes)
            room -= given * _slot(things[i].unit_bytes)
    used = sum(n * _slot(thing.unit_bytes) for n, thing in zip(slots, things, strict=True))
    new_bundles = []
    for bundle, n in zip(bundles, slots, strict=False):
        hot = min(bundle.layer.hot_count, n * 3 // 4) if n < bundle.units else 0
        new_bundles.append(replace(bundle, slots=n, hot=hot))
    new_matrices = [replace(m, slots=n) for m, n in zip(matrices, slots[len(bundles) :], strict=True)]
    return new_bundles, new_matrices, used


def _fixed_parts(model: ModelFiles, context: Context) -> dict[str, int]:
    """Bytes of everything that is not streamed, by kind; "weights" includes deciding matrices."""
    metadata = model.first.metadata
    arch = metadata.get("general.architecture", "")

    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        return int(max(value) if isinstance(value, list | tuple) else value) if value else default

    n_embd, n_head = number("embedding_length"), max(number("attention.head_count"), 1)
    head = number("attention.key_length", n_embd // n_head)
    values = number("attention.value_length", head)
    n_ctx = -(-(context.n_ctx or number("context_length", 512)) // 256) * 256  # llama.cpp rounds up
    kv_values = number("block_count") * n_ctx * number("attention.head_count_kv", n_head) * (head + values)
    kv = int(kv_values * context.kv_bytes)
    rows = context.rows
    n_used = max(number("expert_used_count"), 1)
    n_ff = max(number("feed_forward_length"), number("expert_feed_forward_length") * n_used)
    vocabulary = next((t.shape[1] for t in model.tensors() if t.name == "token_embd.weight"), 0)
    outputs = rows if context.logits_all else 1
    # The widest moments of a layer: FFN (gate, up, their product, and what flows past, of every expert that is used),
    # attention (scores, q, k, v, output).
    ffn = 3 * n_ff + (4 + n_used) * n_embd
    scores = 0 if context.flash_attention else n_head * n_ctx
    compute = 4 * rows * max(ffn, scores + 7 * n_embd) + 8 * outputs * vocabulary
    streamable = {m.source.name for m in _stock_matrices(model.tensors())} if model.sparse is None else set()
    kept = sum(t.nbytes for t in model.tensors() if t.file >= 0 and t.name not in streamable)
    extra = 0
    for layer in model.sparse.layers if model.sparse is not None else []:
        tensors = [layer.scale_tensor, layer.threshold_tensor, *(layer.predictor.tensors if layer.predictor else [])]
        extra += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    process = resident_bytes() if context.process is None else context.process
    parts = {"process": process, "weights": kept, "KV cache": kv, "compute": compute, "predictors": extra}
    parts["vocabulary"] = _TOKEN_BYTES * vocabulary
    parts["margin"] = (4 << 20) + (sum(parts.values()) >> 8)
    return parts


def resident_bytes() -> int:
    """Bytes that this process has in memory now."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", machine.read_text("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _shown(size: int) -> str:
    return f"{-(-size // (1 << 20))} MiB"  # rounded up: what is said to work has to work
