"""`powerinfer doctor`: look at everything that decides whether and how fast we run, with remedies.

Whatever may crash (llama-cpp-python's first decode, our backend's self-test) runs in a child process, so the
doctor lives to say what killed it.
"""

import errno
import importlib.metadata
import json as json_module
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from powerinfer_ext import compiler, machine, probe

Status = Literal["ok", "warn", "fail"]
NAME = "llama-cpp-python"
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. ``fail``: we cannot run; ``warn``: we run, at a loss that ``remedy`` says how to undo."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def requirement() -> str:
    """The tested range of llama-cpp-python, as our own metadata (or pyproject.toml) states it."""
    try:
        stated = importlib.metadata.requires("powerinfer-ext") or []
    except importlib.metadata.PackageNotFoundError:
        text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
        stated = tomllib.loads(text)["project"]["dependencies"]
    return next(line for line in stated if line.replace("_", "-").startswith(NAME))


def check_cpu(cpuinfo: str) -> Check:
    """The kernels want AVX2; AVX-512, VNNI, BF16 and AMX are named when they are there."""
    model, flags = machine.parse_cpuinfo(cpuinfo)
    wanted = "avx2 fma f16c avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 asimd sve"
    have = [flag for flag in wanted.split() if flag in flags]
    detail = f"{model}: {', '.join(have) if have else 'no vector extensions we know'}"
    if {"avx2", "fma", "f16c"} <= flags or "asimd" in flags:
        return Check("CPU", "ok", detail)
    remedy = "Without AVX2, FMA and F16C the kernels are plain C: use a newer CPU if speed matters."
    return Check("CPU", "warn", detail, remedy)


def check_cores(present: int, allowed: int, quota: float | None) -> Check:
    """Cores that exist, that the affinity mask allows and that a cgroup quota pays for."""
    detail = f"{allowed} of {present} logical cores allowed"
    if quota is not None and quota < allowed:
        detail += f", but the cgroup's quota pays for {quota:g}"
        remedy = f"Raise the container's CPU quota, or run {max(1, int(quota))} thread(s): more only wait."
        return Check("cores", "warn", detail, remedy)
    if allowed < present:
        return Check("cores", "ok", detail, "Widen the affinity mask (taskset, cpuset) to use the others.")
    return Check("cores", "ok", detail)


def check_version(version: str | None, wanted: str) -> Check:
    """Is the installed llama-cpp-python in the tested range?"""
    name = f"{NAME} version"
    if version is None:
        return Check(name, "fail", "not installed", f"Install it: {compiler.rebuild_command(wanted)}")
    if not probe.version_in_range(version, wanted):
        detail = f"{version} is not in the tested range ({wanted})"
        return Check(name, "fail", detail, f"Install a version that is: {compiler.rebuild_command(wanted)}")
    return Check(name, "ok", f"{version} ({wanted})")


def check_decode(result: probe.ProbeResult, wanted: str) -> Check:
    """What the tiny decode in a child process came to."""
    if result.ok:
        error = result.info["disagreement"]
        return Check("decode probe", "ok", f"{result.reason} (relative difference {error:.1e})")
    return Check("decode probe", "fail", result.reason, f"Rebuild it: {compiler.rebuild_command(wanted)}")


# How llama_print_system_info() says that the CPU kernels were compiled for AMX.
_AMX_BUILD = "AMX_INT8 = 1"


def check_compiler(
    found: compiler.Compiler | None, cpu_has_amx: bool, result: probe.ProbeResult, wanted: str
) -> Check:
    """The AMX trap: would this compiler build a llama-cpp-python that crashes on a CPU with AMX?"""
    affected = found is not None and found.miscompiles_tile_config
    info = str(result.info.get("system_info", ""))
    detail = f"{found or 'no C++ compiler found'}"
    detail += ", which miscompiles AMX tile configuration; " if affected else "; "
    detail += "this CPU has AMX, " if cpu_has_amx else "this CPU has no AMX, "
    if not info:
        detail += "what the installed libggml-cpu was built for is not known"
    else:
        detail += f"the installed libggml-cpu has {'AMX' if _AMX_BUILD in info else 'no AMX'} code"

    if cpu_has_amx and affected and not result.ok:
        return Check("compiler", "fail", detail, f"Rebuild with the fix: {compiler.rebuild_command(wanted)}")
    if cpu_has_amx and info and _AMX_BUILD not in info:
        remedy = f"Rebuild here, AMX about doubles stock's speed: {compiler.rebuild_command(wanted)}"
        return Check("compiler", "warn", detail, remedy)
    if affected:
        remedy = f'Build {NAME} with CXXFLAGS="{compiler.fix_flags()}" always (make does).'
        return Check("compiler", "ok", detail, remedy)
    return Check("compiler", "ok", detail)


