"""`powerinfer synth`: the models load in stock llama.cpp, and fire as they were told to."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from contextlib import closing
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gguf_tools import ConversionError, convert, shapes, synth
from gguf_tools.reader import GGUFFile, type_name
from powerinfer_ext import Llama

SPARSE = [name for name, shape in shapes.SHAPES.items() if shape.sparse]
DENSE = [name for name in shapes.SHAPES if name not in SPARSE]


def small(name: str, **changes: object) -> shapes.Shape:
    """A shape of the same family with few, short rows."""
    shape = shapes.SHAPES[name]
    reduced: dict[str, object] = {"n_embd": 512, "n_ff": 1024, "n_head": 4, "n_head_kv": 2, "n_vocab": 1500}
    reduced |= {"head_dim": 128, "n_layer": 4}
    if shape.n_expert:
        reduced |= {"n_expert": 8, "n_expert_used": 2, "n_ff": 512}
    if shape.n_ff_shared:
        reduced["n_ff_shared"] = 256
    if shape.mamba:
        reduced |= {"mamba": shapes.Mamba(512, 8, 2, 32, 4), "pattern": "ME*E"}
    return dataclasses.replace(shape, **{**reduced, **changes})


def random_tokens(llama: llama_cpp.Llama, n: int) -> list[int]:
    return np.random.default_rng(0).integers(0, llama.n_vocab(), n).tolist()


def measured(path: Path, tokens: int = 256) -> list[float]:
    """Per layer, the density that our engine counts on random tokens; the file is converted first."""
    sparse = path.with_suffix(".sparse.gguf")
    convert(path, sparse)
    settings = {"n_ctx": tokens, "n_batch": tokens, "n_ubatch": 128, "n_threads": 1, "n_threads_batch": 1}
    with closing(Llama(sparse, logits_all=True, verbose=False, **settings)) as llama:
        llama.eval(random_tokens(llama, tokens))
        layers = [layer["density"] for layer in llama.sparse_stats()["layers"]]
    sparse.unlink()
    return layers


def check_in_stock(path: Path) -> None:
    """Stock llama.cpp loads it, tokenises text and back, decodes, and gives logits that mean something."""
    settings = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "logits_all": True}
    with closing(llama_cpp.Llama(str(path), **settings)) as llama:
        ids = llama.tokenize("def f(x):\n\treturn x*x  # größer".encode(), add_bos=False)
        assert llama.detokenize(ids).decode().strip() == "def f(x):\n\treturn x*x  # größer"
        llama.eval(random_tokens(llama, 24))
        llama.eval([5])
        scores = llama.scores[:25]
        assert np.isfinite(scores).all()
        assert 1.5 < scores.std() < 6
        assert len(set(scores.argmax(axis=1).tolist())) > 10


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_stock_loads_the_family(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    report = synth.run(path, small(name), layers=max(2, small(name).least_layers))
    assert report.output_bytes == path.stat().st_size
    check_in_stock(path)


@pytest.mark.parametrize(
    ("name", "density"),
    [
        *(("llama2-7b", density) for density in (0.05, 0.1, 0.2, 0.5)),
        *(("nemotron-4b", density) for density in (0.05, 0.5)),
        *(("smallthinker-21b-a3b", density) for density in (0.05, 0.2)),
    ],
)
def test_the_density_asked_for_is_measured(name: str, density: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.run(path, small(name), layers=2, density=density)
    assert measured(path) == pytest.approx([density] * 2, rel=0.1)


@pytest.mark.parametrize("name", ["mistral-7b", "arcee-4.5b", "nemotron-4b", "smallthinker-21b-a3b"])
def test_every_neuron_fires_where_all_are_asked_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    report = synth.run(path, small(name), layers=2, density=1.0)
    assert report.density == 1 and report.skew == synth.COVERED
    check_in_stock(path)
    assert min(measured(path)) > 0.9999


def test_the_density_of_a_deep_hybrid(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = small("nemotron3-nano-30b-a3b", n_layer=16, pattern="MEMEM*EMEMEM*EME")
    synth.run(path, shape, density=0.1)
    assert measured(path) == pytest.approx([0.1] * 7, rel=0.1)


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K", "Q6_K"])
def test_the_density_in_every_type(quant: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.run(path, small("mistral-7b"), layers=1, density=0.1, quant=quant.lower())
    with GGUFFile.open(path) as file:
        assert type_name(file.tensors["blk.0.ffn_gate.weight"].type) == quant
    assert measured(path) == pytest.approx([0.1], rel=0.1)


def test_types_that_do_not_divide_a_row(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth.run(path, small("nemotron3-nano-30b-a3b", n_embd=672, n_ff=288), layers=3, quant="Q4_K")
    with GGUFFile.open(path) as file:
        assert type_name(file.tensors["blk.1.ffn_up_exps.weight"].type) in ("Q5_0", "Q4_K")
        assert {type_name(t.type) for t in file.tensors.values()} >= {"Q5_0", "Q4_K", "F32"}
    check_in_stock(path)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("skew", [None, 0.43, 0.8])
def test_the_power_law(density: float, skew: float | None) -> None:
    shape = shapes.SHAPES["llama2-7b"]
    if skew is not None and skew < synth.COVERED * density / synth.MOST_LIKELY + 0.01:
        with pytest.raises(ConversionError, match="skew must be between"):
            synth._check_density(shape, density, skew)
        return
    density, skew = synth._check_density(shape, density, skew)
    assert density is not None and skew is not None
    p = synth.firing_probabilities(11008, density, skew)
    assert p.mean() == pytest.approx(density, rel=1e-6)
    assert (np.diff(p) <= 0).all() and p[0] <= synth.MOST_LIKELY
    assert p[: round(skew * len(p))].sum() / p.sum() == pytest.approx(0.8, abs=0.005)


def test_neurons_follow_the_power_law(tmp_path: Path) -> None:
    from powerinfer_ext.trace import analyse, record

    path = tmp_path / "model.gguf"
    synth.run(path, small("arcee-4.5b"), layers=1, density=0.1, skew=0.26)
    result = analyse(record(str(path), None, tokens=768), policies=())
    assert result["density"] == pytest.approx(0.1, rel=0.1)
    assert result["skew"] == pytest.approx(0.26, abs=0.03)
    assert result["overlap"] > 1.05 * result["overlap_by_chance"]  # the context is shared by neighbours


def test_consecutive_tokens_share_experts(tmp_path: Path) -> None:
    from powerinfer_ext.trace import analyse, record

    path = tmp_path / "model.gguf"
    synth.run(path, small("qwen3-30b-a3b", n_expert=16), layers=2)
    result = analyse(record(str(path), None, tokens=512), policies=())
    assert result["density"] is None  # every neuron of an expert counts
    assert result["expert_skew"] < 0.7
    assert result["expert_overlap"] > 1.2 * result["expert_overlap_by_chance"]


def test_the_seed_decides_the_file_and_the_threads_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(seed: int) -> str:
        synth.run(tmp_path / "model.gguf", small("smallthinker-4b-a0.6b"), layers=1, seed=seed)
        return hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()

    first, other = digest(1), digest(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert digest(1) == first != other


def test_published_sizes() -> None:
    """The number of parameters of the whole models, in 10^9, as published (embeddings included)."""
    expected = {
        "llama2-7b": 6.74,
        "mistral-7b": 7.24,
        "llama2-13b": 13.02,
        "falcon-40b-like": 41.8,
        "arcee-4.5b": 4.62,
        "nemotron-4b": 4.19,
        "mixtral-8x7b": 46.7,
        "qwen3-30b-a3b": 30.5,
        "smallthinker-4b-a0.6b": 4.0,
        "smallthinker-21b-a3b": 21.5,
        "nemotron3-nano-30b-a3b": 31.6,
        "gpt-oss-20b": 20.9,
    }
    assert set(expected) == set(shapes.SHAPES)
    for name, billions in expected.items():
        shape = shapes.SHAPES[name]
        density, skew = synth._check_density(shape, None, None)
        plan = synth._Plan(shape, shape.n_layer, density, skew, "Q4_0", 0)
        plan.build()
        assert plan.parameters / 1e9 == pytest.approx(billions, rel=0.01), name


def test_a_hybrid_has_one_block_of_each_kind() -> None:
    shape = shapes.SHAPES["nemotron3-nano-30b-a3b"]
    assert len(shape.pattern) == shape.n_layer
    assert (shape.pattern.count("M"), shape.pattern.count("*"), shape.pattern.count("E")) == (23, 6, 23)
    for n_layer in range(shape.least_layers, 8):
        assert len(shape.blocks(n_layer)) == n_layer
        assert set(shape.blocks(n_layer)) == {shapes.MAMBA, shapes.ATTENTION, shapes.FFN}
        assert shape.blocks(n_layer)[0] == shapes.MAMBA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "llama3-8b"}, "there is no shape 'llama3-8b'; known: llama2-7b"),
        ({"shape": "llama2-7b", "layers": 33}, "can have 1 to 32 layers, not 33"),
        ({"shape": "nemotron3-nano-30b-a3b", "layers": 2}, "can have 3 .one of each kind of block. to 52"),
        ({"shape": "llama2-7b", "density": 0.0}, "density must be between 0.001 and 0.9, or 1, not 0"),
        ({"shape": "llama2-7b", "density": 0.95}, "density must be between"),
        ({"shape": "llama2-7b", "density": float("nan")}, "density must be between"),
        ({"shape": "mixtral-8x7b", "density": 0.1}, "computes silu, whose neurons are never silent"),
        ({"shape": "llama2-7b", "density": 0.5, "skew": 0.26}, "skew must be between 0.41 and 0.8"),
        ({"shape": "llama2-7b", "density": 1.0, "skew": 0.5}, "all are alike: skew is 0.8, not 0.5"),
        ({"shape": "llama2-7b", "quant": "mxfp4"}, "cannot be written as 'mxfp4'; choose one of F32"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        synth.run(tmp_path / "model.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 10_000_000})
    monkeypatch.setattr("gguf_tools.writer.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ConversionError, match="needs 3.* MB but its disk has 10.0 MB free"):
        synth.run(tmp_path / "model.gguf", "llama2-7b")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "smallthinker-4b-a0.6b", small("smallthinker-4b-a0.6b"))
    app = typer.Typer()
    app.command()(synth.command)
    path = tmp_path / "model.gguf"
    result = CliRunner().invoke(
        app, [str(path), "--shape", "smallthinker-4b-a0.6b", "--layers", "1", "--density", "0.2", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert '"density": 0.2' in result.stdout and '"layers": 1' in result.stdout
    with GGUFFile.open(path) as file:
        assert file.metadata["smallthinker.block_count"] == 1


@pytest.mark.long
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("name", SPARSE)
def test_every_shape_at_full_width(name: str, density: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = shapes.SHAPES[name]
    layers = 4 if shape.pattern else 1 if name == "falcon-40b-like" else 2
    synth.run(path, shape, layers=layers, density=density)
    if density == 0.1:
        check_in_stock(path)
    found = measured(path)
    path.unlink()  # pytest would keep a gigabyte for each
    assert found == pytest.approx([density] * len(found), rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", DENSE)
def test_every_dense_shape_at_full_width(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    report = synth.run(path, name, layers=1)
    check_in_stock(path)
    path.unlink()
    assert report.bytes_per_second > 100e6
