"""The report's page: nothing on it that is not in the JSON, nothing that has to be fetched, whatever the
result.
"""

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from powerinfer_ext import bench, disk, engines, figures, report, roofline
from powerinfer_ext.errors import PowerInferError

PUBLISHED = sorted((Path(__file__).parent.parent / "bench" / "results").glob("*.json"))


def _series(name: str, decode: list[float], streams: bool = False) -> figures.Series:
    counted = {"prefill": _flash(16), "decode": _flash(8)}
    flash = {"engine": "io_uring", "slots_bytes": 10**8, "budget": 6 * 10**8, **counted}
    layers = [
        {"layer": i, "neurons": 100, "density": 0.1 + i / 50, "decode": {
            "density": 0.1 + i / 50, "selected": 10 + 2 * i, "touched": 10 + 2 * i}}
        for i in range(4)
    ]  # fmt: skip
    runs = [
        {"engine": name, "load_s": 0.5, "ttft_s": 0.9, "prefill_s": 0.8, "prefill_tps": 7.5 * speed,
         "decode_tps": speed, "latencies_ms": [1000 / speed + i for i in range(8)], "likeliest": [1] * 8,
         "prefill_tokens": 16, "decode_tokens": 8, "peak_bytes": 2_100_000_000, "peak_anonymous_bytes": 10**9,
         "peak_file_bytes": 10**9, "page_cache_bytes": 10**9, "group_peak_bytes": None, "n_vocab": 300,
         "decode_read_bytes": 4096, "load_read_bytes": 0, "major_faults_decode": 0, "plugin_loaded": False,
         "cpu_s": 3.0, "wall_s": 2.0, "sparse": {"layers": layers}, "flash": flash if streams else None}
        for speed in decode
    ]  # fmt: skip
    return figures.Series(engines.Engine(name), "model.gguf", True, list(runs))


def _flash(n: int) -> dict[str, Any]:
    """Counters of a run that streamed, over n tokens."""
    return {"wanted": 1000 * n, "missed": 130 * n, "unit_bytes": 9_500_000 * n, "read_bytes": 10_500_000 * n,
            "reads": 77 * n, "wait_seconds": 0.0123 * n, "prefetched": 50 * n, "useful": 40 * n,
            "wasted": 3 * n}  # fmt: skip


