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
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import llama_cpp
import numpy as np
from llama_cpp import _internals as internals
from llama_cpp._logger import set_verbose
from rich.console import Console
from rich.table import Table

from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import K_VERSION, SparseGGUF
from gguf_tools.virtual import ModelFiles
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.firing import TOKENS, firing
from powerinfer_ext.hook import sparse_loading
from powerinfer_ext.loader import Options
from powerinfer_ext.placement import Context, choose_ubatch
from powerinfer_ext.run import trained_context

PASSES = ("prefill", "decode")
MODES = ("exact", "predict", "threshold")
_ROWS = 64  # positions compared at a time: bounds the float64 copies to 64 x n_vocab


class Scorer(Protocol):
    """Anything that gives logits for a window of tokens that starts with an empty context."""

    def logits(self, tokens: list[int], how: str) -> np.ndarray:
        """float32 [len(tokens), n_vocab]; "prefill" reads the window at once, "decode" token by token."""
        ...


class LlamaScorer:
    """Logits from llama.cpp.

    Not a `llama_cpp.Llama`: that one has no way to set `use_extra_bufts`, and keeps the logits of a whole
    context.
    """

    def __init__(
        self,
        path: str,
        *,
        window: int,
        threads: int,
        sparse_mode: str | None = "exact",
        extra_bufts: bool = True,
        memory: int | str | None = None,
        io: str = "auto",
        logits_all: bool = True,
    ) -> None:
        """window: tokens of the context. sparse_mode: None for stock as it is, without our loader. memory, io: as for
        `powerinfer_ext.Llama`. logits_all: will logits of all tokens of a batch be wanted? (A budget has to leave room
        for them.)"""
        self._stack = contextlib.ExitStack()
        set_verbose(False)  # llama.cpp's log, as llama_cpp.Llama(verbose=False) does
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = extra_bufts
        room = Context(window, window, min(window, 512), logits_all=logits_all)
        if sparse_mode is not None and memory is not None:
            with ModelFiles.open(path) as files:
                room = replace(room, n_ubatch=choose_ubatch(files, memory, room) or room.n_ubatch)
        with sparse_loading(Options(sparse_mode, memory, io, room)) if sparse_mode else contextlib.nullcontext():
            self.model = self._open(internals.LlamaModel(path_model=path, params=params, verbose=False))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = window
        context.n_ubatch = room.n_ubatch
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

    def logits(self, tokens: list[int], how: str) -> np.ndarray:
        self.context.kv_cache_clear()
        step = len(tokens) if how == "prefill" else 1
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), step):
            self.batch.set_batch(tokens[start : start + step], n_past=start, logits_all=True)
            self.context.decode(self.batch)
            rows = np.ctypeslib.as_array(self.context.get_logits(), shape=(step * self.n_vocab,))
            out[start : start + step] = rows.reshape(step, self.n_vocab)
        return out


