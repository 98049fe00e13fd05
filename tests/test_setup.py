"""The set-up: version ranges, compiler detection, the AMX header, the wheel cache, the built libraries."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from powerinfer_ext import compiler, probe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in ("compiler", "probe")}
    spec.loader.exec_module(module)
    for name, old in before.items():  # bootstrap loads these two as top-level modules
        sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    return module


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("0.3.35", False),
        ("0.3.36", True),
        ("0.3.36.post1", True),
        ("0.3.37", False),
        ("0.3.4", False),
        ("0.4.0", False),
        ("1.0", False),
    ],
)
def test_version_range(version: str, inside: bool) -> None:
    assert probe.version_in_range(version, "llama-cpp-python>=0.3.36,<0.3.37") is inside
    # importlib.metadata writes the bounds in the other order
    assert probe.version_in_range(version, "llama-cpp-python<0.3.37,>=0.3.36") is inside


def test_requirements_come_from_pyproject(bootstrap: ModuleType) -> None:
    ours, others = bootstrap.read_requirements()
    assert ours == "llama-cpp-python>=0.3.36,<0.3.37"
    assert any(requirement.startswith("numpy") for requirement in others)
    assert not any(requirement.startswith("llama") for requirement in others)


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((10, 2, 1), False),  # has no AMX intrinsics
        ((11, 4, 0), True),
        ((12, 2, 0), True),
        ((12, 3, 1), True),
        ((12, 4, 0), False),
        ((13, 0, 1), True),
        ((13, 2, 0), True),
        ((13, 3, 0), False),
        ((14, 1, 0), False),
        ((15, 1, 0), False),
    ],
)
def test_affected_versions(version: tuple[int, int, int], affected: bool) -> None:
    assert compiler.Compiler(("g++",), "gcc", version).miscompiles_tile_config is affected
    assert not compiler.Compiler(("clang++",), "clang", version).miscompiles_tile_config


def test_macros_tell_gcc_from_clang() -> None:
    gcc = "#define __GNUC__ 12\n#define __GNUC_MINOR__ 2\n#define __GNUC_PATCHLEVEL__ 0\n"
    clang = "#define __clang_major__ 16\n#define __clang_minor__ 0\n#define __clang_patchlevel__ 6\n"
    clang = "#define __clang__ 1\n" + clang
    # What clang claims besides.
    old = "#define __GNUC__ 4\n#define __GNUC_MINOR__ 2\n#define __GNUC_PATCHLEVEL__ 1\n"
    assert compiler.parse_macros(gcc) == ("gcc", (12, 2, 0))
    assert compiler.parse_macros(old + clang) == ("clang", (16, 0, 6))
    assert compiler.parse_macros(gcc + "#define __INTEL_COMPILER 2021\n")[0] == "other"
    assert compiler.parse_macros("")[0] == "other"


def test_find_compiler_honours_cxx(tmp_path: Path) -> None:
    fake = tmp_path / "my c++"
    fake.write_text("#!/bin/sh\necho '#define __GNUC__ 13'; echo '#define __GNUC_MINOR__ 3'\n")
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "CXX": f"'{fake}' -m64"}
    found = compiler.find_compiler(env)
    assert found == compiler.Compiler((str(fake), "-m64"), "gcc", (13, 3, 0))
    assert compiler.find_compiler({"PATH": str(tmp_path / "nothing")}) is None


def test_build_environment(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-g")
    monkeypatch.setenv("MAKEFLAGS", "-j --jobserver-auth=3,4")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    fixed = bootstrap.build_environment(fixed=True)
    assert fixed["CXXFLAGS"] == f"-g {compiler.fix_flags()}"
    assert "MAKEFLAGS" not in fixed and "SOURCE_DATE_EPOCH" not in fixed
    assert bootstrap.build_environment(fixed=False)["CXXFLAGS"] == "-g"


def test_wheel_cache_key(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("POWERINFER_NO_WHEEL_CACHE", raising=False)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    gcc, clang = (compiler.Compiler((name,), name, (12, 2, 0)) for name in ("gcc", "clang"))
    plain = bootstrap.cache_folder("a>=1", gcc, False)
    assert plain == bootstrap.cache_folder("a>=1", gcc, False)
    assert plain.parent == tmp_path / "powerinfer-ext" / "wheels"
    others = [
        bootstrap.cache_folder(*key)
        for key in (("a>=2", gcc, False), ("a>=1", clang, False), ("a>=1", gcc, True))
    ]
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    others.append(bootstrap.cache_folder("a>=1", gcc, False))
    assert len({plain, *others}) == 5
    monkeypatch.setenv("POWERINFER_NO_WHEEL_CACHE", "1")
    assert bootstrap.cache_folder("a>=1", gcc, False) is None


def test_keep_is_atomic_and_forgiving(
    bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "x-1.whl"
    wheel.write_bytes(b"wheel")
    bootstrap.keep(wheel, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x-1.whl"]
    bootstrap.keep(wheel, wheel / "not a folder")
    assert "not kept" in capsys.readouterr().out


class Scene:
    """bootstrap.main() with pip, the compiler and the probe played by stand-ins; nothing is installed.

    ``probes``: what each decode probe finds, in order (True: it decodes). ``pip``: the commands it was given.
    """

    def __init__(self, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.bootstrap, self.probes, self.pip, self.built_with = bootstrap, [], [], []
        self.compiler = compiler.Compiler(("c++",), "gcc", (12, 2, 0))
        self.version: str | None = None
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.delenv("POWERINFER_NO_WHEEL_CACHE", raising=False)
        monkeypatch.setattr(bootstrap, "pip", self.run_pip)
        monkeypatch.setattr(bootstrap, "installed_version", lambda: self.version)
        monkeypatch.setattr(bootstrap.compiler_module, "find_compiler", lambda: self.compiler)
        monkeypatch.setattr(bootstrap.probe_module, "probe_dependency", self.run_probe)

    def run_pip(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.pip.append(arguments)
        if arguments[0] == "wheel":
            assert "--no-cache-dir" in arguments and "--no-binary" in arguments
            self.built_with.append("amx_tile_fix.h" in env.get("CXXFLAGS", ""))
            folder = Path(arguments[arguments.index("--wheel-dir") + 1])
            (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_bytes(b"new")
        elif arguments[-1].endswith(".whl"):
            self.version = "0.3.36"

    def run_probe(self) -> probe.ProbeResult:
        return probe.ProbeResult(True, "decodes") if self.probes.pop(0) else probe.ProbeResult(False, "died")

    def cached(self) -> list[Path]:
        return sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.whl"))

    def main(self) -> None:
        self.bootstrap.main()
        assert self.probes == []


@pytest.fixture
def scene(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    return Scene(bootstrap, monkeypatch, tmp_path)


def test_a_good_installation_is_left_alone(scene: Scene) -> None:
    scene.version, scene.probes = "0.3.36", [True]
    scene.main()
    assert not any("wheel" in command[0] or command[-1].endswith(".whl") for command in scene.pip)


def test_a_build_is_kept_and_used_again(scene: Scene) -> None:
    scene.probes = [True]
    scene.main()
    assert scene.built_with == [True] and len(scene.cached()) == 1
    scene.version, scene.probes = None, [True]
    scene.main()
    assert len(scene.built_with) == 1


@pytest.mark.parametrize("version", ["0.3.35", "0.3.36"])
def test_a_bad_or_foreign_installation_is_rebuilt(scene: Scene, version: str) -> None:
    scene.version = version
    scene.probes = [False, True] if version == "0.3.36" else [True]  # out of range: not worth a probe
    scene.main()
    assert scene.built_with == [True]
    assert any("--force-reinstall" in command for command in scene.pip)


def test_a_bad_wheel_in_our_cache_is_replaced(scene: Scene) -> None:
    folder = scene.bootstrap.cache_folder("llama-cpp-python>=0.3.36,<0.3.37", scene.compiler, True)
    folder.mkdir(parents=True)
    (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_bytes(b"bad")
    scene.probes = [False, True]
    scene.main()
    assert scene.built_with == [True]
    assert [wheel.read_bytes() for wheel in scene.cached()] == [b"new"]


def test_an_unaffected_compiler_builds_without_the_header_first(scene: Scene) -> None:
    scene.compiler = compiler.Compiler(("c++",), "gcc", (14, 1, 0))
    scene.probes = [False, True]
    scene.main()
    assert scene.built_with == [False, True]


def test_what_cannot_be_mended_stops_with_reason_and_remedy(scene: Scene) -> None:
    scene.probes = [False]
    with pytest.raises(SystemExit, match=r"still fails: died\. Name another compiler"):
        scene.main()
    assert scene.cached() == []
    scene.compiler = None
    scene.version = None
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found"):
        scene.main()


# The AMX header. ldtilecfg cannot run on most machines, so the assembly is rewritten: where the compiler put
# ldtilecfg, the 64 bytes it would have read are copied out. That runs on any x86-64.

PROBE = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstring>
struct tile_config { uint8_t palette_id, start_row, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; };
extern "C" { alignas(64) unsigned char captured[64]; }
__attribute__((noinline)) void configure() {
    alignas(64) tile_config tc = {};
    tc.palette_id = 1;
    for (int i = 0; i < 8; i++) { tc.rows[i] = 9 + i; tc.colsb[i] = 33 + i; }
    _tile_loadconfig(&tc);
}
__attribute__((noinline)) void dirty_the_stack() {
    volatile unsigned char junk[512];
    for (int i = 0; i < 512; i++) junk[i] = 0xAA;
}
int main() {
    unsigned char expected[64] = {1};
    for (int i = 0; i < 8; i++) { expected[48 + i] = 9 + i; expected[16 + 2 * i] = 33 + i; }
    dirty_the_stack();
    configure();
    return std::memcmp(captured, expected, 64) != 0;
}
"""


