"""Run a child process with less memory, and make that honest: what the benchmark does before a limited run.

A memory cgroup counts anonymous memory and the page cache that its processes bring in, so a limited process
that maps a model larger than the limit reads it from disk again and again, as on a machine with less memory.
Three things would spoil that: pages of the model that are already in the page cache (they are charged to
whoever read them first, so they are dropped), swap (switched off), and the kernel's read-ahead (a page fault
of a mapped file reads that much; distributions ship 128 KiB, some clouds 8 MiB; set and reported).

Limits are set by a command prefix, so that the child is inside before it loads anything:

    root, cgroup v1 or v2   a group of our own below this process's, made and removed here
    otherwise               systemd-run --user --scope -p MemoryMax=...
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from powerinfer_ext import machine
from powerinfer_ext.errors import PowerInferError

READ_AHEAD_KB = 128  # Linux's own default, and what limited runs are compared at
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SMALLEST = 64 << 20  # below this not even the interpreter and llama.cpp's libraries fit

_REMEDY = (
    "run as root where a memory cgroup is mounted, or as a user of a systemd session (systemd-run --user "
    "must work), or leave --memory out"
)


def parse_limit(text: str, size: int) -> int | None:
    """Bytes of a limit such as "50%" (of `size` bytes), "4GiB", "4G" (binary), "800MB" (decimal) or a
    plain number.

    "none" is None, no limit. Raises ValueError with one sentence for anything else, and for less than 64 MiB.
    """
    text = text.strip().lower()
    if text in ("none", "all", "unlimited"):
        return None
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|[kmgt]?(?:ib|b)?)", text)
    if not found:
        raise ValueError(f"memory limit {text!r} is none of 50%, 4GiB, 800MB, a number of bytes, or none")
    number, unit = float(found[1]), found[2]
    if unit == "%":
        limit = number / 100 * size
    else:
        limit = number * (_DECIMAL.get(unit) or _UNITS[unit.rstrip("b").rstrip("i")])
    if limit < _SMALLEST:
        raise ValueError(
            f"memory limit {text!r} is {limit / 1e6:.0f} MB; below {_SMALLEST >> 20} MiB not even the "
            "interpreter and its libraries fit, so use a larger model or a larger limit"
        )
    return int(limit)


@dataclass(frozen=True)
class Limit:
    """A memory limit that is set up: put `prefix` before a command to run it inside.

    how: "cgroup v1", "cgroup v2", "systemd-run", or "none" for no limit. limit: bytes, None without one.
    """

    how: str
    limit: int | None
    prefix: tuple[str, ...] = ()
    folder: Path | None = None

    def peak(self) -> int | None:
        """Most bytes the group has held so far, page cache included; None where the kernel does not say."""
        return None if self.folder is None else _number(self.folder / _PEAK[self.how])

    def oom_kills(self) -> int:
        """How many processes the kernel has killed for exceeding the limit (0 where it does not say)."""
        if self.folder is None:
            return 0
        text = machine.read_text(self.folder / _EVENTS[self.how])
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0


_PEAK = {"cgroup v1": "memory.max_usage_in_bytes", "cgroup v2": "memory.peak"}
_EVENTS = {"cgroup v1": "memory.oom_control", "cgroup v2": "memory.events"}
NO_LIMIT = Limit("none", None)


def own_group_peak() -> int | None:
    """Most bytes that the memory cgroup of this process has held, page cache included; None when not
    known.
    """
    group = machine.memory_cgroup()
    if group.folder is None:
        return None
    return _number(group.folder / _PEAK[f"cgroup v{group.version}"])


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[Limit]:
    """A place to run one command with at most `limit` bytes (None: without a limit); removed afterwards.

    Raises PowerInferError, saying what to do, where no limit can be set.
    """
    if limit is None:
        yield NO_LIMIT
        return
    group = machine.memory_cgroup()
    refusal = "no memory cgroup is mounted here"
    if group.version:
        try:
            folder = _make_group(group, limit)
        except OSError as error:
            refusal = f"the memory cgroup at {group.folder} refuses a group of ours ({error.strerror})"
        else:
            # The shell enters the group, then becomes the command: nothing of it is charged elsewhere.
            enter = ("/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"))
            try:
                yield Limit(f"cgroup v{group.version}", limit, enter, folder)
            finally:
                _remove_group(folder)
            return
    prefix = _systemd_prefix(limit)
    if prefix is None:
        raise PowerInferError(
            f"memory cannot be limited: {refusal}, and systemd-run does not work; {_REMEDY}"
        )
    yield Limit("systemd-run", limit, prefix)


def _make_group(group: machine.MemoryCgroup, limit: int) -> Path:
    """A new group with the limit and without swap. Raises OSError where we may not."""
    assert group.folder is not None
    parent = group.folder if group.version == 1 else _delegating(group.folder)
    folder = parent / f"powerinfer-bench-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        if group.version == 1:
            (folder / "memory.limit_in_bytes").write_text(str(limit))
            with contextlib.suppress(OSError):  # without swap accounting the file is not there
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit))
        else:
            (folder / "memory.max").write_text(str(limit))
            with contextlib.suppress(OSError):
                (folder / "memory.swap.max").write_text("0")
    except OSError:
        _remove_group(folder)
        raise
    return folder


def _delegating(folder: Path) -> Path:
    """The nearest group, upwards, whose children have the memory controller (cgroup v2).

    A v2 group that holds processes cannot give controllers to children, so it is hardly ever our own group.
    """
    while True:
        if "memory" in machine.read_text(folder / "cgroup.subtree_control").split():
            return folder
        if not (folder.parent / "cgroup.procs").exists():
            break
        folder = folder.parent
    (folder / "cgroup.subtree_control").write_text("+memory")  # the top of the mount; may refuse
    return folder


def _remove_group(folder: Path) -> None:
    """Remove a group whose processes have ended; the kernel may need a moment to notice that they have."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def _systemd_prefix(limit: int) -> tuple[str, ...] | None:
    """A systemd-run prefix with the limit, None where it does not work (it is tried)."""
    if shutil.which("systemd-run") is None:
        return None
    user = () if os.geteuid() == 0 else ("--user",)
    prefix = (
        "systemd-run",
        *user,
        "--scope",
        "--quiet",
        "-p",
        f"MemoryMax={limit}",
        "-p",
        "MemorySwapMax=0",
        "--",
    )
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, stdin=subprocess.DEVNULL, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return prefix if tried.returncode == 0 else None


