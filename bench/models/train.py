"""Train the language models that ship with powerinfer-ext, from scratch, on a CPU.

    python bench/models/train.py --model arcee-relu2      # one of them
    python bench/models/train.py --all                    # all four, one after the other
    python bench/models/train.py --all --steps 50 --out /tmp/smoke

A run that was interrupted continues from its last checkpoint in `--work`; `--fresh` starts over.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from corpus import Corpus, encode_documents, excerpt, read_corpus, train_tokenizer
from evaluate import complete, measure
from export import CALIBRATION, HELD_OUT, provenance, read_gguf, write_gguf, write_record
from model import MODELS, FfnTrace, LanguageModel, ModelConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

OUT = Path(__file__).resolve().parents[2] / "powerinfer_ext" / "models"
WORK = Path(tempfile.gettempdir()) / "powerinfer-models"
SEED = 20240607

console = Console(width=None if sys.stdout.isatty() else 160)
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Recipe:
    """What the four runs have in common."""

    windows: int = 16  # per step; times the context gives tokens per step
    peak_rate: float = 3e-3
    warm_up: int = 60  # steps; shorter ones leave many ReLU neurons dead
    decay: float = 0.35  # share of the steps, at the end, in which the rate falls to zero
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01  # weight of the load-balancing loss
    ramp: tuple[int, int] = (60, 360)  # steps between which the density is brought to its target
    checkpoint_every: int = 25

    def decay_from(self, steps: int) -> int:
        """The step at which the rate begins to fall; what is before it does not depend on `steps`."""
        return round(steps * (1 - self.decay))


class SparsityControl:
    """Chooses the strength of the L1 term so that the mean density follows a falling schedule.

    ProSparse (arXiv 2402.13516) raises the strength in stages fixed in advance; here the density is what is
    fixed, and the strength follows: multiplied each step by (density / wanted density) to a small power.
    """

    most = 2.0

    def __init__(self, config: ModelConfig, ramp: tuple[int, int]) -> None:
        self.target, self.least, self.gain = config.target_density, config.l1_least, config.l1_gain
        self.ramp = ramp
        self.strength = self.least
        self.natural: float | None = None  # the density when the ramp began

    def update(self, step: int, density: float) -> None:
        """Look at the density of `step` and set the strength for the next one."""
        begin, end = self.ramp
        if not self.target or step < begin:
            return
        self.natural = self.natural or density
        t = min(1.0, (step - begin) / (end - begin))
        wanted = self.natural * (self.target / self.natural) ** t
        factor = (max(density, 1e-4) / wanted) ** self.gain
        self.strength = min(max(self.strength * factor, self.least), self.most)


def batch(tokens: Tensor, context: int, windows: int, step: int) -> Tensor:
    """Return int64 [windows, context + 1] for a step, the same for the same step whenever it is asked for.

    An epoch is a random order of the windows at a random offset, so every token is seen about once per epoch.
    """
    per_epoch = (len(tokens) - context - 1) // context // windows
    epoch, index = divmod(step, per_epoch)
    rng = np.random.default_rng((SEED, epoch))
    offset = int(rng.integers(context))
    chosen = rng.permutation(per_epoch * windows)[index * windows : (index + 1) * windows]
    return torch.stack([tokens[s : s + context + 1] for s in (offset + chosen * context).tolist()]).long()


def optimiser(model: LanguageModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=recipe.betas, fused=True)


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate's share of its peak: linear warm-up, a plateau, and a linear fall to zero.

    Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): unlike a cosine it lets a run be made longer or
    shorter while it is on its plateau, and the result is that of a run planned so from its beginning.
    """
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    decay_from = recipe.decay_from(steps)
    return min(1.0, (steps - step) / max(1, steps - decay_from))


