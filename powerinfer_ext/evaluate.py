"""`powerinfer eval`: how far a sparse-GGUF is from the dense model it was made from.

Both read the same text, cut into windows that start with an empty KV cache, and at every position their
next-token distributions are compared: KL(dense || sparse) in nats, in float64, and whether the likeliest
token is the same. Perplexity is taken over the second half of each window, where there is context to predict
from (as llama.cpp's perplexity tool does).

A difference means nothing without the noise it stands in. So stock is compared with itself too: with its
repacked weight layouts (`use_extra_bufts`) on and off, and reading a window at once (prefill) against token
by token (decode).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import llama_cpp
import numpy as np
from llama_cpp import _internals as internals
from llama_cpp._logger import set_verbose
from rich.console import Console
from rich.table import Table

from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.hook import sparse_loading
from powerinfer_ext.loader import Options
from powerinfer_ext.run import trained_context

MODES = ("prefill", "decode")
_ROWS = 64  # positions compared at a time: bounds the float64 copies to 64 x n_vocab


class Scorer(Protocol):
    """Anything that gives logits for a window of tokens that starts with an empty context."""

    def logits(self, tokens: list[int], mode: str) -> np.ndarray:
        """float32 [len(tokens), n_vocab]; "prefill" reads the window at once, "decode" token by token."""
        ...


class LlamaScorer:
    """Logits from llama.cpp.

    Not a `llama_cpp.Llama`: that one has no way to set `use_extra_bufts`, and keeps the logits of a whole
    context.
    """

    def __init__(
        self, path: str, *, window: int, threads: int, sparse_mode: str = "exact", extra_bufts: bool = True
    ) -> None:
        self._stack = contextlib.ExitStack()
        set_verbose(False)  # llama.cpp's log, as llama_cpp.Llama(verbose=False) does
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = extra_bufts
        with sparse_loading(Options(sparse_mode)):
            self.model = self._open(internals.LlamaModel(path_model=path, params=params, verbose=False))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = window
        context.n_ubatch = min(window, 512)
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )  # as llama_cpp.Llama does by default
        self.context = self._open(internals.LlamaContext(model=self.model, params=context, verbose=False))
        self.batch = self._open(internals.LlamaBatch(n_tokens=window, embd=0, n_seq_max=1, verbose=False))
        self.n_vocab: int = self.model.n_vocab()

    def _open(self, thing: Any) -> Any:
        return self._stack.enter_context(contextlib.closing(thing))

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> LlamaScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def sparse(self) -> Any:
        """The `SparseModel`, None for a stock GGUF."""
        return getattr(self.model.model, "sparse", None)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of `text`, without a BOS."""
        return self.model.tokenize(text.encode(), add_bos=False, special=False)

    def logits(self, tokens: list[int], mode: str) -> np.ndarray:
        self.context.kv_cache_clear()
        step = len(tokens) if mode == "prefill" else 1
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), step):
            self.batch.set_batch(tokens[start : start + step], n_past=start, logits_all=True)
            self.context.decode(self.batch)
            rows = np.ctypeslib.as_array(self.context.get_logits(), shape=(step * self.n_vocab,))
            out[start : start + step] = rows.reshape(step, self.n_vocab)
        return out


class ReferenceScorer:
    """Logits from the numpy float32 forward pass; it has no modes, a window is a window."""

    def __init__(self, path: str, activation: str) -> None:
        from powerinfer_ext.reference import Reference

        self._reference = Reference(path, activation)
        self._last: tuple[list[int], np.ndarray] = ([], np.empty((0, 0)))

    def logits(self, tokens: list[int], mode: str) -> np.ndarray:
        if self._last[0] != tokens:
            self._last = (tokens, np.asarray(self._reference.logits(tokens), np.float32))
        return self._last[1]