def _condition(limit: int | None, fits: bool) -> dict[str, Any]:
    """What `bench` measures under one memory limit; `fits`: our engine ran."""
    streams = limit is not None and fits
    named = {
        "stock": _series("stock", [20.0, 21.0, 19.5] if limit is None else [1.3, 1.2, 1.3]),
        "sparse": _series("sparse", [41.0, 40.0, 42.0] if fits else [], streams),
        "<other>": figures.Series(engines.Engine("<other>", "x {model}"), "model.gguf", True),
    }
    named["<other>"].failure = {"error": "<other> died of <SIGSEGV>", "output": "<b>&", "fits": None,
                                "needs_bytes": None}  # fmt: skip
    if not fits:
        named["sparse"].failure = {"error": "does not fit", "output": "", "fits": False,
                                   "needs_bytes": 10**9}  # fmt: skip
    touches = {"stock": roofline.TokenBytes(3 * 10**8, 0, 7 * 10**8, 10**9),
               "sparse": roofline.TokenBytes(3 * 10**8, 10**8, 10**8, 10**9)}  # fmt: skip
    device = disk.DiskCost(1e-5, 1.5e9, 1e-4)
    speeds = {"memory": [15e9, 25e9], "disk": 1.5e9, "device": device,
              "disk_table": [{"block": 65536, "depth": 16, "gbps": 1.5}]}  # fmt: skip
    work = figures.Workload([], "drawn", 16, 8, 3, 2, 60)
    verdict = {"ok": True, "reasons": [], "engines": {}, "top1_agreement": 0.99}
    ratio = figures.ratios(named, verdict)
    summaries = {name: figures.summary(entry, work) for name, entry in named.items()}
    condition = {
        "memory_limit": {"bytes": limit, "share_of_model": limit and 0.5, "how": "cgroup v1",
                         "page_cache": "dropped", "read_ahead_kb": 128},
        "baseline": summaries.pop("stock"),
        "sparse": summaries.pop("sparse"),
        "engines": summaries,
        "ratio": ratio,
        "roofline": figures.limits(named, touches, limit, speeds),
        "comparable": verdict,
        "noise": {**figures.noise(named, ratio, (0.0, 0.0, 0.0)), "set_aside": []},
    }  # fmt: skip
    if streams:
        condition["plan"] = {"placement": "neurons streamed", "predicted_tps": 44.5, "error": 44.5 / 41 - 1}
    condition["summary"] = bench.sentences(condition)
    return condition


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Everything that can happen: with and without a limit, an engine that does not fit, one that crashed."""
    about = {"cpu": "A <CPU>", "cpu_features": ["avx2"], "cores": 2, "cores_allowed": 2, "threads": 2,
             "memory_bytes": 24 << 30, "kernel": "6.1", "read_ahead_kb": 128,
             "versions": {"python": "3.11.2", "llama-cpp-python": "0.3.36"}}  # fmt: skip
    model = {"name": "tiny <script>", "architecture": "arcee", "activation": "relu2", "layers": 4,
             "stock_bytes": 10**9, "stock_file": "a.gguf", "sparse_file": "b.gguf", "stock_from": "given",
             "same_model": "same"}  # fmt: skip
    return {
        "format": bench.FORMAT,
        "time": "2026-01-02T03:04:05Z",
        "command": "powerinfer bench 'a b' --memory 50%",
        "model": model,
        "workload": {"prompt": 16, "gen": 8, "runs": 3, "tokens_from": "drawn", "warm_up": "w", "order": "o"},
        **_condition(None, True),
        "conditions": [_condition(500_000_000, False), _condition(600_000_000, True)],
        "machine": about,
    }


def _number(text: str) -> float | None:
    found = re.search(r"-?\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def _check_numbers(result: dict[str, Any], page: str) -> int:
    """Every marked number is the JSON's value at its path, in one of the page's units, as rounded there."""
    shown = report.numbers(page)
    for path, text in shown:
        value = report.look_up(result, path)
        if isinstance(value, str):
            assert text == value
            continue
        digits = len(text.partition(".")[2].rstrip("%× GMKiBs/")) if "." in text else 0
        units = [value * factor for factor in (1, 100, 1e-6, 1e-9, 1 / 1024)]
        assert any(abs(_number(text) - unit) <= 0.5000001 * 10**-digits for unit in units), (
            path,
            text,
            value,
        )
    return len(shown)


def _unmarked(page: str) -> str:
    """The page's text without what is marked as a number or sentence of the JSON."""
    body = re.sub(r"<(style|pre|title)>.*?</\1>|<img [^>]*>|<h1>.*?</h1>", "", page, flags=re.S)
    body = re.sub(r'<span data-json(-text)?="[^"]*">[^<]*</span>', "", body)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_every_number_is_in_the_json(result: dict[str, Any]) -> None:
    page = report.page(result, {})
    assert _check_numbers(result, page) > 60
    # What is left: dates, versions, features of the CPU, names of percentiles, counting of runs.
    left = _unmarked(page)
    for known in ("2026-01-02 03:04 UTC", "3.11.2", "0.3.36", "avx2", "90th", "99th", "relu2"):
        left = left.replace(known, "")
    left = re.sub(r"run \d+|\d+ runs", "", left)
    for line in (line for condition in (result, *result["conditions"]) for line in condition["noise"]["reasons"]):
        left = left.replace(line, "")
    assert re.findall(r"\S*\d\S*", left) == []
    texts = re.findall(r'data-json-text="summary">([^<]*)<', page)
    known = [line for condition in (result, *result["conditions"]) for line in condition["summary"]]
    assert texts and all(html.unescape(text) in known for text in texts)


