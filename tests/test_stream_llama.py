"""Models that are streamed from flash, through llama.cpp: the logits of resident ones bit for bit, whatever the
cache, the I/O engine, the split and the family; and reads that fail, which end an answer and nothing else."""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from every_mixture import ARCHITECTURES, make_mixture, metadata, tensors_of
from test_llama import write_lora
from tiny_models import make

import powerinfer_ext
from gguf_tools import convert, quants
from gguf_tools.convert import Calibrated, Calibration
from gguf_tools.predictor import Predictor
from powerinfer_ext import Llama, PowerInferError, loader, placement
from powerinfer_ext.models import bundled
from powerinfer_ext.placement import Bundles, Placement

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("io_uring", "threads")
F32 = 0
SETTINGS: dict[str, Any] = {
    "n_ctx": 128,
    "n_threads": 2,
    "n_threads_batch": 2,
    "verbose": False,
    "logits_all": True,
    "type_k": F32,  # in an F16 cache a difference of 1e-7 can become a rounding step
    "type_v": F32,
}
ALL = 1 << 30


@contextmanager
def slots(units: int, *, hot: int = 0, deciders: bool = False, prefetch: bool = True) -> Iterator[None]:
    """Models loaded meanwhile are streamed with so many slots for each matrix and for each layer's neurons."""

    def place(model: Any, memory: Any, context: Any) -> Placement:
        sources = {tensor.name: tensor for tensor in model.tensors()}
        layers = [Bundles(layer) for layer in (model.sparse.layers if model.sparse is not None else [])]
        layers = [replace(b, slots=min(units, b.units), hot=hot if hot < units < b.units else 0) for b in layers]
        if model.sparse is None:
            matrices = placement._stock_matrices(sources.values())
        else:
            matrices = placement._decider_matrices(layers, sources) if deciders else []
        matrices = [replace(m, slots=min(units, m.units)) for m in matrices]
        embedding = placement._embedding(sources)
        if embedding is not None:
            matrices.append(replace(embedding, slots=min(units, embedding.units)))
        return Placement(1 << 40, layers, [*matrices, *placement._routers(model, sources, matrices)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "place", place)
        patch.setattr(loader, "TRANSIT", 1 << 17)  # small models would fit into it
        patch.setattr(powerinfer_ext.llama, "Options", partial(loader.Options, prefetch=prefetch))
        yield


def tokens_of(llama: llama_cpp.Llama, n: int) -> list[int]:
    return np.random.default_rng(5).integers(0, min(llama.n_vocab(), 500), n).tolist()


def logits(llama: llama_cpp.Llama, n: int = 40, decoded: int = 6) -> np.ndarray:
    """[n, n_vocab] of random tokens, all but the last few in one go."""
    tokens = tokens_of(llama, n)
    llama.reset()
    llama.eval(tokens[: n - decoded])
    for token in tokens[n - decoded :]:
        llama.eval([token])
    return llama.scores[:n].copy()


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of b's next tokens from a's."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (a, b))
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


# ---- the same bits ------------------------------------------------------------------------------------------------

QUICK = ("llama4", "qwen2moe", "deepseek2", "gpt-oss")  # shared experts, merged gate and up, biases
DIFFUSION = ("llada-moe", "rnd1")  # no KV cache: llama_cpp.Llama cannot run them at all


def check_mixture(path: Path, cases: list[tuple[int, str, bool]]) -> None:
    """cases: slots, I/O engine, prefetching."""
    stock = llama_cpp.Llama(str(path), **SETTINGS)
    expected = logits(stock)
    with slots(ALL):
        resident = logits(Llama(path, **SETTINGS))
    own = divergence(expected, logits(stock, decoded=35))  # stock's prefill and decode differ too; random routers flip
    assert divergence(expected, resident) < max(1e-4, 4 * own)
    assert expected.std() > 0.5
    for n, engine, prefetch in cases:
        with slots(n, prefetch=prefetch):
            llama = Llama(path, io=engine, **SETTINGS)
        assert np.array_equal(logits(llama), resident), (n, engine, prefetch)
        assert np.array_equal(logits(llama), resident), (n, engine, prefetch)  # with a cache that is warm
        flash = llama.sparse_stats()["flash"]
        assert flash["missed"] > 0 and flash["engine"] == engine
        llama.close()


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=() if a in QUICK else pytest.mark.long) for a in ARCHITECTURES if a not in DIFFUSION],
)
def test_every_mixture_streams(tmp_path: Path, arch: str) -> None:
    path = make_mixture(tmp_path / "m.gguf", arch, "Q8_0")
    assert path is not None, f"llama.cpp refuses {arch}"
    check_mixture(path, [(1, "io_uring", True), (3, "threads", False)])


