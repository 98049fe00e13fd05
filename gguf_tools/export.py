"""Turn a sparse-GGUF back into the stock GGUF it came from.

Everything but a re-quantised `down` comes back bit for bit: tensors, their order, metadata, alignment,
padding. Where nothing was re-quantised the result is the source, and its SHA-256 proves it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from gguf_tools import quants, sparse
from gguf_tools.errors import ConversionError, FormatError
from gguf_tools.reader import BLOCKS, DEFAULT_ALIGNMENT, STRING, U32, Field, TensorInfo, row_bytes
from gguf_tools.sparse import SparseGGUF, SparseLayer
from gguf_tools.stream import WORKERS, Progress, Reporter, permuted_rows, pieces, row_ranges, strips
from gguf_tools.writer import GGUFWriter, NewTensor


@dataclass(frozen=True)
class ExportReport:
    """The outcome of `export`. `requantised` names tensors that differ from the source's, as far as rounding
    goes.
    """

    source: str
    output: str
    output_bytes: int
    sha256: str
    identical: bool  # the output is the original source, byte for byte
    requantised: list[str]
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def export(
    source: str | os.PathLike[str], output: str | os.PathLike[str], progress: Progress | None = None
) -> ExportReport:
    """Write the stock GGUF that the sparse-GGUF `source` was converted from to `output`.

    `progress(done, total, what)` counts bytes. Raises FormatError (bad source), ConversionError (cannot be
    written), OSError (source unreadable).
    """
    started = time.monotonic()
    with SparseGGUF.open(source) as view:
        if os.path.exists(output) and os.path.samestat(os.stat(output), os.fstat(view.file.fd)):
            raise ConversionError(
                f"{os.fspath(output)}: is the source itself; choose another name for the output"
            )
        digest = hashlib.sha256()
        writer = GGUFWriter(
            output,
            _fields(view),
            _tensors(view),
            alignment=view.source_alignment or DEFAULT_ALIGNMENT,
            version=view.source_gguf_version,
            size=view.source_size if view.source_format == "gguf" else None,
            digest=digest,
        )
        if view.source_format == "gguf" and writer.data_end > view.source_size:
            raise FormatError(
                f"{view.path}: {sparse.K_SOURCE_SIZE}: {view.source_size} bytes, but the source's tensors "
                f"end at byte {writer.data_end}"
            )
        with writer:
            _write_all(view, writer, Reporter(progress, writer.size))
            view.check_unchanged()
        return ExportReport(
            source=view.path,
            output=os.fspath(output),
            output_bytes=writer.size,
            sha256=digest.hexdigest(),
            identical=digest.hexdigest() == view.source_sha256,
            requantised=[
                layer.down_name
                for layer in view.layers
                if not quants.transposes_exactly(layer.source_down_type, layer.down_type)
            ],
            seconds=time.monotonic() - started,
        )


def _fields(view: SparseGGUF) -> list[Field]:
    """The source's metadata: ours removed, alignment and activation hint as they were."""
    fields = []
    for name, field in view.file.fields.items():
        if name == "general.alignment":
            if view.source_alignment:
                fields.append(Field.scalar(name, U32, view.source_alignment))
        elif name == sparse.K_ACTIVATION:
            if view.source_activation is not None:
                fields.append(Field.scalar(name, STRING, view.source_activation))
        elif not sparse.owns_key(name):
            fields.append(field)
    return fields


def _tensors(view: SparseGGUF) -> list[NewTensor]:
    hidden = view.hidden_tensors()
    stored = view.file.tensors
    return [
        NewTensor(name, *hidden[name])
        if name in hidden
        else NewTensor(name, stored[name].type, stored[name].shape)
        for name in view.source_tensors
    ]


