"""The command line, `powerinfer`: each command is thin, the work is in the module of its name."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from powerinfer_ext.errors import PowerInferError

# Commands that bring their options with them; imported when asked for, because numpy and llama_cpp come along.
_ELSEWHERE = {
    "calibrate": "powerinfer_ext.calibrate",
    "synth": "gguf_tools.synth",
    "trace": "powerinfer_ext.trace",
    "bench": "powerinfer_ext.bench",
    "plan": "powerinfer_ext.plan",
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:
        return [*super().list_commands(ctx), *_ELSEWHERE]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(_ELSEWHERE[cmd_name])
        alone = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name, epilog=_examples(*module.EXAMPLES))(module.command)
        return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Commands,
    name="powerinfer",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() says it in one sentence
    epilog="[bold]Start here[/bold]: powerinfer demo",
)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF or sparse-GGUF file, or the name of a bundled model.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="as many as there are CPUs to use")
]
Context = Annotated[int, typer.Option(min=0, help="Context length in tokens; 0: the model's own, but at most 4096.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Random seed for temperatures above 0.", show_default="another one each time"),
]
Dense = Annotated[bool, typer.Option("--dense", help="Compute all neurons of a sparse-GGUF, to compare with.")]


class IoEngine(StrEnum):
    auto = "auto"
    io_uring = "io_uring"
    threads = "threads"


Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="Memory for the whole process: 4GiB, 800MB, or 50% of the model's file; the rest is streamed from disk.",
        show_default="everything is kept in memory if it fits",
    ),
]
Io = Annotated[IoEngine, typer.Option("--io", help="How to read what is streamed.")]


class Activation(StrEnum):
    relu = "relu"
    relu2 = "relu2"
    drelu = "drelu"
    silu = "silu"
    gelu = "gelu"


class Threshold(StrEnum):
    cats = "cats"
    chess = "chess"


class ConvertMode(StrEnum):
    exact = "exact"
    predict = "predict"


class EvalMode(StrEnum):
    exact = "exact"
    predict = "predict"
    threshold = "threshold"


class Pass(StrEnum):
    prefill = "prefill"
    decode = "decode"
    both = "both"


def _examples(*lines: str) -> str:
    """The epilog of a command's help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


def _print_versions(wanted: bool) -> None:
    if wanted:
        for package in ("powerinfer-ext", "llama-cpp-python"):
            print(package, version(package))
        raise typer.Exit


@app.callback()
def options(
    versions: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_versions, help="Show versions and exit."),
    ] = False,
) -> None:
    """Run GGUF models computing only the FFN neurons that fire, on stock llama-cpp-python."""


