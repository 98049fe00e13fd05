"""Which C++ compiler would build llama-cpp-python here, and does it miscompile AMX tile configuration?

GCC before 12.4, and 13.0 to 13.2, declares ``_tile_loadconfig`` as reading 8 of its 64 bytes;
llama.cpp built with one of those crashes at the first decode on a CPU with AMX. The remedy is a header,
``amx_tile_fix.h``, force-included. Standard library only: bootstrap.py loads this file before anything is
installed.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FIX_HEADER = Path(__file__).resolve().parent / "amx_tile_fix.h"

# First good release of each branch; GCC 11 is the first with the AMX intrinsics. All of 11 is taken to be
# affected: the header does no harm where it is not needed.
_FIRST_GOOD = {11: (12, 0, 0), 12: (12, 4, 0), 13: (13, 3, 0)}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, "gcc" | "clang" | "other", and its version."""

    command: tuple[str, ...]
    family: str
    version: tuple[int, int, int]

    @property
    def miscompiles_tile_config(self) -> bool:
        return self.family == "gcc" and self.version < _FIRST_GOOD.get(self.version[0], (0, 0, 0))

    def __str__(self) -> str:
        return f"{self.family} {'.'.join(map(str, self.version))} ({shlex.join(self.command)})"


def parse_macros(text: str) -> tuple[str, tuple[int, int, int]]:
    """Family and version from the output of ``-dM -E``.

    The macros are asked because names lie: c++ may be anything, and clang defines __GNUC__ too.
    """
    macros = dict(re.findall(r"^#define (\w+) (.+)$", text, re.MULTILINE))

    def version(*names: str) -> tuple[int, int, int]:
        major, minor, patch = (int(macros.get(name, "0")) for name in names)
        return major, minor, patch

    if "__clang__" in macros:
        return "clang", version("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
    if "__GNUC__" in macros and "__INTEL_COMPILER" not in macros:
        return "gcc", version("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
    return "other", (0, 0, 0)


def find_compiler(env: Mapping[str, str] = os.environ) -> Compiler | None:
    """The C++ compiler CMake would take ($CXX, else c++, g++, clang++ on PATH); None when there is none."""
    candidates = [shlex.split(env["CXX"])] if env.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        path = shutil.which(command[0], path=env.get("PATH"))
        if path is None:
            continue
        command = [path, *command[1:]]
        ask = [*command, "-dM", "-E", "-x", "c++", os.devnull]
        try:
            done = subprocess.run(ask, capture_output=True, text=True, env=dict(env))
        except OSError:
            continue
        if done.returncode == 0:
            return Compiler(tuple(command), *parse_macros(done.stdout))
    return None


def fix_flags(header: Path = FIX_HEADER) -> str:
    """What to add to CXXFLAGS so that the AMX code is compiled right."""
    return f"-include {shlex.quote(str(header))}"


def rebuild_command(requirement: str) -> str:
    """The line a user types to replace a bad build of llama-cpp-python by one that works on this machine."""
    compiler = find_compiler()
    prefix = f'CXXFLAGS="{fix_flags()}" ' if compiler is None or compiler.miscompiles_tile_config else ""
    return (
        f"{prefix}python -m pip install --force-reinstall --no-cache-dir --no-deps "
        f"--no-binary llama-cpp-python '{requirement}'"
    )
