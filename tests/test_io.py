"""The I/O engines of cpatch/io.h: what they read, what they say when it fails, and what they fall back to."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from powerinfer_ext._cpatch import ffi, lib

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096
ENGINES = {"uring": lib.IO_URING, "threads": lib.IO_THREADS}
SIZE = 3_000_019  # no multiple of any block


class Refused(Exception):
    """io_open's sentence."""


class ReadFailed(Exception):
    """args: errno, offset in the file."""


class Io:
    """An io with a buffer for each read in flight; ``read`` gives the bytes or raises ReadFailed."""

    def __init__(
        self, *paths: Path, engine: int = 0, depth: int = 16, buffered: bool = False, room: int = 1 << 18
    ) -> None:
        fds = [os.open(path, os.O_RDONLY) for path in paths]
        err = ffi.new("char[256]")
        options = ffi.new("struct io_options *", {"engine": engine, "depth": depth, "buffered": buffered})
        self.io = lib.io_open(fds, len(fds), options, err, 256)
        for fd in fds:
            os.close(fd)  # the io has its own
        if self.io == ffi.NULL:
            raise Refused(ffi.string(err).decode())
        self.align = lib.io_align(self.io)
        self.depth, self.room = depth, room
        self.memory = mmap.mmap(-1, depth * room)
        self.base = ffi.from_buffer(self.memory)
        self.done = ffi.new("struct io_done[]", depth)

    def __enter__(self) -> Io:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        lib.io_close(self.io)
        self.io = ffi.NULL

    def submit(self, buffer: int, offset: int, size: int, tag: int = 0, file: int = 0) -> int:
        assert lib.io_window(offset, size, self.align) <= self.room
        read = {"file": file, "offset": offset, "size": size, "dst": self.base + buffer * self.room, "tag": tag}
        return lib.io_submit(self.io, ffi.new("struct io_read *", read), 1)

    def poll(self, wait: bool = True) -> list[tuple[int, int, int]]:
        """(tag, error, offset) of what has finished."""
        n = lib.io_poll(self.io, self.done, self.depth, wait)
        return [(d.tag, d.error, d.offset) for d in self.done[0:n]]

    def bytes_of(self, buffer: int, offset: int, size: int) -> bytes:
        start = buffer * self.room + offset % self.align
        return self.memory[start : start + size]

    def read(self, offset: int, size: int, file: int = 0) -> bytes:
        assert self.submit(0, offset, size, 7, file) == 1
        [(tag, error, where)] = self.poll()
        assert tag == 7
        if error:
            raise ReadFailed(error, where)
        return self.bytes_of(0, offset, size)

    def read_many(self, ranges: list[tuple[int, int]], check: bytes) -> None:
        """Reads all ranges with the queue kept full and compares each with check."""
        free, where = list(range(self.depth)), {}
        waiting = list(enumerate(ranges))
        finished = 0
        while finished < len(ranges):
            while waiting and free and self.submit(free[-1], *waiting[-1][1], tag=waiting[-1][0]):
                where[waiting.pop()[0]] = free.pop()
            for tag, error, _ in self.poll():
                assert error == 0, (ranges[tag], os.strerror(error))
                offset, size = ranges[tag]
                assert self.bytes_of(where[tag], offset, size) == check[offset : offset + size], ranges[tag]
                free.append(where.pop(tag))
                finished += 1
        assert lib.io_in_flight(self.io) == 0 and not self.poll()


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def disk(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("io") / "on_disk"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def tmpfs(content: bytes) -> Iterator[Path]:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    path = Path(f"/dev/shm/test_io.{os.getpid()}")
    path.write_bytes(content)
    yield path
    path.unlink()


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, disk: Path) -> int:
    try:
        Io(disk, engine=ENGINES[request.param]).close()
    except Refused as e:
        pytest.skip(str(e))
    return ENGINES[request.param]


@pytest.fixture(params=["direct", "buffered"])
def buffered(request: pytest.FixtureRequest) -> bool:
    return request.param == "buffered"