@app.command(epilog=_examples("powerinfer demo", "powerinfer demo --keep demo-files", "powerinfer demo --json"))
def demo(
    keep: Annotated[Path | None, typer.Option(help="Keep the converted model in this folder.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the model is too small for many.")] = 1,
    shaped: Annotated[
        bool,
        typer.Option(
            "--shaped/--no-shaped",
            help="Then make a model with the shape of a real one and compare speeds on it (2 GB of disk, minutes).",
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Convert a bundled model, run it with stock and with us, compare; then compare speeds on a larger one."""
    from powerinfer_ext import demo as demonstration

    _silence_llama_cpp()
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(err.status("")).update if err.is_terminal else _note
        result = demonstration.demo(keep=keep, threads=threads, step=step)
    if not as_json:
        demonstration.render(result, out)
    if shaped:
        from powerinfer_ext.bench import demo_comparison

        with contextlib.ExitStack() as stack:
            step = stack.enter_context(err.status("")).update if err.is_terminal else _note
            result["shaped"] = demo_comparison(err if as_json else out, step=step)
    if as_json:
        _print_json(result)


@app.command(epilog=_examples("powerinfer models", "powerinfer models --json"))
def models(as_json: Json = False) -> None:
    """List the small models that come with this package."""
    from powerinfer_ext.models import bundled

    found = bundled()
    if as_json:
        return _print_json([dataclasses.asdict(model) for model in found])
    table = Table("name", "architecture", "activation", "size", "ppl", "density", box=SIMPLE_HEAD)
    for model in found:
        table.add_row(
            model.name,
            model.architecture,
            model.activation,
            f"{model.parameters / 1e6:.1f} M",
            f"{model.heldout_ppl:.2f}",
            f"{model.density:.1%}",
        )
    out.print(table)
    if found:
        _say("ppl: perplexity on held-out text; density: share of neurons that fire")
        _say(f"Files: {found[0].path.parent}")


@app.command(
    epilog=_examples(
        "powerinfer convert arcee-relu2 arcee.sparse.gguf",
        "powerinfer convert prosparse-llama-2-7b.gguf prosparse.sparse.gguf --activation relu",
        "powerinfer convert model-f16.gguf model.sparse.gguf --down-type Q8_0",
        "powerinfer convert arcee-relu2 arcee.sparse.gguf --mode predict --text my-texts.txt",
        "powerinfer convert arcee-relu2 arcee.sparse.gguf --mode predict --profile arcee.profile --recall 0.98",
        "powerinfer convert prosparse-llama-2-7b.powerinfer.gguf prosparse.sparse.gguf",
        "powerinfer convert llama-swiglu swiglu.sparse.gguf --threshold chess --max-ppl-increase 1%",
    )
)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A stock GGUF, a PowerInfer model (PWRI), or a bundled model's name.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The sparse-GGUF to write.")],
    activation: Annotated[
        Activation | None,
        typer.Option(help="What the FFN computes.", show_default="what the file says, or its architecture"),
    ] = None,
    down_type: Annotated[
        str, typer.Option(help="Type to store the columns of down in, such as F16 or Q8_0; or auto.")
    ] = "auto",
    mode: Annotated[
        ConvertMode,
        typer.Option(help="exact: the deciding matrix stays and decides; predict: small predictors do, at some loss."),
    ] = ConvertMode.exact,
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile made by powerinfer calibrate: stores neurons hot-first, trains predictors."),
    ] = None,
    recall: Annotated[
        float, typer.Option(help="With --mode predict: the share of firing neurons that predictors must find.")
    ] = 0.97,
    hot_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="MB",
            help="With a profile: memory for the hot neurons of all layers, for a model that will be streamed. With "
            "--mode predict, predictors then spare the others at the same recall.",
            show_default="what makes up 80 % of the firings",
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="With --mode predict: try all predictors and draw recall against bytes read."),
    ] = None,
    threshold: Annotated[
        Threshold | None,
        typer.Option(
            help="For SwiGLU and GeGLU models: skip neurons whose |act(gate)| is below a threshold, one per layer "
            "(cats) or per neuron (chess). Changes what the model computes; by how much is said at the end.",
            show_default="off",
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="With --threshold: share of neurons to compute.", show_default="0.5")
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Instead of --density: skip as many as cost this in perplexity, say 1%."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to calibrate with (may be given more than once); a part is kept for judging the result.",
            show_default="bundled; for a synthetic model random tokens",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Convert a stock GGUF, or a PowerInfer model, to sparse-GGUF."""
    from gguf_tools.convert import convert as write_sparse

    if threshold is None and (density is not None or max_ppl_increase is not None):
        raise PowerInferError("--density and --max-ppl-increase go with --threshold; add --threshold chess")
    calibration, cost, notes, times = None, None, [], ""
    if _is_powerinfer(_resolve(source)):
        if profile is not None or text:
            raise PowerInferError(f"{source}: a PowerInfer model brings predictors; leave --profile and --text out")
    elif mode is ConvertMode.predict or profile is not None or (text and threshold is None):
        from powerinfer_ext.calibrate import fitted_to

        if threshold is not None:
            raise PowerInferError("--threshold goes with neither --mode predict nor --profile; leave one of them out")
        _silence_llama_cpp()
        with _progress("Calibrating") as progress, _kept(f"{target}.profile" if profile is None else profile):
            fitted = fitted_to(
                _resolve(source),
                profile=profile,
                texts=text,
                predict=mode is ConvertMode.predict,
                recall=recall,
                activation=activation.value if activation else None,
                hot_bytes=None if hot_memory is None else round(hot_memory * 1e6),
                chart=chart,
                threads=threads,
                beside=target,
                progress=progress,
            )
        calibration, notes = fitted.calibration, fitted.notes
        times = ", ".join(f"{what} in {seconds:.0f} s" for what, seconds in fitted.seconds.items())
    if threshold is not None:
        from powerinfer_ext.run import default_threads
        from powerinfer_ext.thresholds import find_thresholds

        with _progress("Looking for thresholds") as progress:
            calibration, cost = find_thresholds(
                _resolve(source),
                threshold.value,
                density=density,
                max_increase=None if max_ppl_increase is None else _share("--max-ppl-increase", max_ppl_increase),
                text="".join(part.read_text(encoding="utf-8", errors="replace") for part in text) if text else None,
                threads=threads or default_threads(),
                progress=progress,
            )
    with _progress(f"Converting to {target.name}") as progress:
        report = write_sparse(
            _resolve(source),
            target,
            activation=activation.value if activation else None,
            down_type=down_type,
            calibration=calibration,
            progress=progress,
        )
    if as_json:
        result = report.to_dict() | {"notes": [*notes, *report.notes]}
        return _print_json(result | ({"threshold": cost.to_dict()} if cost else {}))
    neurons = sum(layer.n_ff * (layer.n_expert or 1) for layer in report.layers)
    _say(
        f"{report.output}: {report.architecture}, {report.activation}, {neurons} neurons in "
        f"{len(report.layers)} layers, mode {report.mode}, {_megabytes(report.output_bytes)} "
        f"(was {_megabytes(report.source_bytes)}), {report.seconds:.1f} s"
    )
    if calibration is not None and calibration.tokens:
        _say(f"{calibration.tokens} tokens of {calibration.text}: {times}")
    if report.requantised:
        worst = max(layer.relative_rms for layer in report.requantised)
        _say(
            f"down was re-quantised in {len(report.requantised)} layers, as its columns are stored as rows: "
            f"it moved by at most {worst:.2%} (root mean square)"
        )
    predicted = [layer for layer in report.layers if layer.predictor != "none"]
    for layer in predicted:
        figures = [] if layer.recall is None else [f"recall {layer.recall:.1%}", f"computes {layer.computed:.1%}"]
        rank = [f"rank {layer.predictor_rank}"] if layer.predictor_rank else []
        size = f"{layer.predictor_bytes / 1e3:.0f} kB"
        _say(f"layer {layer.index}: {', '.join([f'{layer.predictor} predictor', *rank, size, *figures])}")
    if predicted and all(layer.recall is not None for layer in predicted):
        found, computed = (sum(getattr(x, k) for x in predicted) / len(predicted) for k in ("recall", "computed"))
        _say(
            f"{len(predicted)} of {len(report.layers)} layers are predicted: {found:.1%} of the neurons that fire are "
            f"found in text not trained on, {computed:.1%} of all are computed, the predictors take "
            f"{_megabytes(sum(x.predictor_bytes for x in predicted))}; powerinfer eval says what that does to the text"
        )
    if cost:
        _say(cost.sentence())
    for note in [*notes, *report.notes]:
        _say(note)


@app.command(epilog=_examples("powerinfer export arcee.sparse.gguf arcee.gguf"))
def export(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A sparse-GGUF file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The stock GGUF to write.")],
    as_json: Json = False,
) -> None:
    """Turn a sparse-GGUF back into a stock GGUF."""
    from gguf_tools.export import export as write_stock

    with _progress(f"Exporting to {target.name}") as progress:
        report = write_stock(source, target, progress=progress)
    if as_json:
        return _print_json(report.to_dict())
    _say(f"{report.output}: {_megabytes(report.output_bytes)}, {report.seconds:.1f} s")
    if report.identical:
        _say("It is the file that the sparse-GGUF was made from, byte for byte.")
    elif report.requantised:
        _say(f"{len(report.requantised)} tensors differ from the original's by rounding (re-quantised)")


@app.command(epilog=_examples("powerinfer inspect arcee.sparse.gguf", "powerinfer inspect arcee-relu2 --json"))
def inspect(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A GGUF or sparse-GGUF file, or the name of a bundled model."),
    ],
    as_json: Json = False,
) -> None:
    """Show what is in a file: metadata, tensors, and how its neurons are bundled."""
    from gguf_tools import inspect as inspection

    report = inspection.inspect(_resolve(file))
    if as_json:
        return _print_json(report)
    inspection.render(report, out)


@app.command(
    epilog=_examples(
        'powerinfer run arcee.sparse.gguf -p "def main():"',
        'powerinfer run arcee.sparse.gguf -p "import os" -n 200 --temperature 0.7 --seed 1',
        'powerinfer run arcee-relu2 -p "class Stack:" --json',
        'powerinfer run qwen3-30b-a3b-q4_0.gguf -p "Once upon a time" --memory 8GiB',
    )
)
def run(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to write at most.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Context = 0,
    dense: Dense = False,
    memory: Memory = None,
    io: Io = IoEngine.auto,
    verify: Annotated[
        float,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="Of a predicted layer's evaluations: look afterwards what was missed."
        ),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Continue a text, and say how fast and how sparsely that was, and what was read from disk for it."""
    from powerinfer_ext.openmp import spin_briefly

    spin_briefly()
    from powerinfer_ext.run import generate, open_model

    _silence_llama_cpp()
    settings = {"ctx": ctx, "threads": threads, "dense": dense, "seed": seed, "memory": memory, "io": io.value}
    settings["verify"] = verify
    with contextlib.closing(open_model(_resolve(model), **settings)) as llama:
        result = generate(
            llama,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            on_text=None if as_json else lambda piece: print(piece, end="", flush=True),
        )
    if as_json:
        return _print_json(dataclasses.asdict(result))
    print()
    computed = "all neurons (a stock GGUF)" if result.density is None else f"{result.density:.1%} of neurons"
    _say(
        f"prefill {result.prompt_tokens} tokens, {_rate(result.prefill_tps)}/s; "
        f"decode {result.tokens} tokens, {_rate(result.decode_tps)}/s; computed {computed}",
        err,
    )
    if result.streaming is not None:
        _say(result.streaming.sentence(), err)
    if result.missed is not None:
        _say(f"missed {result.missed:.2%} of the neurons that fire, in {result.verified} evaluations looked at", err)
    elif verify:
        _say("nothing was verified: no layer of this model is predicted, or too few were evaluated", err)


@app.command(epilog=_examples("powerinfer chat model.sparse.gguf", "powerinfer chat model.gguf --temperature 0"))
def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Length of an answer at most.")] = 512,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    threads: Threads = None,
    ctx: Context = 0,
    dense: Dense = False,
    memory: Memory = None,
    io: Io = IoEngine.auto,
) -> None:
    """Talk to a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    from powerinfer_ext.openmp import spin_briefly

    spin_briefly()
    from powerinfer_ext import chat as conversation
    from powerinfer_ext.run import open_model

    _silence_llama_cpp()
    settings = {"ctx": ctx, "threads": threads, "dense": dense, "seed": seed, "memory": memory, "io": io.value}
    with contextlib.closing(open_model(_resolve(model), **settings)) as llama:
        conversation.chat(
            llama,
            max_tokens=max_tokens,
            temperature=temperature,
            lines=conversation.typed_lines(),
            out=sys.stdout,
        )


@app.command(
    "eval",
    epilog=_examples(
        "powerinfer eval arcee.sparse.gguf --against arcee-relu2 --text heldout.txt",
        "powerinfer eval arcee.sparse.gguf --against arcee.gguf --text heldout.txt --pass decode --json",
        "powerinfer eval predicted.sparse.gguf --against arcee-relu2 --text heldout.txt --sweep quality.png",
        "powerinfer eval drelu.sparse.gguf --against reference --text heldout.txt",
    ),
)
def eval_(
    sparse: Annotated[str, typer.Argument(metavar="SPARSE", help="The sparse-GGUF to judge.")],
    against: Annotated[
        str,
        typer.Option(
            metavar="DENSE|reference",
            help="The stock GGUF it was made from; or [bold]reference[/bold], a numpy forward pass, for an "
            "activation that stock llama.cpp does not compute for this architecture.",
        ),
    ],
    text: Annotated[Path, typer.Option(help="Text to read, best one that the model was not trained on.")],
    reference_model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --against reference: the stock GGUF.",
            show_default="the bundled model it was made from",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=4, help="How many tokens to read.")] = 4096,
    window: Annotated[
        int | None,
        typer.Option(
            min=4,
            help="Tokens per window; each starts with an empty context.",
            show_default="512, or the model's context where that is less",
        ),
    ] = None,
    mode: Annotated[
        EvalMode | None,
        typer.Option(
            help="predict, threshold: as the file runs; exact: with all neurons computed that are left out then.",
            show_default="what the file is",
        ),
    ] = None,
    how: Annotated[
        Pass,
        typer.Option("--pass", help="Read a window at once (prefill), token by token (decode), or try both."),
    ] = Pass.both,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Also draw quality against density, with stricter and looser thresholds."),
    ] = None,
    floor: Annotated[
        bool,
        typer.Option("--floor/--no-floor", help="Also measure how far stock is from itself (loads DENSE twice)."),
    ] = True,
    memory: Memory = None,
    io: Io = IoEngine.auto,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how far a sparse-GGUF is from its dense model: perplexity, KL, top-1 agreement, density.

    KL and top-1 agreement are over every position, perplexity over the second half of each window. With
    --pass both, the JSON's top level holds the pass with the greater KL. Recall and precision of predictors are
    measured on the first thousand tokens.
    """
    from powerinfer_ext import evaluate as evaluation
    from powerinfer_ext.run import default_threads

    _silence_llama_cpp()
    sparse_path = _resolve(sparse)
    reference = _reference(sparse_path, reference_model) if against == "reference" else None
    dense_path = None if reference else _resolve(against)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PowerInferError(f"{text}: is not text in UTF-8; --text needs a plain text file") from None
    settings: dict[str, Any] = {
        "reference": reference,
        "tokens": tokens,
        "window": window,
        "memory": memory,
        "io": io.value,
        "threads": threads or default_threads(),
    }
    with _progress("Evaluating") as progress:
        result = evaluation.evaluate(
            sparse_path,
            dense_path,
            content,
            passes=evaluation.PASSES if how is Pass.both else (how.value,),
            mode=mode.value if mode else None,
            floor=floor,
            progress=progress,
            **settings,
        )
    if sweep is not None:
        from powerinfer_ext.sweep import draw
        from powerinfer_ext.sweep import sweep as move

        def judge(path: str) -> dict[str, Any]:
            return evaluation.evaluate(path, dense_path, content, passes=("prefill",), floor=False, **settings)

        with _progress("Sweeping") as progress:
            result["sweep"] = move(sparse_path, judge, progress)
        draw(result["sweep"], sweep, f"{Path(sparse_path).name}, {result['tokens']} tokens")
    if as_json:
        return _print_json(result)
    evaluation.render(result, out)


@app.command(epilog=_examples("powerinfer doctor", "powerinfer doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Check this machine and its libraries; every finding with a verdict and a remedy."""
    from powerinfer_ext.doctor import run as examine

    raise typer.Exit(examine(json=as_json))


def _is_powerinfer(path: str) -> bool:
    from gguf_tools.powerinfer_import import PowerInferFile, open_source

    with open_source(path) as file:
        return isinstance(file, PowerInferFile)


def _resolve(model: str) -> str:
    """The path of a model given as a path or as the name of a bundled one."""
    if Path(model).exists() or "/" in model or model.endswith(".gguf"):
        return model  # opening it says what is wrong with it, if anything
    from powerinfer_ext.models import find

    try:
        return str(find(model).path)
    except ValueError as error:
        raise PowerInferError(f"{model}: there is no such file, and {error}") from None


def _share(option: str, given: str) -> float:
    """A share written as 0.01 or 1%."""
    try:
        return float(given[:-1]) / 100 if given.endswith("%") else float(given)
    except ValueError:
        raise PowerInferError(f"{option} {given}: give a share, such as 0.01 or 1%") from None


def _reference(sparse_path: str, dense: str | None) -> tuple[str, str]:
    """(dense GGUF, activation) for the numpy reference of a sparse-GGUF."""
    from gguf_tools.sparse import SparseGGUF
    from powerinfer_ext.models import bundled

    with SparseGGUF.open(sparse_path) as file:
        source, activation = file.source_name, file.activation
    if dense is not None:
        return _resolve(dense), activation
    for model in bundled():
        if model.path.name == source:
            return str(model.path), activation
    raise PowerInferError(
        f"{sparse_path} was made from {source}, which is not a bundled model; name it with --reference-model"
    )


def _note(line: str) -> None:
    """A line about what is being done, on stderr."""
    _say(line, err)


def _say(line: str, console: Console = out) -> None:
    """A plain line, not wrapped, so that paths stay whole."""
    console.print(line, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # str: paths


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields the function to call with (done, total[, what])."""
    percent = TextColumn("{task.percentage:>3.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task(title, total=None)


        def show(done: int, total: int, what: str = "") -> None:
            bars.update(task, completed=done, total=total, description=f"{title}: {what}" if what else title)

        yield show


@contextlib.contextmanager
def _kept(folder: str | Path) -> Iterator[None]:
    """When what is done inside is interrupted, say that it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        if Path(folder).is_dir():
            _say(f"interrupted; what is done is kept in {folder}, and the same command goes on from there", err)
        raise


_kept_alive: list[Any] = []  # llama.cpp calls its log callback until the process ends


def _silence_llama_cpp() -> None:
    """Drop llama.cpp's log: what matters comes as exceptions, its warnings would run through our output."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    _kept_alive.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))


def main() -> None:
    """The `powerinfer` command: a problem is one sentence on stderr and exit code 1, a usage error 2."""
    try:
        app(prog_name="powerinfer")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError:
        _fail("there is not enough memory for this")
    except (
        ValueError,
        RuntimeError,
    ) as error:  # FormatError, ConversionError, PowerInferError and stock's own
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
