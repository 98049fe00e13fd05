"""Turn a stock GGUF into a sparse one: FFN weights bundled neuron by neuron, everything else copied byte for
byte.

The plan (which tensors become which) is made and checked before the first byte is written. Then the output is
streamed in order: plain tensors in pieces, bundles one expert (or dense FFN) at a time. The peak of memory is
two of an expert's matrices, a few MiB of buffers, and the predictors: those of all layers, twice (ours are some
MB per layer of a 7B model, PowerInfer's own, of rank 1024 in half precision, about 30).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from gguf_tools import powerinfer_import, quants, sparse
from gguf_tools.activations import NATIVE
from gguf_tools.errors import ConversionError, FormatError
from gguf_tools.predictor import Predictor
from gguf_tools.reader import BLOCKS, F32, I32, STRING, U32, U64, Field, GGUFFile, TensorInfo, row_bytes, type_name
from gguf_tools.stream import PIECE, WORKERS, Progress, Reporter, permuted_rows, pieces, row_ranges, strips
from gguf_tools.writer import GGUFWriter, NewTensor

_F32, _F16, _I8, _I32 = 0, 1, 24, 26

# Names of `--down-type`, besides auto and same. Coarser types are left out: they save little of what a bundle
# takes, lose much, and most of them want an importance matrix.
DOWN_TYPES = {
    type_name(t).lower(): t for t in (0, 1, 30, 24, 8, 14, 13, 7, 6, 12, 3, 2, 23, 20)
}  # F32 F16 BF16 I8 Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 IQ4_XS IQ4_NL

# What `--down-type auto` makes of a source type; of types that are not listed (below 4 bits, or with scales
# that are powers of two) Q8_0. Q8_0 becomes columns of integers (I8), which loses nothing: blocked anew as
# Q8_0 it moved an earlier bundled mixture by a mean KL of 1.2e-4 and flipped 0.8 % of top tokens (4096 held-out
# tokens). The 4-bit types kept as they are move perplexity by 0.1 % at most, and I8 would be larger.
AUTO_DOWN_TYPE = {t: t for t in DOWN_TYPES.values()} | {quants.Q8_0: quants.I8}

# What we cannot bundle: pattern, what it is.
_UNSUPPORTED = {
    r"blk\.\d+\.ffn_gate_up(_exps)?\.weight": "gate and up merged into one tensor; not supported yet",
    r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight": (
        "one tensor per expert, a layout llama.cpp no longer writes; "
        "convert the model again with a current llama.cpp"
    ),
    r"blk\.\d+\.ffn_(gate|up|down)(_exps)?\.(input_)?scale": "FFN weights with scales; not supported yet",
    r"blk\.\d+\.ffn_sub_norm\.weight": "a norm between up and down, which needs every neuron",
    r"blk\.\d+\.ffn\.act(\.scales)?": "activation scales between up and down; not supported yet",
    r"blk\.\d+\.ffn_(bundle|order|freq|down_scale|thresh|pred_\w+)(_exps)?\.weight": (
        "a name of the sparse-GGUF format in a file that is none"
    ),
}


@dataclass(frozen=True)
class Calibrated:
    """What calibration found out about one FFN; parts may be missing. Neurons are numbered as in the source.

    order: stored -> source, int [n_ff] or [n_expert, n_ff]. frequency: share of tokens a neuron fires for, float
    of the same shape. hot_count: neurons at the start of the order that are hot. predictor: makes the FFN a
    predicted one. thresholds: float [n_ff] or [n_expert, n_ff], see docs/FORMAT.md;
    density: the share of neurons above them.
    """

    order: np.ndarray | None = None
    frequency: np.ndarray | None = None
    hot_count: int = 0
    predictor: Predictor | None = None
    thresholds: np.ndarray | None = None
    density: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What a model was calibrated with, and the outcome by FFN: "3" is layer 3, "3_exps" its experts.

    profile: the digest of the profile, or empty. threshold_kind: cats or chess, where there are thresholds.
    """

    ffns: Mapping[str, Calibrated]
    text: str = ""
    tokens: int = 0
    profile: str = ""
    threshold_kind: str | None = None


