"""GGUF files made by hand for the format's tests: byte by byte, or through the `gguf` package; none of our
own code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

QT = gguf.GGMLQuantizationType


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class Raw:
    """A GGUF described field by field, so that a test can make any one of them wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_fields: int | None = None
    # key, encoded value including its type
    fields: list[tuple[str | bytes, bytes]] = field(
        default_factory=lambda: [
            ("general.architecture", struct.pack("<I", 8) + string("llama")),
            ("tiny.flag", struct.pack("<IB", 7, 1)),
            ("tiny.words", struct.pack("<IIQ", 9, 8, 2) + string("one") + string("two")),
            ("tiny.numbers", struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0)),
        ]
    )
    # name, dims, ggml type, offset
    tensors: list[tuple[str | bytes, list[int], int, int]] = field(
        default_factory=lambda: [("a", [8, 2], 0, 0), ("b", [32], 8, 64), ("c", [4], 1, 128)]
    )
    alignment: int = 32
    data: bytes = bytes(range(64)) + bytes(range(34)).ljust(64, b"\0") + bytes(8)

    def encode(self) -> bytes:
        out = self.magic + struct.pack("<I", self.version)
        out += struct.pack("<Q", len(self.tensors) if self.n_tensors is None else self.n_tensors)
        out += struct.pack("<Q", len(self.fields) if self.n_fields is None else self.n_fields)
        for key, value in self.fields:
            out += string(key) + value
        for name, dims, ggml_type, offset in self.tensors:
            out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)
        return out + bytes(-len(out) % self.alignment) + self.data


# Where a block's F16 scales are, and values for them.
SCALES = {
    QT.Q8_0: (0, [0.01]),
    QT.Q4_K: (0, [0.01, 0.02]),
    QT.Q5_K: (0, [0.01, 0.02]),
    QT.Q6_K: (208, [0.01]),
}


def encode_weights(values: np.ndarray, ggml_type: QT) -> np.ndarray:
    """float32 [..., rows, n] as uint8 [..., rows, bytes per row]."""
    if ggml_type in SCALES and (ggml_type != QT.Q8_0 or values.size > 1 << 20):
        # The gguf package reads K-quants but does not write them, and is slow with much Q8_0: random blocks
        # with sane scales are as good.
        rng = np.random.default_rng(values.size)
        block, size = gguf.GGML_QUANT_SIZES[ggml_type]
        raw = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8)
        start, scales = SCALES[ggml_type]
        scales = np.float16(scales).view(np.uint8)
        raw[..., start : start + len(scales)] = scales
        return raw.reshape(*values.shape[:-1], -1)
    return gguf.quants.quantize(values, ggml_type).view(np.uint8)


@dataclass
class Model:
    """What `tiny_model` wrote: raw bytes of each tensor, and its sizes."""

    path: Path
    tensors: dict[str, np.ndarray]
    layers: list[int]
    n_embd: int
    n_ff: int
    n_expert: int
    gated: bool

    @property
    def suffix(self) -> str:
        return "_exps" if self.n_expert else ""


ARCHITECTURE = {
    (True, False): "llama",
    (False, False): "arcee",
    (True, True): "smallthinker",
    (False, True): "nemotron_h_moe",
}


def tiny_model(
    path: Path,
    *,
    gated: bool = True,
    n_expert: int = 0,
    ggml_type: QT = QT.F32,
    n_embd: int = 64,
    n_ff: int = 96,
    layers: tuple[int, ...] = (0, 1),
    bias: bool = False,
    alignment: int | None = None,
    hint: str | None = None,
    architecture: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
    strings: dict[str, str] | None = None,
    numbers: dict[str, int] | None = None,
) -> Model:
    """Write a GGUF with the tensors of a small transformer's FFNs (and a few others) and random weights."""
    rng = np.random.default_rng(len(layers) * 1000 + n_ff)
    writer = gguf.GGUFWriter(path, architecture or ARCHITECTURE[gated, n_expert > 0])
    writer.add_name("tiny")
    if alignment:
        writer.add_custom_alignment(alignment)
    if hint:
        writer.add_string("powerinfer.activation", hint)
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    for key, number in (numbers or {}).items():
        writer.add_uint16(key, number)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "\u00e9"])
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, kind: QT = ggml_type) -> None:
        tensors[name] = encode_weights(rng.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(name, tensors[name], raw_dtype=kind)

    experts = (n_expert,) if n_expert else ()
    suffix = "_exps" if n_expert else ""
    add("token_embd.weight", 5, n_embd)
    for i in layers:
        add(f"blk.{i}.ffn_norm.weight", n_embd, kind=QT.F32)
        add(f"blk.{i}.ffn_down{suffix}.weight", *experts, n_embd, n_ff)
        if gated:
            add(f"blk.{i}.ffn_gate{suffix}.weight", *experts, n_ff, n_embd)
        add(f"blk.{i}.ffn_up{suffix}.weight", *experts, n_ff, n_embd)
        if n_expert:
            add(f"blk.{i}.ffn_gate_inp.weight", n_expert, n_embd, kind=QT.F32)
            add(f"blk.{i}.ffn_up_shexp.weight", n_ff, n_embd)
        if bias:
            for part in ("gate", "up") if gated else ("up",):
                add(f"blk.{i}.ffn_{part}{suffix}.bias", *experts, n_ff, kind=QT.F32)
            add(f"blk.{i}.ffn_down{suffix}.bias", *experts, n_embd, kind=QT.F32)
    for name, values in (extra or {}).items():
        tensors[name] = values.view(np.uint8)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Model(path, tensors, list(layers), n_embd, n_ff, n_expert, gated)
