"""What a calibration run saw of a model: the profile that predictors, hot sets and thresholds are made from.

A profile is a folder:

    profile.json         what was read with what (`meta`), and the FFNs (`ffns`), see `Profile`
    chunk-00000.npz      the first `meta["chunk"]` tokens, chunk-00001.npz the next, ...

Chunks are written one by one, each complete or not at all, so that an interrupted run can go on where it was.
Neurons are numbered as in the source, whatever file was run. For each FFN ("3" is layer 3's, "3_exps" its
experts) a chunk has

    count.<ffn>      int32 [n_ff], or [n_expert, n_ff]: for how many tokens each neuron fired
    x.<ffn>          float16 [tokens, n_embd]: the FFN's inputs (dense FFNs, sampled chunks)
    bits.<ffn>       uint8 [tokens, n_ff / 8], [tokens, experts used, n_ff / 8]: which neurons fired, eight to a
                     byte (sampled chunks, and activations under which neurons are silent)
    gate.<ffn>       float16 [sampled tokens, n_ff]: |act(g)|, and
    up.<ffn>         float16 [sampled tokens, n_ff]: |u| of the same tokens (dense gated FFNs with silu or gelu;
                     an ungated FFN has gate alone)
    experts.<ffn>    int16 [tokens, experts used]: the routing

A neuron fires when what `down` is multiplied with is not zero. Under silu and gelu all do, and there is no count.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools import sparse
from gguf_tools.errors import FormatError
from gguf_tools.reader import GGUFFile, printable
from gguf_tools.sparse import FFN_TENSOR, SparseGGUF

VERSION = 1
_SAMPLE = 4096  # bytes of each tensor that the fingerprint looks at
_META = ("model", "fingerprint", "architecture", "activation", "text", "tokens", "window", "chunk", "stored")


def fingerprint(file: GGUFFile) -> str:
    """A digest that a stock GGUF and every sparse-GGUF made from it have in common, 64 hexadecimal digits.

    Of the shapes and types of all tensors the source has, and of the first bytes of those that no conversion
    touches (norms, attention, embeddings, routers): telling models apart takes no more, and reading 30 GB would
    take a minute.
    """
    if sparse.K_VERSION in file.fields:
        view = SparseGGUF(file)
        names, hidden = view.source_tensors, view.hidden_tensors()
    else:
        names, hidden = list(file.tensors), {}
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = file.tensors.get(name)
        ggml_type, shape = (tensor.type, tensor.shape) if tensor else hidden[name]
        digest.update(f"{name} {ggml_type} {shape}\n".encode())
        moved = FFN_TENSOR.fullmatch(name) or (".ffn_" in name and name.endswith(".bias"))
        if tensor is not None and not moved:
            digest.update(file.pread(tensor.offset, min(_SAMPLE, tensor.nbytes)))
    return digest.hexdigest()


@dataclass(frozen=True)
class ProfiledFFN:
    """An FFN of the profiled model. n_expert is 0 for a dense one."""

    unit: str
    n_embd: int
    n_ff: int
    n_expert: int
    gated: bool

    @property
    def index(self) -> int:
        """The layer."""
        return int(self.unit.split("_")[0])


class Profile:
    """A profile on disk; arrays are read when they are asked for.

    meta: model (file name), fingerprint, architecture, activation, text (what was read), tokens (how many will
    have been read when it is complete), window (tokens of one context), chunk (tokens of a chunk), stored (every
    so many-th chunk has inputs and masks).
    """

    def __init__(self, folder: Path, meta: dict[str, Any], ffns: list[ProfiledFFN]) -> None:
        self.folder = folder
        self.meta = meta
        self.ffns = {ffn.unit: ffn for ffn in ffns}

    @classmethod
    def create(cls, folder: str | os.PathLike[str], meta: dict[str, Any], ffns: list[ProfiledFFN]) -> Profile:
        """An empty profile, or the one that is there if it was begun with the same `meta`.

        Raises FormatError when another one is there, OSError.
        """
        folder = Path(folder)
        if (folder / "profile.json").exists():
            there = cls.open(folder)
            different = [key for key in _META if there.meta[key] != meta[key]]
            if different:
                raise FormatError(
                    f"{folder}: holds another profile ({', '.join(different)} differ); choose another place, or "
                    "remove it"
                )
            return there
        folder.mkdir(parents=True, exist_ok=True)
        described = {"version": VERSION, "meta": meta, "ffns": [vars(ffn) for ffn in ffns]}
        write_atomically(folder / "profile.json", lambda file: file.write(json.dumps(described, indent=1).encode()))
        return cls(folder, meta, ffns)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Profile:
        """Raises FormatError naming the field when `folder` is not a profile, OSError."""
        folder = Path(folder)
        path = folder / "profile.json"
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            if described["version"] != VERSION:
                raise FormatError(f"{path}: a profile of version {described['version']}; calibrate again")
            meta = described["meta"]
            missing = [key for key in _META if key not in meta]
            if missing:
                raise FormatError(f"{path}: {missing[0]} is missing; calibrate again")
            return cls(folder, meta, [ProfiledFFN(**ffn) for ffn in described["ffns"]])
        except (FileNotFoundError, NotADirectoryError):
            raise FormatError(f"{folder}: is not a profile; make one with: powerinfer calibrate") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: is not the description of a profile ({error})") from error

    def check_model(self, file: GGUFFile) -> None:
        """Raise FormatError unless the profile was made with this model."""
        if fingerprint(file) != self.meta["fingerprint"]:
            raise FormatError(
                f"{self.folder}: is the profile of another model ({printable(str(self.meta['model']))}), not of "
                f"{file.path}; calibrate this one"
            )

    @property
    def n_chunks(self) -> int:
        """Chunks of a complete profile."""
        return -(-self.meta["tokens"] // self.meta["chunk"])

    @property
    def done(self) -> int:
        """Chunks that are there, the first ones."""
        n = 0
        while n < self.n_chunks and self._path(n).exists():
            n += 1
        return n

    @property
    def complete(self) -> bool:
        return self.done == self.n_chunks

    @property
    def tokens(self) -> int:
        """Tokens in the chunks that are there."""
        return min(self.done * self.meta["chunk"], self.meta["tokens"])

    def digest(self) -> str:
        """Of everything that is there: 64 hexadecimal digits."""
        digest = hashlib.sha256((self.folder / "profile.json").read_bytes())
        for number in range(self.done):
            with self._path(number).open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest()

    def is_stored(self, chunk: int) -> bool:
        """Whether a chunk keeps inputs and masks."""
        return chunk % self.meta["stored"] == 0

    def write_chunk(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what chunk `number` gave; complete or not at all."""
        write_atomically(self._path(number), lambda file: np.savez(file, **arrays))

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.npz"

    def _parts(self, kind: str, unit: str) -> Iterator[np.ndarray]:
        for number in range(self.done):
            path = self._path(number)
            try:
                with np.load(path, allow_pickle=False) as file:
                    if f"{kind}.{unit}" in file:
                        yield file[f"{kind}.{unit}"]
            except OSError:
                raise
            except Exception as error:  # zipfile, zlib and numpy have many names for a damaged file
                raise FormatError(
                    f"{path}: is damaged ({error}); remove it and run powerinfer calibrate again"
                ) from error

    def array(self, kind: str, unit: str) -> np.ndarray | None:
        """All chunks' arrays of a kind for an FFN, one after the other (counts: added up); None if there are none."""
        parts = list(self._parts(kind, unit))
        if not parts:
            return None
        return np.sum(parts, axis=0, dtype=np.int64) if kind == "count" else np.concatenate(parts)

    def masks(self, unit: str) -> np.ndarray | None:
        """bool [tokens, n_ff]: which neurons of a dense FFN fired; None where that is not known."""
        bits = self.array("bits", unit)
        if bits is None or self.ffns[unit].n_expert:
            return None
        return np.unpackbits(bits, axis=-1, count=self.ffns[unit].n_ff).view(bool)

    def frequency(self, unit: str) -> np.ndarray | None:
        """float32 [n_ff] or [n_expert, n_ff]: the share of tokens (routed to the expert) a neuron fired for.

        None where every neuron counts. Experts that no token was routed to have frequency zero.
        """
        count = self.array("count", unit)
        if count is None:
            return None
        if not self.ffns[unit].n_expert:
            return (count / max(1, self.tokens)).astype(np.float32)
        routed = np.bincount(self.array("experts", unit).ravel(), minlength=self.ffns[unit].n_expert)
        return (count / np.maximum(routed, 1)[:, None]).astype(np.float32)


def write_atomically(path: Path, fill: Any) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_name(f".{path.name[:180]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