def some_ranges(n: int, seed: int, largest: int = 200_000) -> list[tuple[int, int]]:
    """Random ranges, many of them tiny, some up to the last byte, some empty."""
    rng = random.Random(seed)
    ranges = []
    for _ in range(n):
        size = int(largest ** rng.random()) if rng.random() < 0.95 else 0
        offset = SIZE - size if rng.random() < 0.1 else rng.randrange(SIZE - size)
        ranges.append((offset, size))
    return ranges


@pytest.mark.parametrize("place", ["disk", "tmpfs"])
@pytest.mark.parametrize("depth", [1, 7, 64, 256])
def test_reads_what_is_in_the_file(
    engine: int, buffered: bool, place: str, depth: int, content: bytes, request: pytest.FixtureRequest
) -> None:
    with Io(request.getfixturevalue(place), engine=engine, depth=depth, buffered=buffered) as io:
        assert lib.io_engine(io.io) == engine
        assert lib.io_direct(io.io, 0) == (io.align > 1)
        if buffered:
            assert io.align == 1
        io.read_many(some_ranges(400, depth), content)


def test_statistics(engine: int, disk: Path, content: bytes) -> None:
    ranges = some_ranges(100, 3)
    with Io(disk, engine=engine) as io:
        io.read_many(ranges, content)
        stats = ffi.new("struct io_stats *")
        lib.io_get_stats(io.io, stats)
        assert stats.reads == 100
        assert stats.bytes == sum(size for _, size in ranges)
        assert stats.windows == sum(lib.io_window(offset, size, io.align) for offset, size in ranges)
        assert stats.windows % io.align == 0
        assert stats.wait_ns > 0


