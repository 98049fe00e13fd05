"""How far sparse models are from stock: every bundled model, as Q8_0 (as shipped) and F16, prefill and decode.

    python -m bench.accuracy [--tokens 4096] [--output bench/results/accuracy/MACHINE.json]

Natively sparse models are compared with stock llama.cpp on the same file, overridden activations with the numpy
reference (stock computes SwiGLU there). Beside them: how far stock is from itself with its repacked kernels on and off,
and between prefill and token-by-token decode. Held-out text, windows of the length the models were trained with.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguf_tools import GGUFFile, convert, quants
from gguf_tools.reader import row_bytes
from gguf_tools.writer import GGUFWriter, NewTensor
from powerinfer_ext.evaluate import evaluate
from powerinfer_ext.models import BundledModel, bundled

RESULTS = Path(__file__).parent / "results" / "accuracy" / "zen4.json"
STOCK_IS_RIGHT = ("arcee", "smallthinker")


def write_f16(source: Path, output: Path) -> Path:
    """A copy of a GGUF with its quantised tensors expanded to F16."""
    with GGUFFile.open(source) as file:
        infos = list(file.tensors.values())
        types = [quants.F16 if info.type not in quants.LOSSLESS else info.type for info in infos]
        tensors = [NewTensor(info.name, t, info.shape) for info, t in zip(infos, types, strict=True)]
        with GGUFWriter(output, file.fields.values(), tensors, alignment=file.alignment) as writer:
            for info, t in zip(infos, types, strict=True):
                data = file.data(info.name)
                if t != info.type:
                    rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes(info.type, info.shape[0]))
                    data = quants.quantise(t, quants.dequantise(info.type, rows, info.shape[0])).tobytes()
                writer.begin(info.name)
                writer.write(data)
    return output


def measure(model: BundledModel, dense: Path, folder: Path, tokens: int) -> dict[str, Any]:
    """Convert `dense` with the defaults and compare, both modes."""
    sparse = folder / "model.sparse.gguf"
    report = convert(dense, sparse)
    native = model.architecture in STOCK_IS_RIGHT or model.activation == "silu"
    text = Path(model.heldout_text).read_text()
    return {
        "model": model.name,
        "type": dense.stem,
        "against": "stock" if native else "reference",
        "down_type": report.layers[0].down_type,
        **evaluate(
            str(sparse),
            str(dense) if native else None,
            text,
            reference=None if native else (str(dense), model.activation),
            tokens=tokens,
        ),
    }


def measure_stock(model: BundledModel, dense: Path, tokens: int) -> dict[str, Any]:
    """Stock itself against the reference, which rounds no activations: what an overridden model can be judged by."""
    text = Path(model.heldout_text).read_text()
    result = evaluate(str(dense), None, text, reference=(str(dense), model.activation), tokens=tokens)
    return {"model": f"{model.name} in stock", "type": dense.stem, "against": "reference", **result}


def table(results: list[dict[str, Any]]) -> Table:
    """One line per model, type and mode."""
    out = Table(title="sparse against dense")
    for column in ("model", "type", "against", "mode"):
        out.add_column(column)
    for column in ("mean KL", "same top-1", "perplexity", "stock itself", "density"):
        out.add_column(column, justify="right")
    for result in results:
        for mode, figures in result["passes"].items():
            floor = figures["stock_self"]["mean_kl"] if figures.get("stock_self") else None
            across = result.get("stock_prefill_vs_decode")
            density = "-" if result["density"] is None else f"{result['density']:.1%}"
            itself = " / ".join("-" if x is None else f"{x:.0e}" for x in (floor, across and across["mean_kl"]))
            out.add_row(
                *(result["model"], result["type"], result["against"], mode),
                *(f"{figures['mean_kl']:.1e}", f"{figures['top1_agreement']:.2%}"),
                f"{figures['ppl_dense']:.2f} -> {figures['ppl_sparse']:.2f}",
                *(itself, density),
            )
    return out


def main(
    tokens: Annotated[int, typer.Option(help="Held-out tokens per model and mode.")] = 4096,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
) -> None:
    """Measure (about two minutes), print the table, write the JSON."""
    results = []
    for model in bundled():
        with tempfile.TemporaryDirectory() as folder:
            as_f16 = write_f16(Path(model.path), Path(folder) / "F16.gguf")
            as_shipped = Path(folder) / "Q8_0.gguf"
            as_shipped.symlink_to(model.path)
            for dense in (as_shipped, as_f16):
                results.append(measure(model, dense, Path(folder), tokens))
                if model.activation == "silu":
                    results.append(measure_stock(model, dense, tokens))
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=140).print(table(results))


if __name__ == "__main__":
    typer.run(main)
