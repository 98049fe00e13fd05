"""cffi build description of the C backend (API mode). setup.py reads SOURCES, CFLAGS and LDFLAGS from here too."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    f"cpatch/{name}.c"
    for name in ("backend", "buffer", "ffn", "ggml_abi", "kernels", "model", "plugin", "selftest", "vgguf")
]
CFLAGS = [
    "-std=c11",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Werror",
]
LDFLAGS = ["-fopenmp", "-ldl"]


def declarations() -> str:
    """The C interface, powerinfer.h, as cffi reads it: without preprocessor lines. One declaration, one place."""
    text = (HERE / "powerinfer.h").read_text()
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "powerinfer_ext._cpatch",
    '#include "powerinfer.h"',
    sources=SOURCES,
    include_dirs=["cpatch"],
    extra_compile_args=CFLAGS,
    extra_link_args=LDFLAGS,
)
