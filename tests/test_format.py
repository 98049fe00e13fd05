"""The GGUF reader and writer, the sparse-GGUF view and the virtual header, against files made by hand."""

from __future__ import annotations

import os
import shutil
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from handmade import QT, Raw, string, tiny_model

from gguf_tools import ConversionError, FormatError, GGUFFile, SparseGGUF, convert, is_sparse, sparse
from gguf_tools.reader import BOOL, I32, STRING, U32, U64, Field
from gguf_tools.virtual import ModelFiles, virtual_header
from gguf_tools.writer import GGUFWriter, NewTensor


def write(path: Path, raw: Raw | bytes) -> Path:
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


# ---- reader: sound files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_is_there(tmp_path, version):
    with GGUFFile.open(write(tmp_path / "m.gguf", Raw(version=version))) as file:
        assert file.version == version
        assert dict(file.metadata) == {
            "general.architecture": "llama",
            "tiny.flag": True,
            "tiny.words": ["one", "two"],
            "tiny.numbers": [1.0, 2.0, 3.0],
        }
        assert list(file.tensors) == ["a", "b", "c"]
        assert (file.tensors["a"].shape, file.tensors["a"].type, file.tensors["a"].nbytes) == ((8, 2), 0, 64)
        assert file.data("a") == bytes(range(64))
        assert file.data("b") == bytes(range(34))
        assert file.tensors["c"].offset == file.data_start + 128
        assert file.alignment == 32
        assert file.data_end == file.size


def test_agrees_with_the_gguf_package(tmp_path):
    model = tiny_model(tmp_path / "m.gguf", n_expert=3, alignment=64, ggml_type=QT.Q8_0)
    theirs = gguf.GGUFReader(model.path)
    with GGUFFile.open(model.path) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (tuple(tensor.shape), tensor.data_offset, tensor.n_bytes) == (
                mine.shape,
                mine.offset,
                mine.nbytes,
            )
            assert ours.data(tensor.name) == model.tensors[tensor.name].tobytes()
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert ours.metadata[key] == field.contents()


def test_every_value_type_survives_rewriting(tmp_path):
    scalars = [(t, v) for t, v in zip(range(8), (200, -5, 60000, -5, 1 << 31, -5, 0.1, True), strict=True)]
    fields = [Field.scalar(f"s{t}", t, v) for t, v in [*scalars, (8, "wörter"), (10, 1 << 63), (11, -1), (12, 0.1)]]
    fields += [Field.array(f"a{t}", t, [v, v]) for t, v in [*scalars, (8, ""), (10, 7), (11, -1), (12, 0.1)]]
    fields += [Field.array("none", U32, [])]
    with GGUFWriter(tmp_path / "m.gguf", fields, [NewTensor("t", 24, (3,))], alignment=32) as writer:
        writer.begin("t")
        writer.write(b"abc")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert list(file.fields.values()) == fields
        assert file.metadata["s8"] == "wörter" and file.metadata["a12"] == [0.1, 0.1] and file.metadata["none"] == []
        again = [Field(f.name, f.type, f.item_type, f.count, f.raw) for f in file.fields.values()]
    with GGUFWriter(tmp_path / "n.gguf", again, [NewTensor("t", 24, (3,))], alignment=32) as writer:
        writer.begin("t")
        writer.write(b"abc")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()


def test_large_vocabularies_are_fast(tmp_path):
    words = [f"token-{i}" for i in range(150_000)]
    fields = [
        Field.array("tokenizer.ggml.tokens", STRING, words),
        Field.array("tokenizer.ggml.merges", STRING, words),
    ]
    with GGUFWriter(tmp_path / "m.gguf", fields, [], alignment=32):
        pass
    started = time.process_time()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["tokenizer.ggml.merges"][-1] == words[-1]
    assert time.process_time() - started < 1.0


def test_strings_that_are_not_utf8_are_kept_as_they_are(tmp_path):
    raw = Raw(fields=[("k", struct.pack("<I", 8) + string(b"\xff\xfe"))])
    with GGUFFile.open(write(tmp_path / "m.gguf", raw)) as file:
        assert file.fields["k"].raw == string(b"\xff\xfe")
        assert file.metadata["k"] == "\ufffd\ufffd"


