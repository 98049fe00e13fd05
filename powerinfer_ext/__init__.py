"""Run sparse-GGUF models on stock llama-cpp-python, computing only the FFN neurons that fire.

    from powerinfer_ext import Llama          # a llama_cpp.Llama that also opens sparse-GGUF files
    llama = Llama("model.sparse.gguf", n_ctx=2048)
    print(llama("def main(", max_tokens=32)["choices"][0]["text"], llama.sparse_stats()["density"])

or, for code that you would rather not edit, `powerinfer_ext.install()` before it runs.

Everything here is imported on first use (PEP 562): `import powerinfer_ext` costs next to nothing, and
`powerinfer doctor` works on a machine where llama-cpp-python itself does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerinfer_ext.errors import PowerInferError
    from powerinfer_ext.hook import install, uninstall
    from powerinfer_ext.llama import Llama, sparse_stats

__all__ = ["Llama", "PowerInferError", "__version__", "install", "sparse_stats", "uninstall"]

_HOME = {
    "Llama": "powerinfer_ext.llama",
    "PowerInferError": "powerinfer_ext.errors",
    "install": "powerinfer_ext.hook",
    "sparse_stats": "powerinfer_ext.llama",
    "uninstall": "powerinfer_ext.hook",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("powerinfer-ext")
    elif name in _HOME:
        if name in ("Llama", "install"):
            importlib.import_module("powerinfer_ext.openmp").spin_briefly()
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