def _write_all(view: SparseGGUF, writer: GGUFWriter, reporter: Reporter) -> None:
    rows = {}  # tensors that are segments of bundles: name -> layer, offset, type
    for layer in view.layers:
        if layer.gate_type is not None:
            rows[layer.gate_name] = (layer, layer.gate_offset, layer.gate_type)
        if layer.up_type is not None:
            rows[layer.up_name] = (layer, layer.up_offset, layer.up_type)
    downs = {layer.down_name: layer for layer in view.layers}
    permuted = {}
    for layer in view.layers:
        identity = np.arange(layer.n_ff, dtype=np.int32)
        if (layer.order != identity).any():
            deciding = [layer.decider.name] if layer.decider else []
            permuted |= dict.fromkeys((*deciding, *layer.bias_names), layer)
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        for tensor in writer.tensors:
            name = tensor.name
            writer.begin(name)
            if name in rows:
                parts: Iterator[np.ndarray] = _rows(*rows[name])
            elif name in downs:
                parts = _downs(downs[name], pool)
            elif name in permuted:
                parts = permuted_rows(view.file, _plain(view, permuted[name], name), _places(permuted[name]))
            else:
                parts = pieces(view.file, view.file.tensors[name])
            for part in parts:
                writer.write(part)
                reporter.advance(part.nbytes, name)


def _plain(view: SparseGGUF, layer: SparseLayer, name: str) -> TensorInfo:
    """A tensor that follows the neuron order; a bias has to have one value per neuron."""
    tensor = view.file.tensors[name]
    neurons = layer.n_ff * max(1, layer.n_expert)
    if name in layer.bias_names and (
        BLOCKS[tensor.type][0] != 1 or tensor.shape != layer.order_tensor.shape
    ):
        raise FormatError(
            f"{view.path}: tensor {name}: {tensor.label} is not one value for each of {neurons} neurons"
        )
    return tensor


def _places(layer: SparseLayer) -> np.ndarray:
    """int [experts, n_ff]: original index -> stored index."""
    return np.argsort(layer.order, axis=1)


def _segments(layer: SparseLayer, expert: int, offset: int, width: int) -> np.ndarray:
    """uint8 [n_ff, width]: one segment of every neuron of an expert, in the original order."""
    out = np.empty((layer.n_ff, width), np.uint8)
    start = layer.bundle.offset + expert * layer.n_ff * layer.stride
    order = layer.order[expert]
    for first, last in row_ranges(layer.n_ff, layer.stride):
        rows = np.empty((last - first, layer.stride), np.uint8)
        layer.file.read_into(start + first * layer.stride, rows)
        out[order[first:last]] = rows[:, offset : offset + width]
    return out


def _rows(layer: SparseLayer, offset: int, ggml_type: int) -> Iterator[np.ndarray]:
    width = row_bytes(ggml_type, layer.n_embd)
    for expert in range(max(1, layer.n_expert)):
        yield _segments(layer, expert, offset, width)


def _scales(layer: SparseLayer, expert: int) -> np.ndarray:
    """uint16 [n_embd, n_ff / 32]: the scales of an expert's `down`, as its rows have them."""
    table = np.empty((layer.n_ff // quants.SCALE_GROUP, layer.n_embd), "<u2")
    layer.file.read_into(layer.scale_tensor.offset + expert * table.nbytes, table)
    return table.T


def _downs(layer: SparseLayer, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
    """Per expert `down` as the source had it, uint8 [n_embd, bytes of a row]."""
    width = row_bytes(layer.down_type, layer.n_embd)
    for expert in range(max(1, layer.n_expert)):
        columns = _segments(layer, expert, layer.down_offset, width)
        if layer.scale_tensor is not None:
            yield quants.join_blocks(layer.source_down_type, columns.T.view(np.int8), _scales(layer, expert))
            continue
        down = np.empty((layer.n_embd, row_bytes(layer.source_down_type, layer.n_ff)), np.uint8)

        def restore(strip: tuple[int, int], columns: np.ndarray = columns, down: np.ndarray = down) -> None:
            first, last = strip
            span = slice(row_bytes(layer.source_down_type, first), row_bytes(layer.source_down_type, last))
            down[:, span] = quants.transpose(layer.down_type, columns[first:last], layer.source_down_type)

        try:
            for _ in pool.map(restore, strips(layer.source_down_type, layer.n_ff, layer.n_embd)):
                pass
        except ConversionError as problem:
            raise ConversionError(f"{layer.file.path}: tensor {layer.bundle.name}: {problem}") from problem
        yield down
