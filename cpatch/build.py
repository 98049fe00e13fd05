"""cffi build description of the C backend (API mode). setup.py reads SOURCES, CFLAGS and LDFLAGS from here too."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
HEADERS = ("powerinfer.h", "io.h", "kernels_bench.h")  # what Python sees
SOURCES = [f"cpatch/{name}.c" for name in ("attention", "backend", "buffer", "ffn", "ffn_tiles", "ggml_abi", "kernels")]
SOURCES += [f"cpatch/{name}.c" for name in ("model", "panels", "plugin", "selftest", "slab", "store", "tiles", "vgguf")]
SOURCES += [f"cpatch/{name}.c" for name in ("io", "io_measure", "io_threads", "io_uring")]
SOURCES += [f"cpatch/kernels_{name}.c" for name in ("portable", "neon", "avx2", "bench")]
SOURCES += [f"cpatch/kernels_{name}.c" for name in ("avx512", "avx512vnni", "avx512bf16")]
CFLAGS = [
    "-std=c11",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fno-wrapv",  # Python's own flags bring -fwrapv, which costs AVX2's dot products of Q4_K 30 %
    "-Wall",
    "-Wextra",
    "-Werror",
]
LDFLAGS = ["-fopenmp", "-ldl"]


def declarations() -> str:
    """The C interface as cffi reads it: the headers without preprocessor lines. One declaration, one place."""
    text = "".join((HERE / header).read_text() for header in HEADERS)
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "powerinfer_ext._cpatch",
    "".join(f'#include "{header}"\n' for header in HEADERS),
    sources=SOURCES,
    include_dirs=["cpatch"],
    extra_compile_args=CFLAGS,
    extra_link_args=LDFLAGS,
)
