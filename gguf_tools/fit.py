"""From a profile to what a conversion needs: neuron orders, hot counts, predictors.

Predictors are kept beside the profile (`predictor-<ffn>.npz`) as they are made, so that an interrupted run goes on
where it was, and the next conversion at the same settings trains nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools import order, quants, training
from gguf_tools.convert import FFN, Calibrated, Calibration, Plan, plan_conversion, predict_obstacle
from gguf_tools.errors import ConversionError
from gguf_tools.predictor import Predictor
from gguf_tools.profile import Profile, write_atomically
from gguf_tools.reader import BLOCKS, GGUFFile, TensorInfo
from gguf_tools.sparse import bundle_layout

RECALL = 0.97
_VERSION = 4  # of the trained predictors that are kept

Progress = Callable[..., None]


@dataclass(frozen=True)
class Candidate:
    """A predictor that was tried for a layer, for charts: bytes a token reads by recall."""

    layer: int
    name: str
    trained: bool
    predictor_bytes: int
    recall: float
    computed: float
    bytes: float
    curve: list[tuple[float, float]]  # (recall, bytes)
    chosen: bool


@dataclass(frozen=True)
class Fit:
    """What a profile gave. candidates: only those of layers that were trained now. seconds: what took how long."""

    calibration: Calibration
    candidates: list[Candidate]
    notes: list[str]
    seconds: Mapping[str, float] = field(default_factory=dict)


def fit(
    profile: Profile,
    source: str | os.PathLike[str],
    *,
    predict: bool = False,
    recall: float = RECALL,
    activation: str | None = None,
    hot_bytes: int | None = None,
    everything: bool = False,
    progress: Progress | None = None,
) -> Fit:
    """What is to be known about the FFNs of the stock GGUF `source`, whose profile this is.

    predict: find predictors of that recall too. hot_bytes: memory for hot neurons of all layers together, for a model
    that will be streamed: predictors then spare the others; default: in each layer the fewest that make up 80 % of
    the firings. everything: try all kinds and ranks of predictors, for
    a chart. progress(done, total, what) counts layers. Raises FormatError (another model's profile, damage),
    ConversionError (too few tokens, nothing fires, no layer gains).
    """
    if not 0 < recall < 1:
        raise ConversionError(f"a recall of {recall:g} cannot be asked for; give a share above 0 and below 1")
    found: dict[str, Calibrated] = {}
    candidates: list[Candidate] = []
    notes: list[str] = []
    with GGUFFile.open(source) as file:
        profile.check_model(file)
        if not profile.complete:
            raise ConversionError(f"{profile.folder}: is not complete; run powerinfer calibrate again to finish it")
        plan = plan_conversion(file, activation)
        hot = _hot_counts(profile, plan, hot_bytes, predict)
        digest = profile.digest()
        settings = json.dumps([_VERSION, digest, recall])
        for done, ffn in enumerate(plan.ffns):
            if progress:
                progress(done, len(plan.ffns), f"{'predictor' if predict else 'order'} of layer {ffn.index}")
            fired = profile.masks(ffn.unit) if ffn.unit in profile.ffns else None
            found[ffn.unit] = _ordered(profile, ffn, fired, hot[ffn.unit])
            if not predict:
                continue
            if obstacle := predict_obstacle(file, plan, ffn):
                notes.append(f"layer {ffn.index} stays exact: {obstacle}")
                continue
            in_memory = hot[ffn.unit] if hot_bytes is not None else None
            predictor, selected, tried, note = _predictor(
                profile, file, ffn, fired, recall, settings, everything, in_memory
            )
            candidates += tried
            notes += [note] if note else []
            if selected is not None:  # more of what is in memory, less of the rest: that is what caches will see
                frequency = selected.mean(axis=0, dtype=np.float32)
                stored = order.stored_order(frequency, selected, hot[ffn.unit])
                found[ffn.unit] = Calibrated(order=stored, frequency=frequency, hot_count=hot[ffn.unit])
            if predictor:
                found[ffn.unit] = Calibrated(**{**vars(found[ffn.unit]), "predictor": predictor})
        if progress:
            progress(len(plan.ffns), len(plan.ffns), "")
    if predict and not any(f.predictor for f in found.values()):
        raise ConversionError(f"{os.fspath(source)}: no layer gains from a predictor: {'; '.join(notes)}")
    text, tokens = str(profile.meta["text"]), profile.tokens
    return Fit(Calibration(found, text=text, tokens=tokens, profile=digest), candidates, notes)


# ---- order -------------------------------------------------------------------------------------------------


def _hot_counts(profile: Profile, plan: Plan, hot_bytes: int | None, predict: bool) -> dict[str, int]:
    """Hot neurons of each FFN; experts have none, as a count holds for all of them. predict: bundles hold the deciding
    rows too (of FFNs that stay exact after all they will not)."""
    frequency = {
        ffn.unit: profile.frequency(ffn.unit) for ffn in plan.ffns if not ffn.suffix and ffn.unit in profile.ffns
    }
    known = {unit: values for unit, values in frequency.items() if values is not None}
    counts = dict.fromkeys((ffn.unit for ffn in plan.ffns), 0)
    if hot_bytes is None:
        return counts | {unit: order.hot_count(values) for unit, values in known.items()}
    if not known:
        return counts
    # The same frequency per byte everywhere: the best use of the memory.
    stride = {ffn.unit: _bundle(ffn) if predict else ffn.layout[1] for ffn in plan.ffns}
    values = np.concatenate([v / stride[unit] for unit, v in known.items()])
    sizes = np.concatenate([np.full(len(v), stride[unit]) for unit, v in known.items()])
    owner = np.repeat(np.arange(len(known)), [len(v) for v in known.values()])
    ranked = np.argsort(-values, kind="stable")
    chosen = ranked[: np.searchsorted(np.cumsum(sizes[ranked]), hot_bytes, side="right")]
    chosen = chosen[values[chosen] > 0]
    return counts | dict(zip(known, np.bincount(owner[chosen], minlength=len(known)).tolist(), strict=True))


def _ordered(profile: Profile, ffn: FFN, fired: np.ndarray | None, hot: int) -> Calibrated:
    if ffn.unit not in profile.ffns or (frequency := profile.frequency(ffn.unit)) is None:
        return Calibrated()
    if frequency.ndim == 2:
        return Calibrated(order=np.argsort(-frequency, axis=1, kind="stable"), frequency=frequency)
    stored = order.stored_order(frequency, fired, hot)
    return Calibrated(order=stored, frequency=frequency, hot_count=hot)


# ---- predictors --------------------------------------------------------------------------------------------


def _predictor(
    profile: Profile,
    file: GGUFFile,
    ffn: FFN,
    fired: np.ndarray | None,
    recall: float,
    settings: str,
    everything: bool,
    in_memory: int | None,
) -> tuple[Predictor | None, np.ndarray | None, list[Candidate], str | None]:
    """The best predictor of an FFN, what it selects for some tokens if it spares neurons on flash, all that were tried,
    and, without a predictor, why the layer stays exact. in_memory: neurons that will not be on flash; None: all."""
    kept = profile.folder / f"predictor-{ffn.unit}.npz"
    loaded = None if everything else _load(kept, settings)
    if loaded and (loaded[0] is None or in_memory is None):
        return loaded[0], None, [], loaded[1]
    x = profile.array("x", ffn.unit)
    if x is None or fired is None:
        raise ConversionError(f"{profile.folder}: has no inputs of layer {ffn.index}; calibrate again")
    up = _matrix(file, ffn, ffn.up) if profile.meta["activation"] == "drelu" else None
    m = training.material(x, fired, _matrix(file, ffn, ffn.decider), profile.meta["window"], up)
    del x
    if loaded:
        assert loaded[0] is not None and in_memory is not None
        return *_for_flash(m, ffn, loaded[0], recall, in_memory), [], loaded[1]
    costs = _costs(ffn, m.density)
    tried = list(training.candidates(m, costs, recall, everything=everything))
    best = training.choose(tried, costs, m)
    note, candidates = None, [_candidate(ffn, s, costs, m.n_ff, s is best) for s in tried]
    if best is None or costs.predicted(best.predictor, m.n_ff) >= costs.exact:
        candidates = [replace(candidate, chosen=False) for candidate in candidates]
        pays = max((r for candidate in candidates for r, size in candidate.curve if size < costs.exact), default=None)
        reached = "no predictor fits" if best is None else (
            f"{best.predictor.label} would compute {best.predictor.computed:.0%} of the neurons"
        )
        note = (
            f"layer {ffn.index} stays exact: {m.density:.0%} of its neurons fire, and at a recall of {recall:g} "
            f"{reached}, which reads more than its deciding matrix; "
            + (f"up to a recall of about {pays:g} one reads less" if pays else "no recall from 0.8 up does")
        )
    predictor = best.predictor if best and note is None else None
    _save(kept, settings, predictor, note)
    if predictor and in_memory is not None:
        return *_for_flash(m, ffn, predictor, recall, in_memory), candidates, note
    return predictor, None, candidates, note


def _for_flash(
    m: training.Material, ffn: FFN, predictor: Predictor, recall: float, in_memory: int
) -> tuple[Predictor, np.ndarray]:
    """The predictor that spares neurons on flash, and which it selects for some tokens."""
    sparing = training.for_flash(m, predictor, recall, in_memory, ffn.decider.nbytes // ffn.n_ff)
    return sparing, training.selected(m, sparing)


def _matrix(file: GGUFFile, ffn: FFN, tensor: TensorInfo) -> np.ndarray:
    raw = np.empty((ffn.n_ff, tensor.nbytes // ffn.n_ff), np.uint8)
    file.read_into(tensor.offset, raw)
    return quants.dequantise(tensor.type, raw, ffn.n_embd)


def _bundle(ffn: FFN) -> int:
    """Bytes of a neuron where all of its FFN is in bundles, as in a predicted layer."""
    return bundle_layout([*(t.type for t in (ffn.gate, ffn.up) if t), ffn.down_type], ffn.n_embd)[1]


def _costs(ffn: FFN, density: float) -> training.Costs:
    matrices = [tensor for tensor in (ffn.gate, ffn.up, ffn.down) if tensor]
    rows = [tensor.type for tensor in matrices[:-1]]
    exact = bundle_layout([*rows[1:], ffn.down_type], ffn.n_embd)[1]
    block, size = BLOCKS[ffn.decider.type]
    deciding = ffn.n_ff * ffn.n_embd // block * size
    total = sum(tensor.nbytes for tensor in matrices)
    return training.Costs(_bundle(ffn), total, deciding + density * ffn.n_ff * exact)


def _candidate(ffn: FFN, s: training.Scored, costs: training.Costs, n_ff: int, chosen: bool) -> Candidate:
    p = s.predictor
    curve = [(recall, p.nbytes + computed * n_ff * costs.bundle) for recall, computed in s.curve]
    return Candidate(
        layer=ffn.index,
        name=s.name,
        trained=s.trained,
        predictor_bytes=p.nbytes,
        recall=float(p.recall or 0),
        computed=float(p.computed or 0),
        bytes=costs.predicted(p, n_ff),
        curve=curve,
        chosen=chosen,
    )


def _save(path: Path, settings: str, predictor: Predictor | None, note: str | None) -> None:
    arrays: dict[str, Any] = {"settings": np.array(settings), "note": np.array(note or "")}
    if predictor:
        scalars = {k: v for k, v in asdict(predictor).items() if not isinstance(v, np.ndarray)}
        arrays |= {"predictor": np.array(json.dumps(scalars)), "b": predictor.b, "bias": predictor.bias}
        if predictor.a is not None:
            arrays["a"] = predictor.a
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _load(path: Path, settings: str) -> tuple[Predictor | None, str | None] | None:
    """What was kept, None where nothing or something else was."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["settings"]) != settings:
                return None
            note = str(file["note"]) or None
            if "predictor" not in file:
                return None, note
            scalars = json.loads(str(file["predictor"])) | {"a": file["a"] if "a" in file else None}
            return Predictor(**scalars | {"b": file["b"], "bias": file["bias"]}), note
    except FileNotFoundError:
        return None
    except Exception:  # damaged: it is only a copy, made again
        return None


# ---- the chart ---------------------------------------------------------------------------------------------


def chart_of(candidates: list[Candidate], path: str | os.PathLike[str], title: str) -> None:
    """Recall against bytes read, a panel per layer: PNG at `path`, its data beside it as JSON."""
    from matplotlib.figure import Figure

    path = Path(path)
    layers = sorted({c.layer for c in candidates})
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    for i, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, i + 1)
        for c in (c for c in candidates if c.layer == layer):
            style = "-" if c.trained else "--"
            bytes_read, recall = [b / 1e3 for _, b in c.curve], [r for r, _ in c.curve]
            axes.plot(bytes_read, recall, style, lw=2.5 if c.chosen else 1, label=c.name)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xlabel("kB read per token (predictor and bundles)")
        axes.set_ylabel("recall")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    data = json.dumps([asdict(c) for c in candidates], indent=1).encode()
    write_atomically(path.with_suffix(".json"), lambda file: file.write(data))
