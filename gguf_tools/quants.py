"""Quantise and dequantise rows with the dependency's own code, so that our bytes are the bytes llama.cpp
computes.

The functions come from the `libggml-base.so.0` that lies in the installed llama-cpp-python, through
`ggml.h`'s public interface. Not from `libggml-base.so` beside it: the wheel holds copies, not links, and
opening that name would give the process a second ggml.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

import numpy as np

from gguf_tools.errors import ConversionError
from gguf_tools.reader import BLOCKS, row_bytes, type_name

F32, F16, Q4_0, Q8_0, I8, BF16 = 0, 1, 2, 8, 24, 30
# Types whose transposition loses nothing: one value per block.
LOSSLESS = frozenset({F32, F16, BF16})
# Types whose blocks are one F16 scale and integers of at most 8 bits: a matrix of them can be transposed without
# loss into columns of integers (I8) and a table of scales.
SCALED = frozenset({Q8_0, Q4_0})
SCALE_GROUP = 32  # values per block of those types
# ggml writes these but not from rows of floats, or keeps them for activations: no weights are stored in them.
NOT_FOR_WEIGHTS = frozenset({9, 15, 24, 25, 26, 27, 28})  # Q8_1, Q8_K, I8, I16, I32, I64, F64

F16_LIMIT = 65520.0  # the least value that rounds to infinity; block scales are F16 too


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h; `traits` below checks its sizes against the gguf package's table."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The dependency's libggml-base, opened once. Raises ConversionError when llama-cpp-python is not
    installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = os.path.join(folder, "lib", "libggml-base.so.0")
        if os.path.exists(path):
            break
    else:
        where = f"{folders[0]} has no lib/libggml-base.so.0" if folders else "it is not installed"
        raise ConversionError(
            f"quantised tensors need llama-cpp-python's libraries, but {where}; install it first"
        )
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be loaded: {error}") from error
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, n = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, n, n, n, pointer]
    return lib


@functools.cache
def _traits(ggml_type: int) -> _TypeTraits:
    traits = library().ggml_get_type_traits(ggml_type).contents
    # A libggml that disagrees with the table our sizes come from would write past our buffers.
    if (traits.blck_size, traits.type_size) != BLOCKS[ggml_type]:
        raise ConversionError(
            f"{type_name(ggml_type)}: {traits.blck_size} values take {traits.type_size} bytes in the "
            f"installed llama-cpp-python, but {BLOCKS[ggml_type]} in the installed gguf package; "
            "install matching versions"
        )
    return traits


def dequantise(ggml_type: int, rows: np.ndarray, n: int) -> np.ndarray:
    """float32 [n_rows, n] of `rows`, uint8 [n_rows, bytes per row of n values]. Exact: every type fits
    float32.
    """
    rows = np.ascontiguousarray(rows)
    if ggml_type == F32:
        return rows.view(np.float32)
    if ggml_type == F16:
        return rows.view(np.float16).astype(np.float32)
    if ggml_type == BF16:
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    to_float = _traits(ggml_type).to_float
    if not to_float:
        raise ConversionError(f"{type_name(ggml_type)}: ggml cannot turn this type into floats")
    out = np.empty((rows.shape[0], n), np.float32)
    to_float(rows.ctypes.data, out.ctypes.data, rows.shape[0] * n)
    return out


def quantise(ggml_type: int, rows: np.ndarray) -> np.ndarray:
    """uint8 [n_rows, bytes per row] of float32 `rows` [n_rows, n]; n a multiple of the type's block.

    Types that ggml only quantises with an importance matrix get a uniform one.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n = rows.shape
    if ggml_type == F32:
        return rows.view(np.uint8)
    if ggml_type in NOT_FOR_WEIGHTS:
        raise ConversionError(f"{type_name(ggml_type)}: not a type that weights can be stored in")
    # Infinities, NaN and huge values make some of ggml's quantisers abort the process. (False for NaN.)
    largest = np.abs(rows).max()
    if not largest < (np.inf if ggml_type == BF16 else F16_LIMIT):
        raise ConversionError(f"values as large as {largest:.3g} cannot be stored as {type_name(ggml_type)}")
    if ggml_type == F16:
        return rows.astype(np.float16).view(np.uint8)
    if n % BLOCKS[ggml_type][0]:  # ggml would write past the end
        raise ValueError(f"rows of {n} values are not whole blocks of {type_name(ggml_type)}")
    _traits(ggml_type)
    lib = library()
    out = np.empty((n_rows, row_bytes(ggml_type, n)), np.uint8)
    importance = np.ones(n, np.float32) if lib.ggml_quantize_requires_imatrix(ggml_type) else None
    written = lib.ggml_quantize_chunk(
        ggml_type,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n,
        None if importance is None else importance.ctypes.data,
    )
    if written != out.nbytes:
        raise ConversionError(
            f"{type_name(ggml_type)}: ggml wrote {written} bytes where {out.nbytes} were expected"
        )
    return out


def transposes_exactly(source_type: int, stored_type: int) -> bool:
    """Whether a matrix of `source_type` survives being stored transposed as `stored_type`, bit for bit."""
    if stored_type == I8:
        return source_type in SCALED
    return source_type in LOSSLESS and stored_type in (source_type, F32)


def split_blocks(ggml_type: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n_rows, n] and F16 scales (as uint16) [n_rows, n / 32] of `SCALED` rows, uint8 [n_rows, bytes]."""
    width = BLOCKS[ggml_type][1]
    blocks = rows.reshape(len(rows), -1, width)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<u2")[:, :, 0]
    packed = blocks[:, :, 2:]
    if ggml_type == Q8_0:
        return np.ascontiguousarray(packed).view(np.int8).reshape(len(rows), -1), scales
    values = np.concatenate((packed & 15, packed >> 4), axis=2).view(np.int8) - np.int8(8)
    return values.reshape(len(rows), -1), scales


def join_blocks(ggml_type: int, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The inverse of `split_blocks`, bit for bit."""
    values = np.ascontiguousarray(values).reshape(len(values), -1, SCALE_GROUP)
    heads = np.ascontiguousarray(scales, "<u2")[:, :, None].view(np.uint8)
    if ggml_type == Q8_0:
        tails = values.view(np.uint8)
    else:
        nibbles = (values + np.int8(8)).view(np.uint8)
        tails = (nibbles[:, :, :16] & 15) | (nibbles[:, :, 16:] << 4)
    return np.concatenate((heads, tails), axis=2).reshape(len(values), -1)


def transpose(source_type: int, rows: np.ndarray, target_type: int) -> np.ndarray:
    """The transposed matrix: uint8 [n_columns, bytes of n_rows values] from uint8 [n_rows, bytes of
    n_columns].

    Types without blocks are only moved; others go through float32. Both lengths must be multiples of their
    type's block.
    """
    if source_type == target_type and source_type in LOSSLESS:
        values = np.ascontiguousarray(rows).view(f"u{BLOCKS[source_type][1]}")
        return np.ascontiguousarray(values.T).view(np.uint8)
    block, size = BLOCKS[source_type]
    return quantise(target_type, dequantise(source_type, rows, rows.shape[1] // size * block).T)
