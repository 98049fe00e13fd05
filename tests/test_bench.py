"""`powerinfer bench`: that it measures what it says, refuses what it must, and survives engines that fail.

No test looks at how fast anything is.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import typer
from typer.testing import CliRunner

from gguf_tools import convert
from gguf_tools.reader import GGUFFile
from gguf_tools.sparse import SparseGGUF
from powerinfer_ext import bench, disk, engines, figures, machine, memory_limit, plan, roofline
from powerinfer_ext.errors import PowerInferError

PROMPT, GEN = 12, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(stock, sparse): a squared-ReLU model of which a tenth of the neurons fires."""
    folder = tmp_path_factory.mktemp("bench")
    stock = tiny_models.make(folder / "tiny.gguf", "arcee", quant="Q8_0", density=0.1)
    convert(stock, folder / "tiny.sparse.gguf")
    return str(stock), str(folder / "tiny.sparse.gguf")


@pytest.fixture(scope="module")
def result(models: tuple[str, str]) -> dict[str, Any]:
    """One real comparison of everything: stock, ours, one external program that works and one that
    crashes.
    """
    others = [
        engines.parse_engine("good=echo '| pp12 | 9.5 ± 0.1 | | tg6 | 3.25 ± 0.2 |' {model} {threads}"),
        engines.parse_engine("bad=sh -c 'echo last words of {model} >&2; kill -SEGV $$'"),
    ]
    steps: list[str] = []
    patch = pytest.MonkeyPatch()  # the bandwidths need not be right here
    memory, reads = roofline.memory_bandwidth, roofline.disk_speeds
    patch.setattr(figures, "OTHERS_THRESHOLD", 2.0)  # nor the machine quiet
    patch.setattr(bench, "_rates", lambda path, threads: plan.Speeds(2e10, 2e10, 2e10, 1e10, 3e10, None))
    patch.setattr(disk, "cost", lambda path, remeasure: disk.DiskCost(1e-5, 1e9, 1e-4))
    patch.setattr(roofline, "memory_bandwidth", lambda seconds, mean: memory(0.02, mean=mean))
    patch.setattr(roofline, "disk_speeds", lambda path: reads(path, 0.005))
    found = bench.bench(models[1], engines=others, prompt=PROMPT, gen=GEN, runs=2, threads=2, step=steps.append)
    patch.undo()
    order = [step.rpartition(" ")[2] for step in steps if step.startswith("Run ")]
    assert order == [
        "stock",
        "sparse",
        "good",
        "bad",
        "stock",
        "sparse",
        "good",
    ]  # in turns; a crash ends a series
    return json.loads(json.dumps(found))


def test_layout(result: dict[str, Any]) -> None:
    for name in ("baseline", "sparse"):
        entry = result[name]
        for key in ("load_s", "ttft_s", "prefill_tps", "decode_tps", "peak_bytes"):
            assert entry[key] > 0, (name, key)
        assert entry["latency_ms"]["p50"] <= entry["latency_ms"]["p99"] <= entry["latency_ms"]["max"]
        assert len(entry["latency_over_tokens_ms"]) == GEN
        assert entry["bytes_read_per_token"] is not None and entry["bytes_read_per_token"] >= 0
        assert len(entry["runs"]) == 2 and entry["error"] is None and entry["fits"] is True
        assert entry["peak_bytes"] >= entry["runs"][0]["memory"]["after_load"]["anonymous"] > 0
    assert result["ratio"]["decode"] > 0 and result["ratio"]["prefill"] > 0 and result["ratio"]["spread"] >= 0
    assert len(result["ratio"]["decode_runs"]) == 2
    assert result["roofline"]["memory_gbps"] > 0
    assert result["roofline"]["bound_tps"] > 0 and result["roofline"]["fraction"] > 0
    for name, entry in (("stock", result["baseline"]), ("sparse", result["sparse"])):
        bound = result["roofline"]["engines"][name]
        rates = sorted(r["decode_tps"] * bound["bytes_per_token"] / r["memory_gbps"] / 1e9 for r in entry["runs"])
        assert bound["beside"] == pytest.approx(sum(rates) / 2)
    assert {"cpu", "cpu_features", "cores", "read_ahead_kb", "versions"} <= result["machine"].keys()
    assert result["machine"]["versions"]["llama-cpp-python"]
    assert result["workload"]["prompt"] == PROMPT and result["conditions"] == []
    assert result["memory_limit"]["bytes"] is None
    assert result["plan"]["placement"] == "all in memory" and result["plan"]["predicted_tps"] > 0
    assert result["plan"]["error"] == pytest.approx(
        result["plan"]["predicted_tps"] / result["sparse"]["decode_tps"] - 1
    )


