"""Mutated, spliced and truncated files: whatever they hold, the answer is a result or one of our two
exceptions.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from handmade import QT, Raw, tiny_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gguf_tools import ConversionError, FormatError, GGUFFile, SparseGGUF, convert, export, is_sparse
from gguf_tools.inspect import inspect
from gguf_tools.virtual import ModelFiles, virtual_header

FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Values that break arithmetic: limits of each width, and one off.
EXTREMES = [
    v % (1 << 64) for b in (7, 8, 15, 16, 31, 32, 62, 63, 64) for v in ((1 << b) - 1, 1 << b, -(1 << b))
]

changes = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 1 << 20), st.integers(0, 255)),
        st.tuples(st.just("word"), st.integers(0, 1 << 20), st.sampled_from([0, 1, 2, 3, *EXTREMES])),
        st.tuples(
            st.just("half"), st.integers(0, 1 << 20), st.sampled_from([0, 1, 2, 9, 24, 30, 0x7FFFFFFF])
        ),
        st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 1 << 20), st.integers(1, 64)),
        st.tuples(st.just("copy"), st.integers(0, 1 << 20), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(raw: bytes, header: int, changes: list[tuple[str, int, int]]) -> bytes:
    """`raw` after the changes, each at a place in its header (bytes below `header`)."""
    out = bytearray(raw)
    for kind, place, value in changes:
        at = place % max(1, min(header, len(out)))
        if kind == "byte":
            out[at : at + 1] = bytes([value])
        elif kind == "word":
            out[at : at + 8] = struct.pack("<Q", value)
        elif kind == "half":
            out[at : at + 4] = struct.pack("<I", value)
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + value]
        elif kind == "copy":
            out[at:at] = out[at : at + value]
    return bytes(out)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> dict[str, tuple[bytes, int]]:
    """Name -> bytes of a sound file, length of its header."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "hand").write_bytes(Raw().encode())
    small = dict(n_embd=32, n_ff=32, layers=(0, 1), bias=True)
    tiny_model(folder / "dense", ggml_type=QT.F16, hint="drelu", **small)
    tiny_model(folder / "experts", gated=False, n_expert=2, ggml_type=QT.Q8_0, **small)
    convert(folder / "dense", folder / "dense.sparse")
    convert(folder / "experts", folder / "experts.sparse")
    seeds = {}
    for path in folder.iterdir():
        with GGUFFile.open(path) as file:
            seeds[path.name] = (path.read_bytes(), file.header_end)
    return seeds


def exercise(path: Path) -> None:
    """Use everything that reads, whether it makes sense for this file or not."""
    try:
        with GGUFFile.open(path) as file:
            assert len(repr(dict(file.metadata))) >= 2
            for tensor in file.tensors.values():
                assert len(file.data(tensor.name)) == tensor.nbytes
    except FormatError as error:
        sentence(error, path)
    for action in (is_sparse, inspect):
        try:
            action(path)
        except FormatError as error:
            sentence(error, path)
    try:
        with SparseGGUF.open(path) as view:
            header, extents = virtual_header(ModelFiles(view.file, view))
            assert extents[0].virtual_offset == len(header)
            for extent in extents:
                assert extent.file_offset == -1 or extent.file_offset + extent.size <= view.file.size
            for layer in view.layers:
                assert layer.order.shape == (max(1, layer.n_expert), layer.n_ff)
                assert layer.frequency is None or layer.frequency.shape == layer.order.shape
                assert layer.bundle.offset + layer.bundle.nbytes <= view.file.size
                assert layer.down_offset < layer.stride and layer.bundle.shape[0] == layer.stride
    except FormatError as error:
        sentence(error, path)


def sentence(error: Exception, path: Path) -> None:
    assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("name", ["hand", "dense", "dense.sparse", "experts.sparse"])
@FUZZ
@given(changes=changes)
@example(changes=[("cut", 0, 0)])
def test_reading(tmp_path, seeds, name, changes):
    raw, header = seeds[name]
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(mutate(raw, header, changes))
    exercise(path)


@pytest.mark.parametrize("name", ["dense", "experts"])
@settings(FUZZ, max_examples=60)
@given(changes=changes, down_type=st.sampled_from(["auto", "same", "f32", "q4_0"]))
def test_converting(tmp_path, seeds, name, changes, down_type):
    raw, header = seeds[name]
    path, output = tmp_path / "fuzzed.gguf", tmp_path / "out.gguf"
    path.write_bytes(mutate(raw, header, changes))
    output.unlink(missing_ok=True)
    try:
        convert(path, output, down_type=down_type)
        SparseGGUF.open(output).close()  # what we write, we read
    except (FormatError, ConversionError) as error:
        assert not output.exists()
        assert "\n" not in str(error)
    assert {p.name for p in tmp_path.iterdir()} <= {"fuzzed.gguf", "out.gguf"}


@pytest.mark.parametrize("name", ["dense.sparse", "experts.sparse"])
@settings(FUZZ, max_examples=60)
@given(changes=changes)
def test_exporting(tmp_path, seeds, name, changes):
    raw, header = seeds[name]
    path, output = tmp_path / "fuzzed.gguf", tmp_path / "out.gguf"
    path.write_bytes(mutate(raw, header, changes))
    output.unlink(missing_ok=True)
    try:
        export(path, output)
        GGUFFile.open(output).close()
    except (FormatError, ConversionError) as error:
        assert not output.exists()
        assert "\n" not in str(error)
    assert {p.name for p in tmp_path.iterdir()} <= {"fuzzed.gguf", "out.gguf"}


@settings(FUZZ, max_examples=300)
@given(
    raw=st.binary(max_size=200),
    prefix=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0\1" + bytes(7)]),
)
def test_arbitrary_bytes(tmp_path, raw, prefix):
    path = tmp_path / "noise.gguf"
    path.write_bytes(prefix + raw)
    exercise(path)


@pytest.mark.parametrize("name", ["dense.sparse", "experts.sparse"])
def test_truncated_sparse_files(tmp_path, seeds, name):
    """Every byte of the last page of the header, and every 97th before it and after it, is missing from there
    on.
    """
    raw, header = seeds[name]
    path = tmp_path / "cut.gguf"
    with pytest.raises(FormatError):
        path.write_bytes(raw[: header - 1])
        SparseGGUF.open(path)
    end = len(raw.rstrip(b"\0"))
    for size in sorted({*range(0, end, 97), *range(max(0, header - 500), header + 1)}):
        path.write_bytes(raw[:size])
        with pytest.raises(FormatError):
            SparseGGUF.open(path)
