"""What our seam adds to a token: `python -m bench.seam [MODEL] [--json]`.

Splits of the graph, calls of our backend, its parallel regions and barriers cost the same whatever a layer's size, so
they are measured where they are nearly all there is: on the bundled models, whose weights fit into a cache. Each is
decoded by stock and, converted, by our engine, in turns; the difference, divided by the layers, is what the seam costs
in each, less what sparsity saves even there. The dearest model's counts. With MODEL, a sparse-GGUF, its token is timed
too, and the share is what that cost would be of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def token_seconds(path: str, ours: bool, tokens: int = 200) -> tuple[float, int]:
    """Median seconds of decoding a token, and the model's layers."""
    import llama_cpp

    from powerinfer_ext import Llama
    from powerinfer_ext.run import default_threads

    threads = default_threads()
    kind = Llama if ours else llama_cpp.Llama
    llama = kind(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama.eval(list(range(1, 9)))
    taken = []
    for token in range(tokens):
        start = time.perf_counter()
        llama.eval([token % 200 + 10])
        taken.append(time.perf_counter() - start)
    layers = llama_cpp.llama_model_n_layer(llama._model.model)
    llama.close()
    return statistics.median(taken), layers


def per_layer(path: Path, rounds: int) -> dict[str, Any]:
    """A stock GGUF's tokens, and those of what it is converted to."""
    from gguf_tools.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        sparse = Path(folder) / "sparse.gguf"
        convert(path, sparse)
        pairs = []
        for _ in range(rounds):
            stock, layers = token_seconds(str(path), ours=False)
            ours, _ = token_seconds(str(sparse), ours=True)
            pairs.append((stock, ours))
    extra = statistics.median(ours - stock for stock, ours in pairs) / layers
    return {
        "layers": layers,
        "stock_us": [stock * 1e6 for stock, _ in pairs],
        "sparse_us": [ours * 1e6 for _, ours in pairs],
        "seam_us_per_layer": extra * 1e6,
    }


def measure(model: str | None, rounds: int = 5) -> dict[str, Any]:
    """`seam_us_per_layer` and what it was computed from; with a model `share` of its token."""
    from powerinfer_ext.models import bundled

    models = {each.name: per_layer(each.path, rounds) for each in bundled() if each.activation != "silu"}
    dearest = max(found["seam_us_per_layer"] for found in models.values())
    result: dict[str, Any] = {"models": models, "seam_us_per_layer": dearest}
    if model is not None:
        seconds, layers = token_seconds(model, ours=True, tokens=50)
        share = dearest * 1e-6 * layers / seconds
        result |= {"of": Path(model).name, "of_layers": layers, "of_token_us": seconds * 1e6, "share": share}
    return result


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    for name, each in found["models"].items():
        print(f"{name}: {each['seam_us_per_layer']:.1f} us more than stock per layer of a token")
    if "share" in found:
        print(f"{found['of']}: {found['share']:.1%} of a token of {found['of_token_us'] / 1e3:.1f} ms")


if __name__ == "__main__":
    main()
