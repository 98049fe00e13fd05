"""Say what is in a GGUF: as a dictionary for machines (`inspect`), as a table for people (`render`)."""

from __future__ import annotations

import os
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gguf_tools import sparse
from gguf_tools.activations import NATIVE
from gguf_tools.convert import plan_conversion
from gguf_tools.errors import ConversionError
from gguf_tools.reader import STRING, GGUFFile, TensorInfo, type_name
from gguf_tools.sparse import FFN_TENSOR, SparseGGUF, SparseLayer


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `path`, a sparse or a stock GGUF, holds; sizes in bytes. Raises FormatError or OSError.

    Keys: path, format (``sparse-gguf`` or ``gguf``), size, gguf_version, architecture, name, activation,
    gated, tensors, layers (one entry per FFN), ffn_bytes, ffn_share (of the file), types (tensor bytes by
    type), and for sparse files version and source, for stock ones obstacle (why it cannot be converted, or
    null).
    """
    with GGUFFile.open(path) as file:
        info: dict[str, Any] = {
            "path": file.path,
            "format": "gguf",
            "size": file.size,
            "gguf_version": file.version,
            "architecture": _text(file, "general.architecture"),
            "name": _text(file, "general.name"),
            "tensors": len(file.tensors),
        }
        if sparse.K_VERSION in file.fields:
            info |= _inspect_sparse(file)
        else:
            info |= _inspect_stock(file)
        types: dict[str, int] = {}
        for tensor in file.tensors.values():
            types[type_name(tensor.type)] = types.get(type_name(tensor.type), 0) + tensor.nbytes
        info["types"] = dict(sorted(types.items(), key=lambda item: -item[1]))
        info["ffn_bytes"] = sum(layer["bytes"] for layer in info["layers"])
        info["ffn_share"] = info["ffn_bytes"] / file.size
        return info


def _text(file: GGUFFile, key: str) -> str | None:
    field = file.fields.get(key)
    return field.value if field is not None and field.type == STRING else None


def _inspect_sparse(file: GGUFFile) -> dict[str, Any]:
    view = SparseGGUF(file)
    return {
        "format": "sparse-gguf",
        "version": view.version,
        "mode": view.mode,
        "thresholds": view.threshold_kind,
        "activation": view.activation,
        "gated": view.gated,
        "layers": [_sparse_layer(layer) for layer in view.layers],
        "source": {
            "name": view.source_name,
            "size": view.source_size,
            "sha256": view.source_sha256,
            "alignment": view.source_alignment or None,
            "gguf_version": view.source_gguf_version,
        },
    }


def _sparse_layer(layer: SparseLayer) -> dict[str, Any]:
    predictor = layer.predictor
    beside = predictor.tensors if predictor else [layer.decider]
    up_type = layer.decider_type if layer.up_type is None else layer.up_type
    return {
        "index": layer.index,
        "kind": "moe" if layer.n_expert else "dense",
        "n_embd": layer.n_embd,
        "n_ff": layer.n_ff,
        "n_expert": layer.n_expert,
        "gate_type": type_name(layer.decider_type) if layer.gated else None,
        "up_type": type_name(up_type),
        "down_type": type_name(layer.down_type),
        "down_source_type": type_name(layer.source_down_type),
        "bytes_per_neuron": layer.stride,
        "hot_count": layer.hot_count,
        "profiled": layer.frequency_tensor is not None,
        "predictor": predictor.kind if predictor else "none",
        "predictor_rank": predictor.rank if predictor else 0,
        "predictor_bytes": predictor.nbytes if predictor else 0,
        "recall": predictor.recall if predictor else None,
        "computed": predictor.computed if predictor else None,
        "thresholds": layer.threshold_tensor is not None,
        "bytes": layer.bundle.nbytes + sum(tensor.nbytes for tensor in beside),
    }


def _inspect_stock(file: GGUFFile) -> dict[str, Any]:
    groups: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        if match := FFN_TENSOR.fullmatch(name):
            groups.setdefault((int(match[1]), match[3] or ""), {})[match[2]] = tensor
    layers = [
        _stock_layer(index, suffix, parts)
        for (index, suffix), parts in sorted(groups.items())
        if "up" in parts and "down" in parts
    ]
    obstacle = activation = None
    try:
        activation = plan_conversion(file).activation
    except ConversionError as error:
        obstacle = str(error).removeprefix(f"{file.path}: ")
        activation = NATIVE.get(_text(file, "general.architecture") or "", (None, False))[0]
    return {
        "activation": activation,
        "gated": any(layer["gate_type"] for layer in layers) if layers else None,
        "layers": layers,
        "obstacle": obstacle,
    }


def _stock_layer(index: int, suffix: str, parts: dict[str, TensorInfo]) -> dict[str, Any]:
    up, down, gate = parts["up"], parts["down"], parts.get("gate")
    n_embd, n_ff, *experts = (*up.shape, 1)[: max(2, len(up.shape))]
    n_expert = (experts[0] if experts else 1) if suffix else 0
    total = sum(tensor.nbytes for tensor in parts.values())
    return {
        "index": index,
        "kind": "moe" if suffix else "dense",
        "n_embd": n_embd,
        "n_ff": n_ff,
        "n_expert": n_expert,
        "gate_type": type_name(gate.type) if gate else None,
        "up_type": type_name(up.type),
        "down_type": type_name(down.type),
        "down_source_type": type_name(down.type),
        "bytes_per_neuron": total // (n_ff * max(1, n_expert)),
        "hot_count": 0,
        "profiled": False,
        "bytes": total,
    }


# ---- for people --------------------------------------------------------------------------------------------


def render(info: dict[str, Any], console: Console) -> None:
    """Print what `inspect` returned: a few lines, then a table with runs of alike layers folded into one
    row.
    """
    is_sparse = info["format"] == "sparse-gguf"
    kind = f"sparse-GGUF version {info['version']}" if is_sparse else f"GGUF version {info['gguf_version']}"
    gate = {True: "gated", False: "ungated", None: "no FFN"}[info["gated"]]
    lines = [
        ("file", f"{info['path']} ({kind}, {_size(info['size'])}, {info['tensors']} tensors)"),
        ("model", f"{info['name'] or 'unnamed'}, architecture {info['architecture'] or 'unknown'}"),
        ("activation", f"{info['activation'] or 'unknown'} ({gate})"),
        ("FFN", f"{_size(info['ffn_bytes'])}, {info['ffn_share']:.0%} of the file"),
        ("tensors", ", ".join(f"{name} {_size(size)}" for name, size in info["types"].items())),
    ]
    if is_sparse:
        source = info["source"]
        lines.append(
            ("source", f"{source['name']} ({_size(source['size'])}, sha256 {source['sha256'][:16]}...)")
        )
        lines.append(("mode", _mode(info)))
    elif info["obstacle"]:
        lines.append(("convert", f"not possible: {info['obstacle']}"))
    else:
        lines.append(("convert", "possible"))
    for label, text in lines:
        console.print(f"[bold]{label:>10}[/]  {escape(_visible(text))}", highlight=False, soft_wrap=True)
    if info["layers"]:
        console.print(_table(info["layers"], is_sparse))
    if any(layer.get("predictor", "none") != "none" for layer in info["layers"]):
        console.print(_predictor_table(info["layers"]))


def _mode(info: dict[str, Any]) -> str:
    layers = info["layers"]
    predicted = [layer for layer in layers if layer["predictor"] != "none"]
    if predicted:
        size, share = _predictors_size(predicted)
        return (
            f"predict: {len(predicted)} of {len(layers)} layers, whose predictors take {_size(size)}, {share:.1%} of "
            "their FFNs"
        )
    return f"exact, with thresholds ({info['thresholds']})" if info["thresholds"] else "exact"


def _predictors_size(layers: list[dict[str, Any]]) -> tuple[int, float]:
    """Bytes, and the share of what the FFNs take without them."""
    size = sum(layer["predictor_bytes"] for layer in layers)
    return size, size / sum(layer["bytes"] - layer["predictor_bytes"] for layer in layers)


def _predictor_table(layers: list[dict[str, Any]]) -> Table:
    """recall: share of the firing neurons that are found; computed: of all neurons that are computed."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "predictor", "rank", "size", "of the FFN", "recall", "computed"):
        table.add_column(name, justify="left" if name == "predictor" else "right")
    for layer in layers:
        if layer["predictor"] == "none":
            table.add_row(str(layer["index"]), "none (exact)", *["-"] * 5)
            continue
        size, share = _predictors_size([layer])
        figures = ["-" if layer[key] is None else f"{layer[key]:.1%}" for key in ("recall", "computed")]
        rank = str(layer["predictor_rank"] or "-")
        table.add_row(str(layer["index"]), layer["predictor"], rank, _size(size), f"{share:.1%}", *figures)
    return table