def test_engines_did_the_same_work(result: dict[str, Any]) -> None:
    assert result["comparable"]["ok"], result["comparable"]["reasons"]
    assert result["comparable"]["top1_agreement"] > 0.5  # random logits: only near ties may differ
    assert all(run["plugin_loaded"] for run in result["sparse"]["runs"])
    assert not any(run["plugin_loaded"] for run in result["baseline"]["runs"])


def test_density_and_cache(result: dict[str, Any]) -> None:
    assert 0.04 < result["sparse"]["density"] < 0.2
    assert [layer["layer"] for layer in result["sparse"]["layers"]] == [0, 1]
    for layer in result["sparse"]["layers"]:
        assert layer["computed"] == pytest.approx(layer["density"])  # what was read is what fired
    assert result["sparse"]["cache_hit_rate"] is None and "no cache" in result["sparse"]["notes"][0]
    assert "density" not in result["baseline"]


def test_engines_that_fail_are_named_and_the_others_kept(result: dict[str, Any]) -> None:
    good, bad = result["engines"]["good"], result["engines"]["bad"]
    assert (good["prefill_tps"], good["decode_tps"], good["error"]) == (9.5, 3.25, None)
    assert result["ratio"]["engines"]["good"]["decode"] > 0
    assert "bad" in bad["error"] and "SIGSEGV" in bad["error"] and "last words of" in bad["output"]
    assert bad["decode_tps"] is None and bad["runs"] == []
    assert "SIGSEGV" in result["ratio"]["engines"]["bad"]["reason"]
    assert any("last output: last words of" in line for line in result["summary"])


def test_printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    bench.render(result, Console(width=80, highlight=False))
    text = capsys.readouterr().out
    assert "tiny arcee" in text and "decode, tokens/s" in text and "good" in text
    assert "powerinfer-ext against stock" in text and "SIGSEGV" in text


def test_stock_file_is_exported_or_found(models: tuple[str, str], tmp_path: Path) -> None:
    with bench._files(models[1], None, lambda text: None) as pair:
        assert (pair.stock, pair.stock_from) == (models[0], "found beside the model")
    alone = tmp_path / "alone.sparse.gguf"
    alone.write_bytes(Path(models[1]).read_bytes())
    with bench._files(str(alone), None, lambda text: None) as pair:
        assert pair.stock_from.startswith("exported")
        assert "exported" in bench._check_same_model(pair, lambda text: None)
    assert os.listdir(tmp_path) == ["alone.sparse.gguf"]
    with bench._files(models[0], None, lambda text: None) as pair:
        assert pair.stock == models[0] and pair.sparse_from == "converted from the stock GGUF"


def test_files_that_cannot_be_compared(models: tuple[str, str], tmp_path: Path) -> None:
    stock, sparse = models
    other = str(tiny_models.make(tmp_path / "other.gguf", "arcee", quant="Q8_0", density=0.1, seed=1))
    words = str(tiny_models.make(tmp_path / "words.gguf", "arcee", quant="Q8_0", n_vocab=300))
    for baseline, why in ((other, "SHA-256"), (words, "tokenizers")):
        with pytest.raises(PowerInferError, match=f"not comparable.*{why}"):
            bench.bench(sparse, baseline=baseline)
    with pytest.raises(PowerInferError, match="is a sparse-GGUF: --baseline wants"):
        bench.bench(sparse, baseline=sparse)
    with pytest.raises(PowerInferError, match="swapped"):
        bench.bench(stock, baseline=sparse)
    with pytest.raises(PowerInferError, match="so is the baseline"):
        bench.bench(stock, baseline=other)


