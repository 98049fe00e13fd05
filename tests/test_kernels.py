"""The kernels on rows of weights against float64 numpy: every type and instruction set, each forced in turn."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import Q4_K, dequantize, quant_shape_to_byte_shape

from powerinfer_ext.loader import native

EPSILON = 2.0**-24  # of one rounding to float32
BF16_EPSILON = 2.0**-8
ARM = platform.machine() == "aarch64"
FUSED = ("neon",) if ARM else ("avx512bf16", "avx512vnni", "avx512", "avx2")
LEVELS = (*FUSED, "portable")
PAIR_BIAS = 16  # what kernels_avx512.c adds to integers of 4 bits, beside the 8 of Q4_0
NIBBLES = ("avx512vnni", "avx512", "avx2")  # whose sums of 4 bits are of integers from 0 on
# Where the half-precision scales lie in a block; the rest is filled with random bytes, so that all values occur.
SCALES_AT = {"Q4_0": [0], "Q8_0": [0], "MXFP4": [], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
FALLBACKS = {"Q5_0": [0], "IQ4_NL": [0]}  # types that have no kernels of their own
FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, *SCALES_AT, *FALLBACKS)
# Multiples of the block, but not of what one pass takes.
LENGTHS = {1: (1, 3, 15, 16, 17, 33, 100, 129, 1000), 32: (32, 64, 96, 160, 544, 1184), 256: (256, 768, 1280)}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The level's name, in force during the test. NEON is tested on other machines by emulation, below."""
    _, lib = native()
    if lib.pi_kernel_force(request.param.encode()) != 0:
        pytest.skip(f"this CPU does not have {request.param}")
    yield request.param
    lib.pi_kernel_force(native()[0].NULL)


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def lengths(name: str) -> tuple[int, ...]:
    return LENGTHS[gguf.GGML_QUANT_SIZES[kind(name)][0]]