def test_several_files(engine: int, disk: Path, tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.write_bytes(content[::-1])
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with Io(disk, other, empty, engine=engine) as io:
        assert io.read(12345, 678, 0) == content[12345 : 12345 + 678]
        assert io.read(12345, 678, 1) == content[::-1][12345 : 12345 + 678]
        with pytest.raises(ReadFailed) as e:
            io.read(0, 1, 2)
        assert e.value.args == (errno.ENODATA, 0)
        for file in (-1, 3):
            with pytest.raises(ReadFailed) as e:
                io.read(0, 1, file)
            assert e.value.args == (errno.EBADF, 0)


def test_a_full_queue_takes_no_more(engine: int, disk: Path) -> None:
    with Io(disk, engine=engine, depth=4) as io:
        reads = ffi.new("struct io_read[10]")
        for i in range(10):
            reads[i].size, reads[i].offset, reads[i].tag, reads[i].dst = 100, i * 1000, i, io.base + i % 4 * PAGE
        assert lib.io_submit(io.io, reads, 10) == 4
        assert lib.io_in_flight(io.io) == 4
        assert lib.io_submit(io.io, reads + 4, 6) == 0
        tags = [tag for tag, _, _ in io.poll()]
        room = len(tags)
        assert 1 <= room <= 4
        assert lib.io_submit(io.io, reads + 4, 6) == room
        while finished := io.poll():
            tags += [tag for tag, _, _ in finished]
        assert sorted(tags) == list(range(4 + room))
        assert io.poll(wait=True) == [] and io.poll(wait=False) == []


def test_bad_destinations_and_offsets(engine: int, disk: Path) -> None:
    with Io(disk, engine=engine) as io:
        with pytest.raises(ReadFailed) as e:
            io.read(2**63 - 4096, 4096)
        assert e.value.args == (errno.EINVAL, 2**63 - 4096)
        if io.align > 1:
            read = {"offset": 0, "size": 10, "dst": io.base + 1}
            assert lib.io_submit(io.io, ffi.new("struct io_read *", read), 1) == 1
            assert io.poll() == [(0, errno.EINVAL, 0)]


def test_the_end_of_the_file(engine: int, buffered: bool, disk: Path, content: bytes) -> None:
    with Io(disk, engine=engine, buffered=buffered) as io:
        assert io.read(SIZE - 10, 10) == content[-10:]
        assert io.read(SIZE - 9000, 9000) == content[-9000:]
        for offset, size, where in [
            (SIZE - 10, 11, SIZE),
            (SIZE - 9000, 100_000, SIZE),
            (SIZE, 1, SIZE),
            (SIZE + 12345, 10, SIZE + 12345),
            (SIZE + 1_000_000, 10, SIZE + 1_000_000),
        ]:
            with pytest.raises(ReadFailed) as e:
                io.read(offset, size)
            assert e.value.args == (errno.ENODATA, where)
        assert io.read(5, 5) == content[5:10]


def test_truncated_while_open(engine: int, buffered: bool, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(content)
    with Io(path, engine=engine, buffered=buffered) as io:
        assert io.read(1_000_000, 5000) == content[1_000_000:1_005_000]
        os.truncate(path, 1_002_345)
        with pytest.raises(ReadFailed) as e:
            io.read(1_000_000, 5000)
        assert e.value.args == (errno.ENODATA, 1_002_345)
        assert io.read(1_000_000, 2345) == content[1_000_000:1_002_345]
        path.unlink()  # a file replaced by renaming goes on being what it was
        path.write_bytes(b"another")
        assert io.read(0, 5000) == content[:5000]


def test_injected_faults(engine: int, buffered: bool, disk: Path, content: bytes) -> None:
    with Io(disk, engine=engine, buffered=buffered) as io:
        lib.io_inject(io.io, 1, errno.EIO, 0)
        assert io.read(10_000, 3000) == content[10_000:13_000]
        with pytest.raises(ReadFailed) as e:
            io.read(10_000, 3000)
        assert e.value.args == (errno.EIO, 10_000)
        assert io.read(10_000, 3000) == content[10_000:13_000]

        lib.io_inject(io.io, 0, 0, 2500)
        with pytest.raises(ReadFailed) as e:
            io.read(10_000, 3000)
        assert e.value.args == (errno.ENODATA, 10_500)
        assert io.read(10_000, 3000) == content[10_000:13_000]

        for error in (errno.EINTR, errno.EAGAIN, errno.ECANCELED):
            lib.io_inject(io.io, 0, error, 0)
            assert io.read(10_000, 3000) == content[10_000:13_000]

        lib.io_inject(io.io, 0, errno.EIO, 0)
        lib.io_inject(io.io, -1, 0, 0)
        assert io.read(10_000, 3000) == content[10_000:13_000]


def test_many_threads_submit_and_poll(engine: int, disk: Path, content: bytes) -> None:
    n_threads, n_reads, room = 4, 150, 1 << 16
    ranges = some_ranges(n_threads * n_reads, 9, largest=room - 2 * PAGE)
    seen: list[int] = []
    with Io(disk, engine=engine, depth=8) as io:
        memory = mmap.mmap(-1, n_threads * n_reads * room)
        base = ffi.from_buffer(memory)

        def work(first: int) -> None:
            done = ffi.new("struct io_done[3]")
            tag = first
            while tag < first + n_reads:
                offset, size = ranges[tag]
                read = {"offset": offset, "size": size, "dst": base + tag * room, "tag": tag}
                tag += lib.io_submit(io.io, ffi.new("struct io_read *", read), 1)
                n = lib.io_poll(io.io, done, 3, tag % 5 == 0)
                assert all(d.error == 0 for d in done[0:n])
                seen.extend(d.tag for d in done[0:n])

        threads = [threading.Thread(target=work, args=(i * n_reads,)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The threads that submitted are gone; what they left in flight still arrives.
        while finished := io.poll():
            assert all(error == 0 for _, error, _ in finished)
            seen.extend(tag for tag, _, _ in finished)
        assert sorted(seen) == list(range(n_threads * n_reads))
        for tag, (offset, size) in enumerate(ranges):
            start = tag * room + offset % io.align
            assert memory[start : start + size] == content[offset : offset + size]


def test_polling_sees_completions_while_the_submitter_computes(engine: int, disk: Path) -> None:
    """Without sleeping in the kernel and without a system call: a team computes while reads arrive."""
    with Io(disk, engine=engine) as io:
        submitted, seen = threading.Event(), threading.Event()

        def submit_then_compute() -> None:
            for i in range(16):
                assert io.submit(i, i * 10_000, 5000, tag=i) == 1
            submitted.set()
            while not seen.is_set():
                sum(range(1000))

        thread = threading.Thread(target=submit_then_compute)
        thread.start()
        submitted.wait()
        n = 0
        for _ in range(2_000_000):
            n += len(io.poll(wait=False))
            if n == 16:
                break
        seen.set()
        thread.join()
        assert n == 16


def test_closing_waits_for_what_is_in_flight(engine: int, disk: Path, content: bytes) -> None:
    """Nothing may be written to memory that the caller is about to free."""
    io = Io(disk, engine=engine)
    for i in range(io.depth):
        assert io.submit(i, i * 1000, 200_000) == 1
    io.close()
    for i in range(io.depth):
        assert io.bytes_of(i, i * 1000, 200_000) == content[i * 1000 : i * 1000 + 200_000]


def resources() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
    }


def test_nothing_stays_behind(engine: int, disk: Path) -> None:
    def once() -> None:
        with Io(disk, disk, engine=engine, depth=8, room=PAGE * 2) as io:
            assert io.submit(0, 100, 200) == 1
        io.base = None
        io.memory.close()

    once()
    before = resources()
    for _ in range(200):
        once()
    after = resources()
    assert after["mappings"] - before["mappings"] < 50  # of 400 or more; the interpreter maps some as well
    assert (after["descriptors"], after["threads"]) == (before["descriptors"], before["threads"])


def test_many_at_once(engine: int, disk: Path, content: bytes) -> None:
    ios = [Io(disk, engine=engine, depth=4) for _ in range(5)]
    for io in ios:
        io.submit(0, 1000, 500)
    for io in ios:
        assert io.poll() == [(0, 0, 1000)]
        assert io.bytes_of(0, 1000, 500) == content[1000:1500]
        io.close()


def test_a_descriptor_that_is_none() -> None:
    err = ffi.new("char[256]")
    options = ffi.new("struct io_options *")
    assert lib.io_open([987654], 1, options, err, 256) == ffi.NULL
    assert "descriptor 987654" in ffi.string(err).decode()
    assert lib.io_open([], 0, options, err, 256) == ffi.NULL
    lib.io_close(ffi.NULL)


def resident_pages(path: Path) -> int:
    """How many of the file's pages are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        n = (len(mapped) + PAGE - 1) // PAGE
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        pages = (ctypes.c_ubyte * n)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages)


def test_the_page_cache_stays_empty(engine: int, buffered: bool, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cold"
    path.write_bytes(content)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path) != 0:
        pytest.skip("this file system keeps its pages")
    with Io(path, engine=engine, buffered=buffered) as io:
        io.read_many(some_ranges(100, 5), content)
    assert resident_pages(path) <= 8  # neighbours in flight may share a page that one of them brings back


def test_registered_memory(disk: Path, content: bytes) -> None:
    try:
        io = Io(disk, engine=lib.IO_URING)
    except Refused as e:
        pytest.skip(str(e))
    with io:
        half = io.depth * io.room // 2
        if lib.io_register(io.io, io.base, half) != 0:
            pytest.skip("memory cannot be registered here (ulimit -l)")
        io.read_many(some_ranges(100, 6), content)
        assert lib.io_register(io.io, io.base + half + io.room, half - io.room) == 0  # a hole between the two
        io.read_many(some_ranges(100, 7), content)
        io.submit(0, 0, 10)
        assert lib.io_register(io.io, io.base, PAGE) == -1  # in flight
        assert io.poll() == [(0, 0, 0)]
    with Io(disk, engine=lib.IO_THREADS) as io:
        assert lib.io_register(io.io, io.base, PAGE) == -1


def measure(io: Io, size: int, seconds: float = 0.05) -> tuple[float, float] | str:
    cost, err = ffi.new("struct io_cost *"), ffi.new("char[256]")
    if lib.io_measure(io.io, 0, size, seconds, cost, err, 256) != 0:
        return ffi.string(err).decode()
    assert 1 <= cost.first < 1e6
    return cost.latency, cost.bandwidth


def test_measuring_the_device(engine: int, buffered: bool, disk: Path, content: bytes) -> None:
    with Io(disk, engine=engine, buffered=buffered) as io:
        latency, bandwidth = measure(io, SIZE)
        assert 0 <= latency < 0.1 and 1e6 < bandwidth < 1e12
        assert lib.io_in_flight(io.io) == 0
        assert io.read(100, 100) == content[100:200]
        assert "too small" in measure(io, 5000)
        io.submit(0, 0, 10)
        assert "in flight" in measure(io, SIZE)
        io.poll()
        assert "failed: No data available" in measure(io, 1000 * SIZE)
        assert lib.io_in_flight(io.io) == 0
        lib.io_inject(io.io, 3, errno.EIO, 0)
        assert "Input/output error" in measure(io, SIZE)


# A seccomp filter as containers use them: system call NR answers ERRNO when (argument 2 & MASK) == MASK.
REFUSE = """
import ctypes, os, struct
def refuse(nr, error, mask):
    code = [(0x20, 0, 0, 0), (0x15, 0, 4, nr), (0x20, 0, 0, 32), (0x54, 0, 0, mask), (0x15, 0, 1, mask),
            (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0, os.strerror(ctypes.get_errno())
"""
OPENAT = {"x86_64": 257, "aarch64": 56}.get(os.uname().machine)
IO_URING_SETUP = 425


def in_child(script: str, *args: object) -> str:
    """What the script prints, run in a process of its own that may give up system calls."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n" + REFUSE
    prelude += "from pathlib import Path\nfrom test_io import Io, Refused, SIZE, ffi, lib, some_ranges\n"
    command = [sys.executable, "-c", prelude + script, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_io_uring_refused(disk: Path, error: int) -> None:
    said = in_child(
        f"""
refuse({IO_URING_SETUP}, {error}, 0)
path = Path(sys.argv[1])
with Io(path) as io:
    print(lib.io_engine(io.io) == lib.IO_THREADS)
    io.read_many(some_ranges(50, 1), path.read_bytes())
try:
    Io(path, engine=lib.IO_URING)
except Refused as e:
    print(e)
""",
        disk,
    )
    fell_back, sentence = said.splitlines()
    assert fell_back == "True"
    assert sentence.startswith("io_uring is refused") and "seccomp" in sentence


@pytest.mark.skipif(OPENAT is None, reason="the number of openat on this machine is not known")
@pytest.mark.parametrize("what", ["O_DIRECT", "opening"])
def test_file_systems_without_o_direct(engine: int, disk: Path, what: str) -> None:
    mask = os.O_DIRECT if what == "O_DIRECT" else 0
    said = in_child(
        f"""
path = Path(sys.argv[1])
content = path.read_bytes()
import os
opened = os.open(path, os.O_RDONLY)
os.open = lambda *args: os.dup(opened)
refuse({OPENAT}, 22, {mask})
with Io(path, engine={engine}) as io:
    print(lib.io_direct(io.io, 0), io.align)
    io.read_many(some_ranges(50, 1), content)
""",
        disk,
    )
    assert said == "False 1\n"


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """tests/c/io_exercise.c: four threads, one io, faults injected."""
    program, data = tmp_path / "io_exercise", tmp_path / "data"
    offset = np.arange(1 << 20, dtype=np.uint64)
    (offset * 167 + (offset >> 8) * 13 + (offset >> 16)).astype(np.uint8).tofile(data)
    sources = ["tests/c/io_exercise.c", *sorted(ROOT.glob("cpatch/io*.c"))]
    flags = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icpatch", f"-fsanitize={sanitizer}"]
    command = [os.environ.get("CC", "cc"), *flags, "-fno-sanitize-recover=all", *sources, "-lpthread", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program, data, "1"], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this compiler's ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""


def test_compiles_outside_linux(tmp_path: Path) -> None:
    """There is still the pool of threads; and on Linux nothing asks for the kernel's headers."""
    for source in sorted(ROOT.glob("cpatch/io*.c")):
        assert "#include <linux/" not in source.read_text()
        flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-U__linux__"]
        command = [os.environ.get("CC", "cc"), *flags, "-c", source, "-o", tmp_path / "object"]
        subprocess.run(command, cwd=ROOT, check=True)