# ---- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vllm", "unknown engine 'vllm'"),
        ("stock=llama-bench -m {model}", "taken"),
        ("a b=x {model}", "not a plain word"),
        ("x=", "no command"),
        ("x=echo 'open {model}", "cannot be split"),
        ("x=llama-bench -p 3", "no {model}"),
    ],
)
def test_engines_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engines.parse_engine(text)


def test_placeholders_are_words_not_shell() -> None:
    engine = engines.parse_engine('x=run -m {model} "-p {prompt}" -n{gen} -t {threads} ; rm')
    job = engines.Job("/a b/$HOME.gguf", 12, 6, 2)
    assert engines.external_command(engine, job) == [
        "run", "-m", "/a b/$HOME.gguf", "-p 12", "-n6", "-t", "2", ";", "rm",
    ]  # fmt: skip
    with pytest.raises(engines.EngineFailure, match="no program 'no-such-program'"):
        engines.run(engines.parse_engine("x=no-such-program {model}"), job)
    with pytest.raises(engines.EngineFailure, match="printed no timing") as failure:
        engines.run(engines.parse_engine("x=echo hello {model}"), job)
    assert failure.value.output == "hello /a b/$HOME.gguf"
    with pytest.raises(engines.EngineFailure, match="did not end within"):
        engines.run(engines.parse_engine("x=sleep 60 {model}"), engines.Job("9", 1, 1, 1), timeout=0.2)


PERF = """
llama_perf_context_print:        load time =     512.25 ms
llama_perf_context_print: prompt eval time =     800.00 ms /   128 tokens (    6.25 ms per token,   160.00
tokens per second) llama_perf_context_print:        eval time =    2520.00 ms /    63 runs   (   40.00 ms
per token,    25.00 tokens per second) llama_perf_context_print:       total time =    3320.00 ms /   191
tokens
"""  # noqa: E501
TABLE = """
| model         |     size | params | backend | threads |  test |            t/s |
| ------------- | -------: | -----: | ------- | ------: | ----: | -------------: |
| llama 7B Q4_0 | 3.56 GiB | 6.74 B | CPU     |       2 | pp128 |  160.25 ± 0.31 |
| llama 7B Q4_0 | 3.56 GiB | 6.74 B | CPU     |       2 |  tg64 |   25.50 ± 0.02 |
"""
ROWS = json.dumps([{"n_prompt": 128, "n_gen": 0, "avg_ts": 160.25}, {"n_prompt": 0, "n_gen": 64, "avg_ts": 25.5}])


def test_timings_of_llama_cpp_programs() -> None:
    assert engines.parse_timings(PERF) == {
        "prefill_tps": 160.0, "prefill_tokens": 128, "decode_tps": 25.0, "decode_tokens": 63, "load_s":
        0.51225,
    }  # fmt: skip
    wanted = {"prefill_tps": 160.25, "prefill_tokens": 128, "decode_tps": 25.5, "decode_tokens": 64}
    assert engines.parse_timings(TABLE) == wanted
    assert engines.parse_timings("log line\n" + ROWS + "\nmore") == wanted
    old = PERF.replace("llama_perf_context_print", "llama_print_timings")
    assert engines.parse_timings(old)["decode_tps"] == 25.0
    assert engines.parse_timings("[ Prompt: 16.5 t/s | Generation: 4.0 t/s ]") == {
        "prefill_tps": 16.5, "decode_tps": 4.0,
    }  # fmt: skip
    for nothing in ("", "[1, 2]", "[{}]", "eval time = 0.00 ms / 0 runs", "| pp | x |"):
        assert engines.parse_timings(nothing) == {}


def test_a_model_that_does_not_load_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    for engine, why in (("stock", "Failed to load model.*broken.gguf"), ("sparse", "broken.gguf: version")):
        with pytest.raises(engines.EngineFailure, match=f"engine {engine} failed.*{why}"):
            engines.run(engines.Engine(engine), engines.Job(str(broken), 1, 1, 1, [1, 2]))


# ---- figures --------------------------------------------------------------------------------------


