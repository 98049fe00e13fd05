"""The exceptions of the runtime."""

from __future__ import annotations


class PowerInferError(RuntimeError):
    """Something of ours went wrong at run time. Its text is one sentence that says what to do about it."""


class BudgetError(PowerInferError):
    """A memory budget that cannot work. least: bytes of the smallest one that does."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least
