"""The one exception type of the runtime."""

from __future__ import annotations


class PowerInferError(RuntimeError):
    """Something of ours went wrong at run time. Its text is one sentence that says what to do about it."""
