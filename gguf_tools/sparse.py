"""The sparse-GGUF format, version 1: its names, its layout and the checked view of a file (see
docs/FORMAT.md).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gguf_tools.errors import FormatError
from gguf_tools.quants import SCALE_GROUP, SCALED
from gguf_tools.reader import (
    ARRAY,
    BLOCKS,
    I32,
    STRING,
    U32,
    U64,
    VALUE_TYPE_NAMES,
    GGUFFile,
    TensorInfo,
    align_up,
    printable,
    row_bytes,
    type_name,
)

VERSION = 1
FILE_ALIGNMENT = 4096  # bundles start at a page, so that O_DIRECT reads can reach them
BUNDLE_ALIGNMENT = 64  # segments start at a cache line
ACTIVATIONS = ("relu", "relu2", "drelu", "silu", "gelu")

K_VERSION = "powerinfer.version"
K_ACTIVATION = "powerinfer.activation"
K_SOURCE_NAME = "powerinfer.source.name"
K_SOURCE_SIZE = "powerinfer.source.size"
K_SOURCE_SHA256 = "powerinfer.source.sha256"
K_SOURCE_ALIGNMENT = "powerinfer.source.alignment"
K_SOURCE_GGUF_VERSION = "powerinfer.source.gguf_version"
K_SOURCE_ACTIVATION = "powerinfer.source.activation"
K_SOURCE_TENSORS = "powerinfer.source.tensors"
K_BUNDLE_ALIGN = "powerinfer.bundle.align"
K_BUNDLE_SEGMENTS = "powerinfer.bundle.segments"
K_BUNDLE_TENSORS = "powerinfer.bundle.tensors"
K_UP_TYPE = "powerinfer.bundle.up.type"
K_DOWN_TYPE = "powerinfer.bundle.down.type"
K_DOWN_SOURCE_TYPE = "powerinfer.bundle.down.source_type"
K_STRIDE = "powerinfer.bundle.stride"
K_HOT_COUNT = "powerinfer.hot.count"

_OWN_PREFIXES = tuple(
    f"powerinfer.{part}." for part in ("source", "bundle", "hot", "predictor", "calibration")
)

_I8, _I32, _F32, _F16 = 24, 26, 0, 1  # ggml tensor types
_BUNDLE_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_bundle(_exps)?\.weight")


# The FFN matrices of a stock GGUF: layer, part, and _exps in a mixture of experts.
FFN_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_(up|down|gate)(_exps)?\.weight")


def owns_key(name: str) -> bool:
    """Whether a metadata key belongs to the sparse-GGUF format (other ``powerinfer.`` keys are the model's
    own).
    """
    return name in (K_VERSION, K_ACTIVATION) or name.startswith(_OWN_PREFIXES)


def bundle_layout(gated: bool, up_type: int | None, down_type: int, n_embd: int) -> tuple[int, int, int]:
    """Offsets of the up and down segments in a neuron's row, and the row's length (stride), in bytes.

    Ungated bundles have no up segment; its offset is then 0 as well.
    """
    down_offset = align_up(row_bytes(up_type, n_embd), BUNDLE_ALIGNMENT) if gated else 0
    return 0, down_offset, align_up(down_offset + row_bytes(down_type, n_embd), BUNDLE_ALIGNMENT)


@dataclass
class SparseLayer:
    """One bundled FFN. Sizes in values, offsets and stride in bytes within a neuron's row of the bundle.

    `decider`, `up` and `down` are the names in the source: the decider (gate, or up when ungated) is an
    ordinary tensor of the file whose rows are in stored order; `up` (gated) and `down` exist only inside the
    bundle.
    """

    index: int
    bundle: TensorInfo
    order_tensor: TensorInfo
    decider: TensorInfo
    stride: int
    n_embd: int
    n_ff: int
    n_expert: int  # 0 for a dense FFN
    up_type: int | None
    down_type: int
    source_down_type: int
    up_offset: int
    down_offset: int
    hot_count: int
    frequency_tensor: TensorInfo | None
    scale_tensor: TensorInfo | None  # F16 [n_embd, n_ff / 32, n_expert] by source neuron, where down_type is I8
    file: GGUFFile = field(repr=False)
    _order: np.ndarray | None = field(default=None, repr=False)

    @property
    def suffix(self) -> str:
        """``_exps`` for a mixture of experts, empty for a dense FFN."""
        return "_exps" if self.n_expert else ""

    @property
    def up_name(self) -> str:
        """Name of the source's up tensor."""
        return f"blk.{self.index}.ffn_up{self.suffix}.weight"

    @property
    def down_name(self) -> str:
        """Name of the source's down tensor."""
        return f"blk.{self.index}.ffn_down{self.suffix}.weight"

    @property
    def up_shape(self) -> tuple[int, ...]:
        """Shape of the source's up tensor, ne order: that of the deciding tensor."""
        return self.decider.shape

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Shape of the source's down tensor, ne order."""
        return (self.n_ff, self.n_embd, *self.decider.shape[2:])

    @property
    def bias_names(self) -> tuple[str, ...]:
        """Names of the tensors with one value per neuron that follow the stored order, if the file has
        them.
        """
        return tuple(f"blk.{self.index}.ffn_{part}{self.suffix}.bias" for part in ("gate", "up"))

    @property
    def order(self) -> np.ndarray:
        """int32 [n_expert or 1, n_ff]: stored index -> original index, a permutation in every row."""
        if self._order is None:
            self._order = self._read_order()
        return self._order

    @property
    def frequency(self) -> np.ndarray | None:
        """float32 [n_expert or 1, n_ff]: how often each stored neuron fired when profiled; None without a
        profile.
        """
        if self.frequency_tensor is None:
            return None
        raw = self.file.pread(self.frequency_tensor.offset, self.frequency_tensor.nbytes)
        return np.frombuffer(raw, "<f4").reshape(-1, self.n_ff)

    def _read_order(self) -> np.ndarray:
        raw = self.file.pread(self.order_tensor.offset, self.order_tensor.nbytes)
        order = np.frombuffer(raw, "<i4").reshape(-1, self.n_ff)
        for expert, row in enumerate(order):
            seen = np.zeros(self.n_ff, bool)
            inside = row[(row >= 0) & (row < self.n_ff)]
            seen[inside] = True
            if not seen.all():
                where = f" of expert {expert}" if self.n_expert else ""
                raise FormatError(
                    f"{self.file.path}: tensor {self.order_tensor.name}: the neuron order{where} is not a "
                    f"permutation of 0 to {self.n_ff - 1}"
                )
        return order


