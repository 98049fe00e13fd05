"""How ggml's threads and ours wait for each other, which they do some hundred times per token."""

from __future__ import annotations

import importlib
import os
import sys

# Turns of libgomp's waiting loop before a thread sleeps: 0.15 ms where a turn takes 51 ns (Zen 4), more than threads
# wait for each other on a quiet machine. Its default, 300000, is longer than a time slice.
SPINS = 3000


def spin_briefly() -> None:
    """Load llama-cpp-python, and with it OpenMP, so that threads that wait soon sleep instead of spinning on.

    A thread that spins through its time slice may keep the very thread that it waits for off the core, when other
    processes are busy too. Nothing is changed where llama_cpp was imported before, or where the environment says
    GOMP_SPINCOUNT or OMP_WAIT_POLICY; child processes do not inherit it.
    """
    if "llama_cpp" in sys.modules or "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        importlib.import_module("llama_cpp")
    finally:
        del os.environ["GOMP_SPINCOUNT"]
