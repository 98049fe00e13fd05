"""Writes GGUF files atomically and as a stream: the file appears complete under its name, or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gguf_tools.errors import ConversionError
from gguf_tools.reader import MAGIC, Field, align_up, row_bytes

# Kept free beyond the file itself: file systems need some for their own metadata.
DISK_RESERVE = 1 << 20


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: `shape` in ggml's order (ne), `type` a ggml type."""

    name: str
    type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        size = row_bytes(self.type, self.shape[0])
        for n in self.shape[1:]:
            size *= n
        return size


def encode_header(
    fields: Iterable[Field], tensors: Sequence[NewTensor], alignment: int, version: int = 3
) -> tuple[bytes, list[int]]:
    """The header of a GGUF file, padded to `alignment`, and the absolute offset of each tensor's data."""
    fields = list(fields)
    parts = [MAGIC, struct.pack("<IQQ", version, len(tensors), len(fields))]
    parts += [field.encode() for field in fields]
    relative = []
    at = 0
    for tensor in tensors:
        name = tensor.name.encode()
        parts.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type, at))
        relative.append(at)
        at = align_up(at + tensor.nbytes, alignment)
    header = b"".join(parts)
    header += bytes(align_up(len(header), alignment) - len(header))
    return header, [len(header) + offset for offset in relative]


class GGUFWriter:
    """Streams a GGUF file whose metadata and tensor infos are known before its data.

    Use as a context manager: on leaving it the file is synced and renamed to `path`; after any exception
    (Ctrl-C included) the temporary file is removed and whatever was at `path` is untouched. Tensors are
    written in their declared order, in as many pieces as the caller likes. `size`, if given, extends the file
    with zeros to that many bytes (the padding after the last tensor is optional in GGUF; a reproduction has
    to follow its model).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fields: Iterable[Field],
        tensors: Sequence[NewTensor],
        *,
        alignment: int,
        version: int = 3,
        size: int | None = None,
        digest: hashlib._Hash | None = None,
    ) -> None:
        self.path = os.path.realpath(path)  # what a link points to is replaced, not the link
        self.tensors = list(tensors)
        self.alignment = alignment
        self.fields = list(fields)
        self.header, self.offsets = encode_header(self.fields, self.tensors, alignment, version)
        self.data_end = self.offsets[-1] + self.tensors[-1].nbytes if self.tensors else len(self.header)
        self.size = max(self.data_end, align_up(self.data_end, alignment) if size is None else size)
        self._digest = digest
        self._next = 0  # index of the tensor being written
        self._left = 0  # its bytes still to come
        self._fd = -1
        self._temporary = ""  # its path, while it exists

    def __enter__(self) -> GGUFWriter:
        folder, name = os.path.split(self.path)
        temporary = os.path.join(folder, f".{name[:180]}.{secrets.token_hex(4)}.tmp")
        try:
            if os.path.exists(self.path) and not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ConversionError(
                    f"{self.path}: cannot be written, something that is not a regular file is there"
                )
            if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
                raise ConversionError(f"{self.path}: cannot be written, it exists and is read-only")
            free = shutil.disk_usage(folder).free
            if free < self.size + DISK_RESERVE:
                raise ConversionError(
                    f"{self.path}: needs {self.size / 1e6:.1f} MB but its disk has {free / 1e6:.1f} MB free; "
                    "free some space or choose another place"
                )
            self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._temporary = temporary
            self._write(self.header)
        except OSError as error:
            self._discard()
            raise self._sentence(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def begin(self, name: str) -> None:
        """Start the next tensor, which must be `name`: a check that the caller and the header agree."""
        if self._left:
            raise ValueError(f"tensor {self.tensors[self._next - 1].name} lacks {self._left} bytes")
        tensor = self.tensors[self._next]
        if tensor.name != name:
            raise ValueError(f"tensor {name} written where {tensor.name} was declared")
        self._pad(self.offsets[self._next])
        self._left = tensor.nbytes
        self._next += 1

    def write(self, data: Any) -> None:
        """Append bytes (anything with a contiguous buffer) to the tensor that was begun."""
        view = memoryview(data).cast("B")
        if len(view) > self._left:
            raise ValueError(
                f"tensor {self.tensors[self._next - 1].name} got {len(view) - self._left} bytes too many"
            )
        self._left -= len(view)
        self._write(view)

    def replace_string(self, key: str, value: str) -> None:
        """Overwrite the string field `key` in the header with one of the same length (a digest known only at
        the end).
        """
        at = 24
        for field in self.fields:
            encoded = field.encode()
            if field.name == key:
                new = Field.scalar(key, field.type, value)
                if len(new.raw) != len(field.raw):
                    raise ValueError(f"{key}: the new value must be as long as the declared one")
                os.pwrite(self._fd, new.raw, at + len(encoded) - len(field.raw))
                return
            at += len(encoded)
        raise KeyError(key)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._left or self._next != len(self.tensors):
                raise ValueError(
                    f"{self.path}: only {self._next} of {len(self.tensors)} tensors were written"
                )
            self._pad(self.size)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.rename(self._temporary, self.path)
            self._temporary = ""
            # The rename itself survives a power cut only once the folder is on disk.
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._discard()
            raise self._sentence(error) from error
        except BaseException:
            self._discard()
            raise

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        if self._digest:
            self._digest.update(view)
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._sentence(error) from error

    def _pad(self, offset: int) -> None:
        """Zeros up to the absolute `offset`; in pieces, as a reproduced file's tail may be long."""
        missing = offset - os.lseek(self._fd, 0, os.SEEK_CUR)
        while missing > 0:
            n = min(missing, 1 << 20)
            self._write(bytes(n))
            missing -= n

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary:
            os.unlink(self._temporary)
            self._temporary = ""

    def _sentence(self, error: OSError) -> ConversionError:
        return ConversionError(f"{self.path}: cannot be written: {error.strerror or error}")