def random_rows(rng: np.random.Generator, name: str, n_rows: int, n: int, scale: float = 1.0) -> np.ndarray:
    """uint8 [n_rows, bytes of a row]: weights of the order of scale, every bit pattern of the integers possible."""
    if name in FLOATS:
        values = (rng.standard_normal((n_rows, n)) * scale).astype(np.float32)
        if name == "F32":
            return values.view(np.uint8)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind(name)]
    blocks = rng.integers(0, 256, (n_rows, n // block, size), np.uint8)
    for at in (SCALES_AT | FALLBACKS)[name]:
        d = rng.standard_normal((n_rows, n // block)) * scale / 16
        blocks[:, :, at : at + 2] = d.astype(np.float16)[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[:, :, 0] = rng.integers(120, 130, (n_rows, n // block)) if scale == 1 else rng.integers(0, 4)
    return blocks.reshape(n_rows, -1)


def exact(name: str, rows: np.ndarray) -> np.ndarray:
    """float64 [n_rows, n]."""
    values = rows.view(np.float32) if name == "F32" else dequantize(rows, kind(name))
    return values.astype(np.float64)


def rounded(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n] -> what dot products with rows of the type take: its bytes, and its values in float64."""
    ffi, lib = native()
    to = gguf.GGMLQuantizationType(lib.pi_kernel_input_type(kind(name)))
    out = np.zeros(quant_shape_to_byte_shape(x.shape, to) if to != 0 else x.nbytes, np.uint8)
    lib.pi_kernel_round_input(to, x.size, ffi.from_buffer("float[]", x), ffi.from_buffer(out))
    if to == gguf.GGMLQuantizationType.Q8_K:
        blocks = out.reshape(-1, 292)
        values = blocks[:, 4:260].view(np.int8) * blocks[:, :4].copy().view(np.float32).astype(np.float64)
        return out, values.reshape(-1)
    return out, exact(to.name, out[None])[0]


class Rows:
    """Rows at odd addresses, each in a place of its own, and lists of pointers to them."""

    def __init__(self, rows: np.ndarray) -> None:
        ffi, _ = native()
        self.memory = np.zeros((len(rows), rows.shape[1] + 7), np.uint8)
        self.memory[:, 3:-4] = rows
        first = int(ffi.cast("uintptr_t", ffi.from_buffer(self.memory)))
        self.addresses = [first + i * self.memory.shape[1] + 3 for i in range(len(rows))]

    def list(self, index: Any) -> Any:
        ffi, _ = native()
        return ffi.new("const uint8_t *[]", [ffi.cast("const uint8_t *", self.addresses[i]) for i in index] or 1)


def dots(name: str, n: int, rows: Rows, index: Any, x: np.ndarray) -> np.ndarray:
    ffi, lib = native()
    out = np.full(len(index), np.nan, np.float32)
    lib.pi_kernel_dots(
        kind(name), n, rows.list(index), len(index), ffi.from_buffer(x), ffi.cast("float *", ffi.from_buffer(out))
    )
    return out


def axpys(name: str, n: int, rows: Rows, index: Any, a: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """The columns of the index list, times a: one sum, in several calls where the list is cut."""
    ffi, lib = native()
    found, offsets, tmp = np.zeros(n, np.float32), np.zeros(n // 32 + 1, np.float32), np.empty(n, np.float32)
    floats = [ffi.cast("float *", ffi.from_buffer(v)) for v in (found, offsets, tmp)]
    for part, factors in zip(np.split(np.asarray(index), cuts), np.split(np.float32(a), cuts), strict=True):
        own = ffi.cast("float *", ffi.from_buffer(np.ascontiguousarray(factors)))
        lib.pi_kernel_axpys(kind(name), n, rows.list(part), own, len(part), *floats)
    lib.pi_kernel_finish_sums(kind(name), n, floats[1], floats[0])
    return found


def rounds_factors(level: str, name: str) -> bool:
    """Whether factors times scales are rounded to bfloat16 (kernels.h)."""
    return level == "avx512bf16" and name in ("Q4_0", "MXFP4", "Q4_K")


def parts(level: str, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [n_rows, n] three times: what is multiplied by integers; apart from it what is added to 32 values alike;
    and what a factor is multiplied with in the end, where it is rounded."""
    w = exact(name, rows)
    alike = np.zeros_like(w)
    if name == "Q4_0" and (level in NIBBLES or rounds_factors(level, name)):
        whole = w.shape[1] // 256 * 256
        halves = np.ascontiguousarray(rows.reshape(len(rows), -1, 18)[:, :, :2]).view(np.float16)[..., 0]
        d = np.repeat(halves.astype(np.float64), 32, axis=1)
        alike[:, :whole] = (-8 if level in NIBBLES else -8 - PAIR_BIAS) * d[:, :whole]
        return w - alike, alike, w
    if name not in ("Q4_K", "Q5_K"):
        return w, alike, w
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind(name)][1])
    d, dmin = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float64).T[..., None]
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16])
    d, minima = (np.repeat(v, 32, axis=1).reshape(w.shape) for v in (d * scales, dmin * minima))
    alike = -minima - (PAIR_BIAS * d if rounds_factors(level, name) else 0)
    return w - alike, alike, w + minima - 8 * d


def index_lists(rng: np.random.Generator, n_rows: int) -> list[np.ndarray]:
    """Empty, one, all, repeated, some."""
    some = np.sort(rng.choice(n_rows, n_rows // 2, replace=False))
    return [np.arange(0), np.array([n_rows - 1]), np.arange(n_rows), np.array([2, 2, 2, 1, 1, 2, 0]), some]


@pytest.mark.parametrize("name", TYPES)
def test_dot_products(level: str, name: str) -> None:
    rng = np.random.default_rng(1)
    for n in lengths(name):
        rows = random_rows(rng, name, 13, n)
        w, placed = exact(name, rows), Rows(rows)
        x, values = rounded(name, rng.standard_normal(n).astype(np.float32))
        size = np.abs(w) + np.abs(w).max(axis=1, keepdims=True) * name.endswith("_K")
        # Roundings of partial sums, each of the size of the whole, that add up like a random walk.
        tolerance = 8 * EPSILON * (np.sqrt(n) * np.linalg.norm(size * values, axis=1) + np.abs(w) @ np.abs(values) / n)
        for index in index_lists(rng, 13):
            out = dots(name, n, placed, index, x)
            error = np.abs(out - (w @ values)[index])
            assert (error <= tolerance[index]).all(), (n, index, error / tolerance[index])


@pytest.mark.parametrize("name", TYPES)
def test_one_row_with_several_inputs_gives_the_same_bits(level: str, name: str) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(2)
    for n in lengths(name)[::2]:
        rows = Rows(random_rows(rng, name, 1, n))
        inputs = [rounded(name, rng.standard_normal(n).astype(np.float32))[0] for _ in range(11)]
        pointers = ffi.new("const void *[]", [ffi.from_buffer(x) for x in inputs])
        out = np.empty(11, np.float32)
        lib.pi_kernel_dots_inputs(
            kind(name), n, rows.list([0])[0], pointers, 11, ffi.cast("float *", ffi.from_buffer(out))
        )
        single = np.concatenate([dots(name, n, rows, [0], x) for x in inputs])
        assert out.tobytes() == single.tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_sums_of_columns(level: str, name: str) -> None:
    rng = np.random.default_rng(3)
    for n in lengths(name):
        rows = random_rows(rng, name, 13, n)
        w, placed, (of_integers, alike, moved) = exact(name, rows), Rows(rows), parts(level, name, rows)
        for index in index_lists(rng, 13):
            a = rng.standard_normal(len(index)).astype(np.float32)
            y = axpys(name, n, placed, index, a)
            factors = a[:, None].astype(np.float64)
            wanted = (factors * w[index]).sum(axis=0)
            terms = factors * of_integers[index]
            sums, offsets = np.cumsum(terms, axis=0), np.cumsum(factors * alike[index], axis=0)
            # One rounding for each partial sum, one for factor times scale where integers share one, and one for each
            # product where there are no fused multiply-adds. What 32 values have in common adds up apart.
            roundings = np.abs(sums).sum(axis=0) + np.finfo(np.float32).tiny
            of_products = (name in SCALES_AT) + (level not in FUSED)
            roundings += of_products * np.abs(terms).sum(axis=0)
            if alike.any():  # of which the dequantised values themselves are rounded sums
                roundings += np.abs(offsets).sum(axis=0) + np.abs(wanted)
                roundings += (2 * np.abs(factors * alike[index]) + np.abs(factors * w[index])).sum(axis=0)
            if rounds_factors(level, name):  # what is added alike is itself a sum, of three terms
                roundings += 3 * np.abs(factors * (of_integers - moved)[index]).sum(axis=0)
                roundings += np.abs(factors * alike[index]).sum(axis=0)
            tolerance = EPSILON * 1.001 * roundings
            if rounds_factors(level, name):
                tolerance += BF16_EPSILON * 1.001 * np.abs(factors * moved[index]).sum(axis=0)
            assert (np.abs(y - wanted) <= tolerance).all(), (n, index)


@pytest.mark.parametrize("name", TYPES)
def test_sums_of_many_columns_are_close(level: str, name: str) -> None:
    """The error of the whole, relative to the size of what is added up."""
    rng = np.random.default_rng(8)
    rows = random_rows(rng, name, 400, 1024)
    a = rng.standard_normal(400).astype(np.float32)
    y = axpys(name, 1024, Rows(rows), range(400), a)
    of_integers, alike, moved = (a.astype(np.float64) @ part for part in parts(level, name, rows))
    rounds = rounds_factors(level, name)
    error = np.linalg.norm(y - (of_integers + alike)) / np.linalg.norm(moved if rounds else of_integers)
    assert error < (0.002 if rounds else 1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_results_do_not_depend_on_how_a_list_is_cut(level: str, name: str) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(4)
    n = lengths(name)[-1]
    rows = Rows(random_rows(rng, name, 23, n))
    x, _ = rounded(name, rng.standard_normal(n).astype(np.float32))
    index = rng.integers(0, 23, 41)
    a = rng.standard_normal(41).astype(np.float32)
    whole_dots, whole_y = dots(name, n, rows, index, x), axpys(name, n, rows, index, a)
    for cuts in ((1,), (3,), (4, 5), (2, 11, 17, 40)):
        parts = np.split(index, cuts)
        assert np.concatenate([dots(name, n, rows, part, x) for part in parts]).tobytes() == whole_dots.tobytes()
        assert axpys(name, n, rows, index, a, cuts).tobytes() == whole_y.tobytes()


@pytest.mark.parametrize("n", [1, 31, 32, 100, 1024])
def test_columns_of_integers_with_scales(level: str, n: int) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(5)
    integers = rng.integers(-128, 128, (9, n), np.int8)
    scales = (rng.standard_normal((2, n)) / 16).astype(np.float16)
    columns = Rows(integers.view(np.uint8))
    a, before = rng.standard_normal(9).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    lists = ffi.new("const uint16_t *[]", [ffi.from_buffer("uint16_t[]", scales[i % 2]) for i in range(9)])
    y = before.copy()
    floats = [ffi.cast("float *", ffi.from_buffer(v)) for v in (a, y)]
    lib.pi_kernel_axpys_scaled(n, columns.list(range(9)), lists, floats[0], 9, floats[1])
    w = integers * scales.astype(np.float64)[np.arange(9) % 2]
    terms = np.concatenate([before[None].astype(np.float64), a[:, None].astype(np.float64) * w])
    tolerance = EPSILON * 1.001 * np.abs(np.cumsum(terms, axis=0)[1:]).sum(axis=0)
    if level not in FUSED:
        tolerance += EPSILON * np.abs(terms).sum(axis=0)
    assert (np.abs(y - terms.sum(axis=0)) <= tolerance).all()


@pytest.mark.parametrize("name", TYPES)
def test_dequantising_is_exact(level: str, name: str) -> None:
    ffi, lib = native()
    rng = np.random.default_rng(6)
    for n, scale in [(n, scale) for n in lengths(name) for scale in (1.0, 1e-6)]:  # 1e-6: subnormal halves
        rows = random_rows(rng, name, 1, n, scale)
        y = np.full(n, np.nan, np.float32)
        lib.pi_kernel_dequantize(kind(name), n, ffi.from_buffer(rows), ffi.cast("float *", ffi.from_buffer(y)))
        np.testing.assert_array_equal(y, exact(name, rows)[0].astype(np.float32))


def test_fused_levels_add_columns_to_the_same_bits() -> None:
    ffi, lib = native()
    rng = np.random.default_rng(7)
    for name in TYPES:
        n = lengths(name)[-1]
        rows = Rows(random_rows(rng, name, 9, n))
        a = rng.standard_normal(9).astype(np.float32)
        usable = [level for level in FUSED if lib.pi_kernel_force(level.encode()) == 0]
        usable = [level for level in usable if not rounds_factors(level, name)]
        results = []
        for level in usable:
            lib.pi_kernel_force(level.encode())
            results.append(axpys(name, n, rows, range(9), a).tobytes())
        lib.pi_kernel_force(ffi.NULL)
        assert len(set(results)) <= 1, name


def test_unknown_levels_are_refused() -> None:
    ffi, lib = native()
    before = ffi.string(lib.pi_kernel_level())
    assert before.decode() in LEVELS
    assert lib.pi_kernel_force(b"abacus") == -1
    assert ffi.string(lib.pi_kernel_level()) == before


@pytest.mark.parametrize("wanted", ["portable", "abacus"])
def test_the_environment_chooses_a_level(wanted: str) -> None:
    program = "from powerinfer_ext.loader import native; f, c = native(); print(f.string(c.pi_kernel_level()).decode())"
    environment = {**os.environ, "POWERINFER_KERNELS": wanted, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    level = done.stdout.strip()
    assert (level == wanted) if wanted == "portable" else (level in LEVELS and "abacus" in done.stderr)


# ---- without Python: under sanitizers, and emulated ----------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
CHECK = ["tests/c/kernels_check.c", "cpatch/kernels.c"]
CHECK += [f"cpatch/kernels_{name}.c" for name in ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "neon")]
CHECK_FLAGS = ["-std=c11", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Icpatch"]


def levels_here() -> list[str]:
    """The levels that this CPU has."""
    ffi, lib = native()
    usable = [name for name in LEVELS if lib.pi_kernel_force(name.encode()) == 0]
    lib.pi_kernel_force(ffi.NULL)
    return usable


@pytest.mark.long
def test_the_kernels_are_clean(tmp_path: Path) -> None:
    """Rows of exactly their length on the heap, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    program = str(tmp_path / "check")
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["cc", *CHECK_FLAGS, *flags, *CHECK, "-lm", "-o", program], cwd=ROOT, check=True)
    for name in levels_here():
        done = subprocess.run([program, name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name


def tool(name: str, packages: str) -> str:
    """The path of a program that `make test-cross` needs; without it the test fails, and says what to install."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"needs {name} (Debian: apt install {packages})")
    return path


@pytest.mark.cross
@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod"])
def test_neon(tmp_path: Path, march: str) -> None:
    """The kernels of 64-bit ARM, cross-compiled and emulated (natively on such a machine)."""
    compiler = "cc" if ARM else tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    emulator = [] if ARM else [tool("qemu-aarch64", "qemu-user")]
    program = str(tmp_path / "check")
    command = [compiler, "-static", "-O2", f"-march={march}", *CHECK_FLAGS, *CHECK, "-lm", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("neon", "portable"):
        done = subprocess.run([*emulator, program, name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name


@pytest.mark.cross
def test_clang(tmp_path: Path) -> None:
    """Every source compiles with clang, without a warning, and its kernels compute the same."""
    clang = tool("clang", "clang libomp-dev")
    spec = importlib.util.spec_from_file_location("cpatch_build", ROOT / "cpatch" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for source in build.SOURCES:
        command = [clang, *build.CFLAGS, "-Icpatch", "-c", source, "-o", tmp_path / "object"]
        subprocess.run(command, cwd=ROOT, check=True)
    program = str(tmp_path / "check")
    subprocess.run([clang, "-O3", *CHECK_FLAGS, *CHECK, "-lm", "-o", program], cwd=ROOT, check=True)
    for name in levels_here():
        done = subprocess.run([program, name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name
