"""The GGUF that stock llama.cpp is shown in place of a file that it cannot load as it is.

Stock's loader refuses files with tensors it does not know and insists on those it does. So it reads a header
that has a sparse-GGUF's added tensors left out and the bundled FFN tensors put back with their source's types
and shapes. The bytes behind tensors that our buffer type serves are holes that nobody reads. The parts of a
split GGUF become one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gguf_tools.errors import FormatError
from gguf_tools.reader import U32, Field, GGUFFile, TensorInfo, row_bytes
from gguf_tools.sparse import FILE_ALIGNMENT, K_VERSION, SparseGGUF
from gguf_tools.writer import NewTensor, encode_header

_SPLIT = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")


class Extent(NamedTuple):
    """Where `size` bytes at `virtual_offset` of the virtual file come from: file number `file`, or nowhere
    (file_offset -1).
    """

    virtual_offset: int
    size: int
    file_offset: int
    file: int


@dataclass(frozen=True)
class Source:
    """A tensor as stock llama.cpp is to see it. file -1: it has no bytes of its own (it is in a bundle)."""

    name: str
    type: int
    shape: tuple[int, ...]
    file: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return row_bytes(self.type, self.shape[0]) * math.prod(self.shape[1:])


class ModelFiles:
    """The open file or files (split GGUF) of a model: its metadata and tensors as stock is to see them.

    sparse: the checked view of a sparse-GGUF, None for a stock one. Raises FormatError, OSError.
    """

    def __init__(self, first: GGUFFile, sparse: SparseGGUF | None = None) -> None:
        self.files = [first]
        self.sparse = sparse
        try:
            self._open_splits()
        except BaseException:
            self.close()
            raise
        self.path = first.path

    @classmethod
    def open(cls, path: str | os.PathLike[str] | GGUFFile) -> ModelFiles:
        """Open a stock or sparse-GGUF by the path of its (first) file; a file that is open is taken over."""
        file = path if isinstance(path, GGUFFile) else GGUFFile.open(path)
        if K_VERSION not in file.fields:
            return cls(file)
        return cls(file, SparseGGUF.open(file))

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def first(self) -> GGUFFile:
        """The file that was asked for, whose metadata counts."""
        return self.files[0]

    @property
    def fds(self) -> list[int]:
        """Descriptors of all files."""
        return [file.fd for file in self.files]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(os.fstat(fd).st_size for fd in self.fds)

    def _open_splits(self) -> None:
        count = self.first.metadata.get("split.count", 0)
        if not isinstance(count, int) or count < 2:
            return
        found = _SPLIT.fullmatch(str(self.first.path))
        if found is None or int(found[2]) != 1 or int(found[3]) != count:
            raise FormatError(
                f"{self.first.path}: this is part of a model in {count} files; open the first one, whose name ends in "
                f"-00001-of-{count:05d}.gguf"
            )
        for i in range(2, count + 1):
            self.files.append(GGUFFile.open(f"{found[1]}-{i:05d}-of-{count:05d}.gguf"))

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def check_unchanged(self) -> None:
        """Raise FormatError when a file is not what it was when it was opened."""
        for file in self.files:
            file.check_unchanged()

    def fields(self) -> list[Field]:
        """The metadata that stock is shown."""
        ours = ("powerinfer.",) if self.sparse is not None else ()
        hidden = ("general.alignment", "split.", *ours)
        kept = [field for field in self.first.fields.values() if not field.name.startswith(hidden)]
        return [*kept, Field.scalar("general.alignment", U32, FILE_ALIGNMENT)]

    def tensors(self) -> list[Source]:
        """The tensors that stock is shown, in order."""
        if self.sparse is None:
            return [_source(t, i) for i, file in enumerate(self.files) for t in file.tensors.values()]
        hidden = self.sparse.hidden_tensors()
        return [
            Source(name, *hidden[name], -1, 0) if name in hidden else _source(self.first.tensors[name], 0)
            for name in self.sparse.source_tensors
        ]


def _source(tensor: TensorInfo, file: int) -> Source:
    return Source(tensor.name, tensor.type, tuple(tensor.shape), file, tensor.offset)


def virtual_header(model: ModelFiles, holes: Iterable[str] = ()) -> tuple[bytes, list[Extent]]:
    """The virtual file's header, padded to where its data begins, and its tensors' extents in ascending
    order.

    holes: names of tensors whose bytes are not to be read, besides those that have none. Extents are as long
    as their tensors; the bytes between them are padding (zeros). The virtual file ends with its last extent.
    Metadata is the model's except `general.alignment`, which is 4096.
    """
    sources, hidden = model.tensors(), set(holes)
    new = [NewTensor(source.name, source.type, source.shape) for source in sources]
    header, offsets = encode_header(model.fields(), new, FILE_ALIGNMENT)
    extents = []
    for offset, source, tensor in zip(offsets, sources, new, strict=True):
        hole = source.file < 0 or source.name in hidden
        extents.append(Extent(offset, tensor.nbytes, -1 if hole else source.offset, max(source.file, 0)))
    return header, extents
