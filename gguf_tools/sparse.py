"""The sparse-GGUF format, versions 1 and 2: its names, its layout and the checked view of a file (see
docs/FORMAT.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gguf_tools.errors import FormatError
from gguf_tools.quants import NOT_FOR_WEIGHTS, SCALE_GROUP, SCALED
from gguf_tools.reader import (
    ARRAY,
    BLOCKS,
    F32,
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

VERSION = 2  # the newest this build reads; files say the oldest that can read them
PREDICT_VERSION = 2  # the first with predicted layers
FILE_ALIGNMENT = 4096  # bundles start at a page, so that O_DIRECT reads can reach them
BUNDLE_ALIGNMENT = 64  # segments start at a cache line
ACTIVATIONS = ("relu", "relu2", "drelu", "silu", "gelu")
SILENT = ("relu", "relu2", "drelu")  # activations that are zero for a neuron that does not fire
MODES = ("exact", "predict")
LOWRANK, LINEAR, DIRECT, NO_PREDICTOR = "lowrank", "linear", "direct", "none"
PREDICTORS = (LOWRANK, LINEAR, DIRECT)
RANK_STEP = 32  # ranks are multiples of it: the block of the types that predictors are stored in
THRESHOLD_KINDS = ("cats", "chess")

K_VERSION = "powerinfer.version"
K_ACTIVATION = "powerinfer.activation"
K_MODE = "powerinfer.mode"
K_SOURCE_NAME = "powerinfer.source.name"
K_SOURCE_SIZE = "powerinfer.source.size"
K_SOURCE_SHA256 = "powerinfer.source.sha256"
K_SOURCE_ALIGNMENT = "powerinfer.source.alignment"
K_SOURCE_GGUF_VERSION = "powerinfer.source.gguf_version"
K_SOURCE_ACTIVATION = "powerinfer.source.activation"
K_SOURCE_FORMAT = "powerinfer.source.format"
K_SOURCE_TENSORS = "powerinfer.source.tensors"
K_BUNDLE_ALIGN = "powerinfer.bundle.align"
K_BUNDLE_SEGMENTS = "powerinfer.bundle.segments"
K_BUNDLE_TENSORS = "powerinfer.bundle.tensors"
K_GATE_TYPE = "powerinfer.bundle.gate.type"
K_UP_TYPE = "powerinfer.bundle.up.type"
K_DOWN_TYPE = "powerinfer.bundle.down.type"
K_DOWN_SOURCE_TYPE = "powerinfer.bundle.down.source_type"
K_STRIDE = "powerinfer.bundle.stride"
K_HOT_COUNT = "powerinfer.hot.count"
K_PREDICTOR_KIND = "powerinfer.predictor.kind"
K_PREDICTOR_RANK = "powerinfer.predictor.rank"
K_PREDICTOR_RECALL = "powerinfer.predictor.recall"
K_PREDICTOR_COMPUTED = "powerinfer.predictor.computed"
K_THRESHOLD_KIND = "powerinfer.threshold.kind"
K_THRESHOLD_DENSITY = "powerinfer.threshold.density"
K_CALIBRATION_TEXT = "powerinfer.calibration.text"
K_CALIBRATION_TOKENS = "powerinfer.calibration.tokens"
K_CALIBRATION_PROFILE = "powerinfer.calibration.profile"

_OWN_PREFIXES = tuple(
    f"powerinfer.{part}."
    for part in ("source", "bundle", "hot", "predictor", "threshold", "calibration")
)

_I8, _I32, _F32, _F16 = 24, 26, 0, 1  # ggml tensor types
# mode -> segments of a bundle when gated, when not (in a file of predicted layers: of those)
_SEGMENTS = {
    "exact": (["up", "down"], ["down"]),
    "predict": (["gate", "up", "down"], ["up", "down"]),
}
_BUNDLE_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_bundle(_exps)?\.weight")


# The FFN matrices of a stock GGUF: layer, part, and _exps in a mixture of experts.
FFN_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_(up|down|gate)(_exps)?\.weight")


def owns_key(name: str) -> bool:
    """Whether a metadata key belongs to the sparse-GGUF format (other ``powerinfer.`` keys are the model's
    own).
    """
    return name in (K_VERSION, K_ACTIVATION, K_MODE) or name.startswith(_OWN_PREFIXES)


def bundle_layout(types: Sequence[int], n_embd: int) -> tuple[tuple[int, ...], int]:
    """Offsets of the segments of a neuron's row, whose ggml types are given in order, and the row's length
    (stride), in bytes.
    """
    offsets, end = [], 0
    for ggml_type in types:
        offsets.append(align_up(end, BUNDLE_ALIGNMENT))
        end = offsets[-1] + row_bytes(ggml_type, n_embd)
    return tuple(offsets), align_up(end, BUNDLE_ALIGNMENT)


@dataclass(frozen=True)
class PredictorTensors:
    """Where the predictor of a layer lies. Neuron j (as stored) is selected when its score is positive:

        lowrank   B_j . relu(A x) + bias_j        A [n_embd, rank], B [rank, n_ff]
        linear    B_j . (A x) + bias_j            the same
        direct    B_j . x + bias_j                B [n_embd, n_ff], no A

    recall and computed: the share of firing neurons it selected, and the share of all neurons it selected, on
    tokens it was not trained on; None where nobody measured.
    """

    kind: str
    rank: int  # 0 where kind is "direct"
    a_tensor: TensorInfo | None
    b_tensor: TensorInfo
    bias_tensor: TensorInfo
    recall: float | None
    computed: float | None

    @property
    def tensors(self) -> list[TensorInfo]:
        """The tensors there are."""
        return [t for t in (self.a_tensor, self.b_tensor, self.bias_tensor) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class SparseLayer:
    """One bundled FFN. Sizes in values, offsets and stride in bytes within a neuron's row of the bundle.

    Exact: the deciding matrix (gate, or up when ungated) is an ordinary tensor of the file, `decider`, whose
    rows are in stored order. Predicted: it is in the bundle like the others, `decider` is None, and
    `predictor` names the neurons. What is in the bundle exists only there.
    """

    index: int
    gated: bool
    bundle: TensorInfo
    order_tensor: TensorInfo
    decider: TensorInfo | None
    decider_type: int
    stride: int
    n_embd: int
    n_ff: int
    n_expert: int  # 0 for a dense FFN
    expert_shape: tuple[int, ...]  # what follows n_embd and n_ff in the matrices' shapes; empty for a dense FFN
    gate_type: int | None  # None where the bundle has no gate segment
    up_type: int | None  # None where the bundle has no up segment
    down_type: int
    source_down_type: int
    gate_offset: int | None
    up_offset: int  # 0 where the bundle has no up segment
    down_offset: int
    hot_count: int
    frequency_tensor: TensorInfo | None
    scale_tensor: TensorInfo | None  # F16 [n_embd, n_ff / 32, n_expert] by source neuron, where down_type is I8
    predictor: PredictorTensors | None
    threshold_tensor: TensorInfo | None  # F32 [n_ff, n_expert], stored order
    file: GGUFFile = field(repr=False)
    _order: np.ndarray | None = field(default=None, repr=False)

    @property
    def suffix(self) -> str:
        """``_exps`` for a mixture of experts, empty for a dense FFN."""
        return "_exps" if self.n_expert else ""

    @property
    def gate_name(self) -> str | None:
        """Name of the source's gate tensor, None without a gate."""
        return f"blk.{self.index}.ffn_gate{self.suffix}.weight" if self.gated else None

    @property
    def up_name(self) -> str:
        """Name of the source's up tensor."""
        return f"blk.{self.index}.ffn_up{self.suffix}.weight"

    @property
    def decider_name(self) -> str:
        """Name of the source's tensor that decides, in the file or in the bundle."""
        return self.gate_name or self.up_name

    @property
    def down_name(self) -> str:
        """Name of the source's down tensor."""
        return f"blk.{self.index}.ffn_down{self.suffix}.weight"

    @property
    def up_shape(self) -> tuple[int, ...]:
        """Shape of the source's up and gate tensors, ne order."""
        return (self.n_embd, self.n_ff, *self.expert_shape)

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Shape of the source's down tensor, ne order."""
        return (self.n_ff, self.n_embd, *self.expert_shape)

    @property
    def hidden(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The source's tensors that exist only in the bundle: name -> ggml type and shape (ne) they had."""
        hidden = {self.down_name: (self.source_down_type, self.down_shape)}
        if self.up_type is not None:
            hidden[self.up_name] = (self.up_type, self.up_shape)
        if self.gate_type is not None:
            hidden[self.gate_name] = (self.gate_type, self.up_shape)
        return hidden

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
        return self._floats(self.frequency_tensor)

    @property
    def thresholds(self) -> np.ndarray | None:
        """float32 [n_expert or 1, n_ff]: below it |act(gate)| of a stored neuron counts as zero; None without."""
        return None if self.threshold_tensor is None else self._floats(self.threshold_tensor)

    def _floats(self, tensor: TensorInfo) -> np.ndarray:
        return np.frombuffer(self.file.pread(tensor.offset, tensor.nbytes), "<f4").reshape(-1, self.n_ff)

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
        self.mode: str = self._mode()
        self.segments: list[str] = self._value(K_BUNDLE_SEGMENTS, STRING, array=True)
        gated, ungated = _SEGMENTS[self.mode]
        if self.segments not in (gated, ungated):
            shown = printable(", ".join(self.segments))
            raise self._fail(
                K_BUNDLE_SEGMENTS,
                f"{shown} is neither {', '.join(gated)} (gated) nor {', '.join(ungated)} (ungated)",
            )
        self.gated = self.segments == gated
        if self.activation == "drelu" and not self.gated:
            raise self._fail(K_ACTIVATION, "drelu needs a gate, and the bundles of this file have none")
        if self.mode == "predict" and self.activation not in SILENT:
            raise self._fail(K_MODE, f"no neuron can be predicted to be silent with {self.activation}")
        if self._value(K_BUNDLE_ALIGN, U32) != BUNDLE_ALIGNMENT:
            raise self._fail(K_BUNDLE_ALIGN, f"version {VERSION} files have {BUNDLE_ALIGNMENT}")
        self._check_source()
        self.layers = self._layers()
        self._check_tensors()
        self.threshold_kind: str | None = self._threshold_kind()

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
                sparse._check_values(layer)
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
        return {name: what for layer in self.layers for name, what in layer.hidden.items()}

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
        self.version: int = self._value(K_VERSION, U32)
        if not 1 <= self.version <= VERSION:
            advice = "update powerinfer-ext to read it" if self.version > VERSION else "convert the model again"
            raise self._fail(
                K_VERSION,
                f"{self.version}, but this build reads sparse-GGUF versions 1 to {VERSION}; {advice}",
            )

    def _mode(self) -> str:
        if K_MODE not in self.file.fields:
            return "exact"
        mode = self._value(K_MODE, STRING)
        if mode not in MODES:
            raise self._fail(K_MODE, f"{printable(mode)} is not one of {', '.join(MODES)}")
        if mode == "predict" and self.version < PREDICT_VERSION:
            raise self._fail(K_MODE, f"predict in a file of version {self.version}, which has no predictors")
        return mode

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
        self.source_format = self._value(K_SOURCE_FORMAT, STRING) if K_SOURCE_FORMAT in self.file.fields else "gguf"
        self._source_tensors: list[str] = self._value(K_SOURCE_TENSORS, STRING, array=True)
        if len(set(self._source_tensors)) != len(self._source_tensors):
            raise self._fail(K_SOURCE_TENSORS, "names a tensor twice")

    def _threshold_kind(self) -> str | None:
        """How thresholds were found, None where no layer has any."""
        if not any(layer.threshold_tensor for layer in self.layers):
            return None
        if self.activation in SILENT:
            raise self._fail(K_THRESHOLD_KIND, f"{self.activation} neurons are silent without thresholds")
        kind = self._value(K_THRESHOLD_KIND, STRING)
        if kind not in THRESHOLD_KINDS:
            raise self._fail(
                K_THRESHOLD_KIND, f"{printable(kind)} is not one of {', '.join(THRESHOLD_KINDS)}"
            )
        return kind

    # ---- bundles -------------------------------------------------------------------------------------------

    def _layers(self) -> list[SparseLayer]:
        names = self._value(K_BUNDLE_TENSORS, STRING, array=True)
        if not names:
            raise self._fail(K_BUNDLE_TENSORS, "is empty")
        columns = {K_DOWN_TYPE: I32, K_DOWN_SOURCE_TYPE: I32, K_STRIDE: U64}
        for key, part in ((K_GATE_TYPE, "gate"), (K_UP_TYPE, "up")):
            if part in self.segments:
                columns[key] = I32
            elif key in self.file.fields:
                raise self._fail(key, f"is present although the bundles have no {part} segment")
        optional = {K_HOT_COUNT: U32}
        if self.mode == "predict":
            columns |= {K_PREDICTOR_KIND: STRING, K_PREDICTOR_RANK: U32}
            optional |= {K_PREDICTOR_RECALL: F32, K_PREDICTOR_COMPUTED: F32}
        columns |= {key: item_type for key, item_type in optional.items() if key in self.file.fields}
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

    def _optional_tensor(self, name: str, ggml_type: int, shape: tuple[int, ...]) -> TensorInfo | None:
        return self._tensor(name, ggml_type, shape) if name in self.file.tensors else None

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

    def _layer(self, name: str, row: dict[str, Any]) -> SparseLayer:
        match = _BUNDLE_NAME.fullmatch(name)
        if not match:
            raise self._fail(K_BUNDLE_TENSORS, f"{printable(name)} is not the name of a bundle")
        index, suffix = int(match[1]), match[2] or ""
        prefix = f"blk.{index}.ffn_"
        predictor = self._predictor(prefix, suffix, row) if self.mode == "predict" else None
        types = self._segment_types(name, row, predictor is not None)
        if predictor is None:
            part = "gate" if self.gated else "up"
            decider = self._tensor(f"{prefix}{part}{suffix}.weight", None, None)
            # A mixture of one expert may have lost its last dimension: writers drop trailing ones.
            if len(decider.shape) not in ((2, 3) if suffix else (2,)):
                raise self._fail(
                    f"shape of tensor {decider.name}", f"{list(decider.shape)} is not that of an FFN matrix"
                )
            n_embd, n_ff, *experts = decider.shape
            decider_type = decider.type
        else:
            decider = None
            first = predictor.a_tensor or predictor.b_tensor  # reads the FFN's input
            n_embd, n_ff, experts = first.shape[0], predictor.bias_tensor.shape[0], []
            decider_type = types[self.segments[0]]
        source_type = row[K_DOWN_SOURCE_TYPE]
        checks = [(f"powerinfer.bundle.{part}.type", types[part], n_embd, "n_embd") for part in types]
        for key, ggml_type, n, what in (*checks, (K_DOWN_SOURCE_TYPE, source_type, n_ff, "n_ff")):
            if ggml_type not in BLOCKS:
                raise self._fail(key, f"unknown ggml type {ggml_type} for {name}")
            if n % BLOCKS[ggml_type][0]:
                raise self._fail(
                    key,
                    f"{type_name(ggml_type)} has blocks of {BLOCKS[ggml_type][0]} values, which do not "
                    f"divide {name}'s {what} of {n}",
                )
        offsets, stride = bundle_layout(list(types.values()), n_embd)
        offset = dict(zip(types, offsets, strict=True))
        if row[K_STRIDE] != stride:
            raise self._fail(K_STRIDE, f"{row[K_STRIDE]} bytes for {name}, whose segments take {stride}")
        hot_count = row.get(K_HOT_COUNT, 0)
        if hot_count > n_ff:
            raise self._fail(K_HOT_COUNT, f"{hot_count} hot neurons for {name}, which has {n_ff} neurons")
        if types["down"] == _I8 and source_type not in SCALED:
            raise self._fail(K_DOWN_TYPE, f"I8 columns for {name}, whose source type has no single scale")
        orders = (n_ff, *experts)
        scales = (n_embd, n_ff // SCALE_GROUP, *experts)
        thresholds = self._optional_tensor(f"{prefix}thresh{suffix}.weight", _F32, orders)
        if thresholds is not None and predictor is not None:
            raise self._fail(f"tensor {thresholds.name}", "thresholds for a layer that is predicted")
        return SparseLayer(
            index=index,
            gated=self.gated,
            bundle=self._tensor(name, _I8, (stride, *orders)),
            order_tensor=self._tensor(f"{prefix}order{suffix}.weight", _I32, orders),
            decider=decider,
            decider_type=decider_type,
            stride=stride,
            n_embd=n_embd,
            n_ff=n_ff,
            n_expert=(experts[0] if experts else 1) if suffix else 0,
            expert_shape=tuple(experts),
            gate_type=types.get("gate"),
            up_type=types.get("up"),
            down_type=types["down"],
            source_down_type=source_type,
            gate_offset=offset.get("gate"),
            up_offset=offset.get("up", 0),
            down_offset=offset["down"],
            hot_count=hot_count,
            frequency_tensor=self._optional_tensor(f"{prefix}freq{suffix}.weight", _F32, orders),
            scale_tensor=(
                self._tensor(f"{prefix}down_scale{suffix}.weight", _F16, scales)
                if types["down"] == _I8
                else None
            ),
            predictor=predictor,
            threshold_tensor=thresholds,
            file=self.file,
        )

    def _segment_types(self, name: str, row: dict[str, Any], predicted: bool) -> dict[str, int]:
        """The ggml types of a bundle's segments by part, in their order.

        In a file of predicted layers an exact one has no segment for the matrix that decides: its type is -1.
        """
        types = {part: row[f"powerinfer.bundle.{part}.type"] for part in self.segments}
        if self.mode == "predict" and not predicted:
            part = self.segments[0]
            if types.pop(part) != -1:
                raise self._fail(
                    f"powerinfer.bundle.{part}.type", f"is not -1 for {name}, which has no predictor"
                )
        return types

    def _predictor(self, prefix: str, suffix: str, row: dict[str, Any]) -> PredictorTensors | None:
        kind, rank = row[K_PREDICTOR_KIND], row[K_PREDICTOR_RANK]
        where = f"{prefix}bundle{suffix}.weight"
        if kind not in (NO_PREDICTOR, *PREDICTORS):
            raise self._fail(
                K_PREDICTOR_KIND, f"{printable(kind)} for {where} is not none, {', '.join(PREDICTORS)}"
            )
        if kind != NO_PREDICTOR and suffix:
            raise self._fail(K_PREDICTOR_KIND, f"{kind} for {where}: mixtures are not predicted")
        has_rank = kind in (LOWRANK, LINEAR)
        if (rank % RANK_STEP or not rank) if has_rank else rank:
            wanted = f"a positive multiple of {RANK_STEP}" if has_rank else "0"
            raise self._fail(K_PREDICTOR_RANK, f"{rank} for {where}, expected {wanted}")
        if kind == NO_PREDICTOR:
            return None
        order = self._tensor(f"{prefix}order.weight", _I32, None)
        bias = self._tensor(f"{prefix}pred_bias.weight", _F32, order.shape)
        b = self._tensor(f"{prefix}pred_b.weight", None, None)
        a = self._tensor(f"{prefix}pred_a.weight", None, None) if has_rank else None
        width = rank or b.shape[0]
        if a is not None and (len(a.shape) != 2 or a.shape[1] != rank):
            raise self._fail(f"shape of tensor {a.name}", f"{list(a.shape)}, expected [n_embd, {rank}]")
        if b.shape != (width, *order.shape) or len(order.shape) != 1:
            raise self._fail(
                f"shape of tensor {b.name}", f"{list(b.shape)}, expected {[width, *order.shape]}"
            )
        for tensor in (a, b):
            if tensor is not None and tensor.type in NOT_FOR_WEIGHTS:
                raise self._fail(f"type of tensor {tensor.name}", f"{type_name(tensor.type)} holds no weights")
        return PredictorTensors(
            kind, rank, a, b, bias, row.get(K_PREDICTOR_RECALL), row.get(K_PREDICTOR_COMPUTED)
        )

    def _check_values(self, layer: SparseLayer) -> None:
        """What floating-point tensors hold must be numbers that can be compared with."""
        if layer.threshold_tensor is not None:
            values = layer.thresholds
            if not (values >= 0).all():
                raise self._fail(f"tensor {layer.threshold_tensor.name}", "has negative thresholds or NaN")
        if layer.predictor is not None:
            bias = layer.predictor.bias_tensor
            if np.isnan(layer._floats(bias)).any():
                raise self._fail(f"tensor {bias.name}", "has NaN")

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
            if layer.decider_name not in source:
                raise self._fail(K_SOURCE_TENSORS, f"lacks {layer.decider_name}")
            for extension in (
                layer.bundle,
                layer.order_tensor,
                layer.frequency_tensor,
                layer.scale_tensor,
                layer.threshold_tensor,
                *(layer.predictor.tensors if layer.predictor else ()),
            ):
                if extension is not None and extension.name in source:
                    raise self._fail(K_SOURCE_TENSORS, f"names {extension.name}, which the conversion added")


def is_sparse(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a sparse-GGUF (of any version). Raises FormatError if it is not a sound GGUF at
    all.
    """
    with GGUFFile.open(path) as file:
        return K_VERSION in file.fields