def _series(name: str, decode: list[float | None], **more: Any) -> figures.Series:
    common = {"prefill_tokens": 12, "decode_tokens": 6, "n_vocab": 300, "plugin_loaded": name != "stock"}
    runs = [
        None if speed is None else {"decode_tps": speed, "prefill_tps": 10 * speed, **common, **more}
        for speed in decode
    ]
    return figures.Series(engines.parse_engine(name) if "=" in name else engines.Engine(name), "model", True, runs)


WORK = figures.Workload([], "", 12, 6, 3, 2, 60)


def test_ratio_is_the_median_of_pairs() -> None:
    ours, other = _series("sparse", [20, 33, 20]), _series("stock", [10, 11, 8])
    found = figures.ratio(other, ours)
    assert found["decode_runs"] == [2, 3, 2.5] and found["decode"] == 2.5 and found["pairs"] == 3
    assert found["spread"] == pytest.approx(0.4)
    assert figures.spread([5.0]) is None
    other.runs[1] = None
    assert figures.ratio(other, ours)["decode_runs"] == [2, 2.5]
    other.runs, other.failure = [None], {"error": "it crashed"}
    assert figures.ratio(other, ours) == figures.no_ratio("stock: it crashed")


def test_percentiles() -> None:
    assert figures._percentiles([[1.0, 2.0], [3.0]]) == {
        "p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98), "max": 3.0, "mean": 2.0,
    }  # fmt: skip
    assert figures._percentiles([])["p50"] is None


def test_runs_that_did_other_work_get_no_ratio(models: tuple[str, str]) -> None:
    named = {
        "stock": _series("stock", [10]),
        "sparse": _series("sparse", [20]),
        "short": _series("short=x {model}", [30], decode_tokens=4),
        "silent": _series("silent=x {model}", [30], prefill_tokens=None),
        "fine": _series("fine=x {model}", [30], decode_tokens=5),  # llama.cpp's programs decode one less
    }
    for name in ("stock", "sparse"):
        named[name].runs[0]["likeliest"] = [1, 2, 3, 4] if name == "stock" else [1, 2, 3, 9]
    verdict = figures.comparable(figures.Pair(models[1], models[0]), named, WORK)
    assert not verdict["ok"] and set(verdict["engines"]) == {"short", "silent"}
    assert verdict["top1_agreement"] == 0.75
    ratio = figures.ratios(named, verdict)
    assert ratio["decode"] == 2 and ratio["engines"]["fine"]["decode"] == pytest.approx(2 / 3)
    assert ratio["engines"]["short"]["decode"] is None and "wrote 4" in ratio["engines"]["short"]["reason"]

    named["stock"].runs[0]["n_vocab"] = 301
    verdict = figures.comparable(figures.Pair(models[1], models[0]), named, WORK)
    assert "vocabulary of 301" in verdict["engines"]["stock"]
    assert figures.ratios(named, verdict)["decode"] is None


