"""`install()`: existing code that uses llama_cpp runs sparse-GGUF files unedited; `uninstall()` undoes it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings
import pytest
from tiny_models import make

import powerinfer_ext
from gguf_tools import FormatError, convert
from powerinfer_ext import Llama, PowerInferError, hook
from powerinfer_ext.loader import Options

PROMPT = "the cat sat on the mat"
SETTINGS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of a stock GGUF and of the sparse-GGUF made from it."""
    folder = tmp_path_factory.mktemp("install")
    stock, sparse = folder / "arcee.gguf", folder / "arcee.sparse.gguf"
    make(stock, "arcee", density=0.15)
    convert(stock, sparse)
    return str(stock), str(sparse)


@pytest.fixture
def installed() -> Iterator[None]:
    powerinfer_ext.install()
    yield
    powerinfer_ext.uninstall()


def text_of(llama: llama_cpp.Llama) -> str:
    return llama(PROMPT, max_tokens=16, temperature=0.0)["choices"][0]["text"]


def test_plain_llama_runs_sparse_files(models: tuple[str, str], installed: None) -> None:
    stock, sparse = models
    expected = text_of(llama_cpp.Llama(stock, **SETTINGS))
    llama = llama_cpp.Llama(sparse, **SETTINGS)
    assert type(llama) is llama_cpp.Llama
    assert text_of(llama) == expected
    assert 0 < powerinfer_ext.sparse_stats(llama)["density"] < 0.5
    assert powerinfer_ext.sparse_stats(llama_cpp.Llama(stock, **SETTINGS))["density"] is None


def test_install_and_uninstall_are_idempotent(models: tuple[str, str]) -> None:
    before = bindings.llama_model_load_from_file, llama_cpp.llama_model_load_from_file
    powerinfer_ext.install()
    powerinfer_ext.install(sparse_mode="dense")
    assert bindings.llama_model_load_from_file is not before[0]
    text_of(llama_cpp.Llama(models[1], **SETTINGS))
    powerinfer_ext.uninstall()
    powerinfer_ext.uninstall()
    assert (bindings.llama_model_load_from_file, llama_cpp.llama_model_load_from_file) == before
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(models[1], **SETTINGS)


def test_open_models_survive_uninstall(models: tuple[str, str]) -> None:
    powerinfer_ext.install()
    llama = llama_cpp.Llama(models[1], **SETTINGS)
    expected = text_of(llama)
    powerinfer_ext.uninstall()
    assert text_of(llama) == expected
    llama.close()


def test_bad_options_change_nothing() -> None:
    before = bindings.llama_model_load_from_file
    with pytest.raises(PowerInferError, match="exact, dense"):
        powerinfer_ext.install(sparse_mode="fast")
    assert bindings.llama_model_load_from_file is before


def test_our_llama_leaves_nothing_behind(models: tuple[str, str]) -> None:
    before = bindings.llama_model_load_from_file, llama_cpp.llama_model_load_from_file
    Llama(models[1], **SETTINGS)
    with pytest.raises(ValueError):
        Llama("/nowhere/model.gguf", **SETTINGS)
    assert (bindings.llama_model_load_from_file, llama_cpp.llama_model_load_from_file) == before


def test_a_scope_is_for_its_own_thread_only(models: tuple[str, str]) -> None:
    failures: list[BaseException] = []

    def load_as_stock() -> None:
        try:
            llama_cpp.Llama(models[1], **SETTINGS)
        except ValueError as error:
            failures.append(error)

    with hook.sparse_loading(Options()):
        other = threading.Thread(target=load_as_stock)
        other.start()
        other.join()
        llama_cpp.Llama(models[1], **SETTINGS)
    assert len(failures) == 1 and "Failed to load model" in str(failures[0])


