"""The corpus of the bundled models: the Python standard library, a byte-level BPE for it, and its splits.

Everything here is a pure function of the running Python's own standard library: file order is sorted, the
split is by a hash of the file's name, and the tokenizer's training has no randomness. Two people with the
same Python get the same tokens; `Corpus.digest` says whether they do.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0
VOCABULARY = 4096
LONGEST_TOKEN = 32  # bytes: llama-cpp-python's detokenize has a buffer of 32 and silently loses longer tokens

# The pre-split that llama.cpp applies for `tokenizer.ggml.pre = "qwen2"` (src/llama-vocab.cpp), which also
# leaves the spaces of a detokenised text alone. Numbers are split digit by digit; an identifier keeps its
# leading underscore.
PRE_TOKENIZER = "qwen2"
PRE_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tests, other people's packages, tables that were generated, and what the build wrote about the machine.
EXCLUDED_DIRS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "_bundled"}
EXCLUDED_FILES = re.compile(
    r"(encodings/(cp|iso8859|mac_|koi8|big5|euc|gb|hz|iso2022|johab|kz|palmos|ptcp|shift|tis|hp_).*"
    r"|_sysconfigdata.*|config-.*/.*|html/entities\.py|stringprep\.py|pydoc_data/__init__\.py)"
)
HELD_OUT_ONE_IN = 32
HELD_OUT_SALT = "powerinfer-ext/held-out/1"


@dataclass(frozen=True)
class Document:
    """One file of the standard library; `name` is relative to it and uses forward slashes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return _rank(self.name) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """The documents in sorted order, and the SHA-256 over all names and texts."""

    documents: tuple[Document, ...]
    digest: str

    @property
    def training(self) -> list[Document]:
        return [d for d in self.documents if not d.held_out]

    @property
    def held_out(self) -> list[Document]:
        return [d for d in self.documents if d.held_out]


def read_corpus() -> Corpus:
    """Read the running Python's standard library, without what `EXCLUDED_*` names and what is not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    documents = []
    for name in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if EXCLUDED_DIRS.intersection(name.split("/")[:-1]) or EXCLUDED_FILES.fullmatch(name):
            continue
        try:
            text = (root / name).read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        documents.append(Document(name, text))
        digest.update(f"{name}\0{text}\0".encode())
    return Corpus(tuple(documents), digest.hexdigest())


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Train the byte-level BPE on the training documents: separator, 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in corpus.training), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY or tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        raise RuntimeError("the tokenizer did not come out with the expected vocabulary")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Return uint16 [n_tokens]: every document after a separator token."""
    parts: list[int] = []
    for encoding in tokenizer.encode_batch([d.text for d in documents]):
        parts.append(SEPARATOR_ID)
        parts.extend(encoding.ids)
    return np.array(parts, dtype=np.uint16)


def vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the token strings by id and the merges ("left right") by rank, in GPT-2's byte alphabet."""
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return tokens, merges


def excerpt(documents: list[Document], least: int, most: int) -> str:
    """Join whole documents, in hash order, until `least` bytes are there.

    A document that would take the text over `most` bytes is left out.
    """
    parts: list[str] = []
    size = 0
    for document in sorted(documents, key=lambda d: _rank(d.name)):
        length = len(document.text.encode()) + 1
        if size < least and size + length <= most:
            parts.append(document.text.rstrip("\n") + "\n")
            size += length
    if size < least:
        raise RuntimeError(f"the documents hold {size} bytes, {least} are needed")
    return "\n".join(parts)


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{HELD_OUT_SALT}/{name}".encode()).digest()[:8], "big")
