"""`powerinfer run`: continue a prompt, and say how fast and how sparsely."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llama_cpp

from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.llama import Llama, sparse_stats


@dataclass(frozen=True)
class Generation:
    """A continuation. Speeds are tokens per second, None where there was nothing to time."""

    text: str
    prompt_tokens: int
    tokens: int
    prefill_tps: float | None  # prompt tokens over the time until the first new token was chosen
    decode_tps: float | None  # the other new tokens over the time they took
    density: float | None  # mean share of neurons computed, None for a stock GGUF
    streaming: Streaming | None = None  # None where everything is in memory
    missed: float | None = None  # share of the firing neurons that predictors missed, None unless verified
    verified: int = 0  # evaluations (a token in a layer) that this is from


@dataclass(frozen=True)
class Streaming:
    """What was read from disk for a continuation, prompt included; per token, prompt tokens counted too."""

    hit_rate: float | None  # share of the wanted neurons, experts or tiles that were in memory
    read_bytes_per_token: float
    io_wait_ms_per_token: float  # of one thread
    prefetch_accuracy: float | None  # share of what was read ahead that was then used
    engine: str
    budget_bytes: int

    def sentence(self) -> str:
        """In words."""
        hits = "-" if self.hit_rate is None else f"{self.hit_rate:.1%}"
        ahead = "" if self.prefetch_accuracy is None else f", {self.prefetch_accuracy:.0%} of prefetches were used"
        return (
            f"within {self.budget_bytes / 1e6:.0f} MB: hit rate {hits}, read {self.read_bytes_per_token / 1e6:.2f} MB "
            f"per token ({self.engine}), waited {self.io_wait_ms_per_token:.1f} ms per token{ahead}"
        )


def streaming(
    before: dict[str, Any] | None, after: dict[str, Any] | None, tokens: int, threads: int
) -> Streaming | None:
    """What the counters (`sparse_stats()["flash"]`) say about the tokens between two moments."""
    if before is None or after is None:
        return None
    counts = {key: after[key] - before[key] for key in before if isinstance(before[key], int | float)}
    settled = counts["useful"] + counts["wasted"]
    return Streaming(
        hit_rate=1 - counts["missed"] / counts["wanted"] if counts["wanted"] else None,
        read_bytes_per_token=counts["read_bytes"] / max(tokens, 1),
        io_wait_ms_per_token=1000 * counts["wait_seconds"] / max(tokens, 1) / max(threads, 1),
        prefetch_accuracy=counts["useful"] / settled if settled else None,
        engine=after["engine"],
        budget_bytes=after["budget"],
    )


def default_threads() -> int:
    """One thread per CPU that this process may use."""
    return len(os.sched_getaffinity(0))


def open_model(
    path: str,
    *,
    ctx: int,
    threads: int | None,
    dense: bool = False,
    seed: int | None = None,
    memory: int | str | None = None,
    io: str = "auto",
    verify: float = 0.0,
) -> Llama:
    """Open `path` for generation.

    ctx: in tokens; 0: what the model was trained with, but at most 4096. seed: None for a new one each time. memory,
    io, verify: as for `powerinfer_ext.Llama`.
    """
    if ctx == 0:
        ctx = trained_context(path)
    threads = threads or default_threads()
    llama = Llama(
        path,
        sparse_mode="dense" if dense else "exact",
        memory=memory,
        io=io,
        verify=verify,
        n_ctx=ctx,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    if seed is not None:
        llama.set_seed(seed)  # not an argument above: Llama takes 0 for "none given"
    return llama


def trained_context(path: str, at_most: int = 4096) -> int:
    """The context length in the file's metadata, `at_most` where it is longer or not stated."""
    from gguf_tools.reader import GGUFFile

    try:
        with GGUFFile.open(path) as file:
            length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    except ValueError:
        length = None  # loading it will say what is wrong, and stock may read what our reader does not
    return min(length, at_most) if isinstance(length, int) and length > 0 else at_most


def generate(
    llama: llama_cpp.Llama,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` by up to `max_tokens` tokens, fewer when the model ends the text or the context is
    full.

    temperature 0 takes the likeliest token each time. on_text gets the new text piece by piece, as it
    appears. Raises PowerInferError when the prompt leaves no room in the context, or is empty.
    """
    tokens = llama.tokenize(prompt.encode(), special=True)
    room = llama.n_ctx() - len(tokens)
    if not tokens:
        raise PowerInferError("the prompt is empty; give some text to continue")
    if room < 1:
        raise PowerInferError(
            f"the prompt has {len(tokens)} tokens and the context only {llama.n_ctx()}; raise --ctx or "
            "shorten the prompt"
        )
    llama.reset()
    before = sparse_stats(llama)["flash"]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
    text: list[str] = []
    written: list[int] = []

    def emit(piece: str) -> None:
        text.append(piece)
        if on_text is not None and piece:
            on_text(piece)

    start = first = last = time.perf_counter()
    for token in llama.generate(tokens, temp=temperature):
        last = time.perf_counter()
        if not written:
            first = last
        if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
            break
        written.append(token)
        emit(decoder.decode(llama.detokenize([token], prev_tokens=tokens + written[:-1])))
        if len(written) >= min(max_tokens, room):
            break
    emit(decoder.decode(b"", final=True))
    stats = sparse_stats(llama)
    return Generation(
        text="".join(text),
        prompt_tokens=len(tokens),
        tokens=len(written),
        prefill_tps=_rate(len(tokens), first - start),
        decode_tps=_rate(len(written) - 1, last - first),
        density=stats["density"],
        streaming=streaming(before, stats["flash"], len(tokens) + len(written), llama.n_threads),
        missed=stats["missed"],
        verified=stats["verified"],
    )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