_BACKEND_CHILD = """
import json, os, llama_cpp
from powerinfer_ext._cpatch import ffi, lib
error = ffi.new("char[]", 1024)
folder = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
if lib.pi_init(os.fsencode(folder), error, 1024) != 0:
    raise SystemExit(ffi.string(error).decode(errors="replace"))
print(ffi.string(lib.pi_ggml_version()).decode())
"""


def check_backend(command: list[str] | None = None) -> Check:
    """Register our ggml backend in a child: it verifies ggml's version and structs and computes an FFN."""
    name = "POWERINFER backend"
    command = command or [sys.executable, "-c", _BACKEND_CHILD]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        remedy = "Please report this, with the name of the CPU."
        return Check(name, "fail", "its self-test did not end within 60 s", remedy)
    if child.returncode == 0:
        return Check(name, "ok", f"registered, passed its self-test with ggml {child.stdout.split()[-1]}")
    reason = probe.describe_end(child.returncode, child.stderr, "the backend's self-test").reason
    remedy = (
        "Build powerinfer-ext for this machine and this llama-cpp-python: make clean setup, or pip install ."
    )
    return Check(name, "fail", reason, remedy)


def check_io_uring(error: int) -> Check:
    """``error``: 0 or the errno of io_uring_setup."""
    if error == 0:
        return Check("io_uring", "ok", "available")
    causes = {
        errno.ENOSYS: ("this kernel (or sandbox) does not have it", "Linux 5.1 or newer has it."),
        errno.EPERM: (
            "refused, by a container's seccomp profile or kernel.io_uring_disabled",
            "Allow the io_uring_setup, io_uring_enter and io_uring_register calls in the seccomp profile, "
            "or set kernel.io_uring_disabled to 0.",
        ),
    }
    cause, remedy = causes.get(error, (os.strerror(error), "See io_uring_setup(2)."))
    return Check("io_uring", "warn", f"{cause}; reads from disk use a pool of threads instead", remedy)


def check_cgroup(group: machine.MemoryCgroup) -> Check:
    """Memory cgroups matter for limits that are set on us and for running with a limit on purpose."""
    if group.version == 0:
        remedy = "Runs with limited memory (bench/) need a memory cgroup: run them on the host."
        return Check("memory cgroup", "warn", "none is mounted here", remedy)
    limit = "no limit" if group.limit is None else f"limit {group.limit / GIB:.1f} GiB"
    detail = f"version {group.version}, {limit}, {'writable' if group.writable else 'not writable'}"
    if group.writable:
        return Check("memory cgroup", "ok", detail)
    remedy = "To run with limited memory, be root or use systemd-run --user --scope -p MemoryMax=4G COMMAND."
    return Check("memory cgroup", "warn", detail, remedy)


def check_direct_io(folder: Path) -> Check:
    """Streaming from disk wants O_DIRECT: without it, the page cache keeps a second copy of every read."""
    try:
        if machine.has_direct_io(folder):
            return Check("O_DIRECT", "ok", f"works in {folder}")
    except OSError as error:
        remedy = "Run this in a folder you may write."
        return Check("O_DIRECT", "warn", f"not tried in {folder}: {error.strerror}", remedy)
    remedy = "Keep models on ext4, xfs or btrfs: tmpfs and some overlays have no O_DIRECT."
    return Check("O_DIRECT", "warn", f"not supported by the file system of {folder}", remedy)


def check_disk(folder: Path) -> Check:
    """Random O_DIRECT reads on a temporary file of 256 MiB."""
    if shutil.disk_usage(folder).free < GIB:
        detail = f"not measured: less than 1 GiB free in {folder}"
        return Check("disk speed", "warn", detail, "Free some space.")
    try:
        speeds = machine.disk_speed(folder)
    except OSError as error:
        remedy = "Run this in a folder you may write, on a file system with O_DIRECT."
        return Check("disk speed", "warn", f"not measured in {folder}: {error.strerror}", remedy)
    sizes = {4096: "4 KiB", 65536: "64 KiB", machine.MIB: "1 MiB"}
    parts = [f"{sizes[s.block]} x{s.depth}: {s.rate / 1e6:.0f} MB/s" for s in speeds]
    detail = "random reads, block x in flight: " + ", ".join(parts)
    if max(speed.rate for speed in speeds) < 500e6:
        return Check("disk speed", "warn", detail, "Streaming weights wants an NVMe disk of 1 GB/s or more.")
    return Check("disk speed", "ok", detail)


def check_bandwidth() -> Check:
    """Decoding reads every weight it uses: tokens/s cannot exceed memory speed over their size."""
    try:
        rate = machine.memory_bandwidth()
    except MemoryError as error:
        return Check("memory speed", "warn", f"not measured: {error}", "Free some memory.")
    speed = rate / 1e9
    detail = f"{speed:.1f} GB/s read by all allowed cores (1 GB of weights per token: {speed:.0f} tokens/s)"
    return Check("memory speed", "ok", detail)