def test_what_streaming_counted(result: dict[str, Any]) -> None:
    found = result["conditions"][1]["sparse"]
    assert found["cache_hit_rate"] == pytest.approx(0.87) and found["streaming"]["reads_per_token"] == 77
    assert found["streaming"]["io_wait_ms_per_token"] == pytest.approx(12.3 / 2)  # of two threads
    assert found["streaming"]["prefetch_accuracy"] == pytest.approx(40 / 43)
    measured = result["conditions"][1]["roofline"]["engines"]["sparse"]["measured"]
    assert measured["bound_by"] == "memory" and measured["bound_tps"] == pytest.approx(25e9 / 5e8)
    assert measured["device_tps"] == pytest.approx(1 / max(77e-5 + 10.5e6 / 1.5e9, 0.02))
    page = report.page(result, {})
    assert "87.0%" in page and 'data-json="conditions.1.sparse.streaming.hit_rate"' in page
    assert any("powerinfer plan predicts 44.5 tokens/s" in line for line in result["conditions"][1]["summary"])


def test_self_contained_and_escaped(result: dict[str, Any], tmp_path: Path) -> None:
    path = report.write(result, tmp_path / "new" / "folder")
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page and "<script" not in page
    assert "&lt;SIGSEGV&gt;" in page and "tiny &lt;script&gt;" in page and "A &lt;CPU&gt;" in page
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["bench.json", "density.png", "index.html", "latency.png", "memory.png", "roofline.png",
                     "speed.png"]  # fmt: skip
    assert page.count("data:image/png;base64,") == 5
    assert json.loads((path.parent / "bench.json").read_text()) == result
    for name in names:
        if name.endswith(".png"):
            assert (path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_what_did_not_run_is_said(result: dict[str, Any]) -> None:
    page = report.page(result, {})
    assert "does not fit" in page and "died of" in page
    noisy = copy.deepcopy(result)
    noisy["noise"] = {"reasons": ["it was loud"]}
    noisy["conditions"][0]["comparable"]["reasons"] = ["x: other tokens"]
    page = report.page(noisy, {})
    assert "Too noisy to tell (all memory): it was loud." in page
    assert "Not comparable (0.50 GB of memory): x: other tokens." in page


def test_nothing_ran(result: dict[str, Any], tmp_path: Path) -> None:
    """A page all the same, without the plots that have nothing to show."""
    failed = copy.deepcopy(result["conditions"][0])
    failed["baseline"] = {**failed["engines"]["<other>"], "engine": "stock"}
    failed["roofline"]["engines"] = {}
    failed = {**result, **failed, "conditions": []}
    report.write(failed, tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["memory.png", "speed.png"]


def test_a_folder_that_cannot_be(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        report.check_folder(tmp_path / "file")
    monkeypatch.setattr(report.os, "access", lambda path, mode: False)
    with pytest.raises(PowerInferError, match="choose another folder"):
        report.check_folder(tmp_path)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(PowerInferError, match="pip install 'powerinfer-ext\\[bench\\]'"):
        report.check_folder(tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_published_results_make_pages_and_the_table() -> None:
    """What is in bench/results was written by this code, and docs/BENCHMARKS.md has its figures."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from bench import tables

    for path in PUBLISHED:
        published = json.loads(path.read_text())
        assert published["format"] == bench.FORMAT
        assert _check_numbers(published, report.page(published, {})) > 60
        assert {"cpu", "cpu_features", "versions"} <= published["machine"].keys() and published["command"]
    document = (Path(__file__).parent.parent / "docs" / "BENCHMARKS.md").read_text()
    assert tables.filled(document, PUBLISHED) == document, "run: python -m bench.tables"
    of_batches = sorted((tables.RESULTS / "batches").glob("*.json"))
    assert tables.filled_batches(document, of_batches) == document, "run: python -m bench.tables"
