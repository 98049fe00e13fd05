"""`powerinfer calibrate`: read text with a model and keep what its FFNs did, as a profile.

Capturing goes through llama.cpp's evaluation callback (`llama_context_params.cb_eval`), as in `trace.py`, in
batches of 512 tokens. It asks for as little as says everything: the product that decides (computed by stock's
kernels for stock and sparse files alike) gives the FFN's input (its second source) and, under relu and squared
relu, which neurons fire. Everything else takes the activation itself as well, which has a sparse file computed
node by node. The layout of the result is described in `gguf_tools/profile.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import typer

from gguf_tools.activations import NATIVE
from gguf_tools.convert import convert, plan_conversion, predict_obstacle
from gguf_tools.errors import ConversionError
from gguf_tools.fit import RECALL, Fit, chart_of, fit
from gguf_tools.profile import Profile, ProfiledFFN, fingerprint
from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import K_VERSION, SILENT, SparseGGUF
from powerinfer_ext.errors import PowerInferError
from powerinfer_ext.graph import Tensor, ggml_functions, open_watched, tensor_values

TOKENS = 32768  # of text read by default; the bundled one has fewer. What training has seen bounds what it can learn
RANDOM_TOKENS = 8192  # where tokens are random; twice as many spare 0.6 % of the neurons of a Mistral's shape
LEAST_TOKENS = 512  # fewer cannot train anything
DISK = 2 << 30  # bytes that a profile takes at most by default
WINDOW = BATCH = 512
CHUNK = 2048  # tokens that are kept together: what an interruption loses at most
MAGNITUDES = 512  # tokens whose magnitudes are kept, for thresholds

Progress = Callable[..., None]

_DECIDER = re.compile(r"^ffn_(gate|up)-(\d+)$")
_UP = re.compile(r"^ffn_up-(\d+)$")
_DENSE = re.compile(r"^ffn_(?:reglu|swiglu|geglu|relu|silu|gelu)-(\d+)$")
_MIXTURE = re.compile(r"^ffn_moe_(?:reglu|swiglu|geglu|relu|relu_sqr|silu|gelu)-(\d+)$")
_ROUTED = re.compile(r"^ffn_moe_topk-(\d+)$")


@dataclass(frozen=True)
class _Model:
    """What has to be known of a model file before it is run. name: what messages call it."""

    path: str
    name: str
    architecture: str
    activation: str
    native: bool  # stock computes that activation
    sparse: bool
    context: int  # 0: not known
    experts_used: int
    fingerprint: str
    ffns: list[ProfiledFFN]
    orders: dict[str, np.ndarray]  # of a sparse file: source index -> stored index, [n_expert or 1, n_ff]
    biased: frozenset[str]  # FFNs with biases


def _about(path: str, name: str | None = None) -> _Model:
    with GGUFFile.open(path) as file:
        architecture = str(file.metadata.get("general.architecture"))
        orders: dict[str, np.ndarray] = {}
        sparse = K_VERSION in file.fields
        if sparse:
            view = SparseGGUF(file)
            if view.mode != "exact":
                raise PowerInferError(
                    f"{path}: its neurons are predicted, so it cannot say which ones fire; calibrate its source "
                    f"({view.source_name}), or an exact conversion of it"
                )
            activation, ffns, biased = view.activation, [], set()
            for layer in view.layers:
                unit = f"{layer.index}{layer.suffix}"
                ffns.append(ProfiledFFN(unit, layer.n_embd, layer.n_ff, layer.n_expert, layer.gated))
                orders[unit] = np.argsort(layer.order, axis=1)
                if any(name in file.tensors for name in layer.bias_names):
                    biased.add(unit)
        else:
            plan = plan_conversion(file)
            activation = plan.activation
            ffns = [
                ProfiledFFN(f.unit, f.n_embd, f.n_ff, f.experts if f.suffix else 0, plan.gated) for f in plan.ffns
            ]
            biased = {f.unit for f in plan.ffns if any(bias in file.tensors for bias in f.biases)}
        return _Model(
            path=path,
            name=name or path,
            architecture=architecture,
            activation=activation,
            native=activation == NATIVE.get(architecture, (None, False))[0],
            sparse=sparse,
            context=int(file.metadata.get(f"{architecture}.context_length", 0)),
            experts_used=int(file.metadata.get(f"{architecture}.expert_used_count", 0)),
            fingerprint=fingerprint(file),
            ffns=ffns,
            orders=orders,
            biased=frozenset(biased),
        )


@dataclass
class _Capture:
    """The evaluation callback: asks for the nodes it needs and gathers a chunk of what they hold."""

    model: _Model
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)
    keep: bool = True  # inputs and masks of the tokens being read
    magnitudes: np.ndarray | None = None  # rows of the batch whose magnitudes are kept
    routed: dict[str, np.ndarray] = field(default_factory=dict)  # experts of the batch being read
    gates: dict[str, np.ndarray] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.ggml = ggml_functions()
        self.ffns = {ffn.unit: ffn for ffn in self.model.ffns}
        self.silent = self.model.activation in SILENT
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def _call(self, tensor: int, ask: bool, user_data: Any) -> bool:
        try:
            name = self.ggml.ggml_get_name(tensor).decode()
            action = self._action(name)
            if not ask and action:
                action(tensor)
            return bool(action) or not ask
        except BaseException as error:  # it cannot travel through C; `calibrate` raises it
            self.error = error
            return False

    def _from_product(self, ffn: ProfiledFFN) -> bool:
        """Whether the deciding product alone says what fires."""
        return self.model.activation in ("relu", "relu2") and ffn.unit not in self.model.biased

    def _action(self, name: str) -> Callable[[int], None] | None:
        """What to do with the node of that name, None to leave it alone."""
        if match := _DECIDER.match(name):
            ffn = self.ffns.get(match[2])
            if ffn is not None and (match[1] == "gate") == ffn.gated:
                return lambda tensor: self._product(ffn, tensor)
            if ffn is not None and not self.silent and ffn.gated and self.magnitudes is not None:
                return lambda tensor: self._up(ffn, tensor)
        elif match := _DENSE.match(name):
            ffn = self.ffns.get(match[1])
            if ffn is not None and self.silent and not self._from_product(ffn):
                return lambda tensor: self._fired(ffn, tensor_values(self.ggml, tensor) != 0)
        elif match := _ROUTED.match(name):
            ffn = self.ffns.get(f"{match[1]}_exps")
            if ffn is not None:
                return lambda tensor: self._route(ffn, tensor)
        elif (match := _MIXTURE.match(name)) and self.silent:
            ffn = self.ffns.get(f"{match[1]}_exps")
            if ffn is not None:
                return lambda tensor: self._fired_experts(ffn, tensor_values(self.ggml, tensor) != 0)
        return None

    def _add(self, kind: str, ffn: ProfiledFFN, values: np.ndarray) -> None:
        self.arrays.setdefault(f"{kind}.{ffn.unit}", []).append(values)

    def _finite(self, ffn: ProfiledFFN, values: np.ndarray, what: str) -> None:
        # One sum finds any NaN or infinity; only then is it worth looking closer.
        if not np.isfinite(values.sum(dtype=np.float64)):
            bad = int(np.count_nonzero(~np.isfinite(values)))
            raise PowerInferError(
                f"{self.model.name}: layer {ffn.index}: {bad} of {values.size} values of its FFN's {what} are not "
                "numbers (NaN or infinite); the model or the file is damaged"
            )

    def _product(self, ffn: ProfiledFFN, address: int) -> None:
        x = tensor_values(self.ggml, Tensor.from_address(address).src[1])
        product = tensor_values(self.ggml, address)
        self._finite(ffn, x, "inputs")
        self._finite(ffn, product, "products")
        if self.keep:
            if np.abs(x).max(initial=0) > np.finfo(np.float16).max:
                raise PowerInferError(
                    f"{self.model.name}: layer {ffn.index}: its FFN's inputs reach {np.abs(x).max():.3g}, too large "
                    "for the profile's half precision"
                )
            self._add("x", ffn, x.astype(np.float16))
        if self.silent:
            if self._from_product(ffn):
                self._fired(ffn, product > 0)
        elif self.magnitudes is not None:
            rows = self._source_order(ffn, product[self.magnitudes])
            act = _silu(rows) if self.model.activation == "silu" else _gelu(rows)
            self._add("gate", ffn, np.abs(act).astype(np.float16))

    def _up(self, ffn: ProfiledFFN, address: int) -> None:
        assert self.magnitudes is not None
        rows = tensor_values(self.ggml, address)[self.magnitudes]
        self._add("up", ffn, np.abs(self._source_order(ffn, rows)).astype(np.float16))

    def _source_order(self, ffn: ProfiledFFN, values: np.ndarray) -> np.ndarray:
        order = self.model.orders.get(ffn.unit)
        return values if order is None else values[..., order[0]]

    def _fired(self, ffn: ProfiledFFN, fired: np.ndarray) -> None:
        fired = self._source_order(ffn, fired)
        self._add("count", ffn, np.count_nonzero(fired, axis=0).astype(np.int32)[None])
        if self.keep:
            self._add("bits", ffn, np.packbits(fired, axis=-1))

    def _route(self, ffn: ProfiledFFN, address: int) -> None:
        experts = tensor_values(self.ggml, address).astype(np.int16)
        self.routed[ffn.unit] = experts
        self._add("experts", ffn, experts)

    def _fired_experts(self, ffn: ProfiledFFN, fired: np.ndarray) -> None:
        """fired: bool [tokens, experts used, n_ff]."""
        experts = self.routed[ffn.unit]
        if (order := self.model.orders.get(ffn.unit)) is not None:
            fired = np.take_along_axis(fired, order[experts], axis=2)
        count = np.zeros((ffn.n_expert, ffn.n_ff), np.int32)
        np.add.at(count, experts.ravel(), fired.reshape(-1, ffn.n_ff))
        self._add("count", ffn, count[None])
        if self.keep:
            self._add("bits", ffn, np.packbits(fired, axis=-1))

    def take(self) -> dict[str, np.ndarray]:
        """What was gathered since the last call, as a chunk's arrays."""
        taken, self.arrays = self.arrays, {}
        return {
            name: np.sum(parts, axis=0)[0] if name.startswith("count.") else np.concatenate(parts)
            for name, parts in taken.items()
        }


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -80, 80)))


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form that ggml computes."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * x * (1 + 0.044715 * x * x)))


