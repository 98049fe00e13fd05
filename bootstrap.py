"""Install llama-cpp-python, built from its source distribution, into this environment and prove it decodes.

    .venv/bin/python bootstrap.py              build, install, prove
    .venv/bin/python bootstrap.py --sources    unpack the headers and tests that our own tests need, into .cache/

1. If a version in pyproject.toml's range is installed and passes the decode probe, nothing is done.
2. Else a wheel built earlier on this machine is installed and probed. Wheels are kept in
   ${XDG_CACHE_HOME:-~/.cache}/powerinfer-ext/wheels per compiler, CPU and build flags;
   POWERINFER_NO_WHEEL_CACHE=1 turns that off.
3. Else, or if that wheel crashes, it is built: with all cores, without pip's own cache (which may hold a bad
   wheel), with amx_tile_fix.h where the compiler is one that miscompiles AMX tile configuration.

pip's configuration (indexes, mirrors, certificates) and CMAKE_ARGS, CC, CXX, CFLAGS, CXXFLAGS are respected.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
NAME = "llama-cpp-python"
BUILD_ENV = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR")


def load_standalone(name: str) -> ModuleType:
    """Load powerinfer_ext/<name>.py without the package around it, whose compiled parts do not exist yet."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "powerinfer_ext" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiler_module = load_standalone("compiler")
probe_module = load_standalone("probe")


def say(message: str) -> None:
    print(f"bootstrap: {message}", flush=True)


def read_requirements() -> tuple[str, list[str]]:
    """pyproject.toml's requirement for llama-cpp-python, and the other run-time requirements."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    ours = [requirement for requirement in dependencies if requirement.startswith(NAME)]
    return ours[0], [requirement for requirement in dependencies if requirement not in ours]


def installed_version() -> str | None:
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pip in this environment; what went wrong is in its own output, so we only stop."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=env)
    if done.returncode != 0:
        sys.exit(f"bootstrap: 'pip {' '.join(arguments)}' failed with exit code {done.returncode}, see above")


def build_environment(fixed: bool) -> dict[str, str]:
    """The environment for the build: all cores, and the AMX header in CXXFLAGS when ``fixed``."""
    # make's jobserver must not leak into CMake's build, and ggml drops -march=native under SOURCE_DATE_EPOCH.
    unwanted = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SOURCE_DATE_EPOCH")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
    if fixed:
        env["CXXFLAGS"] = f"{env.get('CXXFLAGS', '')} {compiler_module.fix_flags()}".strip()
    return env


def cpu_flags() -> str:
    """What -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    wanted = ("flags", "Features", "model name", "CPU part")
    lines = {line for line in text.splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines)) or platform.processor()


def cache_folder(requirement: str, compiler: object, fixed: bool) -> Path | None:
    """Where wheels by this compiler for this CPU and these flags are kept; None when the cache is off."""
    if os.environ.get("POWERINFER_NO_WHEEL_CACHE", "0") not in ("", "0"):
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = [requirement, str(compiler), platform.machine(), *platform.libc_ver(), cpu_flags()]
    parts += [f"{name}={os.environ.get(name, '')}" for name in BUILD_ENV]
    parts.append(compiler_module.FIX_HEADER.read_text() if fixed else "no fix")
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return base / "powerinfer-ext" / "wheels" / key


def install_wheel(wheel: Path) -> None:
    pip("install", "--quiet", str(wheel))
    # Same version as a bad build that may be installed already: force, but only this one package.
    pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel))


def build_wheel(requirement: str, folder: Path, fixed: bool) -> Path:
    """Build the wheel from the source distribution into ``folder``; takes minutes."""
    start = time.monotonic()
    how = "with amx_tile_fix.h (this compiler miscompiles AMX tile configuration)" if fixed else "as it is"
    say(f"building {requirement} from source, {how}; about 4 minutes on 2 cores")
    options = ("--no-cache-dir", "--no-deps", "--no-binary", NAME, "--wheel-dir", str(folder))
    pip("wheel", *options, requirement, env=build_environment(fixed))
    say(f"built in {time.monotonic() - start:.0f} s")
    return next(folder.glob("*.whl"))


