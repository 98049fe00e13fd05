"""The limit that the hardware sets on decoding: the bytes a token has to touch over the measured bandwidths.

Decoding one token reads every weight it uses once, and does little with each; so no engine can be faster than
memory bandwidth / bytes touched. Where memory is limited to less than those bytes, the rest has to come
from disk for every token, at best while the other part is being computed: then the slower of the two is
the limit (roofline model: Williams, Waterman and Patterson, 2009).

Counted are weights only. The KV cache and the activations of a short context are below a percent of them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_tools.quants import SCALE_GROUP
from gguf_tools.virtual import ModelFiles
from powerinfer_ext import machine
from powerinfer_ext.placement import DENSE_FFN, EXPERTS

_BLOCKS = (64 << 10, 256 << 10, 1 << 20)
_DEPTHS = (1, 16)
# Looked up by row or not at all: one row of them is nothing.
_LOOKED_UP = (
    "token_embd.weight",
    "position_embd.weight",
    "token_types.weight",
    "per_layer_token_embd.weight",
)
_EXTENSION_PARTS = (".ffn_bundle", ".ffn_order", ".ffn_freq", ".ffn_thresh", ".ffn_down_scale")


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that decoding one token touches, by what they are; `stored` is all weights of the file.

    chosen_stored: all the bytes that `ffn_neurons` is chosen from anew for every token (experts, bundles).
    """

    attention_and_rest: int
    ffn_deciding: int  # gate, or up where the FFN has no gate, or predictors; 0 for a stock file
    ffn_neurons: int  # bundles of the neurons computed; for a stock file all matrices of its FFNs
    stored: int
    chosen_stored: int = 0

    @property
    def total(self) -> int:
        return self.attention_and_rest + self.ffn_deciding + self.ffn_neurons


def token_bytes(path: str, computed: Mapping[int, float] | None = None) -> TokenBytes:
    """What one token touches in the GGUF or sparse-GGUF at `path`.

    computed: layer -> share of its (routed) neurons whose bundles are read; needed for a sparse-GGUF,
    where a layer left out counts in full.
    """
    with ModelFiles.open(path) as files:
        tensors = [tensor for file in files.files for tensor in file.tensors.values()]
        routed = _routed_share(files.first.metadata)
        tied = all(tensor.name != "output.weight" for tensor in tensors)  # then the head reads the whole embedding
        mixture = any("_exps." in tensor.name for tensor in tensors)
        rest = ffn = chosen = 0
        sparse = files.sparse
        deciding_names = {layer.decider_name for layer in sparse.layers} if sparse else set()
        deciding = 0
        for tensor in tensors:
            share = routed if "_exps." in tensor.name else 1.0
            if tensor.name in _LOOKED_UP and not (tied and tensor.name == "token_embd.weight"):
                continue
            if any(part in tensor.name for part in _EXTENSION_PARTS):
                continue
            if tensor.name in deciding_names or ".ffn_pred" in tensor.name:
                deciding += round(tensor.nbytes * share)
            elif sparse is None and _is_ffn_matrix(tensor.name, mixture):
                ffn += round(tensor.nbytes * share)
                chosen += tensor.nbytes
            else:
                rest += round(tensor.nbytes * share)
        for layer in sparse.layers if sparse else []:
            experts = routed if layer.n_expert else 1.0
            share = (computed or {}).get(layer.index, 1.0)
            ffn += round(layer.bundle.nbytes * share * experts)
            chosen += layer.bundle.nbytes
            if layer.scale_tensor is not None:  # a row of scales is read where any of its neurons is
                wanted = 1 - (1 - share) ** SCALE_GROUP
                ffn += round(layer.scale_tensor.nbytes * wanted * experts)
        return TokenBytes(rest, deciding, ffn, sum(tensor.nbytes for tensor in tensors), chosen)


def _routed_share(metadata: Mapping[str, Any]) -> float:
    """Experts used per token over experts there are; 1.0 for a dense model."""
    architecture = metadata.get("general.architecture")
    experts = metadata.get(f"{architecture}.expert_count")
    used = metadata.get(f"{architecture}.expert_used_count")
    return min(1.0, used / experts) if experts and used else 1.0