def test_many_threads_open_and_install_at_once(models: tuple[str, str]) -> None:
    before = bindings.llama_model_load_from_file
    stock, sparse = models
    expected = text_of(Llama(sparse, **SETTINGS))
    texts: list[str] = []

    def work(path: str) -> None:
        for _ in range(4):
            with closing(Llama(path, **SETTINGS)) as llama:
                texts.append(text_of(llama))
            powerinfer_ext.install()
            powerinfer_ext.uninstall()

    threads = [threading.Thread(target=work, args=(path,)) for path in (stock, sparse, sparse)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 12
    assert bindings.llama_model_load_from_file is before


def test_a_patch_on_top_of_ours_is_not_torn_out(models: tuple[str, str]) -> None:
    before = bindings.llama_model_load_from_file
    powerinfer_ext.install()
    ours = bindings.llama_model_load_from_file
    seen = []

    def somebody_elses(path: bytes, params: Any) -> int | None:
        seen.append(path)
        return ours(path, params)

    bindings.llama_model_load_from_file = somebody_elses
    try:
        with pytest.raises(PowerInferError, match="replaced by somebody else"):
            powerinfer_ext.uninstall()
        with pytest.raises(PowerInferError, match="replaced by somebody else"):
            powerinfer_ext.install()
        expected = text_of(llama_cpp.Llama(models[0], **SETTINGS))
        assert text_of(llama_cpp.Llama(models[1], **SETTINGS)) == expected  # and both keep working
        assert text_of(Llama(models[1], **SETTINGS)) == expected
        assert len(seen) == 2
        assert bindings.llama_model_load_from_file is somebody_elses
    finally:
        bindings.llama_model_load_from_file = ours
        powerinfer_ext.uninstall()
    assert bindings.llama_model_load_from_file is before


def test_a_patch_under_ours_stays_in_use(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = bindings.llama_model_load_from_file
    seen = []

    def somebody_elses(path: bytes, params: Any) -> int | None:
        seen.append(path)
        return original(path, params)

    monkeypatch.setattr(bindings, "llama_model_load_from_file", somebody_elses)
    powerinfer_ext.install()
    try:
        text_of(llama_cpp.Llama(models[0], **SETTINGS))
        text_of(llama_cpp.Llama(models[1], **SETTINGS))
    finally:
        powerinfer_ext.uninstall()
    assert seen == [os.fsencode(models[0])]  # the sparse one is ours alone
    assert bindings.llama_model_load_from_file is somebody_elses


def test_loading_through_the_low_level_bindings(models: tuple[str, str], installed: None) -> None:
    pointer = llama_cpp.llama_model_load_from_file(models[1].encode(), llama_cpp.llama_model_default_params())
    assert llama_cpp.llama_model_n_embd(pointer) == 256
    llama_cpp.llama_model_free(pointer)
    assert llama_cpp.llama_model_load_from_file(b"/nowhere", llama_cpp.llama_model_default_params()) is None


def test_errors_reach_plain_llama_with_our_words(
    models: tuple[str, str], installed: None, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.sparse.gguf"
    damaged.write_bytes(Path(models[1]).read_bytes()[:-100])
    with pytest.raises(FormatError, match="damaged.sparse.gguf.*truncated"):
        llama_cpp.Llama(str(damaged), **SETTINGS)


def test_the_dependencys_server_runs_sparse_files(models: tuple[str, str], installed: None) -> None:
    from fastapi.testclient import TestClient
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    settings = ModelSettings(model=models[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    app = create_app(server_settings=ServerSettings(), model_settings=[settings])
    with TestClient(app) as client:
        request = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0.0}
        reply = client.post("/v1/completions", json=request)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["text"] == text_of(llama_cpp.Llama(models[0], **SETTINGS))


# What of the dependency's own test-suite needs a model from the internet. The cache tests for a transformer
# would too, but any model will do for them: they get our sparse-GGUF.
NEED_A_DOWNLOAD = {
    "test_real_model",
    "test_real_llama",
    "test_real_llama_repeated_prompt_cache",
    "test_real_llama_embeddings",
    "test_recurrent_model_prompt_cache_reset",
    "test_hybrid_model_prompt_cache_reset",
    "test_exact_cached_prompt_reuse_matches_fresh[llama_cpp_recurrent_model_path-True-False]",
    "test_exact_cached_prompt_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_recurrent_model_path-True-False]",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]",
    "test_ram_cache_exact_prompt_hit_matches_fresh[llama_cpp_recurrent_model_path-True-False]",
    "test_ram_cache_exact_prompt_hit_matches_fresh[llama_cpp_hybrid_model_path-False-True]",
    "test_shorter_prompt_prefix_reuse_matches_fresh[llama_cpp_recurrent_model_path-True-False]",
    "test_shorter_prompt_prefix_reuse_matches_fresh[llama_cpp_hybrid_model_path-False-True]",
}
ON_OUR_MODEL = {
    "test_exact_cached_prompt_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_ram_cache_exact_prompt_hit_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_shorter_prompt_prefix_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
}

PLUGIN = '''
"""Loaded into the dependency's pytest run: our hook is active, and nothing is downloaded."""
import sys
import types

import pytest

import powerinfer_ext

powerinfer_ext.install()


def hf_hub_download(repo_id, filename, **kwargs):
    if filename == "tinyllamas/stories15M-q4_0.gguf":
        return {sparse!r}
    pytest.skip("needs a download")


hub = types.ModuleType("huggingface_hub")
hub.hf_hub_download = hf_hub_download
sys.modules["huggingface_hub"] = hub
'''


def test_the_dependencys_own_tests_pass(
    models: tuple[str, str], llama_cpp_sources: Path, tmp_path: Path
) -> None:
    # Not in place: the sources may hold a `llama_cpp` folder, which would be imported, not the installed one.
    vocabulary = Path("vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")
    shutil.copytree(llama_cpp_sources / "tests", tmp_path / "tests")
    (tmp_path / vocabulary.parent).mkdir(parents=True)
    shutil.copy(llama_cpp_sources / vocabulary, tmp_path / vocabulary)
    (tmp_path / "powerinfer_plugin.py").write_text(PLUGIN.format(sparse=models[1]))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "powerinfer_plugin", "-p", "no:cacheprovider", "-v", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(powerinfer_ext.__file__).parents[1]}"},
        capture_output=True,
        text=True,
    )
    outcome = dict(re.findall(r"^tests/\S+?::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", run.stdout, re.MULTILINE))
    assert run.returncode == 0, run.stdout + run.stderr
    assert {name for name, result in outcome.items() if result == "SKIPPED"} == NEED_A_DOWNLOAD
    passed = {name for name, result in outcome.items() if result == "PASSED"}
    assert passed >= ON_OUR_MODEL
    assert len(passed) == len(outcome) - len(NEED_A_DOWNLOAD) >= 12


@pytest.mark.parametrize(
    ("first", "said", "spins"),
    [
        ("from powerinfer_ext import Llama", {}, "3000"),
        ("from powerinfer_ext import install", {}, "3000"),
        ("import llama_cpp; from powerinfer_ext import Llama", {}, None),
        ("from powerinfer_ext import Llama", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("from powerinfer_ext import Llama", {"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(first: str, said: dict[str, str], spins: str | None) -> None:
    """What libgomp itself says when it is loaded, and what is left in the environment."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", f"{first}\nimport os; print(os.environ.get('GOMP_SPINCOUNT'))"],
        env={**env, **said, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    assert found is not None, run.stderr
    assert (found[1] == spins) if spins else (found[1] not in ("3000", "77"))
    assert run.stdout.strip() == str(said.get("GOMP_SPINCOUNT"))