def test_disturbed_rounds_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds wanted, six allowed: what is disturbed is set aside while there are rounds to spare."""
    shares = iter([0.5, 0.0, 0.9, 0.9, 0.0, 0.9])
    speeds = iter(range(10, 100, 10))

    def one_run(entry: figures.Series, *rest: object) -> str:
        share = next(shares)
        entry.runs.append({"decode_tps": next(speeds), "prefill_tps": 1, "others_cpu_share": share})
        entry.others_cpu.append(share)
        return "none"

    monkeypatch.setattr(bench, "_one_run", one_run)
    monkeypatch.setattr(bench, "_wait_until_quiet", lambda: None)
    series = [figures.Series(engines.Engine("stock"), "model", True)]
    how, set_aside = bench._rounds(series, WORK, None, "warm", lambda text: None)
    assert [run["decode_tps"] for run in series[0].good] == [20, 50, 60]
    assert [entry["stock"]["decode_tps"] for entry in set_aside] == [10, 30, 40]
    assert series[0].others_cpu == [0.0, 0.0, 0.9]  # the last could not be repeated: noise() will say so


def test_noise_is_said() -> None:
    named = {"stock": _series("stock", [10, 10]), "sparse": _series("sparse", [20, 26])}
    quiet_ratio = figures.ratio(named["stock"], _series("sparse", [20, 21]))
    quiet = figures.noise(named, quiet_ratio, (0, 0, 0))
    assert quiet["quiet"] and quiet["reasons"] == []
    named["stock"].others_cpu = [0.01, 0.5]
    loud = figures.noise(named, figures.ratio(named["stock"], named["sparse"]), (0, 0, 0))
    assert not loud["quiet"] and len(loud["reasons"]) == 2 and "50%" in loud["reasons"][0]
    named["stock"].others_cpu, named["stock"].runs[0]["page_cache_before_bytes"] = [], 10**9
    kept = figures.noise(named, quiet_ratio, (0, 0, 0))
    assert len(kept["reasons"]) == 1 and "1000 MB of the model could not be dropped" in kept["reasons"][0]
    once = figures.noise({}, figures.ratio(_series("stock", [1]), _series("sparse", [1])), (0, 0, 0))
    assert once["reasons"] == ["a single pair of runs has no spread"]
    assert bench._others_share((10, 100), (16, 110), 4) == pytest.approx(0.2)


# ---- the roofline ---------------------------------------------------------------------------------


def test_bytes_of_a_token(models: tuple[str, str]) -> None:
    stock, sparse = (roofline.token_bytes(path, {0: 0.1, 1: 0.3}) for path in models)
    with GGUFFile.open(models[0]) as file:
        size = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    ffn = sum(size[f"blk.{layer}.ffn_{part}.weight"] for layer in (0, 1) for part in ("up", "down"))
    assert stock.ffn_neurons == ffn and stock.stored == sum(size.values())
    assert stock.total == sum(size.values()) - size["token_embd.weight"]  # one row of it is looked up
    assert sparse.attention_and_rest == stock.attention_and_rest
    assert sparse.ffn_deciding == size["blk.0.ffn_up.weight"] + size["blk.1.ffn_up.weight"]
    with SparseGGUF.open(models[1]) as file:
        bundles = [layer.n_ff * layer.stride for layer in file.layers]
        scales = [layer.scale_tensor.nbytes if layer.scale_tensor else 0 for layer in file.layers]
    rows = [1 - (1 - share) ** 32 for share in (0.1, 0.3)]  # 32 neurons share a row of scales
    expected = 0.1 * bundles[0] + 0.3 * bundles[1] + rows[0] * scales[0] + rows[1] * scales[1]
    assert sparse.ffn_neurons == pytest.approx(expected, abs=4)


def test_bytes_of_a_token_in_a_mixture_and_with_a_tied_head(tmp_path: Path) -> None:
    stock = tiny_models.make(tmp_path / "moe.gguf", "smallthinker", n_expert=8, n_expert_used=2, tied=True)
    convert(stock, tmp_path / "moe.sparse.gguf")
    with GGUFFile.open(stock) as file:
        size = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    experts = sum(bytes_ for name, bytes_ in size.items() if "_exps" in name)
    touched = roofline.token_bytes(str(stock))
    assert touched.ffn_neurons == experts // 4
    assert touched.total == sum(size.values()) - experts + experts // 4  # the embedding is the head: read in full
    sparse = roofline.token_bytes(str(tmp_path / "moe.sparse.gguf"), {0: 0.5, 1: 0.5})
    assert sparse.ffn_deciding == experts // 12
    with SparseGGUF.open(tmp_path / "moe.sparse.gguf") as file:
        bundles = sum(layer.bundle.nbytes for layer in file.layers)
    assert sparse.ffn_neurons == bundles // 4 // 2  # a quarter of the experts, half of their neurons
    assert sparse.attention_and_rest == touched.attention_and_rest


def test_bound() -> None:
    touched = roofline.TokenBytes(200, 300, 500, 1000)
    assert roofline.bound(touched, 10_000, 100, None)["bound_tps"] == 10
    assert roofline.bound(touched, 10_000, 100, 2000)["bound_tps"] == 10
    limited = roofline.bound(touched, 10_000, 100, 600)
    assert limited == {
        "bytes_per_token": 1000, "disk_bytes_per_token": 400, "bound_tps": 0.25, "bound_by": "disk",
    }  # fmt: skip
    chosen = roofline.TokenBytes(200, 300, 100, 5500, 5000)  # a fiftieth of 5000 bytes, other ones for every token
    limited = roofline.bound(chosen, 10_000, 100, 1500, lambda share: 2 * share)  # 1000 are left for a cache: a fifth
    assert limited["disk_bytes_per_token"] == 60 and limited["bound_tps"] == pytest.approx(100 / 60)
    assert roofline.bound(chosen, 10_000, 100, 400)["disk_bytes_per_token"] == 200  # no cache, and 100 are missing
    assert roofline.bound(chosen, 10_000, 100, 6000)["disk_bytes_per_token"] == 0


def test_speeds_are_measured(models: tuple[str, str]) -> None:
    assert roofline.memory_bandwidth(0.02) > 1e8
    speeds = roofline.disk_speeds(models[0], 0.005)
    assert all(speed.rate > 0 and speed.block <= 1 << 20 for speed in speeds)


# ---- memory limits --------------------------------------------------------------------------------


def test_limits_are_parsed() -> None:
    size = 1 << 32
    assert memory_limit.parse_limit("50%", size) == size // 2
    assert memory_limit.parse_limit(" 1.5GiB ", size) == memory_limit.parse_limit("1.5g", size) == 3 << 29
    assert memory_limit.parse_limit("800MB", size) == 800_000_000
    assert memory_limit.parse_limit(str(size), 0) == size
    assert memory_limit.parse_limit("none", size) is None
    for bad in ("", "half", "-3G", "5 apples", "%", "1e9"):
        with pytest.raises(ValueError, match="none of 50%"):
            memory_limit.parse_limit(bad, size)
    with pytest.raises(ValueError, match="larger model or a larger limit"):
        memory_limit.parse_limit("1%", size)


def test_a_limited_child_is_held_to_its_limit_or_we_say_why_not() -> None:
    limit = 96 << 20
    engine = engines.parse_engine(f"x={sys.executable} -c 'bytearray(300 << 20)' {{model}}")
    try:
        with memory_limit.limited(limit) as bounds:
            assert bounds.limit == limit
            with pytest.raises(engines.EngineFailure, match="exceeding 101 MB") as failure:
                engines.run(engine, engines.Job("m", 1, 1, 1), bounds)
            assert failure.value.out_of_memory
    except PowerInferError as error:  # where nothing can limit us, that has to be said with a remedy
        assert "memory cannot be limited" in str(error) and "run as root" in str(error)
    else:
        assert bounds.folder is None or not bounds.folder.exists()


def test_no_way_to_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_cgroup", lambda: machine.MemoryCgroup(0))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PowerInferError, match="no memory cgroup is mounted here, and systemd-run"):
        with memory_limit.limited(1 << 30):
            pass
    with memory_limit.limited(None) as bounds:
        assert bounds is memory_limit.NO_LIMIT and bounds.peak() is None and bounds.oom_kills() == 0


def test_cgroup_v2_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for a v2 hierarchy: the limit goes below the nearest group that hands on the controller."""
    own = tmp_path / "user" / "shell"
    own.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "user", own):
        (folder / "cgroup.procs").touch()
    (tmp_path / "user" / "cgroup.subtree_control").write_text("cpu memory\n")
    group = machine.MemoryCgroup(2, own, None, True)
    folder = memory_limit._make_group(group, 1 << 30)
    assert folder.parent == tmp_path / "user"
    assert (folder / "memory.max").read_text() == str(1 << 30)
    assert (folder / "memory.swap.max").read_text() == "0"
    (folder / "memory.peak").write_text("12345\n")
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    bounds = memory_limit.Limit("cgroup v2", 1 << 30, (), folder)
    assert bounds.peak() == 12345 and bounds.oom_kills() == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, wide_relu: tuple[Path, Path]) -> dict[str, str]:
    """The wide FFN as a stock GGUF, converted; and a mixture."""
    folder = tmp_path_factory.mktemp("wide")
    mixture = tiny_models.make(folder / "mixture.gguf", "qwen3moe", n_layer=4, n_ff=1024, n_expert=8, n_expert_used=2,
                               quant="F16")  # fmt: skip
    stock, sparse = map(str, wide_relu)
    return {"neurons": sparse, "tiles": stock, "experts": str(mixture)}


