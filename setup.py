"""Builds the two native libraries from one set of C sources; everything else is in pyproject.toml.

- ``powerinfer_ext/_cpatch.*.so``: the cffi extension that Python talks to.
- ``powerinfer_ext/libpowerinfer.so``: the same backend without Python, for stock llama.cpp programs
  (``GGML_BACKEND_PATH=.../libpowerinfer.so llama-cli ...``).
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PLAIN_LIBRARY = "powerinfer_ext.libpowerinfer"


def load_cpatch_build() -> ModuleType:
    """Import cpatch/build.py by path: cpatch is a folder of C, not a package."""
    spec = importlib.util.spec_from_file_location("cpatch_build", ROOT / "cpatch" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """build_ext that can also make a plain shared object: no ABI suffix, nothing of Python linked in."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == PLAIN_LIBRARY.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_libraries(self, ext: Extension) -> list[str]:
        if ext.name == PLAIN_LIBRARY:
            return ext.libraries
        return super().get_libraries(ext)

    def build_extension(self, ext: Extension) -> None:
        # Without this an editable install that has a library already would ignore changed headers and flags.
        ext.depends = [relative_to_root(path) for path in sorted((ROOT / "cpatch").glob("*"))]
        if ext.name != PLAIN_LIBRARY:
            return super().build_extension(ext)
        # Its objects come from the same sources as the cffi extension's: keep them apart.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, "plain")
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


def relative_to_root(path: str | Path) -> str:
    """setuptools refuses absolute source paths; cpatch/build.py may give either kind."""
    return os.path.relpath(ROOT / path, ROOT)


cpatch = load_cpatch_build()
setup(
    cffi_modules=["cpatch/build.py:ffibuilder"],
    ext_modules=[
        Extension(
            PLAIN_LIBRARY,
            sources=[relative_to_root(source) for source in cpatch.SOURCES],
            include_dirs=["cpatch"],
            extra_compile_args=list(cpatch.CFLAGS),
            extra_link_args=list(cpatch.LDFLAGS),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