def tile_config_is_complete(command: tuple[str, ...], folder: Path, *flags: str) -> bool:
    """Compile PROBE with -O3 and ``flags``; are all 64 bytes in place where ldtilecfg reads them?"""
    source, assembly, program = folder / "probe.cpp", folder / "probe.s", folder / "probe"
    source.write_text(PROBE)
    subprocess.run([*command, "-O3", "-mamx-tile", *flags, "-S", "-o", assembly, source], check=True)
    copy = "".join(
        rf"movups {16 * i}+\1(\2), %xmm0; movups %xmm0, {16 * i}+captured(%rip); " for i in range(4)
    )
    text, count = re.subn(r"ldtilecfg\s+(-?\d*)\((%\w+)\)", copy, assembly.read_text())
    assert count >= 1, "the compiler wrote ldtilecfg in a form this test does not know"
    assembly.write_text(text.replace("+-", "-").replace("+(%", "(%"))
    subprocess.run([*command, "-o", program, assembly], check=True)
    return subprocess.run([program]).returncode == 0


def tile_compiler() -> compiler.Compiler:
    found = compiler.find_compiler()
    assert found is not None, "the tests need the C++ compiler that the set-up needs"
    return found


x86_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="AMX exists on x86-64 only")


@x86_only
def test_header_keeps_the_whole_tile_configuration(tmp_path: Path) -> None:
    assert tile_config_is_complete(tile_compiler().command, tmp_path, "-include", str(compiler.FIX_HEADER))


