"""The GGUF that stock llama.cpp is shown in place of a sparse one.

Stock's loader refuses files with tensors it does not know and insists on those it does. So it reads a header
that has the extension's tensors left out and the bundled FFN tensors put back with their source's types and
shapes; the bytes behind those are holes that nobody reads.
"""

from __future__ import annotations

from typing import NamedTuple

from gguf_tools.sparse import FILE_ALIGNMENT, SparseGGUF
from gguf_tools.writer import NewTensor, encode_header


class Extent(NamedTuple):
    """Where `size` bytes at `virtual_offset` of the virtual file come from: the sparse file, or nowhere
    (-1).
    """

    virtual_offset: int
    size: int
    file_offset: int


def virtual_header(sparse: SparseGGUF) -> tuple[bytes, list[Extent]]:
    """The virtual file's header, padded to where its data begins, and its tensors' extents in ascending
    order.

    Extents are as long as their tensors; the bytes between them are padding (zeros). The virtual file ends
    with its last extent. Metadata is that of the source except `general.alignment`, which is 4096 like the
    sparse file's.
    """
    file = sparse.file
    hidden = sparse.hidden_tensors()
    tensors, origins = [], []
    for name in sparse.source_tensors:
        if name in hidden:
            tensors.append(NewTensor(name, *hidden[name]))
            origins.append(-1)
        else:
            stored = file.tensors[name]
            tensors.append(NewTensor(name, stored.type, stored.shape))
            origins.append(stored.offset)
    fields = [field for field in file.fields.values() if not field.name.startswith("powerinfer.")]
    header, offsets = encode_header(fields, tensors, FILE_ALIGNMENT)
    extents = [
        Extent(offset, tensor.nbytes, origin)
        for offset, tensor, origin in zip(offsets, tensors, origins, strict=True)
    ]
    return header, extents
