"""`powerinfer_ext.Llama` is a `llama_cpp.Llama`: whatever that one can do, it does on a sparse-GGUF too.

Every feature is compared with stock on the same natively sparse model. Stock is the judge, so the stored type
is F32, where the two differ by the order of additions only.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import types
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from tiny_models import make

import powerinfer_ext
from gguf_tools import convert
from powerinfer_ext import Llama, PowerInferError

PROMPT = "the cat sat on the mat and the dog"
TOLERANCE = 2e-5  # on logits with a standard deviation of about 3; 3e-6 is what is seen
F32 = 0
SETTINGS: dict[str, Any] = {
    "n_ctx": 128,
    "n_threads": 1,
    "n_threads_batch": 1,
    "seed": 7,
    "type_k": F32,  # in an F16 cache a difference of 1e-7 can become a rounding step
    "type_v": F32,
    "verbose": False,
}


class Pair(NamedTuple):
    """A stock GGUF and the sparse-GGUF made from it."""

    stock: str
    sparse: str

    def open(self, **kwargs: Any) -> tuple[llama_cpp.Llama, Llama]:
        settings = {**SETTINGS, **kwargs}
        return llama_cpp.Llama(self.stock, **settings), Llama(self.sparse, **settings)


def make_pair(folder: Path, architecture: str, **kwargs: Any) -> Pair:
    stock, sparse = folder / f"{architecture}.gguf", folder / f"{architecture}.sparse.gguf"
    make(stock, architecture, density=0.15, n_vocab=1100, **kwargs)
    convert(stock, sparse)
    return Pair(str(stock), str(sparse))


@pytest.fixture(scope="module")
def arcee(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("arcee"), "arcee")


@pytest.fixture(scope="module", params=["arcee", "nemotron", "smallthinker", "nemotron_h", "nemotron_h_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


def text_of(llama: llama_cpp.Llama, **kwargs: Any) -> str:
    settings = {"max_tokens": 24, "temperature": 0.0, **kwargs}
    return llama.create_completion(PROMPT, **settings)["choices"][0]["text"]


def test_same_logits_and_text_as_stock(pair: Pair) -> None:
    stock, ours = pair.open(logits_all=True)
    tokens = stock.tokenize(PROMPT.encode())
    for llama in (stock, ours):
        llama.eval(tokens)  # a batch, then token by token
        for token in tokens[:6]:
            llama.eval([token])
    rows = len(tokens) + 6
    np.testing.assert_allclose(ours.scores[:rows], stock.scores[:rows], atol=TOLERANCE, rtol=0)
    assert text_of(ours) == text_of(stock)
    density = ours.sparse_stats()["density"]
    assert 0.02 < density < 0.4


def test_a_stock_file_runs_as_ever(arcee: Pair) -> None:
    stock = llama_cpp.Llama(arcee.stock, **SETTINGS)
    ours = Llama(arcee.stock, **SETTINGS)
    assert text_of(ours) == text_of(stock)
    nothing = {"density": None, "tokens": 0, "missed": None, "verified": 0, "layers": [], "flash": None}
    assert ours.sparse_stats() == nothing
    ours.reset_sparse_stats()


def test_dense_mode_gives_the_same_answer(arcee: Pair) -> None:
    exact, dense = (Llama(arcee.sparse, sparse_mode=mode, **SETTINGS) for mode in ("exact", "dense"))
    assert text_of(exact) == text_of(dense)


def test_statistics_count_and_reset(arcee: Pair) -> None:
    llama = Llama(arcee.sparse, **SETTINGS)
    assert llama.sparse_stats()["density"] is None  # no token yet
    text_of(llama)
    stats = llama.sparse_stats()
    assert [layer["layer"] for layer in stats["layers"]] == [0, 1]
    for layer in stats["layers"]:
        assert layer["neurons"] == 512
        assert 0 < layer["fired"] <= layer["selected"] < layer["tokens"] * layer["neurons"]
        assert layer["density"] == pytest.approx(layer["selected"] / (layer["tokens"] * layer["neurons"]))
        assert layer["seconds"] > 0
    assert stats["density"] == pytest.approx(np.mean([layer["density"] for layer in stats["layers"]]))
    assert powerinfer_ext.sparse_stats(llama) == stats
    llama.reset_sparse_stats()
    assert llama.sparse_stats()["density"] is None
    assert llama.sparse_stats()["tokens"] == 0


def test_streaming(arcee: Pair) -> None:
    stock, ours = arcee.open()
    pieces = [
        [chunk["choices"][0]["text"] for chunk in llama(PROMPT, max_tokens=24, temperature=0.0, stream=True)]
        for llama in (stock, ours)
    ]
    assert pieces[0] == pieces[1]
    assert "".join(pieces[1]) == text_of(ours)


def test_sampling_with_a_seed(arcee: Pair) -> None:
    stock, ours = arcee.open()
    assert text_of(ours, temperature=0.8, seed=3) == text_of(stock, temperature=0.8, seed=3)


def test_samplers_of_earlier_answers_are_freed(arcee: Pair) -> None:
    """Each holds a table of the vocabulary, and hangs in a cycle that only the garbage collector would find."""
    with closing(arcee.open()[1]) as llama:
        gc.disable()
        try:
            kept = [text_of(llama), llama._sampler][1:]
            kept += [text_of(llama), llama._sampler][1:]
        finally:
            gc.enable()
        assert [sampler.sampler is None for sampler in kept] == [True, False]
        llama.eval([1, 2])
        assert 0 <= llama.sample(temp=0.0) < llama.n_vocab()


def test_chat(arcee: Pair) -> None:
    stock, ours = arcee.open()
    messages = [{"role": "user", "content": "hello there"}]

    def answer(llama: llama_cpp.Llama) -> str:
        reply = llama.create_chat_completion(messages, max_tokens=16, temperature=0.0)
        return reply["choices"][0]["message"]["content"]

    def streamed(llama: llama_cpp.Llama) -> str:
        chunks = llama.create_chat_completion(messages, max_tokens=16, temperature=0.0, stream=True)
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    assert answer(ours) == answer(stock) == streamed(ours)


@pytest.mark.parametrize("pooling", [llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_NONE])
def test_embeddings(arcee: Pair, pooling: int) -> None:
    stock, ours = arcee.open(embedding=True, pooling_type=pooling)
    texts = [PROMPT, "a dog", "another line of text"]  # several sequences in one batch
    for expected, found in zip(stock.embed(texts), ours.embed(texts), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=TOLERANCE, rtol=0)


def test_saved_state_continues(arcee: Pair) -> None:
    first, second = Llama(arcee.sparse, **SETTINGS), Llama(arcee.sparse, **SETTINGS)
    tokens = first.tokenize(PROMPT.encode())
    first.eval(tokens)
    state = first.save_state()
    expected = [token for token, _ in zip(first.generate(tokens, temp=0.0), range(12), strict=False)]
    second.load_state(state)
    assert second.n_tokens == len(tokens)
    assert [t for t, _ in zip(second.generate(tokens, temp=0.0), range(12), strict=False)] == expected
    stock = llama_cpp.Llama(arcee.stock, **SETTINGS)
    stock.load_state(state)  # the state holds no weights: stock goes on where we stopped
    assert [t for t, _ in zip(stock.generate(tokens, temp=0.0), range(12), strict=False)] == expected


def test_prompt_cache(arcee: Pair) -> None:
    llama = Llama(arcee.sparse, **SETTINGS)
    expected = text_of(llama)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    assert text_of(llama) == expected
    llama.reset()
    assert text_of(llama) == expected


def test_logprobs(arcee: Pair) -> None:
    stock, ours = arcee.open(logits_all=True)
    found, expected = (
        llama(PROMPT, max_tokens=12, temperature=0.0, logprobs=4, echo=True)["choices"][0]["logprobs"]
        for llama in (ours, stock)
    )
    assert found["tokens"] == expected["tokens"]
    assert found["token_logprobs"][0] is None
    np.testing.assert_allclose(
        found["token_logprobs"][1:], expected["token_logprobs"][1:], atol=TOLERANCE, rtol=0
    )
    assert [set(top) for top in found["top_logprobs"][1:]] == [set(t) for t in expected["top_logprobs"][1:]]


def test_grammar(arcee: Pair) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "[" [0-9]+ ("," [0-9]+)* "]"', verbose=False)
    stock, ours = arcee.open()
    found = text_of(ours, grammar=grammar)
    assert found == text_of(stock, grammar=grammar)
    assert found.startswith("[") and set(found) <= set("[0123456789,]")


def test_json_mode(arcee: Pair) -> None:
    stock, ours = arcee.open()

    def answer(llama: llama_cpp.Llama) -> str:
        reply = llama.create_chat_completion(
            [{"role": "user", "content": "a number"}],
            max_tokens=40,
            temperature=0.0,
            response_format={
                "type": "json_object",
                "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            },
        )
        return reply["choices"][0]["message"]["content"]

    assert answer(ours) == answer(stock)
    assert set(json.loads(answer(ours))) == {"a"}


def test_draft_model(arcee: Pair) -> None:
    plain = text_of(llama_cpp.Llama(arcee.stock, **SETTINGS))
    stock, ours = arcee.open(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    assert text_of(ours) == text_of(stock) == plain


def test_logits_processor_and_bias(arcee: Pair) -> None:
    stock, ours = arcee.open()

    def only_even(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[1::2] = -np.inf
        return scores

    for settings in (
        {"logits_processor": llama_cpp.LogitsProcessorList([only_even])},
        {"logit_bias": {"65": 100.0}},
    ):
        assert text_of(ours, **settings) == text_of(stock, **settings)


def write_lora(path: Path, architecture: str, targets: dict[str, tuple[int, int]], rank: int = 4) -> None:
    """A LoRA adapter for weights given as name -> (inputs, outputs)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    rng = np.random.default_rng(5)
    for name, (inputs, outputs) in targets.items():
        writer.add_tensor(f"{name}.lora_a", rng.normal(0, 0.1, (rank, inputs)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", rng.normal(0, 0.1, (outputs, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("targets", ["attention", "ffn", "both"])
def test_lora(arcee: Pair, tmp_path: Path, targets: str) -> None:
    attention = {f"blk.{layer}.attn_q.weight": (256, 256) for layer in (0, 1)}
    ffn = {f"blk.{layer}.ffn_up.weight": (256, 512) for layer in (0, 1)}
    ffn |= {f"blk.{layer}.ffn_down.weight": (512, 256) for layer in (0, 1)}
    chosen = {"attention": attention, "ffn": ffn, "both": attention | ffn}[targets]
    write_lora(tmp_path / "lora.gguf", "arcee", chosen)
    lora = {"lora_path": str(tmp_path / "lora.gguf"), "logits_all": True}
    stock, ours = arcee.open(**lora)
    tokens = stock.tokenize(PROMPT.encode())
    without = llama_cpp.Llama(arcee.stock, **SETTINGS, logits_all=True)
    for llama in (stock, ours, without):
        llama.eval(tokens)
    rows = len(tokens)
    assert np.abs(stock.scores[:rows] - without.scores[:rows]).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(ours.scores[:rows], stock.scores[:rows], atol=TOLERANCE, rtol=0)
    assert text_of(ours) == text_of(stock)


def test_an_adapter_that_does_not_fit_is_refused(arcee: Pair, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.gguf", "arcee", {"blk.0.ffn_up.weight": (128, 512)})
    with pytest.raises(PowerInferError, match="lora.gguf cannot be applied"):
        Llama(arcee.sparse, lora_path=str(tmp_path / "lora.gguf"), **SETTINGS)


def test_several_batches_and_small_ubatches(arcee: Pair) -> None:
    stock, ours = arcee.open(n_batch=8, n_ubatch=3)
    assert text_of(ours) == text_of(stock)


def test_vocabulary_only(arcee: Pair) -> None:
    stock, ours = arcee.open(vocab_only=True)
    assert ours.tokenize(PROMPT.encode()) == stock.tokenize(PROMPT.encode())


def test_metadata_is_the_sources(arcee: Pair) -> None:
    stock, ours = arcee.open()
    assert {k: v for k, v in ours.metadata.items() if k != "general.alignment"} == {
        k: v for k, v in stock.metadata.items() if k != "general.alignment"
    }


def test_pickling_keeps_our_arguments(arcee: Pair) -> None:
    llama = Llama(arcee.sparse, sparse_mode="dense", **SETTINGS)
    copy = pickle.loads(pickle.dumps(llama))
    assert type(copy) is Llama and copy.sparse_mode == "dense"
    assert text_of(copy) == text_of(llama)
    assert copy.sparse_stats()["layers"]


def test_from_pretrained(arcee: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is somebody else's: a stand-in for huggingface_hub hands out our file."""
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda **kwargs: arcee.sparse
    hub.HfFileSystem = lambda: types.SimpleNamespace(ls=lambda repo, recursive: [f"{repo}/model.gguf"])
    validators = types.ModuleType("huggingface_hub.utils")
    validators.validate_repo_id = lambda repo: None
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", validators)
    llama = Llama.from_pretrained("somebody/model", "*.gguf", sparse_mode="dense", **SETTINGS)
    assert type(llama) is Llama and llama.sparse_mode == "dense"
    assert text_of(llama) == text_of(Llama(arcee.sparse, **SETTINGS))


def test_path_objects(arcee: Pair) -> None:
    assert text_of(Llama(Path(arcee.sparse), **SETTINGS))


def test_closed_model_has_no_statistics(arcee: Pair) -> None:
    with closing(Llama(arcee.sparse, **SETTINGS)) as llama:
        text_of(llama)
    with pytest.raises(PowerInferError, match="closed"):
        llama.sparse_stats()


def test_unknown_mode(arcee: Pair) -> None:
    with pytest.raises(PowerInferError, match="exact, dense"):
        Llama(arcee.sparse, sparse_mode="fast", **SETTINGS)
