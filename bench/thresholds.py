"""Perplexity against density for SwiGLU and GeGLU models under thresholds: CATS, CHESS, and CHESS without balancing.

    python -m bench.thresholds [MODEL] [--output bench/results/thresholds]

Thresholds come from the calibration text, the balance of the layers from another part of it, and the figures from
held-out text (all of it unless --tokens says otherwise), measured on the stock model with a callback that zeroes what
the engine would skip. Writes MODEL.json and MODEL.png.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from powerinfer_ext.models import find
from powerinfer_ext.thresholds import BALANCES, TOKENS, GatedModel, Tuner, cats, chess, measure, texts

RESULTS = Path(__file__).parent / "results" / "thresholds"
DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
CURVES = {
    "cats": "CATS: one threshold per layer",
    "chess even": "CHESS: per neuron, layers alike",
    "chess": "CHESS: per neuron, layers balanced",
}


def curves(path: str, tokens: int, window: int, threads: int, console: Console) -> list[dict[str, Any]]:
    """One entry per kind and density: what was asked for, the balance chosen, and the cost on held-out text."""
    calibration, tuning, heldout, _ = texts(None, None)
    results = []
    with GatedModel(path, window=window, threads=threads) as model:
        tuner = Tuner(model, model.record(model.windows(calibration, TOKENS)), model.windows(tuning, TOKENS))
        tuner.weigh(0.5)
        judged = [(part, model.logits(part)) for part in model.windows(heldout, tokens)]
        for density in DENSITIES:
            balanced, balance, _ = tuner.best("chess", density)
            candidates = {
                "cats": (cats(tuner.statistics, density), 0.0),
                "chess even": (chess(tuner.statistics, density), 0.0),
                "chess": (balanced, balance),
            }
            for kind, (thresholds, used) in candidates.items():
                cost = measure(model, thresholds, judged)
                results.append({"kind": kind, "density_wanted": density, "balance": used, **asdict(cost)})
                results[-1]["increase"] = cost.increase
                console.print(f"{kind} {density}: {cost.increase:+.3%}, KL {cost.kl:.2e}")
    return results


def table(results: list[dict[str, Any]]) -> Table:
    """A line per density: increase of perplexity and KL of each kind."""
    out = Table(title="held-out text: perplexity (mean KL)")
    out.add_column("neurons computed")
    for label in CURVES.values():
        out.add_column(label, justify="right")
    for density in DENSITIES:
        row = {r["kind"]: r for r in results if r["density_wanted"] == density}
        cells = [f"{row[kind]['increase']:+.2%} ({row[kind]['kl']:.1e})" for kind in CURVES]
        out.add_row(f"{row['chess']['density']:.0%}", *cells)
    return out


def draw(results: list[dict[str, Any]], name: str, target: Path) -> None:
    """The chart: perplexity above, KL below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 7), layout="constrained")
    for kind, label in CURVES.items():
        line = sorted((r["density"], r["increase"], r["kl"]) for r in results if r["kind"] == kind)
        densities, increases, kls = zip(*line, strict=True)
        upper.plot(densities, increases, marker="o", label=label)
        lower.semilogy(densities, kls, marker="o", label=label)
    upper.axhline(0.01, color="grey", linewidth=0.8, linestyle="--")
    upper.set_ylabel("perplexity against dense")
    upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    upper.set_title(f"{name}: thresholds on |act(gate)|, held-out text")
    lower.set_ylabel("mean KL(dense || thresholded), nats")
    lower.set_xlabel("share of neurons computed")
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    upper.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Argument(help="A bundled SwiGLU model, or a dense stock GGUF.")] = "llama-swiglu",
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 1 << 20,
    window: Annotated[int, typer.Option(help="Tokens per window; the bundled models were trained with 256.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the chart.")] = RESULTS,
) -> None:
    """Measure, print the table, write JSON and chart."""
    console = Console(width=140)
    path = Path(model) if Path(model).exists() else find(model).path
    results = curves(str(path), tokens, window, threads, console)
    output.mkdir(parents=True, exist_ok=True)
    document = {"model": path.stem, "window": window, "balances": BALANCES, "results": results}
    (output / f"{path.stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(results, path.stem, output / f"{path.stem}.png")
    console.print(table(results))


if __name__ == "__main__":
    typer.run(main)
