"""`powerinfer eval --sweep`: quality against density, by moving the thresholds of a sparse-GGUF.

A predicted file is judged with its predictors made stricter and more generous: all biases of a layer are moved by
the same multiple of their spread. A file with thresholds has them scaled. What is judged are copies of the file,
made beside it and removed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.profile import write_atomically
from gguf_tools.reader import TensorInfo
from gguf_tools.sparse import SparseGGUF
from powerinfer_ext.errors import PowerInferError

SHIFTS = (-16.0, -8.0, -4.0, -2.0, -1.0, 0.0, 2.0, 8.0)  # of the biases, in standard deviations
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0)  # of the thresholds


def sweep(
    path: str,
    judge: Callable[[str], dict[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """What `judge` says of the file at several densities, from sparse to dense: its result with `setting` added.

    Raises PowerInferError when there is nothing in the file to move.
    """
    with SparseGGUF.open(path) as view:
        predicted = any(layer.predictor for layer in view.layers)
        if not predicted and view.threshold_kind is None:
            raise PowerInferError(
                f"{path}: has neither predictors nor thresholds, so there is nothing to sweep; convert it with --mode "
                "predict, or with --threshold"
            )
    copy = Path(f"{path}.{secrets.token_hex(4)}.sweep")
    settings = SHIFTS if predicted else SCALES
    points = []
    try:
        for done, setting in enumerate(settings):
            shutil.copyfile(path, copy)
            _move(copy, predicted, setting)
            points.append({**judge(str(copy)), "setting": setting})
            if progress:
                progress(done + 1, len(settings))
    finally:
        copy.unlink(missing_ok=True)
    return sorted(points, key=lambda point: point["density"])


def _move(path: Path, predicted: bool, setting: float) -> None:
    changes: list[tuple[TensorInfo, np.ndarray]] = []
    with SparseGGUF.open(path) as view:
        for layer in view.layers:
            tensor = layer.predictor.bias_tensor if predicted and layer.predictor else layer.threshold_tensor
            if tensor is None:
                continue
            values = np.frombuffer(view.file.data(tensor.name), "<f4")
            moved = values + setting * values.std() if predicted else values * setting
            changes.append((tensor, moved.astype("<f4")))
    with path.open("r+b") as file:
        for tensor, values in changes:
            file.seek(tensor.offset)
            file.write(values.tobytes())


def draw(points: list[dict[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Perplexity (and recall, where there are predictors) against density: PNG at `path`, data beside it as JSON."""
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    density = [point["density"] for point in points]
    axes.plot(density, [100 * (p["ppl_sparse"] / p["ppl_dense"] - 1) for p in points], "o-", label="perplexity")
    axes.set_xlabel("share of neurons computed")
    axes.set_ylabel("perplexity, % over dense")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    if all(point.get("recall") is not None for point in points):
        other = axes.twinx()
        other.plot(density, [point["recall"] for point in points], "s--", color="tab:orange")
        other.set_ylabel("recall (dashed)")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    kept = ("setting", "density", "recall", "precision", "computed_share", "ppl_dense", "ppl_sparse", "mean_kl")
    data = [{key: point.get(key) for key in (*kept, "top1_agreement")} for point in points]
    write_atomically(path.with_suffix(".json"), lambda file: file.write(json.dumps(data, indent=1).encode()))
