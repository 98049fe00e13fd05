"""What predictors reach on tokens they were not made from, what making them takes, and how skewed the firing is.

    python -m bench.predictors [MODEL...] [--recall 0.97] [--output bench/results/predictors]

For the bundled dense models (the default) or stock GGUFs: calibrates and fits as `powerinfer convert --mode predict`
does, with times and the peak of memory. Bundled models are judged on held-out text, as `powerinfer eval` does;
models of random weights by recall alone, on other random tokens. Writes MODEL.json, and MODEL-coverage.png: the share
of all firings that the hottest neurons make up. `--chart` also tries every kind and rank of predictor:
MODEL-predictors.png.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import typer
from llama_cpp._logger import set_verbose

from gguf_tools import convert, order, synth
from gguf_tools.fit import Fit, chart_of, fit
from gguf_tools.profile import Profile
from gguf_tools.training import threshold
from powerinfer_ext.bench import about_machine
from powerinfer_ext.calibrate import calibrate, is_synthetic
from powerinfer_ext.evaluate import evaluate
from powerinfer_ext.firing import firing
from powerinfer_ext.models import bundled, calibration_text

RESULTS = Path(__file__).parent / "results" / "predictors"
WINDOW = 256  # tokens; the bundled models were trained with as many
# Share of a layer's neurons that makes 80 % of its firings: PowerInfer (arXiv 2312.12456), figure 5a.
PAPERS = {"OPT-30B": 0.26, "LLaMA(ReGLU)-70B": 0.43}


def coverage(profile: Profile) -> list[dict[str, Any]]:
    """Per layer and for all together: what share of the firings the hottest neurons make up, and what share of them
    makes 80 %; and what reading the cold neurons costs in the stored order, and in the order of frequency alone."""
    frequencies = {unit: profile.frequency(unit) for unit, ffn in profile.ffns.items() if not ffn.n_expert}
    found = []
    for unit, frequency in [*frequencies.items(), ("all", np.concatenate(list(frequencies.values())))]:
        total = np.cumsum(np.sort(frequency)[::-1]) / frequency.sum()
        at = np.linspace(0, len(total), 101).round().astype(int)[1:]
        entry = {"layer": unit, "curve": [0.0, *total[at - 1].tolist()], "density": float(frequency.mean())}
        entry["hottest_30"] = float(total[round(0.3 * len(total)) - 1])
        entry["for_80"] = (int(np.searchsorted(total, 0.8)) + 1) / len(total)
        if unit != "all" and (fired := profile.masks(unit)) is not None:
            half, hot = len(fired) // 2, order.hot_count(frequency)
            known = fired[:half].mean(axis=0)
            stride = 2 * profile.ffns[unit].n_embd  # of no model in particular: two rows of 8 bits
            for name, masks in (("stored", fired[:half]), ("by_frequency", None)):
                chained = order.stored_order(known, masks, hot)
                entry[f"reads_{name}"] = asdict(order.reads(fired[half:][:1024], chained, hot, stride))
        found.append(entry)
    return found


def draw(found: list[dict[str, Any]], path: Path, title: str) -> None:
    """The curves of `coverage`, with the papers' points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for entry in found:
        whole = entry["layer"] == "all"
        label = "all layers" if whole else f"layer {entry['layer']} ({entry['density']:.0%} fire)"
        axes.plot(np.linspace(0, 1, 101), entry["curve"], "k" if whole else "-", lw=2 if whole else 1.2, label=label)
    for (name, share), marker in zip(PAPERS.items(), "*P", strict=True):
        axes.plot(share, 0.8, marker, color="red", ms=10, label=f"{name}'s layers (PowerInfer)")
    axes.axvline(0.3, color="grey", lw=0.8, ls="--")
    axes.set_xlabel("hottest neurons, share of all")
    axes.set_ylabel("share of firings")
    axes.set_title(title, fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def measure(path: str, name: str, folder: Path, recall: float, tokens: int, threads: int) -> dict[str, Any]:
    """Everything about one model, for its JSON."""
    text = None if is_synthetic(path) else [calibration_text()]
    started = time.monotonic()
    profile = calibrate(path, text, folder / f"{name}.profile", threads=threads)
    read = time.monotonic()
    fitted: Fit = fit(profile, path, predict=True, recall=recall)
    done = time.monotonic()
    making = {
        "tokens": profile.tokens,
        "calibrate_s": read - started,
        "fit_s": done - read,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sparse = str(folder / f"{name}.sparse.gguf")
    report = convert(path, sparse, calibration=fitted.calibration)
    if text is None:
        ids = np.random.default_rng(1).integers(0, vocabulary(path), tokens).tolist()
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
        layers = [{"layer": i, **found.json()} for i, found in firing(sparse, windows, threads=threads).items()]
        quality = None
    else:
        model = next(model for model in bundled() if model.name == name)
        native = model.activation != "drelu"
        quality = evaluate(
            sparse,
            path if native else None,
            model.heldout_text.read_text(encoding="utf-8"),
            reference=None if native else (path, model.activation),
            tokens=tokens,
            passes=("prefill",),
            floor=False,
            threads=threads,
        )
        layers = [layer for layer in quality.pop("layers") if layer.get("recall") is not None]
    fired, computed = (float(np.mean([layer[key] for layer in layers])) for key in ("fired_share", "computed_share"))
    return {
        "model": name,
        "recall_asked": recall,
        "recall": float(np.mean([layer["recall"] for layer in layers])),
        "fired_share": fired,
        "computed_share": computed,
        "computed_of_fired": computed / fired,
        "predictor_share": float(np.mean([layer["predictor_share"] for layer in layers])),
        "tokens": tokens,
        "quality": quality,
        "making": making,
        "machine": about_machine(path, threads),
        "layers": [
            {**layer, "predictor": made.predictor, "rank": made.predictor_rank, "bytes": made.predictor_bytes}
            for layer, made in zip(layers, (x for x in report.layers if x.predictor != "none"), strict=True)
        ],
        "notes": fitted.notes,
        "coverage": coverage(profile),
    }


def noise_bound(recall: float, density: float = synth.DEFAULT_DENSITY, skew: float = synth.DEFAULT_SKEW) -> float:
    """Neurons computed, of those that fire, by whoever knows what topic and context give to the products of a
    synthetic shape (`gguf_tools.synth`) exactly, and of the rest, which is noise of full rank, its deviation.

    With s known, g = s + e fires above z; e is normal and alike for all neurons, so the most recall for the fewest
    neurons is a threshold on s - z. By simulation, to about 1 %.
    """
    z = np.array([-NormalDist().inv_cdf(p) for p in synth.firing_probabilities(4096, density, skew)], np.float32)
    rng, known = np.random.default_rng(0), sum(synth.SHARES[:2])
    s, e = (rng.standard_normal((1024, len(z)), np.float32) * np.float32(v**0.5) for v in (known, 1 - known))
    fired, scores = s + e > z, s - z
    return float((scores >= threshold(scores, fired, recall)).mean() / fired.mean())


def vocabulary(path: str) -> int:
    """Tokens that the model knows."""
    from gguf_tools import GGUFFile

    with GGUFFile.open(path) as file:
        return file.tensors["token_embd.weight"].shape[1]


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Bundled models or stock GGUFs.")] = None,
    recall: Annotated[float, typer.Option(help="What predictors are asked to find.")] = 0.97,
    tokens: Annotated[int, typer.Option(help="Tokens to judge on.")] = 4096,
    chart: Annotated[bool, typer.Option(help="Try every predictor and draw recall against bytes.")] = False,
    bound: Annotated[bool, typer.Option(help="Only say what bounds predictors of synthetic shapes.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, print a line per model, write JSON and charts."""
    if bound:
        for wanted in (0.95, 0.97):
            print(f"recall {wanted}: {noise_bound(wanted):.2f} neurons computed for each that fires, at the least")
        return
    set_verbose(False)  # llama.cpp's log
    known = {model.name: str(model.path) for model in bundled()}
    output.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    for given in models or ["arcee-relu2", "llama-drelu"]:
        path, name = known.get(given, given), Path(given).stem
        with tempfile.TemporaryDirectory(dir=output) as folder:
            result = measure(path, name, Path(folder), recall, tokens, threads)
            if chart:
                profile = Profile.open(Path(folder) / f"{name}.profile")
                tried = fit(profile, path, predict=True, recall=recall, everything=True).candidates
                chart_of(tried, output / f"{name}-predictors.png", f"{name}: predictors, recall {recall:g} asked for")
        draw(result["coverage"], output / f"{name}-coverage.png", f"{name}: hot neurons")
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        quality = result["quality"]
        cost = "" if quality is None else f", perplexity {quality['ppl_dense']:.3f} -> {quality['ppl_sparse']:.3f}"
        print(
            f"{name}: recall {result['recall']:.4f}, {result['computed_share']:.2%} computed for "
            f"{result['fired_share']:.2%} that fire ({result['computed_of_fired']:.2f}x), predictors "
            f"{result['predictor_share']:.1%} of the FFNs{cost}; {result['making']['calibrate_s']:.0f} + "
            f"{result['making']['fit_s']:.0f} s, {result['making']['peak_bytes'] / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    typer.run(main)