TOKENS = list(range(3, 3 + PROMPT + GEN))


@pytest.mark.parametrize("kind", ["neurons", "tiles", "experts"])
def test_a_budget_is_kept_to_or_refused_with_the_least_that_works(wide: dict[str, str], kind: str) -> None:
    engine = engines.Engine("sparse")

    def job(memory: int | None) -> engines.Job:
        return engines.Job(wide[kind], PROMPT, GEN, 1, TOKENS, memory=memory)

    with pytest.raises(engines.EngineFailure, match="least that works") as failure:
        engines.run(engine, job(1 << 20))
    assert failure.value.out_of_memory and failure.value.needs > 20e6
    whole, streamed = engines.run(engine, job(None)), engines.run(engine, job(failure.value.needs + (8 << 20)))
    assert whole["flash"] is None and streamed["flash"]["budget"] == failure.value.needs + (8 << 20)
    if kind == "neurons":  # of the others the whole run was stock's own
        assert streamed["likeliest"] == whole["likeliest"]
    for phase in ("prefill", "decode"):
        counts = streamed["flash"][phase]
        assert 0 < counts["missed"] <= counts["wanted"] and counts["read_bytes"] >= counts["unit_bytes"] > 0
        assert counts["reads"] > 0 and counts["wait_seconds"] >= 0
    series = figures.Series(engine, wide[kind], True, [streamed])
    work = figures.Workload(TOKENS, "", PROMPT, GEN, 1, 1, 60)
    summary = figures.summary(series, work)
    found, decode = summary["streaming"], streamed["flash"]["decode"]
    assert summary["cache_hit_rate"] == found["hit_rate"] == 1 - decode["missed"] / decode["wanted"]
    assert found["read_bytes_per_token"] == decode["read_bytes"] / GEN and found["io_engine"] in ("io_uring", "threads")
    assert summary["notes"] == [] and "MB per token" in bench.streaming_words(summary)
    speeds = {"memory": [1e10], "disk": 1e8, "disk_table": [], "device": disk.DiskCost(1e-5, 1e8, 1e-4)}
    touched = {"sparse": figures.touched(series)}
    rates = {"sparse": bench._hit_rate(wide[kind])}
    roof = figures.limits({"sparse": series}, touched, failure.value.needs, speeds, hit_rates=rates)
    measured = roof["engines"]["sparse"]["measured"]
    assert measured["disk_bytes_per_token"] == pytest.approx(decode["read_bytes"] / GEN, abs=1)
    seconds = max(decode["read_bytes"] / GEN / 1e8, touched["sparse"].total / 1e10)
    assert measured["bound_tps"] == roof["measured_bound_tps"] == pytest.approx(1 / seconds, rel=1e-3)
    assert measured["device_tps"] < measured["bound_tps"]
    assert roof["measured_fraction"] == pytest.approx(streamed["decode_tps"] / measured["bound_tps"])
    assert measured["beside"] is None
    prices = [asdict(disk.DiskCost(latency, 1e8, 1e-4)) for latency in (3e-5, 2e-5)]
    streamed["read_costs"] = prices
    roof = figures.limits({"sparse": series}, touched, failure.value.needs, speeds, hit_rates=rates)
    seconds = max(decode["read_bytes"] / 1e8 + decode["reads"] * 2e-5, GEN * touched["sparse"].total / 1e10) / GEN
    assert roof["engines"]["sparse"]["measured"]["beside"] == pytest.approx(streamed["decode_tps"] * seconds)