@x86_only
def test_the_faulty_declaration_loses_bytes(tmp_path: Path) -> None:
    """The control of the test above: with GCC 12.2's own declaration, stores must be seen to go missing."""
    header = tmp_path / "faulty.h"
    faulty = '__asm__ volatile("ldtilecfg %0" ::"m"(*((const void **)(config))))'
    header.write_text(f"#include <immintrin.h>\n#define _tile_loadconfig(config) {faulty}\n")
    assert not tile_config_is_complete(tile_compiler().command, tmp_path, "-include", str(header))


@x86_only
def test_no_faulty_compiler_goes_undetected(tmp_path: Path) -> None:
    found = tile_compiler()
    assert found.miscompiles_tile_config or tile_config_is_complete(found.command, tmp_path)


def test_header_is_silent_without_amx(tmp_path: Path) -> None:
    source = tmp_path / "plain.cpp"
    source.write_text("#ifdef _tile_loadconfig\n#error leaked\n#endif\nint x;\n")
    header = shutil.copy(compiler.FIX_HEADER, tmp_path / "a folder.h")
    flags = shlex.split(compiler.fix_flags(Path(header)))
    command = [*tile_compiler().command, *flags, "-dI", "-E", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "immintrin.h" not in done.stdout


def test_header_travels_with_the_package() -> None:
    assert compiler.FIX_HEADER.is_file() and compiler.FIX_HEADER.parent == Path(compiler.__file__).parent


# What setup.py built.


def test_plain_library_needs_no_python() -> None:
    library = Path(compiler.__file__).parent / "libpowerinfer.so"
    assert library.is_file(), "setup.py did not build libpowerinfer.so: run make setup"
    names = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    assert re.search(r" T ggml_backend_init$", names, re.MULTILINE)
    assert not re.search(r" U _?Py", names)
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert "libpython" not in needed