@dataclass
class Divergence:
    """KL and top-1 agreement, accumulated over windows."""

    positions: int = 0
    sum_kl: float = 0.0
    max_kl: float = 0.0
    agreeing: int = 0

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Compare logits `p` and `q`, both [positions, n_vocab]: KL(softmax p || softmax q)."""
        for start in range(0, len(p), _ROWS):
            a, b = p[start : start + _ROWS], q[start : start + _ROWS]
            log_a, log_b = log_softmax(a), log_softmax(b)
            kl = np.sum(np.exp(log_a) * (log_a - log_b), axis=1)
            self.positions += len(kl)
            self.sum_kl += float(kl.sum())
            self.max_kl = max(self.max_kl, float(kl.max()))
            self.agreeing += int(np.count_nonzero(a.argmax(1) == b.argmax(1)))

    def json(self) -> dict[str, float]:
        return {
            "mean_kl": self.sum_kl / self.positions,
            "max_kl": self.max_kl,
            "top1_agreement": self.agreeing / self.positions,
        }


@dataclass
class Perplexity:
    """exp of the mean negative log-likelihood of the second half of each window."""

    predicted: int = 0
    sum_nll: float = 0.0

    def add(self, logits: np.ndarray, tokens: list[int]) -> None:
        """`logits` [len(tokens), n_vocab] of the window `tokens`: row i predicts token i + 1."""
        for row in range(len(tokens) // 2, len(tokens) - 1):
            self.sum_nll -= float(log_softmax(logits[row : row + 1])[0, tokens[row + 1]])
            self.predicted += 1

    def value(self) -> float:
        return float(np.exp(self.sum_nll / self.predicted))


@dataclass
class Comparison:
    """Everything measured in one mode."""

    against_dense: Divergence = field(default_factory=Divergence)
    stock_self: Divergence = field(default_factory=Divergence)  # stays empty without the floor
    ppl_dense: Perplexity = field(default_factory=Perplexity)
    ppl_sparse: Perplexity = field(default_factory=Perplexity)

    def add(self, tokens: list[int], dense: np.ndarray, sparse: np.ndarray) -> None:
        self.against_dense.add(dense, sparse)
        self.ppl_dense.add(dense, tokens)
        self.ppl_sparse.add(sparse, tokens)

    def json(self) -> dict[str, Any]:
        return {
            "tokens": self.against_dense.positions,
            "ppl_dense": self.ppl_dense.value(),
            "ppl_sparse": self.ppl_sparse.value(),
            **self.against_dense.json(),
            "stock_self": self.stock_self.json() if self.stock_self.positions else None,
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log softmax in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def windows(tokens: list[int], total: int, size: int, bos: int | None) -> list[list[int]]:
    """Cut `tokens` into windows of `size`, `total` positions in all, each starting with `bos` unless it is
    None.

    The last window may be shorter. Raises PowerInferError when there is not even one window of 4 tokens.
    """
    head = [] if bos is None else [bos]
    body = iter(tokens)
    out: list[list[int]] = []
    left = total
    while left > 0:
        window = head + list(itertools.islice(body, min(size, left) - len(head)))
        if len(window) < 4:
            break
        out.append(window)
        left -= len(window)
    if not out:
        raise PowerInferError("there is too little text to evaluate on: at least 4 tokens are needed")
    return out


def evaluate(
    sparse_path: str,
    dense_path: str | None,
    text: str,
    *,
    reference: tuple[str, str] | None = None,
    tokens: int = 4096,
    window: int | None = None,
    modes: Iterable[str] = MODES,
    floor: bool = True,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the sparse-GGUF with the dense model over `tokens` positions of `text`.

    Args:
        dense_path: the stock GGUF to compare with, or None to compare with a reference.
        reference: (dense GGUF, activation) for the numpy forward pass, where stock has another activation.
        window: tokens per window, each with a fresh KV cache; None for 512, or the context that the model was
            trained with where that is less.
        modes: of "prefill" and "decode", which to evaluate.
        floor: also measure how far stock is from itself (needs dense_path, and loads it twice).
        progress: called with (tokens read, tokens to read in all); each model reads each window.

    Returns the JSON of `powerinfer eval`. The figures at its top level are those of the mode with the greater
    KL; `modes` has them all. `stock_self` and `stock_prefill_vs_decode` are None without the floor.
    """
    modes = tuple(modes)
    window = window or trained_context(sparse_path, at_most=512)
    floor = floor and dense_path is not None
    with contextlib.ExitStack() as stack:
        settings = {"window": window, "threads": threads}
        sparse = stack.enter_context(LlamaScorer(sparse_path, **settings))
        dense: Scorer
        if dense_path is not None:
            dense = stack.enter_context(LlamaScorer(dense_path, **settings))
        elif reference is not None:
            dense = ReferenceScorer(*reference)
        else:
            raise PowerInferError("nothing to compare with: give a dense model or a reference")
        if isinstance(dense, LlamaScorer) and dense.n_vocab != sparse.n_vocab:
            raise PowerInferError(
                f"{sparse_path} and {dense_path} are not the same model: they have vocabularies of "
                f"{sparse.n_vocab} and {dense.n_vocab} tokens"
            )
        other = stack.enter_context(LlamaScorer(dense_path, **settings, extra_bufts=False)) if floor else None

        bos = sparse.model.token_bos() if sparse.model.add_bos_token() else None
        cut = windows(sparse.tokenize(text), tokens, window, bos)
        dense_modes = MODES if floor else modes
        passes = len(dense_modes) + len(modes) * (2 if other is not None else 1)
        total = sum(map(len, cut)) * passes
        done = 0

        def read(scorer: Scorer, part: list[int], mode: str) -> np.ndarray:
            nonlocal done
            logits = scorer.logits(part, mode)
            done += len(part)
            if progress is not None:
                progress(done, total)
            return logits

        comparisons = {mode: Comparison() for mode in modes}
        prefill_vs_decode = Divergence()
        if sparse.sparse is not None:
            sparse.sparse.reset_stats()
        for part in cut:
            dense_logits = {mode: read(dense, part, mode) for mode in dense_modes}
            for mode, comparison in comparisons.items():
                comparison.add(part, dense_logits[mode], read(sparse, part, mode))
                if other is not None:
                    comparison.stock_self.add(dense_logits[mode], read(other, part, mode))
            if floor:
                prefill_vs_decode.add(dense_logits["prefill"], dense_logits["decode"])
        stats = sparse.sparse.stats() if sparse.sparse is not None else {"density": None, "layers": []}

    per_mode = {mode: comparison.json() for mode, comparison in comparisons.items()}
    worst = max(modes, key=lambda mode: per_mode[mode]["mean_kl"])
    return {
        "mode": worst,
        **per_mode[worst],
        "density": stats["density"],
        "layers": stats["layers"],
        "stock_prefill_vs_decode": prefill_vs_decode.json() if floor else None,
        "against": "dense" if dense_path is not None else "reference",
        "window": window,
        "modes": per_mode,
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print what `evaluate` returned."""
    console.print(agreement_table(result))
    if result["layers"]:
        console.print(layer_table(result["layers"]))
    else:
        console.print("Nothing was computed sparsely: this is a stock GGUF.")


def agreement_table(result: dict[str, Any]) -> Table:
    """Sparse against dense, and below it the noise floor."""
    table = Table(title=f"Agreement over {result['tokens']} tokens")
    table.add_column("", no_wrap=True)
    for column in ("mean KL", "max KL", "same top-1", "perplexity"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, figures: dict[str, Any], perplexity: str = "") -> None:
        kl, greatest, top1 = figures["mean_kl"], figures["max_kl"], figures["top1_agreement"]
        table.add_row(name, f"{kl:.1e}", f"{greatest:.1e}", f"{top1:.2%}", perplexity)

    for mode, figures in result["modes"].items():
        perplexity = f"{figures['ppl_dense']:.2f} -> {figures['ppl_sparse']:.2f}"
        row(f"{mode}: sparse, {result['against']}", figures, perplexity)
    for mode, figures in result["modes"].items():
        if figures["stock_self"]:
            row(f"{mode}: stock, itself*", figures["stock_self"])
    if result["stock_prefill_vs_decode"]:
        row("stock: prefill, decode", result["stock_prefill_vs_decode"])
        table.caption = "* with use_extra_bufts off. The last rows are the noise to judge the first by."
    return table


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Density and time per layer, from `sparse_stats()["layers"]`."""
    table = Table("layer", "neurons", "computed", "", "seconds", title="Neurons computed per layer")
    for layer in layers:
        share = layer["density"] or 0.0
        bar = "█" * round(share * 30)
        table.add_row(
            str(layer["layer"]), str(layer["neurons"]), f"{share:.1%}", bar, f"{layer['seconds']:.3f}"
        )
    return table