def _number(path: Path) -> int | None:
    text = machine.read_text(path).strip()
    return int(text) if text.isdigit() else None


# ---- the page cache ------------------------------------------------------------------------------


def cached_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of the file that are in the page cache (mincore(2); the kernel tells only who may write the
    file).
    """
    size = os.stat(path).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    pages = -(-size // mmap.PAGESIZE)
    present = ctypes.create_string_buffer(pages)
    fd = os.open(path, os.O_RDONLY)
    try:
        # Not Python's mmap: it hides the address of a mapping that is read-only.
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
        try:
            if libc.mincore(address, size, present) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
        finally:
            libc.munmap(address, size)
    finally:
        os.close(fd)
    return min(present.raw.count(b"\x01") * mmap.PAGESIZE, size)


def drop_cached(path: str | os.PathLike[str]) -> int:
    """Drop the file's pages from the page cache; returns the bytes that stayed.

    Asks for this file alone first; where pages stay and we are root, the kernel's whole clean cache is
    dropped.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fdatasync(fd)  # dirty pages cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    left = cached_bytes(path)
    if left and os.geteuid() == 0:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("1")
        left = cached_bytes(path)
    return left


def fill_cache(path: str | os.PathLike[str]) -> None:
    """Read the file once, so that it is in the page cache (as far as memory allows)."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer):
            pass


# ---- read-ahead ----------------------------------------------------------------------------------


@contextlib.contextmanager
def read_ahead(path: str | os.PathLike[str], kib: int = READ_AHEAD_KB) -> Iterator[int | None]:
    """Set the read-ahead of the device that holds `path` and put it back afterwards, whatever happens.

    Yields the value in force, in KiB: the old one where we may not change it, None where there is no device.
    """
    before = machine.read_ahead_kb(path)
    setting = _read_ahead_file(path)
    if before is None or before == kib or not os.access(setting, os.W_OK):
        yield before
        return
    with _ending_by_exception():
        try:
            setting.write_text(str(kib))
            yield machine.read_ahead_kb(path)
        finally:
            setting.write_text(str(before))


def _read_ahead_file(path: str | os.PathLike[str]) -> Path:
    device = os.stat(path).st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")


@contextlib.contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Let SIGTERM raise SystemExit inside the block, so that what was changed is put back."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: then the signal is not ours to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
