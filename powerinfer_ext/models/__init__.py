"""The small language models that ship with powerinfer-ext, and the texts that go with them.

They are real, if small: trained from scratch on the Python standard library (`bench/models/`), one for each
kind of FFN the engine knows, so that tests, demonstrations and a first run need no download.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class BundledModel:
    """One entry of models.json, with absolute paths; every figure in it was measured at its export."""

    name: str
    architecture: str  # of the GGUF: "arcee", "smallthinker" or "llama"
    activation: str  # "relu2", "relu" (ReGLU), "drelu" or "silu" (SwiGLU)
    moe: bool
    path: Path  # the GGUF file, Q8_0
    heldout_text: Path  # text no model was trained on
    calibration_text: Path  # text the models were trained on
    parameters: int
    heldout_ppl: float  # per token, on heldout_text, context 256
    bits_per_byte: float
    density: float  # mean over the layers
    density_layers: tuple[float, ...]  # share of (token, neuron) pairs that fire; MoE: of the routed experts
    training_steps: int
    training_tokens: int
    licence: str
    provenance: str


def bundled() -> list[BundledModel]:
    """Return the models that are here, in the order of their names."""
    entries = json.loads((_FOLDER / "models.json").read_text(encoding="utf-8"))
    return [
        BundledModel(
            name=e["name"],
            architecture=e["architecture"],
            activation=e["activation"],
            moe=e["moe"],
            path=_FOLDER / e["file"],
            heldout_text=_FOLDER / e["heldout_text"],
            calibration_text=_FOLDER / e["calibration_text"],
            parameters=e["parameters"],
            heldout_ppl=e["heldout_ppl"],
            bits_per_byte=e["bits_per_byte"],
            density=e["density"],
            density_layers=tuple(e["density_layers"]),
            training_steps=e["training_steps"],
            training_tokens=e["training_tokens"],
            licence=e["licence"],
            provenance=e["provenance"],
        )
        for e in entries
    ]


def find(name: str) -> BundledModel:
    """Return the model of that name; ValueError naming the known ones if there is none."""
    models = bundled()
    for model in models:
        if model.name == name:
            return model
    raise ValueError(f"no bundled model {name!r}; there are {', '.join(m.name for m in models)}")


def calibration_text() -> Path:
    """The text the bundled models were trained on: Python sources, for want of anything better to calibrate with."""
    return _FOLDER / "calibration.txt"