def _is_ffn_matrix(name: str, mixture: bool) -> bool:
    """Of a mixture only the routed experts: shared ones and dense layers are touched by every token."""
    return (EXPERTS if mixture else DENSE_FFN).fullmatch(name) is not None


# ---- the machine ---------------------------------------------------------------------------------


def memory_bandwidth(seconds: float = 3.0, *, mean: bool = False) -> float:
    """Bytes per second that all allowed cores together read from memory, the best of two ways to read.

    In the best pass within `seconds`, or in the mean of all.

    One is numpy's maximum (vector loads), the other libc's memchr for a byte that is not there (both
    without the GIL); which is faster depends on the CPU. Raises MemoryError when there is no room for the
    buffer.
    """
    return max(machine.memory_bandwidth(seconds / 2, mean=mean), _memchr_bandwidth(seconds / 2, mean))


def _memchr_bandwidth(seconds: float, mean: bool) -> float:
    size = max(256 * machine.MIB, 4 * machine.last_level_cache())
    if size > machine.available_memory() // 2:
        raise MemoryError(f"{size // machine.MIB} MiB for the measurement are not free")
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(size, np.uint8), threads)  # ones: the pages of zeros could all be the same one
    return machine.pass_rate(lambda part: libc.memchr(part.ctypes.data, 2, part.nbytes), parts, seconds, mean=mean)


def disk_speeds(path: str, seconds: float = 0.4) -> list[machine.DiskSpeed]:
    """Random O_DIRECT reads of the file itself in blocks of 64 KiB to 1 MiB, 1 and 16 in flight; [] where
    impossible.

    `seconds` for each of the six. Blocks larger than the file are left out.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return []
    try:
        size = os.fstat(fd).st_size
        return [
            machine.DiskSpeed(block, depth, machine.random_reads(fd, size, block, depth, seconds))
            for block in _BLOCKS
            if block <= size
            for depth in _DEPTHS
        ]
    except OSError:
        return []
    finally:
        os.close(fd)


# ---- the bound -----------------------------------------------------------------------------------


def bound(
    touched: TokenBytes,
    memory: float,
    disk: float | None,
    limit: int | None,
    hit_rate: Callable[[float], float] = lambda share: share,
) -> dict[str, Any]:
    """Most tokens per second that decoding can reach when reads and computation overlap completely.

    memory, disk: bandwidths in bytes per second (disk None where it was not measured). limit: bytes of memory, None
    when there is enough; all of it may hold weights. What every token touches beyond the limit has to come from disk
    for every token. What is chosen anew for every token (experts, neurons) comes from disk where it is not in a cache
    of the rest of the limit: hit_rate(share) is the share of requests that a cache holding that share of the units
    answers (`hits.HitRate`). With the hit rate of the best policy it is a bound, with a typical one an expectation.

    Returns `bytes_per_token`, `disk_bytes_per_token`, `bound_tps` and `bound_by` ("memory" or "disk").
    """
    from_disk = 0.0
    if limit is not None and touched.chosen_stored > touched.ffn_neurons:
        room = limit - (touched.total - touched.ffn_neurons)
        share = min(1.0, max(0.0, room / touched.chosen_stored))
        from_disk = max(0, -room) + touched.ffn_neurons * (1 - hit_rate(share))
    elif limit is not None:
        from_disk = max(0, touched.total - limit)
    return slower(touched.total, round(from_disk), memory, disk)


def slower(touched: int, from_disk: int, memory: float, disk: float | None) -> dict[str, Any]:
    """The roofline of a token that touches so many bytes in memory and gets so many from disk; see `bound`."""
    memory_tps = memory / touched
    disk_tps = disk / from_disk if from_disk and disk else float("inf")
    return {
        "bytes_per_token": touched,
        "disk_bytes_per_token": from_disk,
        "bound_tps": min(memory_tps, disk_tps),
        "bound_by": "disk" if disk_tps < memory_tps else "memory",
    }
