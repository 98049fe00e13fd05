"""Check trained models against stock llama-cpp-python: the same tokens, and the same logits as PyTorch.

    python bench/models/verify.py                # everything in powerinfer_ext/models
    python bench/models/verify.py --folder /tmp/smoke

For `llama-drelu` only loading is checked: stock llama.cpp computes SwiGLU for it, by design.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Annotated

import gguf
import llama_cpp
import numpy as np
import torch
import typer
from corpus import SEPARATOR_ID, read_corpus, train_tokenizer
from export import HELD_OUT, read_gguf, write_gguf
from model import MODELS
from rich.console import Console
from rich.table import Table
from train import OUT

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp's log, dropped; a module-level name keeps it alive."""


def stock_logits(path: Path, ids: list[int]) -> tuple[np.ndarray, llama_cpp.Llama]:
    """Return float32 [len(ids), V] of a prefill of `ids` in stock llama-cpp-python, and the open model."""
    # An F32 KV cache: the default F16 one is a difference of its own.
    llm = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 128, logits_all=True, n_threads=2, type_k=0, type_v=0, verbose=False
    )
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)]), llm


def compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean KL(a||b) in nats, share of equal top-1 tokens, greatest absolute difference; of logits [T, V]."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (a, b))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return kl, float((a.argmax(-1) == b.argmax(-1)).mean()), float(np.abs(a - b).max())


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where the GGUF files and heldout.txt are.")] = OUT,
    prompt: Annotated[str, typer.Option(help="Text for the sample completions.")] = "def read_file(path):\n",
) -> None:
    """Compare every bundled model in FOLDER with PyTorch, and print a completion of each."""
    llama_cpp.llama_log_set(silent, None)
    text = (folder / HELD_OUT).read_text(encoding="utf-8")
    tokenizer = train_tokenizer(read_corpus())
    ids = tokenizer.encode(text).ids
    table = Table("model", "file", "tokens equal", "text equal", "KL", "top-1", "max |difference|")
    for name, config in MODELS.items():
        path = folder / f"{name}.gguf"
        if not path.exists():
            continue
        model = read_gguf(path, config).eval()
        window = [SEPARATOR_ID, *ids[: config.context - 1]]
        with torch.no_grad():
            expected = model.logits(torch.tensor([window]))[0].numpy()
        with tempfile.TemporaryDirectory() as scratch:
            full = Path(scratch) / "f32.gguf"
            write_gguf(full, model, tokenizer, "for verification", gguf.GGMLQuantizationType.F32)
            for file in (full, path):
                found, llm = stock_logits(file, window)
                raw = text.encode()
                tokens = llm.tokenize(raw, add_bos=False, special=False)
                kl, top, most = compare(expected, found)
                table.add_row(
                    name, file.name, str(tokens == ids), str(llm.detokenize(tokens) == raw),
                    f"{kl:.2e}", f"{top:.4f}", f"{most:.3f}",
                )  # fmt: skip
                if file == path:
                    llm.reset()
                    sample = llm(prompt, max_tokens=96, temperature=0.0)["choices"][0]["text"]
                    console.rule(name)
                    console.print(prompt + sample, markup=False, highlight=False)
                llm.close()
    console.print(table)


if __name__ == "__main__":
    app()