RARER = [pytest.param(quant, marks=pytest.mark.long) for quant in ("F16", "BF16", "Q5_K", "Q6_K", "IQ4_NL")]


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K", "MXFP4", *RARER])
def test_every_type_of_expert_streams(tmp_path: Path, quant: str) -> None:
    path = make_mixture(tmp_path / "m.gguf", "gpt-oss" if quant == "MXFP4" else "qwen3moe", quant)
    check_mixture(path, [(2, "io_uring", True)])


@pytest.mark.parametrize("n", [2, 5])
def test_split_files(tmp_path: Path, n: int) -> None:
    one = make_mixture(tmp_path / "m.gguf", "qwen2moe", "Q4_0")
    first = make_mixture(tmp_path / "m.gguf", "qwen2moe", "Q4_0", splits=n)
    assert first.name == f"m-00001-of-0000{n}.gguf"
    with slots(2):
        assert np.array_equal(logits(Llama(one, **SETTINGS)), logits(Llama(first, **SETTINGS)))
    check_mixture(first, [(1, "threads", True)])


def test_the_list_of_architectures_is_llama_cpps(tmp_path: Path) -> None:
    """Whatever else the library can build as a mixture has to be added to the list."""
    libllama = (Path(llama_cpp.__file__).parent / "lib" / "libllama.so").read_bytes()
    names = {name.decode() for name in set(re.findall(rb"\0([a-z][a-z0-9_.-]{1,22})(?=\0)", libllama))}
    known = {a for a in ARCHITECTURES if a in names}
    assert len(known) > 40
    for name in sorted(n for n in names - known if "moe" in n and not n.endswith("_")):
        found = tensors_of(metadata(name))
        assert not any(t.endswith("_exps.weight") for t in found or ()), name


# ---- bundles, predictors, thresholds, tiles -----------------------------------------------------------------------


def sparse_models(folder: Path) -> dict[str, Path]:
    """The bundled models, converted."""
    paths = {}
    for model in bundled():
        paths[model.name] = folder / f"{model.name}.gguf"
        convert(model.path, paths[model.name], activation=model.activation)
    return paths


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sparse_models(tmp_path_factory.mktemp("bundled"))


@pytest.mark.parametrize("name", [model.name for model in bundled()])
def test_bundles_stream(models: dict[str, Path], name: str) -> None:
    path = models[name]
    settings = {**SETTINGS, "n_threads": 1, "n_threads_batch": 2}
    resident = Llama(path, **settings)
    expected = logits(resident)
    assert resident.sparse_stats()["flash"] is None
    for n, hot, engine, deciders, ubatch in [
        (64, 0, "io_uring", False, 512),
        (100, 16, "threads", True, 7),
        (700, 300, "io_uring", True, 512),
        (ALL, 0, "threads", False, 512),
    ]:
        if ubatch != 512:
            expected_here = logits(Llama(path, **{**settings, "n_ubatch": ubatch, "n_batch": ubatch}))
        else:
            expected_here = expected
        with slots(n, hot=hot, deciders=deciders):
            llama = Llama(path, io=engine, **{**settings, "n_ubatch": ubatch, "n_batch": min(ubatch, 512)})
        result = logits(llama)
        if deciders:  # our product with the deciding matrix is not stock's
            assert divergence(expected_here, result) < 1e-4
        else:
            assert np.array_equal(expected_here, result), (n, hot, engine)
        assert llama.sparse_stats()["flash"]["wanted"] > 0
        llama.close()


@pytest.mark.parametrize("name", ["arcee-relu2", "smallthinker-reglu-moe"])
def test_streamed_deciders_are_the_same_whatever_the_cache(models: dict[str, Path], name: str) -> None:
    with slots(ALL, deciders=True):
        expected = logits(Llama(models[name], **SETTINGS))
    for n, engine in [(64, "threads"), (400, "io_uring")]:
        with slots(n, deciders=True):
            assert np.array_equal(expected, logits(Llama(models[name], io=engine, **SETTINGS))), n