def check_read_ahead(kib: int | None) -> Check:
    """Long kernel read-ahead makes stock's mmap slow when memory is short; comparisons should use 128 KiB."""
    if kib is None:
        return Check("read-ahead", "ok", "no block device under this folder")
    if kib <= 128:
        return Check("read-ahead", "ok", f"{kib} KiB")
    remedy = "For fair comparisons with mmap: echo 128 > /sys/class/bdi/<device>/read_ahead_kb (as root)."
    detail = f"{kib} KiB: when memory is short, every page fault of a mapped model reads that much"
    return Check("read-ahead", "warn", detail, remedy)


def check_free(folder: Path, memory: int) -> Check:
    """Free disk and memory, in absolute terms: what a model needs depends on the model."""
    disk = shutil.disk_usage(folder).free
    detail = f"{memory / GIB:.1f} GiB of memory, {disk / GIB:.1f} GiB of disk in {folder}"
    if memory < GIB or disk < GIB:
        return Check("free space", "warn", detail, "Models of useful size need some GiB of both.")
    return Check("free space", "ok", detail)


def check_huge_pages(text: str) -> Check:
    """``text`` of /sys/kernel/mm/transparent_hugepage/enabled, e.g. "always [madvise] never"."""
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return Check("huge pages", "ok", f"transparent huge pages: {chosen}")
    remedy = "For fewer TLB misses: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)."
    return Check("huge pages", "warn", f"transparent huge pages: {chosen or 'not in this kernel'}", remedy)


def each_check(folder: Path, say: Callable[[str], None] = lambda what: None) -> Iterator[Check]:
    """All checks in the order shown; ``say`` is told what will take time; disk is tested in ``folder``."""
    cpuinfo = machine.read_text("/proc/cpuinfo")
    wanted = requirement()
    yield check_cpu(cpuinfo)
    yield check_cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), machine.cpu_quota())
    try:
        version = importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        version = None
    yield check_version(version, wanted)
    say("decoding with llama-cpp-python in a child process")
    result = probe.probe_dependency()
    yield check_decode(result, wanted)
    cpu_has_amx = "amx_tile" in machine.parse_cpuinfo(cpuinfo)[1]
    yield check_compiler(compiler.find_compiler(), cpu_has_amx, result, wanted)
    if result.ok:
        say("testing our backend in a child process")
        yield check_backend()
    else:
        detail = "not tested, because llama-cpp-python itself does not decode"
        yield Check("POWERINFER backend", "warn", detail, "First see to the decode probe.")
    yield check_io_uring(machine.io_uring_error())
    yield check_cgroup(machine.memory_cgroup())
    yield check_direct_io(folder)
    say("reading from disk")
    yield check_disk(folder)
    say("reading from memory")
    yield check_bandwidth()
    yield check_read_ahead(machine.read_ahead_kb(folder))
    yield check_free(folder, machine.available_memory())
    yield check_huge_pages(machine.read_text("/sys/kernel/mm/transparent_hugepage/enabled"))


def checks(folder: Path | None = None) -> list[Check]:
    """All checks; takes about six seconds. ``folder`` (default: the current one) is where disk is tested."""
    return list(each_check(folder or Path.cwd()))


def render(found: list[Check], console: Console) -> None:
    """Print a table of what was found, then the remedies, each on one line that can be copied."""
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in found:
        table.add_row(Text(check.status, colours[check.status]), Text(check.name, "bold"), Text(check.detail))
    console.print(table)
    for check in found:
        if check.remedy:
            line = Text.assemble("\n", (check.name, colours[check.status]), f": {check.remedy}")
            console.print(line, soft_wrap=True)
    counts = {status: sum(check.status == status for check in found) for status in colours}
    console.print(Text(f"\n{counts['ok']} ok, {counts['warn']} to know about, {counts['fail']} failed"))


def to_json(found: list[Check]) -> str:
    """``{"ok": bool, "checks": [{"name", "status", "detail", "remedy"}, ...]}``"""
    return json_module.dumps(
        {"ok": not failed(found), "checks": [asdict(check) for check in found]}, indent=2
    )


def failed(found: list[Check]) -> bool:
    return any(check.status == "fail" for check in found)


def run(json: bool = False, folder: Path | None = None) -> int:
    """What the command does: check, print to stdout, return the exit code (1 if anything failed)."""
    folder = folder or Path.cwd()
    console = Console()
    if json:
        found = checks(folder)
        print(to_json(found))
    else:
        with Console(stderr=True).status("looking at this machine") as status:
            found = list(each_check(folder, status.update))
        render(found, console)
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(run(json="--json" in sys.argv[1:]))