@dataclass(frozen=True)
class FFN:
    """The tensors of one FFN in the source, and what its bundle will hold (types are ggml types)."""

    index: int
    gate: TensorInfo | None
    up: TensorInfo
    down: TensorInfo
    down_type: int
    columns: TensorInfo | None = None  # what the file has in place of `down` where it is transposed already
    found: Calibrated = field(default=Calibrated(), compare=False)

    @property
    def unit(self) -> str:
        """Its key in a `Calibration`."""
        return f"{self.index}{self.suffix}"

    @property
    def keeps_down(self) -> bool:
        """Whether the bundle has the values of `down` exactly."""
        if self.columns and self.columns.type == self.down_type:
            return True
        return quants.transposes_exactly((self.columns or self.down).type, self.down_type)

    @property
    def predicted(self) -> bool:
        return self.found.predictor is not None

    @property
    def suffix(self) -> str:
        return "_exps" if "_exps" in self.up.name else ""

    @property
    def decider(self) -> TensorInfo:
        return self.gate or self.up

    @property
    def rows(self) -> list[TensorInfo]:
        """The source's tensors whose rows are segments of the bundle, in that order."""
        tensors = ([self.gate] if self.gate else []) + [self.up]
        return tensors if self.predicted else tensors[1:]

    @property
    def hidden(self) -> list[TensorInfo]:
        """The source's tensors that move into the bundle."""
        return [*self.rows, self.down]

    @property
    def n_embd(self) -> int:
        return self.up.shape[0]

    @property
    def n_ff(self) -> int:
        return self.up.shape[1]

    @property
    def experts(self) -> int:
        """Matrices in each tensor: the number of experts, 1 for a dense FFN."""
        return math.prod(self.up.shape[2:])

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        """Offsets of the segments, that of down last, and the stride."""
        return sparse.bundle_layout([tensor.type for tensor in self.rows] + [self.down_type], self.n_embd)

    @property
    def bundle(self) -> NewTensor:
        stride = self.layout[1]
        return NewTensor(
            f"blk.{self.index}.ffn_bundle{self.suffix}.weight", _I8, (stride, *self.up.shape[1:])
        )

    @property
    def order(self) -> NewTensor:
        return NewTensor(f"blk.{self.index}.ffn_order{self.suffix}.weight", _I32, self.up.shape[1:])

    @property
    def scales(self) -> NewTensor | None:
        """The table of scales that goes with columns of integers."""
        if self.down_type != _I8:
            return None
        shape = (self.n_embd, self.n_ff // quants.SCALE_GROUP, *self.up.shape[2:])
        return NewTensor(f"blk.{self.index}.ffn_down_scale{self.suffix}.weight", _F16, shape)

    def extras(self) -> list[tuple[NewTensor, np.ndarray]]:
        """The tensors that calibration adds, with their contents in stored order."""
        found, prefix, shape = self.found, f"blk.{self.index}.ffn_", self.up.shape[1:]
        identity = np.broadcast_to(np.arange(self.n_ff), (self.experts, self.n_ff))
        order = identity if found.order is None else found.order
        values: list[tuple[NewTensor, np.ndarray]] = []
        for name, per_neuron in (("freq", found.frequency), ("thresh", found.thresholds)):
            if per_neuron is not None:
                tensor = NewTensor(f"{prefix}{name}{self.suffix}.weight", _F32, shape)
                values.append((tensor, np.take_along_axis(per_neuron, order, 1).astype("<f4")))
        if p := found.predictor:
            if p.a is not None:
                values.append((NewTensor(f"{prefix}pred_a.weight", p.a_type, (self.n_embd, p.rank)), p.a))
            width = p.rank or self.n_embd
            values.append((NewTensor(f"{prefix}pred_b.weight", p.b_type, (width, self.n_ff)), p.b[order[0]]))
            bias = p.bias[order[0]].astype("<f4")
            values.append((NewTensor(f"{prefix}pred_bias.weight", _F32, shape), bias))
        return values

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of tensors with one value per neuron, which follow the neuron order if they exist."""
        return tuple(f"blk.{self.index}.ffn_{part}{self.suffix}.bias" for part in ("gate", "up"))


@dataclass(frozen=True)
class LayerReport:
    """What became of one FFN. `relative_rms` is |stored - source| / |source| of `down`, 0.0 where it is
    exact.
    """

    index: int
    kind: str  # "dense" or "moe"
    n_embd: int
    n_ff: int
    n_expert: int  # 0 for dense
    decider_type: str
    up_type: str
    down_source_type: str
    down_type: str
    requantised: bool
    relative_rms: float
    bytes_per_neuron: int
    predictor: str  # "none" for an exact layer
    predictor_rank: int
    predictor_bytes: int
    recall: float | None  # of the predictor, on tokens it was not trained on
    computed: float | None
    hot_count: int


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of `convert`; sizes in bytes."""

    source: str
    output: str
    architecture: str
    activation: str
    gated: bool
    mode: str
    source_bytes: int
    output_bytes: int
    source_sha256: str
    seconds: float
    layers: list[LayerReport]
    notes: list[str]  # what was asked for and not done, one sentence each

    @property
    def requantised(self) -> list[LayerReport]:
        """The layers whose `down` is not exactly the source's."""
        return [layer for layer in self.layers if layer.requantised]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    activation: str | None = None,
    down_type: str = "auto",
    order: Mapping[int, np.ndarray] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write `output`, the sparse-GGUF of the stock GGUF `source`, or of a PowerInfer model (PWRI).

    `activation`: relu, relu2, drelu, silu or gelu; default: the source's hint, else its architecture's own.
    `down_type`: type that the transposed `down` is stored in; ``auto`` keeps the source's where possible,
    ``same`` insists on that, others are ggml type names (``q8_0``). `order`: layer -> stored-to-original
    neuron permutation, int [n_ff] or [n_expert, n_ff]; layers left out keep their order. `calibration`: what
    is known about the FFNs, orders included; where it has predictors the file's mode is predict. Default: the
    predictors of a PowerInfer model, else nothing.
    `progress(done, total, what)` counts bytes.

    Raises FormatError (bad source), ConversionError (it cannot be done; says why), OSError (source
    unreadable).
    """
    started = time.monotonic()
    with powerinfer_import.open_source(source) as file:
        _refuse_same_file(file, output)
        plan = plan_conversion(file, activation, down_type)
        imported = isinstance(file, powerinfer_import.PowerInferFile)
        if calibration is None and imported:
            layers = file.predicted_layers
            calibration = Calibration({str(i): Calibrated(predictor=file.predictor(i)) for i in layers})
        calibration, notes = _merge(file, plan, order or {}, calibration)
        notes += file.notes if imported else []
        ffns, gated = [replace(ffn, found=calibration.ffns[ffn.unit]) for ffn in plan.ffns], plan.gated
        orders = [ffn.found.order for ffn in ffns]
        writer = GGUFWriter(
            output,
            _fields(file, ffns, plan.activation, gated, calibration),
            _plan(file, ffns),
            alignment=sparse.FILE_ALIGNMENT,
        )
        hashing = _Hashing(file)
        reporter = Reporter(progress, writer.size + file.size, lambda: hashing.done)
        with writer, hashing:
            errors = _write_all(file, writer, ffns, orders, reporter)
            digest = hashing.result(reporter)
            file.check_unchanged()
            writer.replace_string(sparse.K_SOURCE_SHA256, digest)
        return ConversionReport(
            source=file.path,
            output=os.fspath(output),
            architecture=plan.architecture,
            activation=plan.activation,
            gated=gated,
            mode="predict" if any(ffn.predicted for ffn in ffns) else "exact",
            source_bytes=file.size,
            output_bytes=writer.size,
            source_sha256=digest,
            seconds=time.monotonic() - started,
            layers=[_layer_report(ffn, error) for ffn, error in zip(ffns, errors, strict=True)],
            notes=notes,
        )


def _layer_report(ffn: FFN, relative_rms: float) -> LayerReport:
    predictor = ffn.found.predictor
    return LayerReport(
        index=ffn.index,
        kind="moe" if ffn.suffix else "dense",
        n_embd=ffn.n_embd,
        n_ff=ffn.n_ff,
        n_expert=ffn.experts if ffn.suffix else 0,
        decider_type=type_name(ffn.decider.type),
        up_type=type_name(ffn.up.type),
        down_source_type=type_name((ffn.columns or ffn.down).type),
        down_type=type_name(ffn.down_type),
        requantised=not ffn.keeps_down,
        relative_rms=relative_rms,
        bytes_per_neuron=ffn.layout[1],
        predictor=predictor.kind if predictor else sparse.NO_PREDICTOR,
        predictor_rank=predictor.rank if predictor else 0,
        predictor_bytes=predictor.nbytes if predictor else 0,
        recall=predictor.recall if predictor else None,
        computed=predictor.computed if predictor else None,
        hot_count=ffn.found.hot_count,
    )


# ---- planning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a conversion is going to do, decided from the header alone."""

    architecture: str
    activation: str
    gated: bool
    ffns: list[FFN]


def plan_conversion(file: GGUFFile, activation: str | None = None, down_type: str = "auto") -> Plan:
    """Decide how to convert `file`, or raise ConversionError saying why it cannot be done."""
    architecture = _text(file, "general.architecture")
    ffns = _find_ffns(file, down_type)
    gated = ffns[0].gate is not None
    return Plan(architecture, _choose_activation(file, architecture, gated, activation), gated, ffns)


def _text(file: GGUFFile, key: str) -> str:
    field = file.fields.get(key)
    if field is None or field.type != STRING:
        raise FormatError(f"{file.path}: {key}: {'is missing' if field is None else 'is not a string'}")
    return field.value


def _refuse_same_file(file: GGUFFile, output: str | os.PathLike[str]) -> None:
    if os.path.exists(output) and os.path.samestat(os.stat(output), os.fstat(file.fd)):
        raise ConversionError(
            f"{os.fspath(output)}: is the source itself; choose another name for the output"
        )


def _find_ffns(file: GGUFFile, down_type: str) -> list[FFN]:
    """The FFNs of the file by the names of their tensors, in layer order; refuses what cannot be bundled."""
    if sparse.K_VERSION in file.fields:
        raise ConversionError(
            f"{file.path}: is a sparse-GGUF already; get the stock file back with: powerinfer export"
        )
    for name in file.fields:
        if sparse.owns_key(name) and name != sparse.K_ACTIVATION:
            raise ConversionError(
                f"{file.path}: {name}: a key of the sparse-GGUF format in a file that is none"
            )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ConversionError(
            f"{file.path}: is one part of a split model (split.count); merge it first with: "
            "llama-gguf-split --merge FIRST-PART OUTPUT"
        )
    parts: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        for pattern, what in _UNSUPPORTED.items():
            if re.fullmatch(pattern, name):
                raise ConversionError(f"{file.path}: tensor {name}: {what}")
        if match := sparse.FFN_TENSOR.fullmatch(name):
            parts.setdefault((int(match[1]), match[3] or ""), {})[match[2]] = tensor
    if not parts:
        raise ConversionError(
            f"{file.path}: has no FFN tensors (blk.N.ffn_up.weight...), so there is nothing to convert"
        )
    ffns = [
        _ffn(file, index, suffix, tensors, down_type) for (index, suffix), tensors in sorted(parts.items())
    ]
    if len({ffn.gate is None for ffn in ffns}) > 1:
        raise ConversionError(f"{file.path}: some layers have a gate and some have none; not supported yet")
    return ffns


def _ffn(file: GGUFFile, index: int, suffix: str, tensors: dict[str, TensorInfo], down_type: str) -> FFN:
    where = f"{file.path}: FFN of layer {index}"
    for part in ("up", "down"):
        if part not in tensors:
            raise ConversionError(f"{where}: blk.{index}.ffn_{part}{suffix}.weight is missing")
    up, down, gate = tensors["up"], tensors["down"], tensors.get("gate")
    n_embd, n_ff, *experts = (*up.shape, 0, 0)[: max(2, len(up.shape))]
    if gate is None and down.shape[:2] == (n_ff // 2, n_embd):
        raise ConversionError(
            f"{where}: {up.name} holds gate and up merged into one tensor; not supported yet"
        )
    if len(up.shape) not in ((2, 3) if suffix else (2,)):
        raise ConversionError(
            f"{where}: {up.name} has shape {list(up.shape)}, which is not that of an FFN matrix"
        )
    if down.shape != (n_ff, n_embd, *experts):
        raise ConversionError(
            f"{where}: {down.name} has shape {list(down.shape)}, expected {[n_ff, n_embd, *experts]}"
        )
    if gate is not None and gate.shape != up.shape:
        raise ConversionError(f"{where}: {gate.name} has shape {list(gate.shape)}, expected {list(up.shape)}")
    for tensor in (gate, up, down):
        if tensor is not None and tensor.type in quants.NOT_FOR_WEIGHTS:
            raise ConversionError(
                f"{where}: {tensor.name} has type {type_name(tensor.type)}, which holds no weights"
            )
    columns = file.transposed.get(down.name)
    ffn = FFN(index, gate, up, down, _choose_down_type(where, down, n_embd, down_type, columns), columns)
    if n_ff >= 1 << 31:
        raise ConversionError(f"{where}: {n_ff} neurons; at most {(1 << 31) - 1} are supported")
    for bias in ffn.biases:
        tensor = file.tensors.get(bias)
        if tensor is not None and tensor.shape != up.shape[1:]:
            raise ConversionError(
                f"{where}: {bias} has shape {list(tensor.shape)}, expected {list(up.shape[1:])}"
            )
        if tensor is not None and BLOCKS[tensor.type][0] != 1:
            raise ConversionError(
                f"{where}: {bias} has type {type_name(tensor.type)}; biases are F32, F16 or BF16"
            )
    return ffn


def _choose_down_type(where: str, down: TensorInfo, n_embd: int, wanted: str, columns: TensorInfo | None) -> int:
    wanted = wanted.lower()
    if columns and wanted in ("auto", "same"):
        return columns.type
    if columns and wanted == "i8":
        raise ConversionError(f"{where}: {columns.name} is not blocked along neurons, as down type I8 needs; use auto")
    if wanted == "auto":
        fitting = (
            t for t in (AUTO_DOWN_TYPE.get(down.type, quants.Q8_0), quants.Q8_0) if n_embd % BLOCKS[t][0] == 0
        )
        return next(fitting, quants.F16)
    if wanted != "same" and wanted not in DOWN_TYPES:
        raise ConversionError(f"down type {wanted!r} is not one of auto, same, {', '.join(DOWN_TYPES)}")
    chosen = down.type if wanted == "same" else DOWN_TYPES[wanted]
    if chosen == _I8 and down.type not in quants.SCALED:
        scaled = ", ".join(type_name(t) for t in sorted(quants.SCALED))
        raise ConversionError(
            f"{where}: down type I8 keeps the integers of {scaled}, but {down.name} is {type_name(down.type)}; "
            "choose another down type, or auto"
        )
    if n_embd % BLOCKS[chosen][0]:
        raise ConversionError(
            f"{where}: down type {type_name(chosen)} has blocks of {BLOCKS[chosen][0]} values, which do not "
            f"divide this model's embedding length of {n_embd}; choose another down type, or auto"
        )
    return chosen


def _choose_activation(file: GGUFFile, architecture: str, gated: bool, wanted: str | None) -> str:
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        limits = file.metadata.get(f"{architecture}.{key}", 0)
        if any(limits) if isinstance(limits, list) else limits:
            raise ConversionError(
                f"{file.path}: {architecture}.{key}: clamped FFN activations are not supported yet"
            )
    native, native_gated = NATIVE.get(architecture, (None, gated))
    if native_gated != gated:
        # starcoder2 has ungated layers, refact gated ones...; a file that contradicts the table is not what
        # we vouch for.
        native = None
    origin = "the chosen activation"
    if wanted is None and sparse.K_ACTIVATION in file.fields:
        wanted, origin = _text(file, sparse.K_ACTIVATION), f"the file's hint {sparse.K_ACTIVATION}"
    if wanted is None:
        wanted = native
    if wanted is None:
        kind = "" if native_gated == gated else f" with {'a' if gated else 'no'} gate"
        advice = (
            "; say what its FFN computes with --activation"
            if gated
            else ", and FFNs without a gate cannot be overridden"
        )
        raise ConversionError(
            f"{file.path}: the activation of architecture {architecture!r}{kind} is not known{advice}"
        )
    if wanted not in sparse.ACTIVATIONS:
        raise ConversionError(
            f"{file.path}: {origin} is {wanted!r}, which is not one of {', '.join(sparse.ACTIVATIONS)}"
        )
    if not gated and wanted != native:
        own = f"stays {native}" if native else "cannot be overridden"
        raise ConversionError(
            f"{file.path}: {origin} is {wanted}, but the FFN of {architecture!r} has no gate and is computed "
            f"by stock llama.cpp up to its activation, so it {own}"
        )
    return wanted


def _merge(
    file: GGUFFile, plan: Plan, orders: Mapping[int, np.ndarray], calibration: Calibration | None
) -> tuple[Calibration, list[str]]:
    """The calibration with checked contents for every FFN of the plan, and what had to be left out of it.

    Orders become int32 [experts, n_ff], or None where they are the identity.
    """
    calibration = calibration or Calibration({})
    unknown = set(orders) - {ffn.index for ffn in plan.ffns}
    if unknown:
        raise ConversionError(f"neuron orders given for layers without an FFN: {sorted(unknown)}")
    foreign = set(calibration.ffns) - {ffn.unit for ffn in plan.ffns}
    if foreign:
        raise ConversionError(
            f"{file.path}: the calibration is about FFNs that this model does not have: {sorted(foreign)}; "
            "calibrate this model"
        )
    checked, notes = {}, []
    for ffn in plan.ffns:
        found = calibration.ffns.get(ffn.unit, Calibrated())
        if ffn.index in orders:
            found = replace(found, order=orders[ffn.index])
        if found.predictor and (obstacle := predict_obstacle(file, plan, ffn)):
            notes.append(f"layer {ffn.index} stays exact: {obstacle}")
            found = replace(found, predictor=None)
        checked[ffn.unit] = _check_calibrated(ffn, found)
    return replace(calibration, ffns=checked), notes


def predict_obstacle(file: GGUFFile, plan: Plan, ffn: FFN) -> str | None:
    """Why the neurons of an FFN cannot be predicted, or None."""
    if plan.activation not in sparse.SILENT:
        return f"its neurons are never silent ({plan.activation})"
    if ffn.suffix:
        return "mixtures of experts are not predicted"
    if any(bias in file.tensors for bias in ffn.biases):
        return "its matrices have biases, which stock llama.cpp adds in between"
    return None


def _check_calibrated(ffn: FFN, found: Calibrated) -> Calibrated:
    where = f"layer {ffn.index}"
    shape = (ffn.experts, ffn.n_ff)
    order = _check_order(ffn, found.order)
    parts: dict[str, np.ndarray | None] = {"frequency": found.frequency, "thresholds": found.thresholds}
    for name, values in parts.items():
        if values is None:
            continue
        values = np.asarray(values, np.float32)
        if values.size != math.prod(shape) or values.shape[-1] != ffn.n_ff or not (values >= 0).all():
            raise ConversionError(f"{name} of {where} is not {ffn.experts} x {ffn.n_ff} numbers of at least 0")
        parts[name] = values.reshape(shape)
    if not 0 <= found.hot_count <= ffn.n_ff:
        raise ConversionError(f"{found.hot_count} hot neurons for {where}, which has {ffn.n_ff} neurons")
    if found.predictor:
        if found.thresholds is not None:
            raise ConversionError(f"{where} is given a predictor and thresholds; it can have one of them")
        found.predictor.check(where, ffn.n_embd, ffn.n_ff)
    return replace(found, order=order, **parts)


def _check_order(ffn: FFN, order: np.ndarray | None) -> np.ndarray | None:
    if order is None:
        return None
    rows = np.asarray(order)
    rows = rows.reshape(1, -1) if rows.ndim == 1 else rows
    identity = np.arange(ffn.n_ff, dtype=np.int32)
    if rows.shape != (ffn.experts, ffn.n_ff) or any(not np.array_equal(np.sort(row), identity) for row in rows):
        raise ConversionError(
            f"neuron order of layer {ffn.index} is not {ffn.experts} permutation(s) of 0 to {ffn.n_ff - 1}"
        )
    rows = rows.astype(np.int32)
    return None if (rows == identity).all() else rows


def _plan(file: GGUFFile, ffns: list[FFN]) -> list[NewTensor]:
    """The output's tensors: the source's in their order, each bundle and its order where the FFN's first
    hidden was.
    """
    owner = {tensor.name: ffn for ffn in ffns for tensor in ffn.hidden}
    planned, done = [], set()
    for tensor in file.tensors.values():
        ffn = owner.get(tensor.name)
        if ffn is None:
            planned.append(NewTensor(tensor.name, tensor.type, tensor.shape))
        elif ffn not in done:
            done.add(ffn)
            planned += [ffn.bundle, ffn.order] + ([ffn.scales] if ffn.scales else [])
            planned += [extra for extra, _ in ffn.extras()]
    return planned


def _fields(
    file: GGUFFile, ffns: list[FFN], activation: str, gated: bool, calibration: Calibration
) -> list[Field]:
    """The source's metadata in its order, then ours; the keys both have are replaced where they stand."""
    alignment = Field.scalar("general.alignment", U32, sparse.FILE_ALIGNMENT)
    chosen = Field.scalar(sparse.K_ACTIVATION, STRING, activation)
    replaced = {alignment.name: alignment, chosen.name: chosen}
    fields = [replaced.get(name, field) for name, field in file.fields.items()]
    fields += [field for name, field in replaced.items() if name not in file.fields]
    had_alignment = alignment.name in file.fields
    predict = any(ffn.predicted for ffn in ffns)
    parts = (["gate"] if gated else []) + ["up"]
    parts = parts if predict else parts[1:]
    if predict:
        fields.append(Field.scalar(sparse.K_MODE, STRING, "predict"))
    fields += [
        Field.scalar(sparse.K_VERSION, U32, sparse.PREDICT_VERSION if predict else 1),
        Field.scalar(sparse.K_SOURCE_NAME, STRING, os.path.basename(file.path)),
        Field.scalar(sparse.K_SOURCE_SIZE, U64, file.size),
        Field.scalar(sparse.K_SOURCE_SHA256, STRING, "0" * 64),  # replaced when the source has been read
        Field.scalar(sparse.K_SOURCE_ALIGNMENT, U32, file.alignment if had_alignment else 0),
        Field.scalar(sparse.K_SOURCE_GGUF_VERSION, U32, file.version),
    ]
    if sparse.K_ACTIVATION in file.fields:
        fields.append(Field.scalar(sparse.K_SOURCE_ACTIVATION, STRING, _text(file, sparse.K_ACTIVATION)))
    if file.transposed:
        fields.append(Field.scalar(sparse.K_SOURCE_FORMAT, STRING, "powerinfer"))
    fields += [
        Field.array(sparse.K_SOURCE_TENSORS, STRING, file.tensors),
        Field.scalar(sparse.K_BUNDLE_ALIGN, U32, sparse.BUNDLE_ALIGNMENT),
        Field.array(sparse.K_BUNDLE_SEGMENTS, STRING, [*parts, "down"]),
        Field.array(sparse.K_BUNDLE_TENSORS, STRING, [ffn.bundle.name for ffn in ffns]),
    ]
    for part in parts:
        types = [getattr(ffn, part).type if getattr(ffn, part) in ffn.rows else -1 for ffn in ffns]
        fields.append(Field.array(f"powerinfer.bundle.{part}.type", I32, types))
    fields += [
        Field.array(sparse.K_DOWN_TYPE, I32, [ffn.down_type for ffn in ffns]),
        Field.array(sparse.K_DOWN_SOURCE_TYPE, I32, [ffn.down.type for ffn in ffns]),
        Field.array(sparse.K_STRIDE, U64, [ffn.layout[1] for ffn in ffns]),
    ]
    return fields + _calibration_fields(ffns, calibration)


def _calibration_fields(ffns: list[FFN], calibration: Calibration) -> list[Field]:
    """What calibration adds to the metadata, nothing where there was none."""
    found = [ffn.found for ffn in ffns]
    fields = []
    if any(f.hot_count for f in found):
        fields.append(Field.array(sparse.K_HOT_COUNT, U32, [f.hot_count for f in found]))
    predictors = [f.predictor for f in found]
    if any(predictors):
        kinds = [p.kind if p else sparse.NO_PREDICTOR for p in predictors]
        fields.append(Field.array(sparse.K_PREDICTOR_KIND, STRING, kinds))
        fields.append(Field.array(sparse.K_PREDICTOR_RANK, U32, [p.rank if p else 0 for p in predictors]))
        # An exact layer misses nothing, and computes what its deciding product says.
        for key, name in ((sparse.K_PREDICTOR_RECALL, "recall"), (sparse.K_PREDICTOR_COMPUTED, "computed")):
            values = [getattr(p, name) if p else 1.0 for p in predictors]
            if None not in values:
                fields.append(Field.array(key, F32, values))
    if any(f.thresholds is not None for f in found):
        if calibration.threshold_kind not in sparse.THRESHOLD_KINDS:
            raise ConversionError(f"thresholds need a kind, one of {', '.join(sparse.THRESHOLD_KINDS)}")
        fields.append(Field.scalar(sparse.K_THRESHOLD_KIND, STRING, calibration.threshold_kind))
        densities = [1.0 if f.thresholds is None else f.density for f in found]
        if None not in densities:
            fields.append(Field.array(sparse.K_THRESHOLD_DENSITY, F32, densities))
    if calibration.tokens:
        fields += [
            Field.scalar(sparse.K_CALIBRATION_TEXT, STRING, calibration.text),
            Field.scalar(sparse.K_CALIBRATION_TOKENS, U64, calibration.tokens),
            Field.scalar(sparse.K_CALIBRATION_PROFILE, STRING, calibration.profile),
        ]
    return fields


# ---- writing -----------------------------------------------------------------------------------------------


class _Hashing:
    """The source's SHA-256, computed by a thread of its own beside the conversion (both cores have work
    then).
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.done = 0
        self._stop = False
        self._error: BaseException | None = None
        self._hash = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Hashing:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        buffer = bytearray(min(PIECE // 4, max(1, self.file.size)))
        try:
            while self.done < self.file.size and not self._stop:
                view = memoryview(buffer)[: min(len(buffer), self.file.size - self.done)]
                self.file.read_into(self.done, view)
                self._hash.update(view)
                self.done += len(view)
        except BaseException as error:
            self._error = error

    def result(self, reporter: Reporter) -> str:
        """Wait for the digest; re-raises what went wrong while reading."""
        while self._thread.is_alive():
            self._thread.join(0.1)
            reporter.advance(0, "sha256 of the source")
        if self._error:
            raise self._error
        return self._hash.hexdigest()


def _write_all(
    file: GGUFFile, writer: GGUFWriter, ffns: list[FFN], orders: list[np.ndarray | None], reporter: Reporter
) -> list[float]:
    """Stream every planned tensor; the relative RMS error of each FFN's stored `down`, in the order of
    `ffns`.
    """
    bundles = {ffn.bundle.name: i for i, ffn in enumerate(ffns)}
    order_tensors = {ffn.order.name: i for i, ffn in enumerate(ffns)}
    scale_tensors = {ffn.scales.name: ffn for ffn in ffns if ffn.scales}
    extras = {tensor.name: values for ffn in ffns for tensor, values in ffn.extras()}
    permuted = {}  # tensors whose rows (or values, for biases) follow the neuron order
    for ffn, order in zip(ffns, orders, strict=True):
        if order is not None:
            permuted |= dict.fromkeys((ffn.decider.name, *ffn.biases), order)
    errors = [0.0] * len(ffns)
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        for tensor in writer.tensors:
            name = tensor.name
            writer.begin(name)
            if name in bundles:
                i = bundles[name]
                errors[i] = _write_bundle(file, writer, ffns[i], orders[i], pool, reporter)
                continue
            if name in order_tensors:
                i = order_tensors[name]
                identity = np.broadcast_to(
                    np.arange(ffns[i].n_ff, dtype="<i4"), (ffns[i].experts, ffns[i].n_ff)
                )
                order = identity if orders[i] is None else orders[i].astype("<i4")
                parts: Iterator[np.ndarray] = iter(np.ascontiguousarray(row) for row in order)
            elif name in extras:
                parts = iter([np.ascontiguousarray(extras[name])])
            elif name in scale_tensors:
                parts = _scales(file, scale_tensors[name])
            elif name in permuted:
                parts = permuted_rows(file, file.tensors[name], permuted[name])
            else:
                parts = pieces(file, file.tensors[name])
            for part in parts:
                writer.write(part)
                reporter.advance(part.nbytes, name)
    return errors


def _write_bundle(
    file: GGUFFile,
    writer: GGUFWriter,
    ffn: FFN,
    orders: np.ndarray | None,
    pool: ThreadPoolExecutor,
    reporter: Reporter,
) -> float:
    """Stream one bundle, expert by expert. Returns the relative RMS error of the stored `down`.

    Never more than one expert's matrices are in memory: `down` while it is transposed, then the result and
    those whose rows go beside it.
    """
    offsets, stride = ffn.layout
    error = energy = 0.0
    for expert in range(ffn.experts):
        columns, expert_error, expert_energy = _transposed_down(file, ffn, expert, pool)
        error += expert_error
        energy += expert_energy
        segments = [*(_matrix(file, ffn, tensor, expert) for tensor in ffn.rows), columns]
        for first, last in row_ranges(ffn.n_ff, stride):
            picked = slice(first, last) if orders is None else orders[expert, first:last]
            rows = np.zeros((last - first, stride), np.uint8)
            for offset, segment in zip(offsets, segments, strict=True):
                rows[:, offset : offset + segment.shape[1]] = segment[picked]
            writer.write(rows)
            reporter.advance(rows.nbytes, ffn.bundle.name)
    return math.sqrt(error / energy) if energy else 0.0


def _matrix(file: GGUFFile, ffn: FFN, tensor: TensorInfo, expert: int) -> np.ndarray:
    """An expert's gate or up: uint8 [n_ff, bytes of a row]."""
    size = tensor.nbytes // ffn.experts
    rows = np.empty((ffn.n_ff, size // ffn.n_ff), np.uint8)
    file.read_into(tensor.offset + expert * size, rows)
    return rows


def _scales(file: GGUFFile, ffn: FFN) -> Iterator[np.ndarray]:
    """Per expert the scales of `down`'s blocks, uint16 [n_ff / 32, n_embd]: a row for 32 neurons of the source."""
    size = ffn.down.nbytes // ffn.experts
    width = size // ffn.n_embd
    for expert in range(ffn.experts):
        scales = np.empty((ffn.n_ff // quants.SCALE_GROUP, ffn.n_embd), "<u2")
        for first, last in row_ranges(ffn.n_embd, width):
            rows = np.empty((last - first, width), np.uint8)
            file.read_into(ffn.down.offset + expert * size + first * width, rows)
            scales[:, first:last] = quants.split_blocks(ffn.down.type, rows)[1].T
        yield scales


def _transposed_down(
    file: GGUFFile, ffn: FFN, expert: int, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, float, float]:
    """An expert's `down` transposed, in the stored type: uint8 [n_ff, bytes of a column]; squared error and
    norm.
    """
    if ffn.columns:
        return _stored_columns(file, ffn, pool)
    size = ffn.down.nbytes // ffn.experts
    down = np.empty((ffn.n_embd, size // ffn.n_embd), np.uint8)
    file.read_into(ffn.down.offset + expert * size, down)
    columns = np.empty((ffn.n_ff, row_bytes(ffn.down_type, ffn.n_embd)), np.uint8)
    source_type, stored_type = ffn.down.type, ffn.down_type

    def place(strip: tuple[int, int]) -> tuple[float, float]:
        first, last = strip
        part = down[:, row_bytes(source_type, first) : row_bytes(source_type, last)]
        if stored_type == _I8:
            columns[first:last] = quants.split_blocks(source_type, part)[0].T.view(np.uint8)
            return 0.0, 0.0
        if quants.transposes_exactly(source_type, stored_type):
            columns[first:last] = quants.transpose(source_type, part, stored_type)
            return 0.0, 0.0
        values = np.ascontiguousarray(quants.dequantise(source_type, part, last - first).T)
        columns[first:last] = quants.quantise(stored_type, values)
        norm = float(np.vdot(values, values))
        values -= quants.dequantise(stored_type, columns[first:last], ffn.n_embd)
        return float(np.vdot(values, values)), norm

    try:
        sums = list(pool.map(place, strips(source_type, ffn.n_ff, ffn.n_embd)))
    except ConversionError as problem:
        raise ConversionError(f"{file.path}: tensor {ffn.down.name}: {problem}") from problem
    return columns, sum(error for error, _ in sums), sum(norm for _, norm in sums)


def _stored_columns(file: GGUFFile, ffn: FFN, pool: ThreadPoolExecutor) -> tuple[np.ndarray, float, float]:
    """`_transposed_down` where the file has the columns one after the other: its own bytes, unless another type
    is wanted.
    """
    assert ffn.columns is not None
    rows = np.empty((ffn.n_ff, row_bytes(ffn.columns.type, ffn.n_embd)), np.uint8)
    file.read_into(ffn.columns.offset, rows)
    if ffn.columns.type == ffn.down_type:
        return rows, 0.0, 0.0
    columns = np.empty((ffn.n_ff, row_bytes(ffn.down_type, ffn.n_embd)), np.uint8)

    def place(strip: tuple[int, int]) -> tuple[float, float]:
        part = slice(*strip)
        values = quants.dequantise(ffn.columns.type, rows[part], ffn.n_embd)
        columns[part] = quants.quantise(ffn.down_type, values)
        change = values - quants.dequantise(ffn.down_type, columns[part], ffn.n_embd)
        return float(np.vdot(change, change)), float(np.vdot(values, values))

    try:
        sums = list(pool.map(place, strips(ffn.down_type, ffn.n_ff, ffn.n_embd)))
    except ConversionError as problem:
        raise ConversionError(f"{file.path}: tensor {ffn.columns.name}: {problem}") from problem
    return columns, sum(error for error, _ in sums), sum(norm for _, norm in sums)