class ReferenceScorer:
    """Logits from the numpy float32 forward pass; a window is a window, however it is read."""

    def __init__(self, path: str, activation: str) -> None:
        from powerinfer_ext.reference import Reference

        self._reference = Reference(path, activation)
        self._last: tuple[list[int], np.ndarray] = ([], np.empty((0, 0)))

    def logits(self, tokens: list[int], how: str) -> np.ndarray:
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
    """Everything measured in one pass."""

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
    passes: Iterable[str] = PASSES,
    mode: str | None = None,
    floor: bool = True,
    memory: int | str | None = None,
    io: str = "auto",
    threads: int = 1,
    extra_bufts: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the sparse-GGUF with the dense model over `tokens` positions of `text`.

    Args:
        dense_path: the stock GGUF to compare with, or None to compare with a reference.
        reference: (dense GGUF, activation) for the numpy forward pass, where stock has another activation.
        window: tokens per window, each with a fresh KV cache; None for 512, or the context that the model was
            trained with where that is less.
        passes: of "prefill" and "decode", which to evaluate.
        mode: "predict" and "threshold" judge a file that has predictors or thresholds as it runs, "exact" computes all
            of its neurons instead; None for what the file is.
        floor: also measure how far stock is from itself (needs dense_path, and loads it twice).
        memory, io: of the sparse model alone, as for `powerinfer_ext.Llama`; the others are beside it in this process.
        extra_bufts: of the sparse model alone: weights may be kept in other layouts than the file's (panels.h), whose
            products are the same up to the order of floating-point additions.
        progress: called with (tokens read, tokens to read in all); each model reads each window.

    Returns the JSON of `powerinfer eval`. The figures at its top level are those of the pass with the greater
    KL; `passes` has them all. `stock_self` and `stock_prefill_vs_decode` are None without the floor. `recall`,
    `precision` and `predictor_share` are means over the predicted layers (on a part of the tokens), None without any;
    `computed_share` is the mean over all layers.
    """
    passes = tuple(passes)
    mode, sparse_mode = _mode(sparse_path, mode)
    window = window or trained_context(sparse_path, at_most=512)
    floor = floor and dense_path is not None
    with contextlib.ExitStack() as stack:
        settings = {"window": window, "threads": threads}
        ours = {"sparse_mode": sparse_mode, "memory": memory, "io": io, "extra_bufts": extra_bufts}
        sparse = stack.enter_context(LlamaScorer(sparse_path, **settings, **ours))
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
        dense_passes = PASSES if floor else passes
        total = sum(map(len, cut)) * (len(dense_passes) + len(passes) * (2 if other is not None else 1))
        done = 0

        def read(scorer: Scorer, part: list[int], how: str) -> np.ndarray:
            nonlocal done
            logits = scorer.logits(part, how)
            done += len(part)
            if progress is not None:
                progress(done, total)
            return logits

        comparisons = {how: Comparison() for how in passes}
        prefill_vs_decode = Divergence()
        if sparse.sparse is not None:
            sparse.sparse.reset_stats()
        for part in cut:
            dense_logits = {how: read(dense, part, how) for how in dense_passes}
            for how, comparison in comparisons.items():
                comparison.add(part, dense_logits[how], read(sparse, part, how))
                if other is not None:
                    comparison.stock_self.add(dense_logits[how], read(other, part, how))
            if floor:
                prefill_vs_decode.add(dense_logits["prefill"], dense_logits["decode"])
        stats = sparse.sparse.stats() if sparse.sparse is not None else {"density": None, "layers": []}

    found = firing(sparse_path, _some(cut), threads=threads) if mode == "predict" else {}
    layers = [
        {**layer, **found[layer["layer"]].json()} if layer["layer"] in found else layer for layer in stats["layers"]
    ]
    per_pass = {how: comparison.json() for how, comparison in comparisons.items()}
    worst = max(passes, key=lambda how: per_pass[how]["mean_kl"])
    return {
        "mode": mode,
        "pass": worst,
        **per_pass[worst],
        "density": stats["density"],
        "computed_share": stats["density"],
        **{key: _mean([f.json()[key] for f in found.values()]) for key in ("recall", "precision", "predictor_share")},
        "layers": layers,
        "stock_prefill_vs_decode": prefill_vs_decode.json() if floor else None,
        "against": "dense" if dense_path is not None else "reference",
        "window": window,
        "passes": per_pass,
    }


def _mode(path: str, wanted: str | None) -> tuple[str, str]:
    """What the file at `path` is judged as, and the engine's mode for it."""
    with GGUFFile.open(path) as file:
        if K_VERSION not in file.fields:
            native = "exact"
        else:
            view = SparseGGUF(file)
            native = "threshold" if view.threshold_kind else view.mode
    if wanted not in (None, "exact", native):
        how = "--mode predict" if wanted == "predict" else "--threshold"
        raise PowerInferError(f"{path}: has nothing for mode {wanted}; convert the model with {how}")
    mode = wanted or native
    return mode, "dense" if mode == "exact" and native != "exact" else "exact"


def _some(cut: list[list[int]]) -> list[list[int]]:
    """Windows from the start, as many as are looked at closely."""
    n = 1 + next((i for i in range(len(cut)) if sum(map(len, cut[: i + 1])) >= TOKENS), len(cut))
    return cut[:n]


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


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

    for how, figures in result["passes"].items():
        perplexity = f"{figures['ppl_dense']:.2f} -> {figures['ppl_sparse']:.2f}"
        row(f"{how}: sparse, {result['against']}", figures, perplexity)
    for how, figures in result["passes"].items():
        if figures["stock_self"]:
            row(f"{how}: stock, itself*", figures["stock_self"])
    if result["stock_prefill_vs_decode"]:
        row("stock: prefill, decode", result["stock_prefill_vs_decode"])
        table.caption = "* with use_extra_bufts off. The last rows are the noise to judge the first by."
    return table


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Density and time per layer, from `sparse_stats()["layers"]`; recall and precision where `evaluate` added them."""
    predicted = any("recall" in layer for layer in layers)
    more = ("recall", "precision") if predicted else ()
    table = Table("layer", "neurons", "computed", "", "seconds", *more, title="Neurons computed per layer")
    for layer in layers:
        share = layer["density"] or 0.0
        bar = "█" * round(share * 30)
        figures = ["-" if layer.get(key) is None else f"{layer[key]:.1%}" for key in more]
        table.add_row(
            *(str(layer["layer"]), str(layer["neurons"]), f"{share:.1%}", bar, f"{layer['seconds']:.3f}", *figures)
        )
    return table
