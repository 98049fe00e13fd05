"""A strict reader of GGUF files (versions 2 and 3, little-endian).

It trusts nothing: every count, length, offset and shape is checked against the size of the file before memory
is allocated for it, and whatever is wrong is reported as a `FormatError` that names the file and the field.
There is no memory mapping: a file that shrinks under a mapping kills the process (SIGBUS), a short `pread` is
only an error.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Like llama.cpp's loader, and unlike
that document, we insist that tensors lie in the file in the order of their infos, one after the other, with
padding only up to the next multiple of the alignment: a file has then no overlaps and no holes.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import gguf

from gguf_tools.errors import FormatError

MAGIC = b"GGUF"
POWERINFER_MAGIC = b"PWRI"  # what PowerInfer writes in its place; see powerinfer_import.py
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
# llama.cpp stops at these too (GGML_MAX_NAME counts the terminating zero, GGML_MAX_DIMS).
MAX_TENSOR_NAME = 63
MAX_DIMS = 4
# The specification's bound on keys. Strings may be whole tokenizer.json files, so only absurd sizes are
# refused.
MAX_KEY = 65535
MAX_STRING = 1 << 28

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
VALUE_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")
_SCALAR_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
                   U64: "Q", I64: "q", F64: "d"}  # fmt: skip

# ggml type -> (elements per block, bytes per block), and the names users know the types by.
BLOCKS: dict[int, tuple[int, int]] = {int(t): sizes for t, sizes in gguf.GGML_QUANT_SIZES.items()}
TYPE_NAMES: dict[int, str] = {int(t): t.name for t in gguf.GGML_QUANT_SIZES}

_CHUNK = 1 << 20


def type_name(ggml_type: int) -> str:
    """The name of a ggml tensor type, such as ``Q4_K``; ``type 99`` for one we do not know."""
    return TYPE_NAMES.get(ggml_type, f"type {ggml_type}")


def row_bytes(ggml_type: int, n: int) -> int:
    """Bytes of one row of `n` values; `n` must be a multiple of the type's block."""
    block, size = BLOCKS[ggml_type]
    return n // block * size


