"""What this machine is and how fast it reads: parsers of /proc and /sys, and short time-boxed measurements.

Parsers take text, so that they can be tested with the text of other machines. Linux only.
"""

import ctypes
import errno
import mmap
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIB = 1 << 20


def parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Model name and feature flags ("flags" on x86, "Features" on ARM) of the first CPU in /proc/cpuinfo."""
    fields = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", "unknown CPU"), set(flags.split())


@dataclass(frozen=True)
class MemoryCgroup:
    """The memory controller as this process sees it: version 0 is none; limit in bytes, None is unlimited."""

    version: int
    folder: Path | None = None
    limit: int | None = None
    writable: bool = False


def parse_cgroup(mounts: str, cgroup: str) -> tuple[int, Path | None]:
    """Version and folder of the memory controller, from /proc/mounts and /proc/self/cgroup.

    In a container the path of /proc/self/cgroup may lie outside the mount; the caller then climbs up.
    """
    paths = {controllers: path for _, controllers, path in re.findall(r"^(\d+):([^:]*):(.*)$", cgroup, re.M)}
    unified: Path | None = None
    for line in mounts.splitlines():
        device_and_more = line.split(" ")
        if len(device_and_more) < 4:
            continue
        _, mount_point, kind, options = device_and_more[:4]
        mount = Path(mount_point.replace("\\040", " "))
        if kind == "cgroup" and "memory" in options.split(","):
            own = next((path for names, path in paths.items() if "memory" in names.split(",")), "/")
            return 1, mount / own.lstrip("/")
        if kind == "cgroup2":
            unified = mount / paths.get("", "/").lstrip("/")
    return (2, unified) if unified is not None else (0, None)


def memory_cgroup() -> MemoryCgroup:
    """The memory cgroup this process is in, its limit, and whether a child group can be made in it."""
    version, folder = parse_cgroup(Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    while folder is not None and not folder.is_dir():
        folder = folder.parent
    if folder is None or (version == 2 and "memory" not in read_text(folder / "cgroup.controllers").split()):
        return MemoryCgroup(0)
    text = read_text(folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).strip()
    limit = int(text) if text.isdigit() and int(text) < 1 << 60 else None  # v1 writes "none" as 2^63 - 4096
    return MemoryCgroup(version, folder, limit, os.access(folder, os.W_OK))


def read_text(path: str | Path) -> str:
    """The file's text, or "" when it cannot be read: what a kernel does not tell is simply not known."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def available_memory() -> int:
    """Bytes this process may still use: MemAvailable, or less where a cgroup limits it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    group = memory_cgroup()
    if group.limit is not None and group.folder is not None:
        name = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
        used = read_text(group.folder / name)
        available = min(available, group.limit - int(used.strip() or 0))
    return max(available, 0)


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 0 when the kernel does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [read_text(path).strip() for path in files]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def read_ahead_kb(path: str | Path) -> int | None:
    """Kernel read-ahead, in KiB, of the device that holds ``path``; None where there is no device."""
    device = os.stat(path).st_dev
    text = read_text(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").strip()
    return int(text) if text.isdigit() else None


def io_uring_error() -> int:
    """0 when this process may use io_uring, else the errno of io_uring_setup (ENOSYS, EPERM, ...)."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = (ctypes.c_char * 120)()  # struct io_uring_params, all zero
    # 425 is __NR_io_uring_setup on every architecture but alpha.
    fd = libc.syscall(ctypes.c_long(425), ctypes.c_uint(4), params)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def memory_bandwidth(seconds: float = 0.6, *, mean: bool = False) -> float:
    """Bytes per second that all allowed cores together read from memory: the best pass within ``seconds``, or the mean.

    The buffer is several times the last-level cache; numpy's integer maximum runs at memory speed without
    the GIL. Raises MemoryError when there is not enough free memory for the buffer.
    """
    size = max(256 * MIB, 4 * last_level_cache())
    if size > available_memory() // 2:
        raise MemoryError(f"{size // MIB} MiB for the measurement are not free")
    threads = len(os.sched_getaffinity(0))
    return pass_rate(np.max, np.array_split(np.ones(size // 8, np.uint64), threads), seconds, mean=mean)


def pass_rate(read: Callable[[np.ndarray], object], parts: list[np.ndarray], seconds: float, *, mean: bool) -> float:
    """Bytes per second at which threads, one for each part, read all parts again and again: best pass, or the mean."""
    size, passes = sum(part.nbytes for part in parts), []
    deadline = time.perf_counter() + seconds
    with ThreadPoolExecutor(len(parts)) as pool:
        while not passes or time.perf_counter() < deadline:
            start = time.perf_counter()
            list(pool.map(read, parts))
            passes.append(time.perf_counter() - start)
    return size * len(passes) / sum(passes) if mean else size / min(passes)


@dataclass(frozen=True)
class DiskSpeed:
    """Random O_DIRECT reads: ``block`` bytes each, ``depth`` in flight, bytes per second."""

    block: int
    depth: int
    rate: float


@contextmanager
def direct_file(folder: str | Path, size: int = 256 * MIB) -> Iterator[tuple[int, int]]:
    """A temporary file on ``folder``'s file system, opened O_DIRECT: yields (fd, size); removed after use.

    Writing stops after 3 seconds, the size yielded is what was written. Raises OSError (EINVAL where the
    file system has no O_DIRECT).
    """
    with tempfile.NamedTemporaryFile(prefix=".powerinfer-disk-", dir=folder) as file:
        fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        try:
            block = np.random.default_rng(0).bytes(MIB)
            deadline = time.perf_counter() + 3
            written = 0
            while written < size and time.perf_counter() < deadline:
                written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
            # Some file systems serve O_DIRECT reads from cached pages when there are any.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield fd, written
        finally:
            os.close(fd)


def disk_speed(folder: str | Path, seconds: float = 0.3) -> list[DiskSpeed]:
    """Speeds of 4 KiB, 64 KiB and 1 MiB reads, 1 and 16 in flight, ``seconds`` for each of the six."""
    with direct_file(folder) as (fd, size):
        return [
            DiskSpeed(block, depth, random_reads(fd, size, block, depth, seconds))
            for block in (4096, 64 * 1024, MIB)
            for depth in (1, 16)
        ]


def random_reads(fd: int, size: int, block: int, depth: int, seconds: float) -> float:
    """Bytes per second of ``depth`` threads that each read random aligned blocks until the time is up."""
    deadline = time.perf_counter() + seconds

    def work(index: int) -> int:
        choose = random.Random(index)
        total = 0
        with mmap.mmap(-1, block) as buffer:  # O_DIRECT wants page-aligned memory
            while total == 0 or time.perf_counter() < deadline:
                total += os.preadv(fd, [buffer], choose.randrange(size // block) * block)
        return total

    start = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        total = sum(pool.map(work, range(depth)))
    return total / (time.perf_counter() - start)


def has_direct_io(folder: str | Path) -> bool:
    """Can files in ``folder`` be read with O_DIRECT? Raises OSError when no file can be made there."""
    try:
        with direct_file(folder, MIB) as (fd, _), mmap.mmap(-1, 4096) as buffer:
            os.preadv(fd, [buffer], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def cpu_quota() -> float | None:
    """CPUs that the cgroup's quota allows (1.5 is one and a half), None when there is no quota."""
    with suppress(ValueError):
        quota, period = read_text("/sys/fs/cgroup/cpu.max").split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(ValueError):
        quota = int(read_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
        return None if quota < 0 else quota / int(read_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    return None
