"""`powerinfer demo`: convert a bundled model, run it with stock llama-cpp-python and with us, compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from powerinfer_ext import models
from powerinfer_ext.evaluate import agreement_table, evaluate, layer_table
from powerinfer_ext.run import generate, open_model

MODEL = "arcee-relu2"
PROMPT = "def is_number(text):\n    try:\n        float(text)\n"
NOTE_ON_SPEED = (
    "This model is so small that it fits into the processor's cache, where skipping neurons saves next to "
    "nothing: the speeds above say nothing about models that have to be read from memory."
)
NEXT_STEPS = (
    ("powerinfer models", "the other bundled models"),
    ("powerinfer convert MODEL.gguf OUT.sparse.gguf", "convert a model of yours"),
    ("powerinfer run OUT.sparse.gguf -p TEXT", "and run it"),
)


def demo(
    *,
    keep: Path | None = None,
    prompt: str = PROMPT,
    max_tokens: int = 64,
    eval_tokens: int = 512,
    threads: int = 1,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the demonstration and return what it found; `step` is told what is being done.

    keep: a folder for the converted file; by default it goes to a temporary one that is removed.
    threads: one is enough, for a model this small several have more to wait than to do.
    """
    from gguf_tools.convert import convert

    model = models.find(MODEL)
    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="powerinfer-demo-")))
        else:
            folder = keep
            folder.mkdir(parents=True, exist_ok=True)
        sparse_path = folder / f"{MODEL}.sparse.gguf"

        step(f"Converting {MODEL} to sparse-GGUF")
        convert(model.path, sparse_path)
        generations = {}
        for who, name, path in (
            ("stock", "stock llama-cpp-python", model.path),
            ("sparse", "powerinfer-ext", sparse_path),
        ):
            step(f"Generating {max_tokens} tokens with {name}")
            with closing(open_model(str(path), ctx=0, threads=threads)) as llama:
                generations[who] = generate(llama, prompt, max_tokens=max_tokens)
                stats = llama.sparse_stats()  # the second time, of the sparse one
        step(f"Comparing both on {eval_tokens} tokens of text that the model has not seen")
        agreement = evaluate(
            str(sparse_path),
            str(model.path),
            Path(model.heldout_text).read_text(encoding="utf-8"),
            tokens=eval_tokens,
            threads=threads,
        )
        return {
            "model": MODEL,
            "prompt": prompt,
            "source_bytes": Path(model.path).stat().st_size,
            "sparse_bytes": sparse_path.stat().st_size,
            "sparse_path": str(sparse_path) if keep is not None else None,
            "stock": asdict(generations["stock"]),
            "sparse": asdict(generations["sparse"]),
            "threads": threads,
            "same_text": generations["stock"].text == generations["sparse"].text,
            "layers": stats["layers"],
            "agreement": agreement,
            "note": NOTE_ON_SPEED,
        }


def render(result: dict[str, Any], console: Console) -> None:
    """Print what `demo` returned."""
    for who, title in (("stock", "stock llama-cpp-python"), ("sparse", "powerinfer-ext")):
        console.rule(title)
        console.print(result["prompt"], end="", style="dim", markup=False)
        console.print(result[who]["text"], markup=False)
    console.rule()
    console.print("The texts are identical." if result["same_text"] else "The texts differ.", style="bold")
    console.print()
    console.print(layer_table(result["layers"]))
    console.print(agreement_table(result["agreement"]))
    speed = Table("tokens/s", "prefill", "decode", title=f"Speed, threads: {result['threads']}")
    for who in ("stock", "sparse"):
        speed.add_row(who, *(f"{result[who][f'{phase}_tps'] or 0:.0f}" for phase in ("prefill", "decode")))
    console.print(speed)
    console.print(result["note"], style="dim")
    console.print("\n[bold]Next[/bold]")
    for command, what in NEXT_STEPS:
        console.print(f"  {command:46} {what}", markup=False)
    if result["sparse_path"]:
        console.print(f"The converted model is kept: {result['sparse_path']}", markup=False, soft_wrap=True)