def align_up(n: int, alignment: int) -> int:
    """The least multiple of `alignment` that is not below `n`."""
    return -(-n // alignment) * alignment


def printable(name: str) -> str:
    """`name` shortened and escaped, so that a hostile file cannot draw on the terminal through our
    messages.
    """
    return ascii(name if len(name) <= 80 else name[:77] + "...")


@dataclass(frozen=True, slots=True)
class Field:
    """One metadata entry, kept as the bytes it has in the file so that it can be written again unchanged.

    `type` is the GGUF value type, `item_type` that of an array's elements, `count` their number (1 for a
    scalar), and `raw` the encoded value without the key, the types and the count.
    """

    name: str
    type: int
    item_type: int
    count: int
    raw: bytes

    @property
    def value(self) -> Any:
        """The decoded value: int, float, bool, str or a list of one of them (bytes that are not UTF-8 become
        U+FFFD).
        """
        items = list(_strings(self.raw)) if self.item_type == STRING else _scalars(self.item_type, self.raw)
        return items if self.type == ARRAY else items[0]

    @property
    def type_label(self) -> str:
        """How documentation and messages write the type, such as ``arr[u64]``."""
        if self.type == ARRAY:
            return f"arr[{VALUE_TYPE_NAMES[self.item_type]}]"
        return VALUE_TYPE_NAMES[self.type]

    def encode(self) -> bytes:
        """The entry as it stands in a GGUF header."""
        name = self.name.encode()
        head = struct.pack("<Q", len(name)) + name + struct.pack("<I", self.type)
        if self.type == ARRAY:
            head += struct.pack("<IQ", self.item_type, self.count)
        return head + self.raw

    @staticmethod
    def scalar(name: str, value_type: int, value: Any) -> Field:
        """A field holding one value of `value_type` (one of the constants of this module, not ARRAY)."""
        return Field(name, value_type, value_type, 1, _encode(value_type, [value]))

    @staticmethod
    def array(name: str, item_type: int, values: Iterable[Any]) -> Field:
        """A field holding a list of values of `item_type`."""
        values = list(values)
        return Field(name, ARRAY, item_type, len(values), _encode(item_type, values))


def _encode(item_type: int, values: list[Any]) -> bytes:
    if item_type == STRING:
        encoded = [value.encode() for value in values]
        return b"".join(struct.pack("<Q", len(e)) + e for e in encoded)
    return struct.pack(f"<{len(values)}{_SCALAR_FORMATS[item_type]}", *values)


def _scalars(item_type: int, raw: bytes) -> list[Any]:
    code = _SCALAR_FORMATS[item_type]
    values = list(struct.unpack(f"<{len(raw) // struct.calcsize('<' + code)}{code}", raw))
    return [bool(v) for v in values] if item_type == BOOL else values


def _strings(raw: bytes) -> Iterator[str]:
    at = 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 8], "little")
        yield raw[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` in ggml's order (ne: fastest first), `offset` from the start of the file,
    in bytes.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def label(self) -> str:
        """Type and shape for messages, such as ``Q8_0 [512, 1408]``."""
        return f"{type_name(self.type)} [{', '.join(map(str, self.shape))}]"


class Metadata(Mapping[str, Any]):
    """The decoded values of a file's fields by name; decoded when asked for (a vocabulary is large)."""

    def __init__(self, fields: dict[str, Field]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name].value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class GGUFFile:
    """An open, checked GGUF file.

    `fields` and `tensors` keep the order of the file. Use as a context manager, or call `close()`.
    """

    magics: ClassVar[tuple[bytes, ...]] = (MAGIC,)
    renumbered: ClassVar[Mapping[int, int]] = {}  # ggml types that had another number when the file was written

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # O_NONBLOCK: opening a FIFO must not wait for a writer. It has no effect on regular files.
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{self.path}: not a regular file, a GGUF file is needed")
            self.size = status.st_size
            # Tensors that the file has transposed: name in `tensors` -> what is stored (PowerInfer's files only).
            self.transposed: dict[str, TensorInfo] = {}
            self._identity = _identity(status)
            self._parse()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Open and check the header of `path`. Raises FormatError, or OSError when it cannot be read."""
        return cls(path)

    def close(self) -> None:
        """Close the file descriptor; calling it again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    @functools.cached_property
    def metadata(self) -> Metadata:
        """Decoded metadata by key."""
        return Metadata(self.fields)

    @property
    def data_end(self) -> int:
        """Offset of the first byte after the last tensor, without padding."""
        last = next(reversed(self.tensors.values()), None)
        return self.data_start if last is None else last.offset + last.nbytes

    def check_unchanged(self) -> None:
        """Raise FormatError if the file was written to, replaced or removed since it was opened."""
        try:
            same = _identity(os.stat(self.path)) == self._identity == _identity(os.fstat(self.fd))
        except FileNotFoundError:
            same = False
        if not same:
            raise FormatError(
                f"{self.path}: the file changed after it was opened; wait for its writer and try again"
            )

    def pread(self, offset: int, size: int) -> bytearray:
        """`size` bytes at `offset` of the file. Raises FormatError if the file has become too short."""
        buffer = bytearray(size)
        self.read_into(offset, buffer)
        return buffer

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable, contiguous buffer (bytearray, numpy array) from `offset` of the file."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            n = os.preadv(self.fd, [view[done:]], offset + done)
            if n == 0:
                raise FormatError(
                    f"{self.path}: the file ends at byte {offset + done} where it had {self.size} bytes when "
                    "it was opened; it was truncated meanwhile"
                )
            done += n

    def data(self, name: str) -> bytearray:
        """All bytes of the tensor `name`."""
        tensor = self.tensors[name]
        return self.pread(tensor.offset, tensor.nbytes)

    def _fail(self, field: str, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {field}: {problem}")

    # ---- header --------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        cursor = _Cursor(self)
        magic = bytes(cursor.take(4, "magic"))
        if magic not in self.magics:
            if magic == POWERINFER_MAGIC:
                raise self._fail(
                    "magic", "this is a PowerInfer model (PWRI); make a sparse-GGUF of it with: powerinfer convert"
                )
            if magic == MAGIC[::-1]:
                raise self._fail("magic", "this is a big-endian GGUF; convert it to little-endian first")
            raise self._fail("magic", f"not a GGUF file (it starts with {magic!r})")
        self.version = cursor.u32("version")
        if self.version & 0xFFFF == 0 and self.version:
            raise self._fail("version", "this is a big-endian GGUF; convert it to little-endian first")
        if self.version not in (2, 3):
            raise self._fail("version", f"GGUF version {self.version}; this build reads versions 2 and 3")
        n_tensors = cursor.u64("tensor_count")
        n_fields = cursor.u64("metadata_kv_count")
        # The shortest entries: key and tensor names of one byte, a one-byte value, one dimension.
        for count, least, field in ((n_tensors, 33, "tensor_count"), (n_fields, 14, "metadata_kv_count")):
            if count * least > self.size:
                raise self._fail(field, f"{count} entries cannot fit a file of {self.size} bytes")
        self.fields: dict[str, Field] = {}
        for i in range(n_fields):
            field = cursor.field(i)
            if field.name in self.fields:
                raise self._fail(f"key {printable(field.name)}", "appears twice")
            self.fields[field.name] = field
        self.alignment = self._alignment()
        self.tensors: dict[str, TensorInfo] = {}
        infos = []
        names = set()
        for i in range(n_tensors):
            info = cursor.tensor(i)
            if info[0] in names:
                raise self._fail(f"tensor {printable(info[0])}", "appears twice")
            names.add(info[0])
            infos.append(info)
        self.header_end = cursor.at
        self.data_start = align_up(cursor.at, self.alignment)
        expected = 0
        for name, ggml_type, shape, offset, nbytes in infos:
            where = f"offset of tensor {printable(name)}"
            if offset % self.alignment:
                raise self._fail(where, f"{offset} is not a multiple of the alignment {self.alignment}")
            if offset != expected:
                kind = "overlaps the tensor before it" if offset < expected else "leaves a hole before it"
                raise self._fail(where, f"{offset} {kind} (expected {expected})")
            start = self.data_start + offset
            if start + nbytes > self.size:
                raise self._fail(
                    f"data of tensor {printable(name)}",
                    f"ends at byte {start + nbytes} but the file has {self.size} bytes; it is truncated",
                )
            self.tensors[name] = TensorInfo(name, ggml_type, shape, start, nbytes)
            expected = align_up(offset + nbytes, self.alignment)

    def _alignment(self) -> int:
        field = self.fields.get("general.alignment")
        if field is None:
            return DEFAULT_ALIGNMENT
        if field.type != U32:
            raise self._fail("general.alignment", f"has type {field.type_label}, expected u32")
        alignment = field.value
        if alignment == 0 or alignment & (alignment - 1) or alignment > MAX_ALIGNMENT:
            raise self._fail(
                "general.alignment", f"{alignment} is not a power of two of at most {MAX_ALIGNMENT}"
            )
        return alignment


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


class _Cursor:
    """Walks a header, reading the file in chunks; no read or allocation goes past the end of the file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.buffer = bytearray()
        self.at = 0

    def require(self, n: int, field: str) -> None:
        """Have `n` more bytes in the buffer, or raise the error of a truncated file."""
        end = self.at + n
        if end <= len(self.buffer):
            return
        if end > self.file.size:
            raise self.file._fail(field, f"the file is truncated ({self.file.size} bytes, {end} needed)")
        loaded = len(self.buffer)
        self.buffer += self.file.pread(loaded, min(max(_CHUNK, end - loaded), self.file.size - loaded))

    def take(self, n: int, field: str) -> bytearray:
        self.require(n, field)
        self.at += n
        return self.buffer[self.at - n : self.at]

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def name(self, field: str, longest: int) -> str:
        length = self.u64(f"length of {field}")
        if not 1 <= length <= longest:
            raise self.file._fail(f"length of {field}", f"{length} bytes; expected 1 to {longest}")
        raw = self.take(length, field)
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise self.file._fail(field, f"{bytes(raw[:80])!r} is not UTF-8") from None
        if "\0" in name:
            raise self.file._fail(field, f"{printable(name)} contains a zero byte")
        return name

    def field(self, index: int) -> Field:
        name = self.name(f"key {index}", MAX_KEY)
        where = f"value of key {printable(name)}"
        value_type = item_type = self.u32(where)
        count = 1
        if value_type == ARRAY:
            item_type = self.u32(where)
            count = self.u64(where)
            if item_type == ARRAY:
                raise self.file._fail(where, "an array of arrays, which llama.cpp does not read either")
        if item_type not in _SCALAR_FORMATS and item_type != STRING:
            raise self.file._fail(where, f"unknown value type {item_type}")
        least = 8 if item_type == STRING else struct.calcsize("<" + _SCALAR_FORMATS[item_type])
        if self.at + count * least > self.file.size:
            raise self.file._fail(
                where, f"{count} elements cannot fit a file of {self.file.size} bytes; truncated?"
            )
        if item_type == STRING:
            start = self.at
            self.skip_strings(count, where)
            raw = bytes(self.buffer[start : self.at])
        else:
            raw = bytes(self.take(count * least, where))
            if item_type == BOOL and raw.translate(None, b"\0\1"):
                raise self.file._fail(where, "a bool is neither 0 nor 1")
        return Field(name, value_type, item_type, count, raw)

    def skip_strings(self, count: int, where: str) -> None:
        # Vocabularies have 150 000 strings and more: this loop is the reader's hot spot, hence the local
        # names.
        buffer, at, loaded, unpack = self.buffer, self.at, len(self.buffer), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > loaded:
                self.at = at
                self.require(8, where)
                loaded = len(buffer)
            (length,) = unpack(buffer, at)
            if length > MAX_STRING:
                raise self.file._fail(where, f"a string of {length} bytes; at most {MAX_STRING} are read")
            at += 8
            if at + length > loaded:
                self.at = at
                self.require(length, where)
                loaded = len(buffer)
            at += length
        self.at = at

    def tensor(self, index: int) -> tuple[str, int, tuple[int, ...], int, int]:
        name = self.name(f"name of tensor {index}", MAX_TENSOR_NAME)
        label = printable(name)
        n_dims = self.u32(f"n_dims of tensor {label}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.file._fail(f"n_dims of tensor {label}", f"{n_dims}; expected 1 to {MAX_DIMS}")
        where = f"shape of tensor {label}"
        shape = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims, where))
        elements = 1
        for n in shape:
            elements *= n
            if not 1 <= n < 1 << 63 or elements >= 1 << 63:
                raise self.file._fail(where, f"{list(shape)} has a dimension of zero or overflows 63 bits")
        ggml_type = self.u32(f"type of tensor {label}")
        ggml_type = self.file.renumbered.get(ggml_type, ggml_type)
        if ggml_type not in BLOCKS:
            raise self.file._fail(f"type of tensor {label}", f"unknown ggml type {ggml_type}")
        block, block_bytes = BLOCKS[ggml_type]
        if shape[0] % block:
            raise self.file._fail(
                where,
                f"rows of {shape[0]} values are not a multiple of the {type_name(ggml_type)} block, {block}",
            )
        nbytes = elements // block * block_bytes
        offset = self.u64(f"offset of tensor {label}")
        if offset > self.file.size or nbytes > self.file.size:
            raise self.file._fail(
                f"offset of tensor {label}",
                f"{offset} + {nbytes} bytes lies outside the file of {self.file.size} bytes",
            )
        return name, ggml_type, shape, offset, nbytes