def test_a_stock_model_that_fits_is_stocks(wide: dict[str, str]) -> None:
    run = engines.run(engines.Engine("sparse"), engines.Job(wide["experts"], PROMPT, GEN, 1, TOKENS))
    summary = figures.summary(figures.Series(engines.Engine("sparse"), wide["experts"], True, [run]), WORK)
    assert summary["streaming"] is None and summary["cache_hit_rate"] is None and summary["density"] is None
    assert figures.STOCK_PATH_NOTE in summary["notes"]


def test_what_is_converted_first(wide: dict[str, str]) -> None:
    def files(model: str, converted: bool | None) -> figures.Pair:
        with bench._files(model, None, lambda text: None, converted) as pair:
            return pair

    assert files(wide["experts"], None).unconverted  # SwiGLU: nothing of a neuron can be skipped
    assert files(wide["tiles"], False).unconverted
    assert files(wide["tiles"], None).sparse_from == "converted from the stock GGUF"
    assert bench._check_same_model(figures.Pair("a", "a"), lambda text: None) == "both engines run the same file"
    about = bench._describe(figures.Pair(wide["experts"], wide["experts"]), "same")
    assert (about["n_expert"], about["n_ff"], about["activation"]) == (8, 1024, "silu")
    assert about["source_sha256"] is None and about["sparse_bytes"] == os.path.getsize(wide["experts"])