def calibrate(
    model: str,
    texts: Sequence[str | os.PathLike[str]] | None,
    output: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    disk: int = DISK,
    activation: str | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """Read text with `model` and write the profile `output`, or go on with one that was interrupted.

    texts: files, read one after the other up to `tokens` tokens (default: `TOKENS`); None takes random tokens
    (default: `RANDOM_TOKENS`), for models that never learnt a language. disk: the profile keeps the inputs of as
    many tokens as fit so many bytes, evenly spread; counts come from all tokens. activation: what the FFN computes,
    where the file does not say. A stock file whose activation stock does not compute is converted beside the output
    while it is needed. progress(done, total) counts tokens. Raises PowerInferError, FormatError, ConversionError,
    OSError.
    """
    output = Path(output)
    with contextlib.ExitStack() as stack:
        about = _about_with(stack, model, output, activation)
        window = min(WINDOW, about.context or WINDOW)
        names = "random tokens" if texts is None else ", ".join(os.path.basename(text) for text in texts)
        capture = _Capture(about)
        llama, context, batch = open_watched(stack, about.path, window, window, threads, capture.callback)
        ids = _tokens(llama, texts, tokens or (RANDOM_TOKENS if texts is None else TOKENS), seed)
        meta = {
            "model": os.path.basename(model),
            "fingerprint": about.fingerprint,
            "architecture": about.architecture,
            "activation": about.activation,
            "text": names,
            "text_sha256": hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest(),
            "tokens": len(ids),
            "window": window,
            "chunk": CHUNK // window * window,
            "experts_used": about.experts_used,
        }
        meta["stored"] = _stored(about, meta["tokens"], disk)
        profile = Profile.create(output, meta, about.ffns)
        if profile.meta.get("text_sha256") != meta["text_sha256"]:
            raise PowerInferError(f"{output}: holds the profile of another text; choose another place, or remove it")
        magnitudes = max(1, min(BATCH, MAGNITUDES * BATCH // len(ids)))
        for chunk in range(profile.done, profile.n_chunks):
            capture.keep = profile.is_stored(chunk)
            capture.arrays.clear()
            first = chunk * meta["chunk"]
            for at in range(first, min(first + meta["chunk"], len(ids)), window):
                piece = ids[at : at + window]
                capture.magnitudes = np.linspace(0, len(piece) - 1, min(magnitudes, len(piece))).astype(int)
                _read(context, batch, piece, capture)
                if progress:
                    progress(at + len(piece), len(ids))
            arrays = capture.take()
            if not arrays:
                raise PowerInferError(
                    f"{model}: llama.cpp's graph for {about.architecture} names no FFN that we know"
                )
            profile.write_chunk(chunk, arrays)
    return profile


def _about_with(stack: contextlib.ExitStack, model: str, output: Path, activation: str | None) -> _Model:
    """What is known of the model, of a temporary exact conversion of it where stock computes another activation."""
    with GGUFFile.open(model) as file:
        stock = K_VERSION not in file.fields
        plan = plan_conversion(file, activation) if stock else None
    if plan is None or plan.activation == NATIVE.get(plan.architecture, (None, False))[0]:
        return _about(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{secrets.token_hex(4)}.gguf"
    stack.callback(temporary.unlink, missing_ok=True)
    convert(model, temporary, activation=activation)
    return _about(str(temporary), model)


def _stored(model: _Model, tokens: int, disk: int) -> int:
    """Every how many-th chunk can keep inputs and masks, so that the profile takes about `disk` bytes at most."""
    token = 0
    for ffn in model.ffns:
        if not ffn.n_expert:
            token += 2 * ffn.n_embd
        if model.activation in SILENT:
            token += ffn.n_ff // 8 * (model.experts_used if ffn.n_expert else 1)
    return max(1, -(-token * tokens // max(1, disk)))


def _read(context: Any, batch: Any, piece: list[int], capture: _Capture) -> None:
    """One window, with an empty context before it."""
    context.kv_cache_clear()
    # All of them are outputs: llama.cpp leaves the others out of the last layer's FFN.
    batch.set_batch(piece, n_past=0, logits_all=True)
    try:
        context.decode(batch)
    except RuntimeError:
        if capture.error is None:
            raise
    if capture.error is not None:
        raise capture.error


def _tokens(llama: Any, texts: Sequence[str | os.PathLike[str]] | None, tokens: int, seed: int) -> list[int]:
    if texts is None:
        return np.random.default_rng(seed).integers(0, llama.n_vocab(), max(tokens, LEAST_TOKENS)).tolist()
    ids: list[int] = []
    for text in texts:
        content = Path(text).read_text(encoding="utf-8", errors="replace")
        ids += llama.tokenize(content.encode(), add_bos=False, special=False)
        if len(ids) >= tokens:
            break
    if len(ids) < LEAST_TOKENS:
        named = ", ".join(map(str, texts))
        raise PowerInferError(
            f"{named}: {len(ids)} tokens of text are too few to calibrate with; give at least {LEAST_TOKENS}, better "
            f"{TOKENS}"
        )
    return ids[:tokens]


def fitted_to(
    model: str,
    *,
    profile: str | os.PathLike[str] | None = None,
    texts: Sequence[str | os.PathLike[str]] | None = None,
    predict: bool = False,
    recall: float = RECALL,
    activation: str | None = None,
    hot_bytes: int | None = None,
    chart: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    beside: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Fit:
    """What `powerinfer convert` is to know about the stock GGUF `model`.

    From `profile`; or calibrates on `texts` (default: the bundled text, random tokens for a synthetic model), with a
    profile in `beside`.profile that is removed when all is well, and found again by the next try when not. Raises
    what `calibrate` and `fit` raise.
    """
    temporary, seconds, started = None, {}, time.monotonic()
    if profile is None:
        temporary = Path(f"{os.fspath(beside)}.profile")
        if texts is None and not is_synthetic(model):
            from powerinfer_ext.models import calibration_text

            texts = [calibration_text()]
        if predict:
            _refuse_unpredictable(model, activation)
        threads = threads or len(os.sched_getaffinity(0))
        try:
            profile = calibrate(
                model, texts, temporary, activation=activation, threads=threads, progress=progress
            ).folder
        except BaseException:
            if temporary.is_dir() and not any(temporary.glob("chunk-*")):
                shutil.rmtree(temporary)  # nothing that a next try could go on from
            raise
        seconds["read"] = time.monotonic() - started
    elif texts:
        raise ConversionError("--profile and --text are two ways to calibrate; give one of them")
    opened, started = Profile.open(profile), time.monotonic()
    result = fit(
        opened,
        model,
        predict=predict,
        recall=recall,
        activation=activation,
        hot_bytes=hot_bytes,
        everything=chart is not None,
        progress=progress,
    )
    if chart is not None:
        chart_of(result.candidates, chart, f"{os.path.basename(model)}: predictors, recall {recall:g} asked for")
    if temporary is not None:
        shutil.rmtree(temporary)
    seconds["predictors made" if predict else "neurons ordered"] = time.monotonic() - started
    return replace(result, seconds=seconds)


def _refuse_unpredictable(model: str, activation: str | None) -> None:
    """Before minutes are spent: raise ConversionError when there is no FFN that a predictor could be for."""
    with GGUFFile.open(model) as file:
        plan = plan_conversion(file, activation)
        obstacles = {predict_obstacle(file, plan, ffn) for ffn in plan.ffns}
    if None not in obstacles:
        reasons = "; ".join(sorted(filter(None, obstacles)))
        raise ConversionError(f"{model}: no layer can be predicted: {reasons}; convert it without --mode predict")


def is_synthetic(model: str) -> bool:
    """Whether `powerinfer synth` wrote it: its weights are random, and text means nothing to it."""
    with GGUFFile.open(model) as file:
        return str(file.metadata.get("general.name", "")).endswith("(synthetic)")


# ---- the command -------------------------------------------------------------------------------------------


EXAMPLES = (
    "powerinfer calibrate arcee-relu2 --text my-texts.txt -o arcee.profile",
    "powerinfer calibrate synthetic.gguf -o synthetic.profile --tokens 8192",
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF or (exact) sparse-GGUF file, or the name of a bundled model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PROFILE", help="The folder to write.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to read (may be given more than once).", show_default="random tokens, for synthetic models"
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=LEAST_TOKENS, help="Tokens to read at most.", show_default=f"{TOKENS}, if random {RANDOM_TOKENS}"
        ),
    ] = None,
    disk: Annotated[
        float, typer.Option(min=0.01, metavar="GB", help="What the profile may take; beyond, it keeps a sample.")
    ] = DISK / 1e9,
    activation: Annotated[
        str | None, typer.Option(help="What the FFN computes.", show_default="what the file says, or its architecture")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="as many as there are CPUs to use")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Read text with a model and note which neurons fire, for predictors, hot sets and thresholds.

    The result is a folder. An interrupted run goes on where it was when the command is given again.
    """
    from powerinfer_ext.cli import _kept, _print_json, _progress, _resolve, _say, _silence_llama_cpp

    _silence_llama_cpp()
    with _progress(f"Calibrating {model}") as progress, _kept(output):
        profile = calibrate(
            _resolve(model),
            text,
            output,
            tokens=tokens,
            disk=round(disk * 1e9),
            activation=activation,
            threads=threads or len(os.sched_getaffinity(0)),
            seed=seed,
            progress=progress,
        )
    result = summary(profile)
    if as_json:
        return _print_json(result)
    _say(f"{output}: {result['tokens']} tokens of {result['text']}, {result['bytes'] / 1e6:.0f} MB")
    for layer in result["layers"]:
        if layer["density"] is not None:
            _say(
                f"layer {layer['ffn']}: {layer['density']:.1%} of neurons fire, the hottest 30 % make up "
                f"{layer['hottest_30']:.0%} of the firings"
            )


command.__name__ = "calibrate"


def summary(profile: Profile) -> dict[str, Any]:
    """What a profile holds, for JSON: meta, and per FFN density, the share of firings that the hottest 30 % of its
    neurons make up, and of tokens that go to each expert."""
    layers = []
    for unit, ffn in profile.ffns.items():
        frequency = profile.frequency(unit)
        entry: dict[str, Any] = {"ffn": unit, "neurons": ffn.n_ff, "experts": ffn.n_expert}
        entry |= {"density": None, "hottest_30": None}
        if frequency is not None:
            ranked = np.sort(frequency.ravel())[::-1]
            entry["density"] = float(frequency.mean())
            entry["hottest_30"] = float(ranked[: round(0.3 * len(ranked))].sum() / max(ranked.sum(), 1e-30))
        if ffn.n_expert:
            routed = np.bincount(profile.array("experts", unit).ravel(), minlength=ffn.n_expert)
            entry["expert_load"] = (routed / profile.tokens).tolist()
        layers.append(entry)
    size = sum(path.stat().st_size for path in profile.folder.iterdir())
    return {**profile.meta, "tokens": profile.tokens, "bytes": size, "layers": layers}
