"""What a random read costs on a device, measured once and remembered: cpatch/io.h's io_measure.

The measurement takes a third of a second, or seconds where a virtual machine's host has to fetch what was not read
before, so it is kept per device in $XDG_CACHE_HOME/powerinfer-ext/disk.json (~/.cache by default). A folder that cannot
be written to costs a measurement per process, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from powerinfer_ext.placement import DEPTH, GAP, RUN

FLIGHT = 1.5e-3
_LEAST_FLIGHT, _FLIGHT_UNKNOWN = 1 << 20, 4 << 20
SECONDS = 0.2  # that measuring takes, about
_VALID = 24 * 3600.0  # seconds after which a device is measured anew: a virtual one changes from hour to hour
_SMALLEST = 4 << 20  # a smaller file says little about its device

_measured: dict[str, DiskCost] = {}  # of this process, by device


@dataclass(frozen=True)
class DiskCost:
    """Seconds of a read with `DEPTH` in flight: latency + size / bandwidth. round_trip: of one small read alone.

    All of places that were read before, as a streamed model reads the same ones again and again; first: how many times
    as long the first reading takes.
    """

    latency: float
    bandwidth: float  # bytes per second
    round_trip: float
    first: float = 1.0

    def seconds(self, n_bytes: float, reads: float) -> float:
        """Of so many bytes in so many reads, all of them wanted at once."""
        return reads * self.latency + n_bytes / self.bandwidth

    @property
    def gap(self) -> int:
        """Bytes that are as cheap to read through as another read is to make."""
        return int(self.latency * self.bandwidth)


def cache_file() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "powerinfer-ext" / "disk.json"


def cost(path: str | os.PathLike[str], *, remeasure: bool = False) -> DiskCost | None:
    """The cost of reading the device that holds the file at `path`; None where it cannot be measured.

    The file itself is read, at random places, so it should have 4 MiB at least.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    if device in _measured and not remeasure:
        return _measured[device]
    found = None if remeasure else _remembered(device)
    if found is None and status.st_size >= _SMALLEST:
        found = _measure(path, status.st_size)
        if found is not None:
            _remember(device, found)
    if found is not None:
        _measured[device] = found
    return found


def gap(path: str | os.PathLike[str]) -> int:
    """Bytes between two wanted ranges of the file at `path` that are read through rather than skipped."""
    found = cost(path)
    return GAP if found is None else min(found.gap, RUN // 2)


def flight(path: str | os.PathLike[str]) -> int:
    """Bytes that are asked for at a time: what the device reads in `FLIGHT` seconds.

    Fewer would leave it idle while threads compute. With more, what is wanted now waits for what was asked for before
    because it may be wanted later; and some virtual devices report no end before there is nothing left to do.
    """
    found = cost(path)
    return _FLIGHT_UNKNOWN if found is None else max(_LEAST_FLIGHT, int(found.bandwidth * FLIGHT))


def _measure(path: str | os.PathLike[str], size: int) -> DiskCost | None:
    many = _measure_at(path, size, DEPTH, SECONDS)
    one = _measure_at(path, size, 1, SECONDS / 5)
    if many is None or one is None:
        return None
    # At depth 1 the line's intercept is noisy where reads are fast: never below that of many at once.
    return DiskCost(many[0], many[1], max(one[0], many[0]), many[2])


def _measure_at(
    path: str | os.PathLike[str], size: int, depth: int, seconds: float
) -> tuple[float, float, float] | None:
    """(latency, bandwidth, first) with that many reads in flight; None when it cannot be read past the page cache."""
    from powerinfer_ext.loader import native

    ffi, lib = native()
    message = ffi.new("char[]", 256)
    with open(path, "rb") as file:
        options = ffi.new("struct io_options *", {"depth": depth})
        io = lib.io_open([file.fileno()], 1, options, message, 256)
    if io == ffi.NULL:
        return None
    try:
        found = ffi.new("struct io_cost *")
        if not lib.io_direct(io, 0) or lib.io_measure(io, 0, size, seconds, found, message, 256) != 0:
            return None
        return found.latency, found.bandwidth, found.first
    finally:
        lib.io_close(io)


def _remembered(device: str) -> DiskCost | None:
    try:
        entry = json.loads(cache_file().read_text())[device]
        found = DiskCost(*(float(entry[key]) for key in ("latency", "bandwidth", "round_trip", "first")))
        fresh = 0 <= time.time() - float(entry["time"]) < _VALID
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, damaged, or of another version: measure
    sane = found.latency >= 0 and found.round_trip >= 0 and 0 < found.bandwidth < 1e12 and found.first >= 1
    return found if fresh and sane else None


def _remember(device: str, found: DiskCost) -> None:
    """Add an entry; a disk that is full or read-only does not matter."""
    path = cache_file()
    with contextlib.suppress(OSError):
        entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            entries = known if isinstance(known, dict) else {}
        entries[device] = {**asdict(found), "time": time.time()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".disk-", delete=False) as file:
            try:
                json.dump(entries, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