@pytest.mark.parametrize("name", ["arcee-relu2", "llama-swiglu", "smallthinker-reglu-moe"])  # stock's dReLU is SwiGLU
def test_bundled_stock_files_stream(name: str) -> None:
    """Unconverted: tiles of dense models, experts of the mixture."""
    path = next(model.path for model in bundled() if model.name == name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "TILE_BYTES", 20000)  # or a matrix would be one tile
        check_mixture(path, [(1, "io_uring", True), (3, "threads", False)])


def predicted(folder: Path) -> Path:
    """A gated model whose layers have predictors, random ones."""
    n_embd, n_ff = 256, 512
    stock = make(folder / "stock.gguf", "llama", quant="Q8_0", density=0.15)
    rng = np.random.default_rng(3)
    low = Predictor(
        "lowrank",
        quants.Q8_0,
        quants.quantise(quants.Q8_0, rng.standard_normal((n_ff, 32))),
        np.full(n_ff, -60, np.float32),
        quants.F16,
        quants.quantise(quants.F16, rng.standard_normal((32, n_embd))),
    )
    each = {str(i): Calibrated(predictor=low, hot_count=9) for i in range(2)}
    calibration = Calibration(each, text="t", tokens=1, profile="ab" * 32)
    convert(stock, folder / "s.gguf", activation="relu", calibration=calibration)
    return folder / "s.gguf"


def test_predicted_layers_stream(tmp_path: Path) -> None:
    path = predicted(tmp_path)
    resident = Llama(path, **SETTINGS)
    expected = logits(resident)
    assert 0 < resident.sparse_stats()["density"] < 0.9
    for n, hot, engine, prefetch in [(64, 9, "threads", True), (120, 9, "io_uring", False), (200, 9, "io_uring", True)]:
        with slots(n, hot=hot, prefetch=prefetch):
            llama = Llama(path, io=engine, **SETTINGS)
        assert np.array_equal(expected, logits(llama)), n
        llama.reset_sparse_stats()
        for token in tokens_of(llama, 20):  # decoding: a layer's input says what the next will want
            llama.eval([token])
        flash = llama.sparse_stats()["flash"]
        assert flash["missed"] > 0 and (flash["prefetched"] > 0) == prefetch, (n, flash)
    with slots(500, hot=9):  # nearly everything has a slot: little is missed
        assert np.array_equal(expected, logits(Llama(path, **SETTINGS)))


def test_layers_with_thresholds_stream(tmp_path: Path) -> None:
    """SwiGLU whose small gates count as zero, neurons in another order than the source's."""
    stock = make(tmp_path / "stock.gguf", "llama", quant="Q8_0")
    order = np.random.default_rng(4).permutation(512).astype(np.int32)
    thresholds = np.random.default_rng(5).uniform(0.05, 0.5, 512).astype(np.float32)
    each = {str(i): Calibrated(order=order, thresholds=thresholds) for i in range(2)}
    convert(stock, tmp_path / "s.gguf", calibration=Calibration(each, threshold_kind="chess"))
    resident = Llama(tmp_path / "s.gguf", **SETTINGS)
    expected = logits(resident)
    assert 0.05 < resident.sparse_stats()["density"] < 0.95
    for n, hot, engine in [(64, 0, "io_uring"), (300, 40, "threads")]:
        with slots(n, hot=hot):
            llama = Llama(tmp_path / "s.gguf", io=engine, **SETTINGS)
        assert np.array_equal(expected, logits(llama)), (n, hot, engine)
        assert llama.sparse_stats()["flash"]["missed"] > 0
    with slots(ALL, deciders=True):
        expected = logits(Llama(tmp_path / "s.gguf", **SETTINGS))
    with slots(64, deciders=True):
        assert np.array_equal(expected, logits(Llama(tmp_path / "s.gguf", **SETTINGS)))


@pytest.mark.parametrize("converted", [True, False])
def test_lora(tmp_path: Path, converted: bool) -> None:
    """On streamed FFN weights and on others: what is resident gives the same."""
    stock = make(tmp_path / "stock.gguf", "arcee", quant="Q8_0")
    sizes = {"attn_q": (256, 256), "ffn_up": (256, 512), "ffn_down": (512, 256)}
    adapted = {f"blk.{layer}.{part}.weight": size for layer in (0, 1) for part, size in sizes.items()}
    write_lora(tmp_path / "lora.gguf", "arcee", adapted)
    convert(stock, tmp_path / "s.gguf")
    path = tmp_path / "s.gguf" if converted else stock
    settings = {**SETTINGS, "lora_path": str(tmp_path / "lora.gguf")}
    expected = logits(llama_cpp.Llama(str(stock), **settings))
    plain = logits(llama_cpp.Llama(str(stock), **SETTINGS))
    assert divergence(expected, plain) > 1e-3  # the adapter does something
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "TILE_BYTES", 20000)
        with slots(100 if converted else 2):
            llama = Llama(path, **settings)
    assert divergence(expected, logits(llama)) < 1e-4
    assert llama.sparse_stats()["flash"]["missed"] > 0