def test_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    memory_limit.fill_cache(path)
    assert memory_limit.cached_bytes(path) == 1 << 20
    assert memory_limit.drop_cached(path) == memory_limit.cached_bytes(path)
    (tmp_path / "empty").touch()
    assert memory_limit.cached_bytes(tmp_path / "empty") == 0


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the read-ahead setting of the device under tmp_path."""
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    monkeypatch.setattr(memory_limit, "_read_ahead_file", lambda path: setting)
    monkeypatch.setattr(machine, "read_ahead_kb", lambda path: int(setting.read_text()))
    yield setting


def test_read_ahead_is_put_back(device: Path, tmp_path: Path) -> None:
    with memory_limit.read_ahead(tmp_path) as kib:
        assert kib == 128 and int(device.read_text()) == 128
    assert int(device.read_text()) == 8192
    with pytest.raises(KeyboardInterrupt):
        with memory_limit.read_ahead(tmp_path):
            raise KeyboardInterrupt
    assert int(device.read_text()) == 8192
    with pytest.raises(SystemExit):
        with memory_limit.read_ahead(tmp_path):
            os.kill(os.getpid(), 15)
            raise AssertionError("SIGTERM did not end the block")
    assert int(device.read_text()) == 8192


# ---- the command ----------------------------------------------------------------------------------


def test_usage_errors(models: tuple[str, str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(bench.command)
    for arguments, why in (
        (["--engine", "vllm"], "unknown engine 'vllm'"),
        (["--memory", "lots"], "none of 50%"),
        (["--engine", "a=x {model}", "--engine", "a=y {model}"], "same name"),
        (["--runs", "0"], "--runs"),
    ):
        answer = CliRunner().invoke(app, [models[1], *arguments], env={"COLUMNS": "200"})
        assert answer.exit_code == 2 and why in answer.output, answer.output
    answer = CliRunner().invoke(app, ["no-such-model"])
    assert isinstance(answer.exception, PowerInferError) and "there is no such file" in str(answer.exception)


@pytest.mark.long
def test_the_demo_in_little_memory(tmp_path: Path) -> None:
    """A shaped model of 0.9 GB, once in memory and once in half of it."""
    from rich.console import Console

    found = bench.demo_comparison(Console(), folder=tmp_path, prompt=8, gen=4, runs=1)
    assert found["baseline"]["decode_tps"] > 0 and found["sparse"]["decode_tps"] > 0
    limited = found["conditions"][0]
    assert limited["memory_limit"]["share_of_model"] == pytest.approx(0.5, abs=1e-6)
    assert limited["memory_limit"]["read_ahead_kb"] is not None
    assert limited["baseline"]["decode_tps"] > 0 and limited["baseline"]["bytes_read_per_token"] > 1e8
    assert limited["baseline"]["group_peak_bytes"] <= limited["memory_limit"]["bytes"]
    assert limited["sparse"]["decode_tps"] > 0 and 0 < limited["sparse"]["cache_hit_rate"] < 1
    assert limited["sparse"]["group_peak_bytes"] <= limited["memory_limit"]["bytes"]
    assert limited["plan"]["predicted_tps"] > 0 and limited["plan"]["row"]["missing_bytes"] > 1e6
    assert os.listdir(tmp_path) == []