@dataclass
class Run:
    """One model's training: what `train` needs and what a checkpoint keeps."""

    config: ModelConfig
    steps: int
    recipe: Recipe
    checkpoint: Path
    compiled: bool

    def train(self, tokens: Tensor) -> tuple[LanguageModel, float]:
        """Train, or finish training; returns the model and the seconds spent in all."""
        torch.manual_seed(SEED)
        model = LanguageModel(self.config)
        optimizer = optimiser(model, self.recipe)
        control = SparsityControl(self.config, self.recipe.ramp)
        first, spent = self._resume(model, optimizer, control)
        step_loss = torch.compile(model.loss, dynamic=False) if self.compiled else model.loss
        sparse = control.target > 0 or self.config.experts > 0
        began = time.monotonic()
        shown, shown_at, shown_step = {"loss": 0.0, "density": 0.0}, began, first
        console.log(f"{self.config.name}: {model.parameter_count:,} parameters, steps {first}..{self.steps}")
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        ) as progress:  # fmt: skip
            bar = progress.add_task(self.config.name, total=self.steps, completed=first)
            for step in range(first, self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.peak_rate * rate(step, self.steps, self.recipe)
                window = batch(tokens, self.config.context, self.recipe.windows, step)
                with torch.autocast("cpu", torch.bfloat16):
                    loss, traces = step_loss(window, sparse)
                (loss + self._extra(traces, control)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                density = sum(t.density.item() for t in traces) / max(1, len(traces))
                control.update(step, density)
                keep = 0.95 if step > first else 0.0
                shown["loss"] = keep * shown["loss"] + (1 - keep) * loss.item()
                shown["density"] = keep * shown["density"] + (1 - keep) * density
                progress.update(bar, completed=step + 1)
                if (step + 1) % 20 == 0 or step + 1 == self.steps:
                    now = time.monotonic()
                    speed = (step + 1 - shown_step) * window[:, 1:].numel() / (now - shown_at)
                    load = ""
                    if self.config.experts:
                        load = f" least load {min(t.load.min().item() for t in traces):.3f}"
                    console.log(
                        f"{self.config.name} step {step + 1}/{self.steps} loss {shown['loss']:.3f} "
                        f"density {shown['density']:.3f} l1 {control.strength:.3f}{load} "
                        f"{now - began + spent:.0f} s, {speed:.0f} tokens/s"
                    )
                    shown_at, shown_step = now, step + 1
                if (step + 1) % self.recipe.checkpoint_every == 0 or step + 1 == self.steps:
                    self._save(model, optimizer, control, step + 1, spent + time.monotonic() - began)
        return model, spent + time.monotonic() - began

    def _extra(self, traces: list[FfnTrace], control: SparsityControl) -> Tensor | float:
        """The terms beside the cross-entropy: sparsity and load balance, means over the layers."""
        extra: Tensor | float = 0.0
        for t in traces:
            if control.target:
                extra = extra + control.strength / len(traces) * t.penalty
            if t.balance is not None:
                extra = extra + self.recipe.balance / len(traces) * t.balance
        return extra

    def _save(self, model, optimizer, control: SparsityControl, step: int, seconds: float) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "control": (control.strength, control.natural),
                "step": step,
                "steps": self.steps,
                "seconds": seconds,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def _resume(self, model, optimizer, control: SparsityControl) -> tuple[int, float]:
        if not self.checkpoint.exists():
            return 0, 0.0
        saved = torch.load(self.checkpoint, weights_only=True)
        on_plateau = saved["step"] <= min(self.recipe.decay_from(n) for n in (saved["steps"], self.steps))
        if saved["steps"] != self.steps and not on_plateau:
            raise typer.BadParameter(f"{self.checkpoint} is of a run of {saved['steps']} steps: use --fresh")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        control.strength, control.natural = saved["control"]
        return saved["step"], saved["seconds"]


def write_texts(out: Path, corpus: Corpus) -> str:
    """Write the held-out and the calibration text; returns the held-out one."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = excerpt(corpus.held_out, 70_000, 100_000)
    (out / HELD_OUT).write_text(held_out, encoding="utf-8")
    (out / CALIBRATION).write_text(excerpt(corpus.training, 90_000, 105_000), encoding="utf-8")
    return held_out


def export(
    out: Path, model: LanguageModel, tokenizer: Tokenizer, run: Run, corpus: Corpus, seconds: float
) -> None:
    """Write the GGUF, measure what is in the file (dequantised), and record it."""
    trained = run.steps * run.recipe.windows * run.config.context
    source = provenance(corpus, run.steps, trained)
    path = out / f"{run.config.name}.gguf"
    write_gguf(path, model, tokenizer, source)
    stored = read_gguf(path, run.config)
    measured = measure(stored, tokenizer, (out / HELD_OUT).read_text(encoding="utf-8"))
    write_record(out, stored, measured, run.steps, trained, seconds, source)
    console.log(
        f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, perplexity {measured.perplexity:.2f}, "
        f"{measured.bits_per_byte:.3f} bits per byte, density {[round(d, 3) for d in measured.density]}, "
        f"never fired {[round(d, 3) for d in measured.never_fired]}, {seconds:.0f} s"
    )
    console.log(f"sample: {complete(stored, tokenizer, 'import os', 64)!r}", markup=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Which to train: {', '.join(MODELS)}.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Train all of them.")] = False,
    steps: Annotated[int | None, typer.Option(help="Instead of each model's own number.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Where GGUF files, texts and models.json go.")] = OUT,
    work: Annotated[Path, typer.Option(help="Where checkpoints go.")] = WORK,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="Fuse kernels (needs g++).")] = True,
    fresh: Annotated[bool, typer.Option(help="Ignore checkpoints.")] = False,
) -> None:
    """Train bundled models and write them where the package looks for them."""
    names = list(MODELS) if every else list(model or [])
    unknown = sorted(set(names) - set(MODELS))
    if unknown or not names:
        raise typer.BadParameter(f"name models with --model, or --all; known: {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus)
    tokens = torch.from_numpy(encode_documents(tokenizer, corpus.training).astype(np.int32))
    write_texts(out, corpus)
    version = sys.version.split()[0]
    console.log(f"Python {version}: {len(corpus.documents)} documents, {len(tokens):,} training tokens")
    for name in names:
        config = MODELS[name]
        run = Run(config, steps or config.steps, Recipe(), work / f"{name}.pt", compiled)
        if fresh:
            run.checkpoint.unlink(missing_ok=True)
        trained, seconds = run.train(tokens)
        export(out, trained, tokenizer, run, corpus, seconds)


if __name__ == "__main__":
    app()