def test_numbers_of_threads(models: dict[str, Path]) -> None:
    """Streamed is resident at every number of threads; they may change while a model runs."""
    name = next(model.name for model in bundled() if model.moe)
    stock = next(model.path for model in bundled() if model.moe)
    for path in (models[name], stock):
        with slots(ALL):
            resident = Llama(path, **SETTINGS)
        with slots(64 if path == models[name] else 3):
            streamed = Llama(path, **SETTINGS)
        for threads in (1, 3):
            for llama in (resident, streamed):
                llama_cpp.llama_set_n_threads(llama._ctx.ctx, threads, threads)
            assert np.array_equal(logits(resident, 8, 2), logits(streamed, 8, 2)), threads


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A stock mixture and, beside it, another copy."""
    path = make_mixture(tmp_path / "m.gguf", "qwen3moe", "Q8_0")
    assert path is not None
    shutil.copy(path, tmp_path / "other.gguf")
    return path


def open_streamed(path: Path, n: int = 2, engine: str = "io_uring", **settings: Any) -> Llama:
    with slots(n):
        return Llama(path, io=engine, **{**SETTINGS, **settings})


def inject(llama: llama_cpp.Llama, error: int, short_by: int = 0, after: int = 3) -> None:
    """A read to come fails, or sees the file end early."""
    _, lib = loader.native()
    assert lib.pi_model_inject(llama.model.sparse._handle, after, error, short_by) == 0


def logits_until_failure(llama: llama_cpp.Llama, error: int, short_by: int = 0, after: int = 0) -> None:
    """A read that is only made ahead of time may fail unnoticed: whoever wants its bytes reads again. And how many
    reads an evaluation makes depends on how far apart this disk lets wanted rows lie and be one read. So the
    fault waits for its turn, in a later evaluation if need be, and there is another, a read later."""
    for k in range(8):
        inject(llama, error, short_by, after + k)
        for _ in range(5):
            logits(llama)


def offset_in(message: str) -> int:
    return int(re.search(r"offset ([0-9]+)", message)[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["EIO", "short"])
def test_a_read_that_fails_ends_the_answer_and_nothing_else(mixture: Path, engine: str, fault: str) -> None:
    llama, other = open_streamed(mixture, engine=engine), open_streamed(mixture.with_name("other.gguf"))
    expected = logits(llama)
    assert np.array_equal(logits(other), expected)
    for after in (0, 3, 17):
        with pytest.raises(PowerInferError) as raised:
            logits_until_failure(llama, errno.EIO if fault == "EIO" else 0, 0 if fault == "EIO" else 100, after)
        message = str(raised.value)
        assert str(mixture) in message and 0 < offset_in(message) < mixture.stat().st_size
        assert ("Input/output error" if fault == "EIO" else "ended early") in message
        assert np.array_equal(logits(other), expected)  # others live on
        assert np.array_equal(logits(llama), expected)  # and so does this one, once reads work again
        assert llama.model.sparse.failure() is None


@pytest.mark.parametrize("engine", ENGINES)
def test_bundles_whose_read_fails(models: dict[str, Path], engine: str) -> None:
    path = models["arcee-relu2"]
    llama = open_streamed(path, 64, engine)
    expected = logits(llama)
    for after in (0, 40):
        with pytest.raises(PowerInferError, match=f"{path}: reading at offset [0-9]+ failed: Input/output error"):
            logits_until_failure(llama, errno.EIO, after=after)
        assert np.array_equal(logits(llama), expected)


def test_generators_and_completions_raise(models: dict[str, Path]) -> None:
    llama = open_streamed(models["arcee-relu2"], 64, logits_all=False)
    ask: dict[str, Any] = {"prompt": "def f(x):", "max_tokens": 12, "temperature": 0.0}
    expected = llama.create_completion(**ask)["choices"][0]["text"]
    inject(llama, errno.EIO, 0, 0)
    with pytest.raises(PowerInferError, match="offset"):
        llama.create_completion(**ask)
    stream = llama.create_completion(**ask, stream=True)
    pieces = [next(stream)["choices"][0]["text"]]
    inject(llama, errno.EIO, 0, 0)
    with pytest.raises(PowerInferError, match="offset"):
        pieces += [chunk["choices"][0]["text"] for chunk in stream]
    assert expected.startswith("".join(pieces))
    assert llama.create_completion(**ask)["choices"][0]["text"] == expected


def test_a_plain_llama_under_install(models: dict[str, Path]) -> None:
    powerinfer_ext.install()
    try:
        with slots(64):
            powerinfer_ext.install()  # with the options of this block
            llama = llama_cpp.Llama(str(models["arcee-relu2"]), **SETTINGS)
    finally:
        powerinfer_ext.uninstall()
    expected = logits(llama)
    inject(llama, errno.EIO, 0, 0)
    with pytest.raises(RuntimeError):
        logits(llama)
    assert "Input/output error" in llama.model.sparse.failure()
    assert np.array_equal(logits(llama), expected)


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_damaged_while_it_runs(mixture: Path, engine: str, damage: str) -> None:
    llama, other = open_streamed(mixture, engine=engine), open_streamed(mixture.with_name("other.gguf"))
    expected = logits(other)
    whole = mixture.read_bytes()
    if damage == "truncated":
        os.truncate(mixture, len(whole) // 2)
    else:
        with mixture.open("r+b") as file:
            file.seek(len(whole) // 2)
            file.write(bytes(len(whole) // 4))
    for _ in range(2):
        with pytest.raises(PowerInferError, match=f"{mixture}.*offset [0-9]+"):
            logits(llama)
    assert np.array_equal(logits(other), expected)
    mixture.write_bytes(whole)
    with pytest.raises(PowerInferError):  # it may have changed in any way: stays refused
        logits(llama)
    llama.close()
    assert np.array_equal(logits(open_streamed(mixture, engine=engine)), expected)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_gets_another_name_keeps_running(mixture: Path, how: str) -> None:
    llama = open_streamed(mixture)
    expected = logits(llama)
    if how == "deleted":
        mixture.unlink()
    else:
        make_mixture(mixture.with_name("new.gguf"), "qwen3moe", "Q8_0", seed=9).rename(mixture)
    assert np.array_equal(logits(llama), expected)


def test_a_part_of_a_split_file_that_fails_is_named(tmp_path: Path) -> None:
    first = make_mixture(tmp_path / "m.gguf", "qwen3moe", "Q4_0", splits=3)
    second = Path(str(first).replace("-00001-", "-00002-"))
    llama = open_streamed(first, 1)
    logits(llama)
    os.truncate(second, second.stat().st_size // 2)
    with pytest.raises(PowerInferError, match=f"{second}.*offset"):
        logits(llama)


CHILD = """
import errno, sys
sys.path.insert(0, {tests!r})
{prelude}
import numpy as np
from pathlib import Path
from test_stream_llama import Llama, SETTINGS, logits, open_streamed, slots
path = Path(sys.argv[1])
{before}
llama = open_streamed(path, 2, "auto")
print(llama.sparse_stats()["flash"]["engine"], float(np.abs(logits(llama)).sum()))
"""


def test_io_uring_refused(mixture: Path) -> None:
    from test_io import IO_URING_SETUP, REFUSE

    def child(before: str) -> list[str]:
        script = CHILD.format(tests=str(ROOT / "tests"), prelude=REFUSE, before=before)
        done = subprocess.run([sys.executable, "-c", script, str(mixture)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    refused, free = child(f"refuse({IO_URING_SETUP}, errno.EPERM, 0)"), child("")
    assert refused[0] == "threads"
    assert refused[1] == free[1]


def test_a_file_system_without_o_direct(mixture: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shutil.disk_usage(shm).free < 1 << 26:
        pytest.skip("no tmpfs here")
    copy = shm / f"powerinfer-{os.getpid()}.gguf"
    shutil.copy(mixture, copy)
    try:
        assert np.array_equal(logits(open_streamed(copy)), logits(open_streamed(mixture)))
    finally:
        copy.unlink()


def test_a_file_that_ends_early_is_refused_when_loading(mixture: Path) -> None:
    os.truncate(mixture, mixture.stat().st_size - 5000)
    with pytest.raises(ValueError, match=str(mixture)):
        open_streamed(mixture)


# ---- what else llama-cpp-python does ------------------------------------------------------------------------------


def test_several_contexts_in_several_threads(mixture: Path) -> None:
    """One model, contexts of its own for each thread, in rounds of each other's."""
    llama = open_streamed(mixture, 2)
    expected = logits(llama, 12, 4)
    tokens = tokens_of(llama, 12)
    params = llama.context_params
    failures: list[Any] = []

    def work() -> None:
        context = llama_cpp.llama_init_from_model(llama.model, params)
        for _ in range(3):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for part in (tokens[:8], *([t] for t in tokens[8:])):
                array = (llama_cpp.llama_token * len(part))(*part)
                code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part)))
                if code != 0:
                    failures.append(code)
            last = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (llama.n_vocab(),))
            if not np.array_equal(last, expected[-1]):
                failures.append(np.abs(last - expected[-1]).max())
        llama_cpp.llama_free(context)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_state_embeddings_and_sequences(mixture: Path) -> None:
    streamed = open_streamed(mixture, 2)
    with slots(ALL):
        resident = Llama(mixture, **SETTINGS)
    tokens = tokens_of(streamed, 12)
    answers = []
    for llama in (resident, streamed):
        llama.reset()
        llama.eval(tokens[:8])
        state = llama.save_state()
        llama.eval(tokens[8:])
        first = llama.scores[:12].copy()
        llama.load_state(state)
        llama.eval(tokens[8:])
        assert np.array_equal(llama.scores[8:12], first[8:12])
        answers.append(first)
    assert np.array_equal(*answers)
    pooled = []
    for n in (ALL, 2):
        llama = open_streamed(mixture, n, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
        batch = llama_cpp.llama_batch_init(20, 0, 2)
        for i in range(20):  # two sequences in one batch
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[i % 12], i // 2, 1, 1
            batch.seq_id[i][0] = i % 2 if llama.context_params.n_seq_max > 1 else 0
            if llama.context_params.n_seq_max <= 1:
                batch.pos[i] = i
        batch.n_tokens = 20
        assert llama_cpp.llama_decode(llama._ctx.ctx, batch) == 0
        pooled.append(np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(llama._ctx.ctx, 0), (256,)).copy())
        llama_cpp.llama_batch_free(batch)
    assert np.array_equal(*pooled) and pooled[0].any()