# ---- reader: broken files ----------------------------------------------------------------------------------

U32_VALUE = struct.pack("<II", 4, 1)


def tensors(*changed: tuple) -> dict:
    return {"tensors": list(changed)}


BROKEN = {
    "magic": (dict(magic=b"GGML"), "magic: not a GGUF"),
    "big-endian magic": (dict(magic=b"FUGG"), "big-endian"),
    "big-endian version": (dict(version=3 << 24), "version: this is a big-endian"),
    "version 1": (dict(version=1), "version: GGUF version 1"),
    "version 4": (dict(version=4), "version: GGUF version 4"),
    "too many tensors": (dict(n_tensors=1 << 40), "tensor_count"),
    "too many keys": (dict(n_fields=1 << 63), "metadata_kv_count"),
    "one key too many": (dict(n_fields=5), "length of name of tensor 0"),
    "key twice": (dict(fields=[("k", U32_VALUE), ("k", U32_VALUE)]), "key 'k': appears twice"),
    "empty key": (dict(fields=[("", U32_VALUE)]), "length of key 0"),
    "long key": (dict(fields=[("k" * 65536, U32_VALUE)]), "length of key 0"),
    "key not UTF-8": (dict(fields=[(b"\xff", U32_VALUE)]), "key 0"),
    "key with a zero byte": (dict(fields=[("a\0b", U32_VALUE)]), "zero byte"),
    "value type": (
        dict(fields=[("k", struct.pack("<II", 13, 1))]),
        "value of key 'k': unknown value type 13",
    ),
    "array of arrays": (dict(fields=[("k", struct.pack("<IIQ", 9, 9, 1))]), "'k': an array of arrays"),
    "array item type": (dict(fields=[("k", struct.pack("<IIQ", 9, 77, 1))]), "'k': unknown value type 77"),
    "array length": (
        dict(fields=[("k", struct.pack("<IIQ", 9, 4, 1 << 60))]),
        "'k': 1152921504606846976 elements",
    ),
    "string length": (dict(fields=[("k", struct.pack("<IQ", 8, 1 << 62))]), "value of key 'k'"),
    "bool of 2": (dict(fields=[("k", struct.pack("<IB", 7, 2))]), "'k': a bool"),
    "alignment 0": (dict(fields=[("general.alignment", struct.pack("<II", 4, 0))]), "general.alignment: 0"),
    "alignment 24": (
        dict(fields=[("general.alignment", struct.pack("<II", 4, 24))]),
        "general.alignment: 24",
    ),
    "alignment huge": (
        dict(fields=[("general.alignment", struct.pack("<II", 4, 1 << 31))]),
        "general.alignment",
    ),
    "alignment type": (
        dict(fields=[("general.alignment", struct.pack("<IQ", 10, 32))]),
        "has type u64, expected u32",
    ),
    "tensor twice": (tensors(("a", [16], 0, 0), ("a", [16], 0, 64)), "tensor 'a': appears twice"),
    "tensor without a name": (tensors(("", [16], 0, 0)), "length of name of tensor 0"),
    "tensor name too long": (tensors(("t" * 64, [16], 0, 0)), "length of name of tensor 0: 64 bytes"),
    "no dimensions": (tensors(("a", [], 0, 0)), "n_dims of tensor 'a': 0"),
    "five dimensions": (tensors(("a", [1, 1, 1, 1, 1], 0, 0)), "n_dims of tensor 'a': 5"),
    "dimension 0": (tensors(("a", [16, 0], 0, 0)), "shape of tensor 'a'"),
    "dimension negative": (tensors(("a", [(1 << 64) - 1], 0, 0)), "shape of tensor 'a'"),
    "shape overflows": (tensors(("a", [1 << 32, 1 << 32], 0, 0)), "shape of tensor 'a'"),
    "unknown type": (tensors(("a", [16], 4, 0)), "type of tensor 'a': unknown ggml type 4"),
    "half a block": (
        tensors(("a", [48], 8, 0)),
        "shape of tensor 'a': rows of 48 values are not a multiple of the Q8_0",
    ),
    "larger than the file": (tensors(("a", [1 << 40], 0, 0)), "offset of tensor 'a'"),
    "offset outside": (tensors(("a", [16], 0, 1 << 40)), "offset of tensor 'a'"),
    "offset unaligned": (
        tensors(("a", [2], 0, 0), ("b", [2], 0, 8)),
        "offset of tensor 'b': 8 is not a multiple",
    ),
    "overlap": (tensors(("a", [16], 0, 0), ("b", [16], 0, 32)), "offset of tensor 'b': 32 overlaps"),
    "same place": (tensors(("a", [16], 0, 0), ("b", [16], 0, 0)), "offset of tensor 'b': 0 overlaps"),
    "hole": (tensors(("a", [16], 0, 0), ("b", [2], 0, 96)), "offset of tensor 'b': 96 leaves a hole"),
    "past the end": (tensors(("a", [16], 0, 0), ("b", [20], 0, 64)), "data of tensor 'b': ends at byte"),
    "no data at all": (dict(data=b""), "data of tensor 'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_field_by_field(tmp_path, case):
    change, message = BROKEN[case]
    path = write(tmp_path / "broken.gguf", Raw(**change))
    with pytest.raises(FormatError) as error:
        GGUFFile.open(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_truncation_at_every_byte(tmp_path):
    whole = Raw().encode()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.gguf: \S"):
            GGUFFile.open(path)
    path.write_bytes(whole)
    GGUFFile.open(path).close()


def test_names_cannot_control_the_terminal(tmp_path):
    path = write(tmp_path / "m.gguf", Raw(fields=[("\x1b[2Jk", struct.pack("<II", 99, 1))]))
    with pytest.raises(FormatError) as error:
        GGUFFile.open(path)
    assert "\x1b" not in str(error.value)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(FormatError, match="not a regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="not a regular file"):
        GGUFFile.open(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(tmp_path / "nothing")
    with pytest.raises(FormatError, match="magic"):
        GGUFFile.open(write(tmp_path / "empty", b""))


def test_no_descriptor_leaks(tmp_path):
    good, bad = write(tmp_path / "good", Raw()), write(tmp_path / "bad", Raw(version=9))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        GGUFFile.open(good).close()
        GGUFFile.open(good)  # closed when collected
        with pytest.raises(FormatError):
            GGUFFile.open(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_changes_after_opening_are_noticed(tmp_path):
    path = write(tmp_path / "m.gguf", Raw())
    with GGUFFile.open(path) as file:
        file.check_unchanged()
        os.utime(path, ns=(1, 1))
        with pytest.raises(FormatError, match="changed after it was opened"):
            file.check_unchanged()
    with GGUFFile.open(path) as file:
        shutil.copy2(path, tmp_path / "other")
        os.rename(tmp_path / "other", path)  # another inode, same size and time
        with pytest.raises(FormatError, match="changed"):
            file.check_unchanged()
    with GGUFFile.open(path) as file:
        os.unlink(path)
        with pytest.raises(FormatError, match="changed"):
            file.check_unchanged()
    path = write(tmp_path / "m.gguf", Raw())
    with GGUFFile.open(path) as file:
        os.truncate(path, file.size - 100)
        with pytest.raises(FormatError, match="truncated meanwhile"):
            file.data("c")


# ---- writer ------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writer_is_atomic(tmp_path):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"precious")
    tensor = NewTensor("t", 24, (4,))

    def begun():
        return GGUFWriter(target, [], [tensor], alignment=32)

    with pytest.raises(KeyboardInterrupt), begun() as writer:
        writer.begin("t")
        writer.write(b"ab")
        assert len(leftovers(tmp_path)) == 2
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="0 of 1 tensors"), begun():
        pass
    with pytest.raises(ValueError, match="only 1 of 1"), begun() as writer:
        writer.begin("t")
        writer.write(b"abc")
    with pytest.raises(ValueError, match="1 bytes too many"), begun() as writer:
        writer.begin("t")
        writer.write(b"abcde")
    with pytest.raises(ValueError, match="other written where t was declared"), begun() as writer:
        writer.begin("other")
    assert target.read_bytes() == b"precious" and leftovers(tmp_path) == ["m.gguf"]
    with begun() as writer:
        writer.begin("t")
        writer.write(b"ab")
        writer.write(b"cd")
        assert target.read_bytes() == b"precious"
    with GGUFFile.open(target) as file:
        assert file.data("t") == b"abcd"
    assert leftovers(tmp_path) == ["m.gguf"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_writer_says_why_it_cannot(tmp_path, monkeypatch):
    def attempt(path):
        with GGUFWriter(path, [], [NewTensor("t", 24, (5_000_000,))], alignment=32) as writer:
            writer.begin("t")
            writer.write(bytes(5_000_000))

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConversionError, match="not a regular file is there"):
        attempt(tmp_path / "folder")
    with pytest.raises(ConversionError, match="cannot be written: No such file"):
        attempt(tmp_path / "missing" / "m.gguf")
    with pytest.raises(ConversionError, match="cannot be written: Not a directory"):
        attempt(tmp_path / "file" / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 4_000_000))
        with pytest.raises(ConversionError, match=r"m\.gguf: needs 5\.0 MB but its disk has 4\.0 MB free"):
            attempt(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        written = os.write

        def full(fd, data):
            if len(data) > 1 << 20:
                raise OSError(28, "No space left on device")
            return written(fd, data)

        patch.setattr(os, "write", full)
        with pytest.raises(ConversionError, match=r"m\.gguf: cannot be written: No space left"):
            attempt(tmp_path / "m.gguf")
    assert leftovers(tmp_path) == ["file", "folder"]


# ---- sparse-GGUF -------------------------------------------------------------------------------------------


@pytest.fixture
def gated(tmp_path):
    model = tiny_model(tmp_path / "gated.gguf", ggml_type=QT.F16)
    convert(model.path, tmp_path / "gated.sparse.gguf")
    return tmp_path / "gated.sparse.gguf"


@pytest.fixture
def experts(tmp_path):
    model = tiny_model(tmp_path / "moe.gguf", gated=False, n_expert=3, layers=(0, 2))
    convert(model.path, tmp_path / "moe.sparse.gguf")
    return tmp_path / "moe.sparse.gguf"


def test_sparse_view(gated, experts):
    with SparseGGUF.open(gated) as view:
        assert (view.activation, view.gated, view.segments) == ("silu", True, ["up", "down"])
        assert view.source_name == "gated.gguf" and view.source_alignment == 0
        layer = view.layers[1]
        assert (layer.index, layer.n_embd, layer.n_ff, layer.n_expert) == (1, 64, 96, 0)
        assert (layer.up_offset, layer.down_offset, layer.stride) == (0, 128, 256)
        assert layer.bundle.shape == (256, 96) and layer.bundle.offset % 4096 == 0
        assert layer.order.tolist() == [list(range(96))] and layer.order.dtype == np.int32
        assert layer.frequency is None
    with SparseGGUF.open(experts) as view:
        assert (view.activation, view.gated, view.segments) == ("relu2", False, ["down"])
        assert [layer.index for layer in view.layers] == [0, 2]
        layer = view.layers[0]
        assert (layer.n_expert, layer.up_type, layer.down_offset, layer.stride) == (3, None, 0, 256)
        assert layer.bundle.shape == (256, 96, 3) and layer.order.shape == (3, 96)


def rewrite(path: Path, *, fields=None, drop=(), tensors=None, rename=None) -> Path:
    """The sparse file with some fields replaced, dropped or added, and some tensors replaced (name: type,
    shape, data).
    """
    out = path.with_name("changed.gguf")
    with GGUFFile.open(path) as file:
        kept = {name: field for name, field in file.fields.items() if name not in drop}
        kept |= {field.name: field for field in fields or []}
        parts = {}
        for t in file.tensors.values():
            if t.name not in drop:
                parts[(rename or {}).get(t.name, t.name)] = (t.type, t.shape, bytes(file.data(t.name)))
        parts |= tensors or {}
        alignment = kept["general.alignment"].value
        infos = [NewTensor(name, *part[:2]) for name, part in parts.items()]
        with GGUFWriter(out, kept.values(), infos, alignment=alignment) as writer:
            for name, part in parts.items():
                writer.begin(name)
                writer.write(part[2])
    return out


def text(key, value):
    return {"fields": [Field.scalar(key, STRING, value)]}


def number(key, value, kind=U32):
    return {"fields": [Field.scalar(key, kind, value)]}


def row(key, values, kind=I32):
    return {"fields": [Field.array(key, kind, values)]}


ORDER = "blk.1.ffn_order.weight"
TWICE = np.r_[0, 0, 2:96].astype("<i4")
BAD_SPARSE = {
    "newer version": (
        number("powerinfer.version", 3),
        "powerinfer.version: 3, but this build reads sparse-GGUF versions 1 to 2",
    ),
    "version 0": (number("powerinfer.version", 0), "powerinfer.version: 0"),
    "version type": (number("powerinfer.version", 1, U64), "powerinfer.version: has type u64, expected u32"),
    "no version": ({"drop": ["powerinfer.version"]}, "powerinfer.version: is missing"),
    "no architecture": ({"drop": ["general.architecture"]}, "general.architecture: is missing"),
    "alignment": (number("general.alignment", 32), "general.alignment: 32"),
    "activation": (text("powerinfer.activation", "tanh"), "powerinfer.activation: 'tanh'"),
    "no activation": ({"drop": ["powerinfer.activation"]}, "powerinfer.activation: is missing"),
    "segments": (row("powerinfer.bundle.segments", ["down", "up"], STRING), "powerinfer.bundle.segments"),
    "segments lack up": (
        row("powerinfer.bundle.segments", ["down"], STRING),
        "powerinfer.bundle.up.type: is present",
    ),
    "align": (number("powerinfer.bundle.align", 32), "powerinfer.bundle.align"),
    "sha256": (text("powerinfer.source.sha256", "0" * 63), "powerinfer.source.sha256"),
    "source alignment": (number("powerinfer.source.alignment", 48), "powerinfer.source.alignment: 48"),
    "source version": (number("powerinfer.source.gguf_version", 1), "powerinfer.source.gguf_version: 1"),
    "no bundles": (row("powerinfer.bundle.tensors", [], STRING), "powerinfer.bundle.tensors: is empty"),
    "bundle name": (row("powerinfer.bundle.tensors", ["x", "y"], STRING), "powerinfer.bundle.tensors: 'x'"),
    "bundle twice": (
        row("powerinfer.bundle.tensors", ["blk.0.ffn_bundle.weight"] * 2, STRING),
        "is not in layer order",
    ),
    "bundle order": (
        row("powerinfer.bundle.tensors", ["blk.1.ffn_bundle.weight", "blk.0.ffn_bundle.weight"], STRING),
        "is not in layer order",
    ),
    "counts differ": (
        row("powerinfer.bundle.down.type", [1]),
        "powerinfer.bundle.down.type: has 1 entries for 2",
    ),
    "down type unknown": (
        row("powerinfer.bundle.down.type", [1, 99]),
        "powerinfer.bundle.down.type: unknown ggml type 99",
    ),
    "down type block": (
        row("powerinfer.bundle.down.type", [1, 12]),
        "powerinfer.bundle.down.type: Q4_K has blocks of 256",
    ),
    "source type block": (row("powerinfer.bundle.down.source_type", [1, 12]), "n_ff of 96"),
    "up type": (row("powerinfer.bundle.up.type", [1, -1]), "powerinfer.bundle.up.type: unknown ggml type -1"),
    "up type i64": (row("powerinfer.bundle.up.type", [1, 1], 11), "has type arr[i64], expected arr[i32]"),
    "stride": (row("powerinfer.bundle.stride", [256, 192], U64), "powerinfer.bundle.stride: 192 bytes"),
    "types against stride": (
        row("powerinfer.bundle.down.type", [1, 0]),
        "powerinfer.bundle.stride: 256 bytes",
    ),
    "hot count": (row("powerinfer.hot.count", [0, 97], U32), "powerinfer.hot.count: 97 hot neurons"),
    "bundle missing": ({"drop": ["blk.1.ffn_bundle.weight"]}, "tensor 'blk.1.ffn_bundle.weight': is missing"),
    "bundle type": (
        {"tensors": {"blk.1.ffn_bundle.weight": (0, (64, 96), bytes(64 * 96 * 4))}},
        "type of tensor blk.1.ffn_bundle.weight: F32, expected I8",
    ),
    "bundle shape": (
        {"tensors": {"blk.1.ffn_bundle.weight": (24, (256, 95), bytes(256 * 95))}},
        "shape of tensor blk.1.ffn_bundle.weight: [256, 95], expected [256, 96]",
    ),
    "order missing": ({"drop": [ORDER]}, "tensor 'blk.1.ffn_order.weight': is missing"),
    "order shape": (
        {"tensors": {ORDER: (26, (95,), bytes(95 * 4))}},
        "shape of tensor blk.1.ffn_order.weight",
    ),
    "order type": ({"tensors": {ORDER: (0, (96,), bytes(96 * 4))}}, "type of tensor blk.1.ffn_order.weight"),
    "order twice": ({"tensors": {ORDER: (26, (96,), TWICE.tobytes())}}, "is not a permutation"),
    "order negative": ({"tensors": {ORDER: (26, (96,), (TWICE - 1).tobytes())}}, "is not a permutation"),
    "order beyond": (
        {"tensors": {ORDER: (26, (96,), np.arange(1, 97, dtype="<i4").tobytes())}},
        "permutation",
    ),
    "frequency shape": (
        {"tensors": {"blk.1.ffn_freq.weight": (0, (4,), bytes(16))}},
        "shape of tensor blk.1.ffn_freq.weight",
    ),
    "gate missing": ({"drop": ["blk.1.ffn_gate.weight"]}, "tensor 'blk.1.ffn_gate.weight': is missing"),
    "gate shape": (
        {"tensors": {"blk.1.ffn_gate.weight": (1, (64, 95), bytes(64 * 95 * 2))}},
        "ffn_bundle.weight: [256, 96]",
    ),
    "gate dimensions": (
        {"tensors": {"blk.1.ffn_gate.weight": (1, (64, 96, 2), bytes(64 * 96 * 4))}},
        "not that of an FFN matrix",
    ),
    "up beside the bundle": (
        {"tensors": {"blk.1.ffn_up.weight": (24, (1,), b"x")}},
        "tensor blk.1.ffn_up.weight: is present although",
    ),
    "tensor lost": ({"drop": ["token_embd.weight"]}, "names 'token_embd.weight', which is neither"),
    "source list incomplete": (
        row("powerinfer.source.tensors", ["token_embd.weight"], STRING),
        "powerinfer.source.tensors: lacks",
    ),
    "source list twice": (row("powerinfer.source.tensors", ["a", "a"], STRING), "names a tensor twice"),
}


@pytest.mark.parametrize("case", BAD_SPARSE)
def test_bad_sparse_files_are_named_field_by_field(gated, case):
    change, message = BAD_SPARSE[case]
    path = rewrite(gated, **change)
    with pytest.raises(FormatError) as error:
        SparseGGUF.open(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SCALE = "blk.1.ffn_down_scale_exps.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": [SCALE]}, f"tensor '{SCALE}': is missing"),
        ({"tensors": {SCALE: (0, (64, 3, 3), bytes(64 * 9 * 4))}}, f"type of tensor {SCALE}: F32, expected F16"),
        ({"tensors": {SCALE: (1, (64, 96, 3), bytes(64 * 96 * 3 * 2))}}, f"shape of tensor {SCALE}"),
        (row("powerinfer.bundle.down.source_type", [8, 1]), "I8 columns for blk.1.ffn_bundle_exps.weight"),
    ],
    ids=["missing", "type", "shape", "source type"],
)
def test_columns_of_integers_need_their_scales(tmp_path, change, message):
    model = tiny_model(tmp_path / "m.gguf", ggml_type=QT.Q8_0, n_expert=3)
    convert(model.path, tmp_path / "s.gguf")
    with SparseGGUF.open(tmp_path / "s.gguf") as view:
        assert view.layers[1].scale_tensor.shape == (64, 3, 3)
    with pytest.raises(FormatError) as error:
        SparseGGUF.open(rewrite(tmp_path / "s.gguf", **change))
    assert message in str(error.value)


def test_drelu_needs_a_gate(experts):
    with pytest.raises(FormatError, match="drelu needs a gate"):
        SparseGGUF.open(rewrite(experts, **text("powerinfer.activation", "drelu")))


def test_unknown_extensions_are_ignored(gated):
    path = rewrite(
        gated,
        fields=[
            Field.scalar("powerinfer.predictor.kind", STRING, "low-rank"),
            Field.array("powerinfer.hot.count", U32, [3, 96]),
            Field.scalar("powerinfer.bundle.someday", BOOL, True),
        ],
        tensors={
            "blk.0.ffn_pred_a.weight": (0, (4, 4), bytes(64)),
            "blk.1.ffn_freq.weight": (0, (96,), np.linspace(1, 0, 96, dtype="<f4").tobytes()),
        },
    )
    with SparseGGUF.open(path) as view:
        assert [layer.hot_count for layer in view.layers] == [3, 96]
        assert view.layers[0].frequency is None and view.layers[1].frequency[0, 0] == 1.0
        header, _ = virtual_header(ModelFiles(view.file, view))
    assert b"ffn_pred_a" not in header and b"ffn_freq" not in header and b"powerinfer." not in header


def test_is_sparse(gated, tmp_path):
    assert is_sparse(gated)
    assert is_sparse(rewrite(gated, **number("powerinfer.version", 7)))
    assert not is_sparse(tmp_path / "gated.gguf")
    with pytest.raises(FormatError):
        is_sparse(write(tmp_path / "junk", b"junk"))
    with pytest.raises(FormatError, match="this is not a sparse-GGUF; make one with: powerinfer convert"):
        SparseGGUF.open(tmp_path / "gated.gguf")


def test_layout_is_aligned():
    assert sparse.bundle_layout([8, 8], 64) == ((0, 128), 256)  # rows of 68 bytes
    assert sparse.bundle_layout([12], 512) == ((0,), 320)  # a row of 288 bytes
    assert sparse.bundle_layout([1, 0], 32) == ((0, 64), 192)
    assert sparse.bundle_layout([8, 8, 24], 64) == ((0, 128, 256), 320)


# ---- virtual header ----------------------------------------------------------------------------------------


def materialise(path: Path, view: SparseGGUF) -> Path:
    """The virtual file as a real one; what nobody reads (holes) is filled with 0xAA."""
    header, extents = virtual_header(ModelFiles(view.file, view))
    with path.open("wb") as out:
        out.write(header)
        at = len(header)
        for extent in extents:
            assert extent.virtual_offset >= at and extent.virtual_offset % 4096 == 0
            out.write(bytes(extent.virtual_offset - at))
            hole = extent.file_offset == -1
            out.write(b"\xaa" * extent.size if hole else view.file.pread(extent.file_offset, extent.size))
            at = extent.virtual_offset + extent.size
    return path


@pytest.mark.parametrize(
    "kind", [dict(), dict(gated=False), dict(n_expert=3), dict(n_expert=1), dict(gated=False, n_expert=2)]
)
@pytest.mark.parametrize("ggml_type", [QT.F16, QT.Q8_0])
def test_stock_is_shown_the_source(tmp_path, kind, ggml_type):
    model = tiny_model(
        tmp_path / "m.gguf",
        ggml_type=ggml_type,
        bias=True,
        hint="relu2" if "gated" in kind else "relu",
        **kind,
    )
    convert(model.path, tmp_path / "s.gguf", down_type="f32")  # another type than stock is shown
    with SparseGGUF.open(tmp_path / "s.gguf") as view, GGUFFile.open(model.path) as source:
        shown = materialise(tmp_path / "v.gguf", view)
        hidden = view.hidden_tensors()
        with GGUFFile.open(shown) as virtual:
            assert virtual.alignment == 4096
            ours = {k: f for k, f in virtual.fields.items() if k != "general.alignment"}
            assert ours == {k: f for k, f in source.fields.items() if not k.startswith("powerinfer.")}
            assert list(virtual.tensors) == list(source.tensors)
            for name, tensor in source.tensors.items():
                assert (virtual.tensors[name].type, virtual.tensors[name].shape) == (
                    tensor.type,
                    tensor.shape,
                )
                if name in hidden:
                    assert set(virtual.data(name)) == {0xAA}
                else:
                    assert virtual.data(name) == source.data(name)
        assert len(hidden) == len(model.layers) * (2 if model.gated else 1)
    names = [tensor.name for tensor in gguf.GGUFReader(shown).tensors]  # a second opinion on the header
    assert names == list(model.tensors)