def _table(layers: list[dict[str, Any]], is_sparse: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "FFN", "embd", "neurons", "experts", "gate", "up", "down", "B/neuron", "hot"):
        table.add_column(name, justify="left" if name in ("FFN", "gate", "up", "down") else "right")
    for first, last, layer in _runs(layers):
        down = layer["down_type"]
        if is_sparse and down != layer["down_source_type"]:
            down = f"{down} (was {layer['down_source_type']})"
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            layer["kind"],
            str(layer["n_embd"]),
            str(layer["n_ff"]),
            str(layer["n_expert"] or "-"),
            layer["gate_type"] or "-",
            layer["up_type"],
            down,
            str(layer["bytes_per_neuron"]),
            str(layer["hot_count"]) if layer["hot_count"] else "-",
        )
    return table


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers that differ only in their index: first index, last index, one of them."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        if runs:
            first, last, model = runs[-1]
            if layer["index"] == last + 1 and {**layer, "index": 0} == {**model, "index": 0}:
                runs[-1] = (first, layer["index"], model)
                continue
        runs.append((layer["index"], layer["index"], layer))
    return runs


def _size(n: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n} B"
        n /= 1000
    return f"{n:.3g} GB"


def _visible(text: str) -> str:
    """Names come from the file: nothing in them may control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
