"""Our mirror of ggml's structs (cpatch/ggml_abi.h) against the dependency's own headers, field by field, and the ways a
library that does not fit is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from powerinfer_ext import loader

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "cpatch" / "ggml_abi.h"
LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
CONSTANTS = {
    "ABI_BACKEND_API_VERSION": "GGML_BACKEND_API_VERSION",
    "ABI_MAX_DIMS": "GGML_MAX_DIMS",
    "ABI_MAX_SRC": "GGML_MAX_SRC",
    "ABI_MAX_OP_PARAMS": "GGML_MAX_OP_PARAMS",
    "ABI_MAX_NAME": "GGML_MAX_NAME",
    "ABI_OP_COUNT": "GGML_OP_COUNT",
    "ABI_UNARY_OP_COUNT": "GGML_UNARY_OP_COUNT",
    "ABI_TYPE_COUNT": "GGML_TYPE_COUNT",
    "ABI_TYPE_F32": "GGML_TYPE_F32",
    "ABI_TYPE_F16": "GGML_TYPE_F16",
    "ABI_TYPE_Q4_0": "GGML_TYPE_Q4_0",
    "ABI_TYPE_Q8_0": "GGML_TYPE_Q8_0",
    "ABI_TYPE_Q8_1": "GGML_TYPE_Q8_1",
    "ABI_TYPE_Q8_K": "GGML_TYPE_Q8_K",
    "ABI_TYPE_I8": "GGML_TYPE_I8",
    "ABI_TYPE_I32": "GGML_TYPE_I32",
    "ABI_TYPE_BF16": "GGML_TYPE_BF16",
    "ABI_STATUS_ALLOC_FAILED": "GGML_STATUS_ALLOC_FAILED",
    "ABI_STATUS_FAILED": "GGML_STATUS_FAILED",
    "ABI_STATUS_SUCCESS": "GGML_STATUS_SUCCESS",
    "ABI_STATUS_ABORTED": "GGML_STATUS_ABORTED",
    "ABI_DEVICE_TYPE_CPU": "GGML_BACKEND_DEVICE_TYPE_CPU",
    "ABI_DEVICE_TYPE_ACCEL": "GGML_BACKEND_DEVICE_TYPE_ACCEL",
    "ABI_BUFFER_USAGE_ANY": "GGML_BACKEND_BUFFER_USAGE_ANY",
    "ABI_BUFFER_USAGE_WEIGHTS": "GGML_BACKEND_BUFFER_USAGE_WEIGHTS",
}


def declared_structs() -> dict[str, list[str]]:
    """struct name -> field names, as ggml_abi.h declares them."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structs = {}
    for name, body in re.findall(r"struct (ggml_\w+) \{(.*?)\n\};", text, flags=re.DOTALL):
        fields: list[str] = []
        for declaration in filter(str.strip, body.split(";")):
            function = re.search(r"\(\*(\w+)\)", declaration)
            parts = [declaration] if function else re.sub(r"\[[^\]]*\]", "", declaration).split(",")
            fields += [function[1]] if function else [re.findall(r"\w+", part)[-1] for part in parts]
        structs[name] = fields
    return structs


def layout(folder: Path, includes: list[str], flags: list[str], constants: list[str]) -> list[str]:
    """Sizes and offsets of all declared structs and the constants' values, compiled with these includes."""
    lines = [f'#include "{name}"' for name in includes] + [
        "#include <stddef.h>",
        "#include <stdio.h>",
        "int main(void) {",
    ]
    for struct, fields in declared_structs().items():
        lines.append(f'printf("sizeof {struct} %zu\\n", sizeof(struct {struct}));')
        for field in fields:
            where = f"offsetof(struct {struct}, {field}), sizeof(((struct {struct} *)0)->{field})"
            lines.append(f'printf("{struct}.{field} %zu %zu\\n", {where});')
    lines += [f'printf("%ld\\n", (long){constant});' for constant in constants]
    source = folder / "layout.c"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    program = folder / "layout"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-std=c11", *flags, str(source), "-o", str(program)], check=True
    )
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_mirrored_struct_is_laid_out_like_the_original(tmp_path: Path, llama_cpp_sources: Path) -> None:
    ggml = llama_cpp_sources / "vendor" / "llama.cpp" / "ggml"
    assert len(declared_structs()) >= 14
    ours = layout(tmp_path, ["ggml_abi.h"], [f"-I{HEADER.parent}"], list(CONSTANTS))
    theirs = layout(
        tmp_path,
        ["ggml.h", "ggml-cpu.h", "ggml-backend.h", "ggml-backend-impl.h"],
        [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"],
        list(CONSTANTS.values()),
    )
    assert ours == theirs
    assert len(ours) > 120


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_an_unsupported_version_is_refused_naming_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_native", None)
    monkeypatch.setattr(llama_cpp, "__version__", "0.4.1")
    with pytest.raises(loader.PowerInferError, match=r"0\.4\.1 is not supported.*0\.3\.36"):
        loader.native()


def test_a_library_that_is_not_loaded_is_refused() -> None:
    done = python(
        "import llama_cpp, pathlib\nfrom powerinfer_ext._cpatch import ffi, lib\n"
        "message = ffi.new('char[]', 300)\n"
        "print(lib.pi_init(b'/nowhere', message, 300), ffi.string(message).decode())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-1 /nowhere/libggml.so.0 is not loaded")


def test_stock_programs_can_load_the_plain_library() -> None:
    """GGML_BACKEND_PATH, as any llama.cpp program reads it, through the dependency's own loader."""
    plain = Path(loader.__file__).parent / "libpowerinfer.so"
    code = (
        "import ctypes, llama_cpp\n"
        f"ggml = ctypes.CDLL({str(LIBRARIES / 'libggml.so.0')!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "ggml.ggml_backend_load_all()\n"
        "ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p\n"
        "print(ggml.ggml_backend_dev_by_name(b'POWERINFER') is not None)"
    )
    assert python(code, GGML_BACKEND_PATH=str(plain)).stdout.split()[-1:] == ["True"]
    assert python(code, GGML_BACKEND_PATH="").stdout.split()[-1:] == ["False"]


def test_the_plain_library_contains_no_python() -> None:
    plain = Path(loader.__file__).parent / "libpowerinfer.so"
    symbols = subprocess.run(["nm", "-D", str(plain)], check=True, capture_output=True, text=True).stdout
    assert "ggml_backend_init" in symbols
    assert not re.search(r" U _?Py", symbols)
