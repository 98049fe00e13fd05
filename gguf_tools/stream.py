"""What convert and export share: moving tensor bytes in pieces, and telling how far they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from gguf_tools.reader import BLOCKS, GGUFFile, TensorInfo

# progress(done, total, what): bytes done, bytes in all, the tensor or step at hand.
Progress = Callable[[int, int, str], None]

PIECE = 4 << 20  # bytes moved at a time
STRIP = 1 << 20  # values of `down` that a worker holds as floats (4 MiB, in three copies)
WORKERS = min(4, os.cpu_count() or 1)


class Reporter:
    """Counts bytes for the caller's progress bar; `beside` counts those of a thread running along."""

    def __init__(self, progress: Progress | None, total: int, beside: Callable[[], int] = lambda: 0) -> None:
        self.progress = progress
        self.total = total
        self.beside = beside
        self.done = 0

    def advance(self, n: int, what: str) -> None:
        """`n` more bytes are done; `what` is the tensor or step they belong to."""
        self.done += n
        if self.progress:
            self.progress(min(self.done + self.beside(), self.total), self.total, what)


def pieces(file: GGUFFile, tensor: TensorInfo) -> Iterator[np.ndarray]:
    """The bytes of a tensor, a few MiB at a time (the same buffer every time)."""
    buffer = np.empty(min(PIECE, tensor.nbytes), np.uint8)
    for at in range(0, tensor.nbytes, PIECE):
        piece = buffer[: min(PIECE, tensor.nbytes - at)]
        file.read_into(tensor.offset + at, piece)
        yield piece


def permuted_rows(file: GGUFFile, tensor: TensorInfo, order: np.ndarray) -> Iterator[np.ndarray]:
    """Per expert, the rows of a matrix (or the values of a bias) in the order given: int [experts, n_ff]."""
    n_experts, n_ff = order.shape
    size = tensor.nbytes // n_experts
    for expert, row in enumerate(order):
        matrix = np.empty((n_ff, size // n_ff), np.uint8)
        file.read_into(tensor.offset + expert * size, matrix)
        yield matrix[row]


def row_ranges(n_rows: int, row_size: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of runs of rows that are about a piece long."""
    step = max(1, PIECE // row_size)
    for first in range(0, n_rows, step):
        yield first, min(first + step, n_rows)


def strips(ggml_type: int, n_ff: int, n_embd: int) -> list[tuple[int, int]]:
    """Ranges of neurons, `STRIP` values each, that start and end at block borders of rows of `ggml_type`."""
    block = BLOCKS[ggml_type][0]
    step = max(1, STRIP // n_embd // block) * block
    return [(first, min(first + step, n_ff)) for first in range(0, n_ff, step)]