def keep(wheel: Path, folder: Path) -> None:
    """Put the wheel into the cache, atomically; a cache that cannot be written is no reason to fail."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{os.getpid()}.tmp"
        shutil.copyfile(wheel, temporary)
        os.replace(temporary, folder / wheel.name)
    except OSError as error:
        say(f"the wheel is not kept for other clones: {error}")


def build_and_prove(requirement: str, compiler: object, fixed: bool) -> object:
    """Build, install, probe; the wheel is kept only when the probe passes."""
    with tempfile.TemporaryDirectory(prefix="powerinfer-wheel-") as folder:
        wheel = build_wheel(requirement, Path(folder), fixed)
        install_wheel(wheel)
        result = probe_module.probe_dependency()
        cache = cache_folder(requirement, compiler, fixed)
        if result.ok and cache is not None:
            keep(wheel, cache)
    return result


WANTED_SOURCES = ("tests/", "vendor/llama.cpp/ggml/include/", "vendor/llama.cpp/ggml/src/ggml-backend-impl.h",
                  "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")  # fmt: skip


def unpack_sources() -> None:
    """Fetch the source distribution of the installed version and keep what tests read of it, atomically."""
    version = installed_version()
    if version is None:
        sys.exit(f"bootstrap: {NAME} is not installed yet: run bootstrap.py without --sources first")
    target = ROOT / ".cache" / f"llama_cpp_python-{version}"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sources-", dir=target.parent) as folder:
        say(f"fetching the sources of {NAME} {version} for the tests")
        pip("download", "--quiet", "--no-deps", "--no-binary", NAME, "--dest", folder, f"{NAME}=={version}")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            top = archive.next().name.split("/")[0]
            wanted = tuple(f"{top}/{name}" for name in WANTED_SOURCES)
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(folder, members, filter="data")
        os.replace(Path(folder) / top, target)
    say(f"unpacked {len(members)} files into {target}")


def main(arguments: Sequence[str] = ()) -> None:
    if list(arguments) == ["--sources"]:
        return unpack_sources()
    if arguments:
        sys.exit("bootstrap: the only option is --sources")
    requirement, others = read_requirements()
    pip("install", "--quiet", *others)
    version = installed_version()
    if version is not None and probe_module.version_in_range(version, requirement):
        result = probe_module.probe_dependency()
        if result.ok:
            return say(f"{NAME} {version} {result.reason}")
        say(f"the installed {NAME} {version} is bad: {result.reason}")

    compiler = compiler_module.find_compiler()
    if compiler is None:
        sys.exit("bootstrap: no C++ compiler found: install g++ (or clang++), or name one in CXX")
    fixed = compiler.miscompiles_tile_config
    say(f"compiler: {compiler}")

    cache = cache_folder(requirement, compiler, fixed)
    for wheel in sorted(cache.glob("*.whl")) if cache is not None else []:
        say(f"installing {wheel}, built earlier")
        install_wheel(wheel)
        result = probe_module.probe_dependency()
        if result.ok:
            return say(f"{NAME} {installed_version()} {result.reason}")
        say(f"{wheel} is bad and is removed: {result.reason}")
        wheel.unlink()

    result = build_and_prove(requirement, compiler, fixed)
    if not result.ok and not fixed:
        say(f"{result.reason}; trying once more with amx_tile_fix.h")
        result = build_and_prove(requirement, compiler, True)
    if not result.ok:
        sys.exit(
            f"bootstrap: {NAME} was built here by {compiler} and still fails: {result.reason}. "
            "Name another compiler in CC and CXX (GCC 12.4, 13.3 or newer, or clang) and try again."
        )
    say(f"{NAME} {installed_version()} {result.reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