class SparseGGUF:
    """A checked view of a sparse-GGUF file; context manager, owns the open file as `file`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.path = file.path
        self._check_version()
        self.architecture: str = self._value("general.architecture", STRING)
        if file.alignment != FILE_ALIGNMENT:
            raise self._fail(
                "general.alignment", f"{file.alignment}; sparse-GGUF files have {FILE_ALIGNMENT}"
            )
        self.activation: str = self._value(K_ACTIVATION, STRING)
        if self.activation not in ACTIVATIONS:
            raise self._fail(
                K_ACTIVATION, f"{printable(self.activation)} is not one of {', '.join(ACTIVATIONS)}"
            )
        self.segments: list[str] = self._value(K_BUNDLE_SEGMENTS, STRING, array=True)
        if self.segments not in (["up", "down"], ["down"]):
            shown = printable(", ".join(self.segments))
            raise self._fail(K_BUNDLE_SEGMENTS, f"{shown} is neither up, down (gated) nor down (ungated)")
        self.gated = len(self.segments) == 2
        if self.activation == "drelu" and not self.gated:
            raise self._fail(K_ACTIVATION, "drelu needs a gate, and the bundles of this file have none")
        if self._value(K_BUNDLE_ALIGN, U32) != BUNDLE_ALIGNMENT:
            raise self._fail(K_BUNDLE_ALIGN, f"version {VERSION} files have {BUNDLE_ALIGNMENT}")
        self._check_source()
        self.layers = self._layers()
        self._check_tensors()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | GGUFFile) -> SparseGGUF:
        """Open and check `path`, or take over a file that is open already (and close it on errors).

        Raises FormatError naming the field at fault, or OSError.
        """
        file = path if isinstance(path, GGUFFile) else GGUFFile.open(path)
        try:
            sparse = cls(file)
            for layer in sparse.layers:
                layer._read_order()  # checked now, decoded again only if somebody wants it
            return sparse
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> SparseGGUF:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Raise FormatError if the file changed since it was opened."""
        self.file.check_unchanged()

    @property
    def source_tensors(self) -> list[str]:
        """Names of the source's tensors, in its order."""
        return self._source_tensors

    def hidden_tensors(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The source's tensors that exist only inside bundles: name -> ggml type and shape (ne) they had."""
        hidden = {layer.down_name: (layer.source_down_type, layer.down_shape) for layer in self.layers}
        if self.gated:
            hidden |= {layer.up_name: (layer.up_type, layer.up_shape) for layer in self.layers}
        return hidden

    def _fail(self, field: str, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {field}: {problem}")

    def _value(self, name: str, item_type: int, *, array: bool = False) -> Any:
        """The value of a required key, which must have exactly the type that the format gives it."""
        entry = self.file.fields.get(name)
        if entry is None:
            raise self._fail(name, "is missing")
        if (entry.type == ARRAY) != array or entry.item_type != item_type:
            label = VALUE_TYPE_NAMES[item_type]
            raise self._fail(
                name, f"has type {entry.type_label}, expected {f'arr[{label}]' if array else label}"
            )
        return entry.value

    def _check_version(self) -> None:
        if K_VERSION not in self.file.fields:
            raise self._fail(
                K_VERSION, "is missing: this is not a sparse-GGUF; make one with: powerinfer convert"
            )
        version = self._value(K_VERSION, U32)
        if version != VERSION:
            advice = "update powerinfer-ext to read it" if version > VERSION else "convert the model again"
            raise self._fail(
                K_VERSION, f"{version}, but this build reads sparse-GGUF version {VERSION}; {advice}"
            )

    def _check_source(self) -> None:
        self.source_name: str = self._value(K_SOURCE_NAME, STRING)
        self.source_size: int = self._value(K_SOURCE_SIZE, U64)
        self.source_sha256: str = self._value(K_SOURCE_SHA256, STRING)
        if not re.fullmatch("[0-9a-f]{64}", self.source_sha256):
            raise self._fail(K_SOURCE_SHA256, "is not 64 hexadecimal digits")
        self.source_alignment: int = self._value(K_SOURCE_ALIGNMENT, U32)
        if self.source_alignment & (self.source_alignment - 1):
            raise self._fail(K_SOURCE_ALIGNMENT, f"{self.source_alignment} is neither 0 nor a power of two")
        self.source_gguf_version: int = self._value(K_SOURCE_GGUF_VERSION, U32)
        if self.source_gguf_version not in (2, 3):
            raise self._fail(K_SOURCE_GGUF_VERSION, f"{self.source_gguf_version} is neither 2 nor 3")
        self.source_activation: str | None = None
        if K_SOURCE_ACTIVATION in self.file.fields:
            self.source_activation = self._value(K_SOURCE_ACTIVATION, STRING)
        self._source_tensors: list[str] = self._value(K_SOURCE_TENSORS, STRING, array=True)
        if len(set(self._source_tensors)) != len(self._source_tensors):
            raise self._fail(K_SOURCE_TENSORS, "names a tensor twice")

    # ---- bundles -------------------------------------------------------------------------------------------

    def _layers(self) -> list[SparseLayer]:
        names = self._value(K_BUNDLE_TENSORS, STRING, array=True)
        if not names:
            raise self._fail(K_BUNDLE_TENSORS, "is empty")
        columns = {K_DOWN_TYPE: I32, K_DOWN_SOURCE_TYPE: I32, K_STRIDE: U64}
        if self.gated:
            columns[K_UP_TYPE] = I32
        elif K_UP_TYPE in self.file.fields:
            raise self._fail(K_UP_TYPE, "is present although the bundles have no up segment")
        if K_HOT_COUNT in self.file.fields:
            columns[K_HOT_COUNT] = U32
        table = {key: self._value(key, item_type, array=True) for key, item_type in columns.items()}
        for key, values in table.items():
            if len(values) != len(names):
                raise self._fail(key, f"has {len(values)} entries for {len(names)} bundles")
        layers = [
            self._layer(name, {key: values[i] for key, values in table.items()})
            for i, name in enumerate(names)
        ]
        places = [(layer.index, layer.suffix) for layer in layers]
        if sorted(set(places)) != places:
            raise self._fail(K_BUNDLE_TENSORS, "is not in layer order, or names a bundle twice")
        return layers

    def _tensor(self, name: str, ggml_type: int | None, shape: tuple[int, ...] | None) -> TensorInfo:
        """A tensor that has to exist, of this type and shape (None: any)."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise self._fail(f"tensor {printable(name)}", "is missing")
        if ggml_type is not None and tensor.type != ggml_type:
            raise self._fail(
                f"type of tensor {name}", f"{type_name(tensor.type)}, expected {type_name(ggml_type)}"
            )
        if shape is not None and tensor.shape != shape:
            raise self._fail(f"shape of tensor {name}", f"{list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def _layer(self, name: str, row: dict[str, int]) -> SparseLayer:
        match = _BUNDLE_NAME.fullmatch(name)
        if not match:
            raise self._fail(K_BUNDLE_TENSORS, f"{printable(name)} is not the name of a bundle")
        index, suffix = int(match[1]), match[2] or ""
        decider = self._tensor(f"blk.{index}.ffn_{'gate' if self.gated else 'up'}{suffix}.weight", None, None)
        # A mixture of one expert may have lost its last dimension: writers drop trailing ones.
        if len(decider.shape) not in ((2, 3) if suffix else (2,)):
            raise self._fail(
                f"shape of tensor {decider.name}", f"{list(decider.shape)} is not that of an FFN matrix"
            )
        n_embd, n_ff, *experts = decider.shape
        up_type, down_type, source_type = row.get(K_UP_TYPE), row[K_DOWN_TYPE], row[K_DOWN_SOURCE_TYPE]
        for key, ggml_type, n, what in (
            (K_UP_TYPE, up_type, n_embd, "n_embd"),
            (K_DOWN_TYPE, down_type, n_embd, "n_embd"),
            (K_DOWN_SOURCE_TYPE, source_type, n_ff, "n_ff"),
        ):
            if ggml_type is None:
                continue
            if ggml_type not in BLOCKS:
                raise self._fail(key, f"unknown ggml type {ggml_type} for {name}")
            if n % BLOCKS[ggml_type][0]:
                raise self._fail(
                    key,
                    f"{type_name(ggml_type)} has blocks of {BLOCKS[ggml_type][0]} values, which do not "
                    f"divide {name}'s {what} of {n}",
                )
        up_offset, down_offset, stride = bundle_layout(self.gated, up_type, down_type, n_embd)
        if row[K_STRIDE] != stride:
            raise self._fail(K_STRIDE, f"{row[K_STRIDE]} bytes for {name}, whose segments take {stride}")
        hot_count = row.get(K_HOT_COUNT, 0)
        if hot_count > n_ff:
            raise self._fail(K_HOT_COUNT, f"{hot_count} hot neurons for {name}, which has {n_ff} neurons")
        if down_type == _I8 and source_type not in SCALED:
            raise self._fail(K_DOWN_TYPE, f"I8 columns for {name}, whose source type has no single scale")
        orders = (n_ff, *experts)
        scales = (n_embd, n_ff // SCALE_GROUP, *experts)
        frequency_name = f"blk.{index}.ffn_freq{suffix}.weight"
        return SparseLayer(
            index=index,
            bundle=self._tensor(name, _I8, (stride, *orders)),
            order_tensor=self._tensor(f"blk.{index}.ffn_order{suffix}.weight", _I32, orders),
            decider=decider,
            stride=stride,
            n_embd=n_embd,
            n_ff=n_ff,
            n_expert=(experts[0] if experts else 1) if suffix else 0,
            up_type=up_type,
            down_type=down_type,
            source_down_type=source_type,
            up_offset=up_offset,
            down_offset=down_offset,
            hot_count=hot_count,
            frequency_tensor=(
                self._tensor(frequency_name, _F32, orders) if frequency_name in self.file.tensors else None
            ),
            scale_tensor=(
                self._tensor(f"blk.{index}.ffn_down_scale{suffix}.weight", _F16, scales)
                if down_type == _I8
                else None
            ),
            file=self.file,
        )

    def _check_tensors(self) -> None:
        """Every source tensor is either in the file or inside a bundle, never both.

        Tensors that the source did not have are extensions; those this version does not know are ignored.
        """
        bundled = self.hidden_tensors().keys()
        source = set(self._source_tensors)
        for name in bundled - source:
            raise self._fail(K_SOURCE_TENSORS, f"lacks {name}, which is in a bundle")
        for name in bundled & self.file.tensors.keys():
            raise self._fail(f"tensor {name}", "is present although it is also in a bundle")
        for name in source - bundled - self.file.tensors.keys():
            raise self._fail(
                K_SOURCE_TENSORS, f"names {printable(name)}, which is neither in the file nor in a bundle"
            )
        for layer in self.layers:
            if layer.decider.name not in source:
                raise self._fail(K_SOURCE_TENSORS, f"lacks {layer.decider.name}")
            for extension in (
                layer.bundle,
                layer.order_tensor,
                layer.frequency_tensor,
                layer.scale_tensor,
            ):
                if extension is not None and extension.name in source:
                    raise self._fail(K_SOURCE_TENSORS, f"names {extension.name}, which the conversion added")


def is_sparse(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a sparse-GGUF (of any version). Raises FormatError if it is not a sound GGUF at
    all.
    """
    with GGUFFile.open(path) as file:
        return K_VERSION in file.fields