def test_an_abort_leaves_a_model_that_works(mixture: Path) -> None:
    llama = open_streamed(mixture, 1)
    expected = logits(llama)
    calls = [0]

    @llama_cpp.ggml_abort_callback
    def abort(_: Any) -> bool:
        calls[0] += 1
        return calls[0] % 7 == 0

    for _ in range(3):
        llama_cpp.llama_set_abort_callback(llama._ctx.ctx, abort, None)
        with pytest.raises(RuntimeError):
            for _ in range(20):
                logits(llama, 12, 4)
        llama_cpp.llama_set_abort_callback(llama._ctx.ctx, llama_cpp.ggml_abort_callback(), None)
        assert np.array_equal(logits(llama), expected)


def test_an_eval_callback_that_watches_everything(mixture: Path, models: dict[str, Path]) -> None:
    @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
    def watch(tensor: Any, ask: bool, _: Any) -> bool:
        return True

    def watched(llama: Llama) -> np.ndarray:
        params = type(llama.context_params).from_buffer_copy(llama.context_params)
        params.cb_eval = watch
        context = llama_cpp.llama_init_from_model(llama.model, params)
        array = (llama_cpp.llama_token * 12)(*tokens_of(llama, 12))
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, 12)) == 0
        last = llama_cpp.llama_get_logits_ith(context, -1)
        last = np.ctypeslib.as_array(last, (llama.n_vocab(),)).copy()
        llama_cpp.llama_free(context)
        return last

    for path, n in ((mixture, 2), (models["smallthinker-reglu-moe"], 64), (models["llama-swiglu"], 64)):
        expected, streamed = open_streamed(path, ALL), open_streamed(path, n)
        assert np.array_equal(watched(expected), watched(streamed))
        assert divergence(logits(streamed, 12, 0)[-1:], watched(streamed)[None]) < 1e-3  # node by node rounds otherwise


def test_nothing_is_left_when_models_are_closed(mixture: Path) -> None:
    _, lib = loader.native()
    gc.collect()
    fds, count = len(os.listdir("/proc/self/fd")), lib.pi_model_count()
    for engine in ENGINES:
        llama = open_streamed(mixture, engine=engine)
        logits(llama, 4, 1)
        llama.close()
        del llama
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), lib.pi_model_count()) == (fds, count)
