"""The sparse-GGUF format: read it, write it, convert to it and back."""

from gguf_tools.convert import ConversionReport, convert
from gguf_tools.errors import ConversionError, FormatError
from gguf_tools.export import ExportReport, export
from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import SparseGGUF, is_sparse

__all__ = [
    "ConversionError",
    "ConversionReport",
    "ExportReport",
    "FormatError",
    "GGUFFile",
    "SparseGGUF",
    "convert",
    "export",
    "is_sparse",
]
