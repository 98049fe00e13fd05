"""Read PowerInfer's own model files as if they were stock GGUFs, predictors included.

PowerInfer (https://github.com/SJTU-IPADS/PowerInfer, arXiv 2312.12456) is a fork of llama.cpp of December
2023. Its files are GGUF files with the magic ``PWRI`` whose FFNs are kept for sparse computing:

    blk.N.ffn_down_t.weight  [n_embd, n_ff]  `down` transposed: row j is what neuron j adds to the output
    blk.N.fc1.weight         [n_embd, r]     the predictor: neuron j is computed when
    blk.N.fc2.weight         [r, n_ff]       (fc2 . relu(fc1 . h))_j >= powerinfer.sparse_threshold
    blk.N.gpu_idx, gpu_bucket                which neurons go to the GPU; of no use here

`h` is the residual stream **before** the FFN's norm, while our engine sees what comes out of the norm,
x = h / rms(h) . w. As relu is homogeneous, fc1 with its columns divided by w gives the same scores from x, but
for the positive factor rms(h): against a threshold of zero they select exactly the same neurons. A positive
threshold would need rms(h), so zero stands in for it, which selects all that PowerInfer would and some more.
With a negative one that is not so, and the predictors are left out.

PowerInfer computes relu in every FFN (and, for bamboo, on both gate and up, which is our drelu): its llama
files say SwiGLU nowhere, and here they get the hint `powerinfer.activation`. Its falcon and opt models have
ungated ReLU FFNs, whose activation stock llama.cpp would compute itself (falcon: as GELU) or whose
architecture it does not know (opt): they cannot be run on it, and are refused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from gguf_tools import quants
from gguf_tools.errors import ConversionError
from gguf_tools.predictor import Predictor
from gguf_tools.reader import (
    BLOCKS,
    F32,
    MAGIC,
    POWERINFER_MAGIC,
    STRING,
    Field,
    GGUFFile,
    TensorInfo,
    printable,
    row_bytes,
    type_name,
)
from gguf_tools.sparse import LOWRANK, RANK_STEP

K_ARCHITECTURE = "general.architecture"
K_ACTIVATION = "powerinfer.activation"
K_THRESHOLD = "powerinfer.sparse_threshold"

# PowerInfer's architecture -> the one of stock llama.cpp with the same graph, and what its FFN computes.
ARCHITECTURES = {"llama": ("llama", "relu"), "bamboo": ("llama", "drelu")}
_REFUSED = {
    "falcon": (
        "its FFN has no gate, so stock llama.cpp computes the activation itself, and that is GELU where this model "
        "has ReLU"
    ),
    "opt": "stock llama.cpp has no such architecture",
}
_OTHER = "PowerInfer has no sparse graph for it"

# Types that an imported fc2 keeps; others (which PowerInfer does not write) become F16 or Q8_0.
PREDICTOR_TYPES = (quants.F32, quants.F16, quants.Q8_0, quants.Q4_0)
# A score of exactly zero counts as firing in PowerInfer (it skips what is *below* the threshold), but not here.
ZERO_FIRES = np.float32(1e-30)

_DOWN_T = re.compile(r"blk\.(\d+)\.ffn_down_t\.weight")
_FC = re.compile(r"blk\.(\d+)\.(fc[12])\.weight")
_GPU_SPLIT = re.compile(r"blk\.\d+\.(gpu_idx|gpu_bucket)(\.weight)?")


class PowerInferFile(GGUFFile):
    """An open PowerInfer file that shows the names, keys and shapes of the equivalent stock GGUF.

    `transposed`: name of a `down` -> the tensor that the file has in its place, [n_embd, n_ff].
    `threshold`: what its predictors' scores are compared with. `notes`: what was left out and why, a
    sentence each.
    """

    magics: ClassVar[tuple[bytes, ...]] = (POWERINFER_MAGIC, MAGIC)  # files of the first days were called GGUF
    renumbered: ClassVar[Mapping[int, int]] = {16: 24, 17: 25, 18: 26}  # I8, I16, I32 of December 2023

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        try:
            self._translate()
        except BaseException:
            self.close()
            raise

    def _translate(self) -> None:
        source, activation = self._architecture()
        target = ARCHITECTURES[source][0]
        self.threshold = self._threshold()
        self.notes: list[str] = []
        self.fields = self._fields(source, target, activation)
        stored, self.tensors = self.tensors, {}
        self._fc: dict[int, dict[str, TensorInfo]] = {}
        for name, tensor in stored.items():
            if match := _FC.fullmatch(name):
                self._fc.setdefault(int(match[1]), {})[match[2]] = tensor
            elif match := _DOWN_T.fullmatch(name):
                self._down(int(match[1]), tensor, stored)
            elif not _GPU_SPLIT.fullmatch(name):
                self.tensors[name] = tensor
        if not self.transposed:
            raise self._fail("tensors", "no blk.N.ffn_down_t.weight, which every PowerInfer model has")
        for index, parts in self._fc.items():
            self._check_predictor(index, parts)
        if self._fc and self.threshold < 0:
            self._fc = {}
            self.notes.append(
                f"the predictors were left out: {K_THRESHOLD} is {self.threshold:g}, and below zero they depend on "
                "the length of the residual stream, which the FFN's input does not tell"
            )

    def _architecture(self) -> tuple[str, str]:
        field = self.fields.get(K_ARCHITECTURE)
        if field is None or field.type != STRING:
            raise self._fail(K_ARCHITECTURE, "is missing" if field is None else "is not a string")
        name = field.value
        if name not in ARCHITECTURES:
            raise ConversionError(
                f"{self.path}: {K_ARCHITECTURE}: PowerInfer models of architecture {printable(name)} cannot be run "
                f"on stock llama.cpp: {_REFUSED.get(name, _OTHER)}"
            )
        return name, ARCHITECTURES[name][1]

    def _threshold(self) -> float:
        field = self.fields.get(K_THRESHOLD)
        if field is None:
            return 0.0
        if field.type != F32 or not np.isfinite(field.value):
            found = f"is {field.value}" if field.type == F32 else f"has type {field.type_label}"
            raise self._fail(K_THRESHOLD, f"{found}, expected a finite f32")
        return field.value

    def _fields(self, source: str, target: str, activation: str) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for name, field in self.fields.items():
            if name == K_ARCHITECTURE:
                field = Field.scalar(name, STRING, target)
            elif name.startswith(f"{source}."):
                field = Field(target + name[len(source) :], field.type, field.item_type, field.count, field.raw)
            if field.name in fields:
                raise self._fail(f"key {printable(name)}", f"and {printable(field.name)} mean the same")
            fields[field.name] = field
        fields.setdefault(K_ACTIVATION, Field.scalar(K_ACTIVATION, STRING, activation))
        return fields

    def _down(self, index: int, tensor: TensorInfo, stored: Mapping[str, TensorInfo]) -> None:
        """Put a stock `down` in the place of `ffn_down_t`."""
        name, up = f"blk.{index}.ffn_down.weight", stored.get(f"blk.{index}.ffn_up.weight")
        if name in stored:
            raise self._fail(f"tensor {tensor.name}", f"is present beside {name}; one of them is too many")
        if up is None:
            raise self._fail(f"tensor blk.{index}.ffn_up.weight", f"is missing, but {tensor.name} is there")
        if tensor.shape != up.shape or len(up.shape) != 2:
            raise self._fail(f"shape of tensor {tensor.name}", f"{list(tensor.shape)}, expected {list(up.shape)}")
        if tensor.type in quants.NOT_FOR_WEIGHTS:
            raise self._fail(f"type of tensor {tensor.name}", f"{type_name(tensor.type)} holds no weights")
        n_embd, n_ff = tensor.shape
        # The type stock is shown; blocks that fill rows of n_embd values need not fill rows of n_ff.
        shown = tensor.type if n_ff % BLOCKS[tensor.type][0] == 0 else quants.F16
        nbytes = row_bytes(shown, n_ff) * n_embd
        self.tensors[name] = TensorInfo(name, shown, (n_ff, n_embd), tensor.offset, nbytes)
        self.transposed[name] = tensor

    def _check_predictor(self, index: int, parts: Mapping[str, TensorInfo]) -> None:
        for part in ("fc1", "fc2"):
            if part not in parts:
                raise self._fail(f"tensor blk.{index}.{part}.weight", "is missing: half of a predictor is no use")
        fc1, fc2 = parts["fc1"], parts["fc2"]
        down = self.transposed.get(f"blk.{index}.ffn_down.weight")
        if down is None:
            raise self._fail(f"tensor {fc1.name}", f"is a predictor, but blk.{index}.ffn_down_t.weight is missing")
        n_embd, n_ff = down.shape
        rank = fc1.shape[-1]
        for tensor, expected in ((fc1, (n_embd, rank)), (fc2, (rank, n_ff))):
            if tensor.shape != expected:
                raise self._fail(f"shape of tensor {tensor.name}", f"{list(tensor.shape)}, expected {list(expected)}")
            if tensor.type in quants.NOT_FOR_WEIGHTS:
                raise self._fail(f"type of tensor {tensor.name}", f"{type_name(tensor.type)} holds no weights")
        norm = self.tensors.get(f"blk.{index}.ffn_norm.weight")
        if norm is None or norm.shape != (n_embd,) or norm.type != quants.F32:
            problem = "is missing" if norm is None else f"is {norm.label}, expected F32 [{n_embd}]"
            raise self._fail(f"tensor blk.{index}.ffn_norm.weight", problem)

    # ---- predictors ----------------------------------------------------------------------------------------

    @property
    def predicted_layers(self) -> list[int]:
        """Layers with a predictor that can be carried over, ascending."""
        return sorted(self._fc)

    def predictor(self, index: int) -> Predictor:
        """The predictor of layer `index`, read and adapted to the normed input.

        fc2 is taken byte for byte (a rank that the format does not have gets silent hidden values), fc1 is stored
        as F16, or as Q8_0 where it is quantised. Raises FormatError when it has no meaning on the normed input (a
        norm weight of zero) or holds what is not finite.
        """
        fc1, fc2 = self._fc[index]["fc1"], self._fc[index]["fc2"]
        norm_name = f"blk.{index}.ffn_norm.weight"
        norm = np.frombuffer(self.data(norm_name), "<f4")
        with np.errstate(all="ignore"):
            a = self._matrix(fc1) / norm
            largest = np.abs(a).max()
        if not np.isfinite(largest):  # also when the norm's weight is zero where fc1 is not
            raise self._fail(
                f"tensor {norm_name}",
                f"has weights of zero (or {fc1.name} is not finite), so the predictor's input cannot be traced back",
            )
        if not np.isfinite(self._matrix(fc2)).all():
            raise self._fail(f"tensor {fc2.name}", "has values that are not finite")
        if largest > 0:  # scores may be scaled by any positive number: keep `a` where half precision has its digits
            a *= np.float32(2.0 ** -np.floor(np.log2(largest)))
        b, b_type = self._rows(fc2), fc2.type
        missing = -len(a) % RANK_STEP
        if missing or b_type not in PREDICTOR_TYPES:
            b_type = quants.F16 if BLOCKS[b_type][0] == 1 else quants.Q8_0
            b = quants.quantise(b_type, np.pad(self._matrix(fc2), ((0, 0), (0, missing))))
            a = np.pad(a, ((0, missing), (0, 0)))
        plain = BLOCKS[fc1.type][0] == 1 or a.shape[1] % BLOCKS[quants.Q8_0][0]
        a_type = quants.F16 if plain else quants.Q8_0
        bias = np.full(len(b), ZERO_FIRES, np.float32)
        return Predictor(LOWRANK, b_type, b, bias, a_type, quants.quantise(a_type, a))

    def _rows(self, tensor: TensorInfo) -> np.ndarray:
        """uint8 [rows, bytes of a row] of a stored matrix."""
        return np.frombuffer(self.pread(tensor.offset, tensor.nbytes), np.uint8).reshape(tensor.shape[1], -1)

    def _matrix(self, tensor: TensorInfo) -> np.ndarray:
        """float32 [rows, columns] of a stored matrix."""
        return quants.dequantise(tensor.type, self._rows(tensor), tensor.shape[0])


def open_source(path: str | os.PathLike[str]) -> GGUFFile:
    """Open what `convert` can take: a stock GGUF, or one of PowerInfer's as a `PowerInferFile`.

    Raises FormatError, OSError, and ConversionError for a PowerInfer model that stock llama.cpp cannot run.
    """
    if _magic(path) == POWERINFER_MAGIC:
        return PowerInferFile(path)
    file = GGUFFile.open(path)
    if any(_DOWN_T.fullmatch(name) for name in file.tensors):
        file.close()
        return PowerInferFile(path)
    return file


def _magic(path: str | os.PathLike[str]) -> bytes:
    """The first four bytes; empty for what is no regular file (opening a FIFO must not wait for a writer)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(fd, 4, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
