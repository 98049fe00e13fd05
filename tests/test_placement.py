"""What goes where for a budget, and that a process stays within it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from every_mixture import make_mixture
from tiny_models import make

from gguf_tools import convert, synth
from gguf_tools.virtual import ModelFiles
from powerinfer_ext.errors import BudgetError, PowerInferError
from powerinfer_ext.memory_limit import drop_cached, limited
from powerinfer_ext.placement import Bundles, Context, Placement, choose_ubatch, place

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = Context(process=0)  # what this process takes is no matter


def mixture(folder: Path) -> Path:
    path = make_mixture(folder / "m.gguf", "qwen2moe", "F32", n_expert=32)
    assert path is not None
    return path


def dense(folder: Path) -> Path:
    return make(folder / "d.gguf", "llama", n_embd=512, n_ff=8192)


def bundles(folder: Path) -> Path:
    convert(make(folder / "b.gguf", "arcee", n_embd=512, n_ff=8192), folder / "s.gguf")
    return folder / "s.gguf"


def experts(folder: Path) -> Path:
    convert(make(folder / "b.gguf", "smallthinker", n_ff=2048, n_expert=16, n_expert_used=2), folder / "s.gguf")
    return folder / "s.gguf"


@pytest.fixture(params=[mixture, dense, bundles, experts])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_it: Callable[[Path], Path] = request.param
    return make_it(tmp_path)


def test_a_long_context_in_little_memory_gets_small_buffers(tmp_path: Path) -> None:
    """Smaller than else, as it would not fit; flash attention keeps no scores, a quantised cache is smaller."""
    with ModelFiles.open(bundles(tmp_path)) as files:
        long = Context(n_ctx=8192, n_batch=512, n_ubatch=512, process=0)
        assert choose_ubatch(files, 1 << 40, long) is None
        with pytest.raises(BudgetError) as refused:
            place(files, 1, replace(long, n_ubatch=64))
        assert choose_ubatch(files, refused.value.least, long) == 64
        assert choose_ubatch(files, refused.value.least - 1, long) == 32
        small = place(files, 1 << 40, replace(long, n_ubatch=64))
        flash = place(files, 1 << 40, replace(long, n_ubatch=64, flash_attention=True))
        assert flash.parts["compute"] < small.parts["compute"]
        eight_bits = place(files, 1 << 40, replace(long, kv_bytes=34 / 32))
        assert eight_bits.parts["KV cache"] == small.parts["KV cache"] * 17 // 32


def least_of(files: ModelFiles) -> int:
    with pytest.raises(BudgetError) as refused:
        place(files, 1, CONTEXT)
    return refused.value.least


def streamed_bytes(found: Placement) -> int:
    """Memory of everything that has slots."""
    return sum(b.slots * b.unit_bytes for b in found.bundles) + sum(m.slots * m.unit_bytes for m in found.matrices)


def test_the_least_that_is_named_works(path: Path) -> None:
    with ModelFiles.open(path) as files:
        least = least_of(files)
        found = place(files, least, CONTEXT)
        assert found.streams and found.total <= least and found.least == least
        with pytest.raises(BudgetError, match="the least that works is") as refused:
            place(files, least - 1, CONTEXT)
        assert refused.value.least == least
        words = str(refused.value)
        assert str(path) in words
        named = int(words.split("the least that works is ")[1].split(" MiB")[0]) << 20
        assert least <= named < least + (1 << 20)  # the number in the sentence works as well


def test_more_memory_keeps_more_and_never_too_much(path: Path) -> None:
    with ModelFiles.open(path) as files:
        least = least_of(files)
        everything = place(files, 1 << 40, CONTEXT)
        assert not everything.streams
        most = everything.total + (1 << 20) if everything.bundles else least + path.stat().st_size
        before = 0
        for step in range(12):
            budget = least + (most - least) * step // 12
            found = place(files, budget, CONTEXT)
            assert found.total <= budget
            if not found.streams:
                break
            assert all(0 < b.slots <= b.units and b.hot <= b.slots for b in found.bundles)
            assert all(0 < m.slots <= m.units for m in found.matrices if m.kind != "router")
            assert all(isinstance(b, Bundles) and (b.hot < b.slots or b.slots == b.units) for b in found.bundles)
            kept = streamed_bytes(found) + found.parts["weights"]  # deciding matrices are the one or the other
            assert kept >= before
            before = kept


@pytest.mark.parametrize("memory", ["a lot", "-3GiB", "0%", "4 parsecs", 0, -5, ""])
def test_budgets_that_are_none(tmp_path: Path, memory: int | str) -> None:
    with ModelFiles.open(make(tmp_path / "m.gguf", "llama")) as files, pytest.raises(PowerInferError, match="memory="):
        place(files, memory, CONTEXT)


def test_a_longer_context_and_larger_batches_leave_less(path: Path) -> None:
    with ModelFiles.open(path) as files:
        least = [
            place_least(files, Context(process=0, n_ctx=n_ctx, n_ubatch=n_ubatch))
            for n_ctx, n_ubatch in ((512, 64), (512, 512), (4096, 512))
        ]
    assert least[0] < least[1] < least[2]


def place_least(files: ModelFiles, context: Context) -> int:
    with pytest.raises(BudgetError) as refused:
        place(files, 1, context)
    return refused.value.least


# ---- a process under a limit --------------------------------------------------------------------------------------

CHILD = """
import json, re, sys
import numpy as np
from powerinfer_ext import Llama
from powerinfer_ext.errors import BudgetError
path, memory = sys.argv[1], int(sys.argv[2])
try:
    llama = Llama(path, memory=memory, n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
except BudgetError as error:
    print(json.dumps({"least": error.least}))
    sys.exit()
tokens = np.random.default_rng(1).integers(1000, 20000, 460).tolist()
llama.eval(tokens)
for token in tokens[:24]:
    llama.eval([token])
peak = int(re.search(r"^VmHWM:\\s+(\\d+)", open("/proc/self/status").read(), re.MULTILINE)[1]) << 10
flash, placement = llama.sparse_stats()["flash"], llama.model.sparse.placement
print(json.dumps({"peak": peak, "total": placement.total, "missed": flash["missed"]}))
"""


def in_group(path: Path, memory: int) -> tuple[dict[str, int], int]:
    """What CHILD says, inside a memory cgroup with that limit and no swap, and how often the kernel killed."""
    drop_cached(path)
    with limited(max(memory, 400 << 20) if memory < 1 << 27 else memory) as group:
        command = [*group.prefix, sys.executable, "-c", CHILD, str(path), str(memory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        kills = group.oom_kills()
    assert done.returncode == 0, (kills, done.stderr[-2000:])
    return json.loads(done.stdout), kills


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "sparse"),
    [("mistral-7b", True), ("mistral-7b", False), ("qwen3-30b-a3b", False), ("smallthinker-21b-a3b", True)],
)
def test_the_peak_of_a_process_is_within_its_budget(tmp_path: Path, shape: str, sparse: bool) -> None:
    try:
        with limited(1 << 30):
            pass
    except PowerInferError as error:
        pytest.skip(str(error))
    path = tmp_path / "m.gguf"
    synth.run(path, shape, layers=2)
    if sparse:
        convert(path, tmp_path / "s.gguf", activation="relu" if shape == "mistral-7b" else None)
        path = tmp_path / "s.gguf"
    least = in_group(path, 70 << 20)[0]["least"] + (4 << 20)  # processes differ by a few pages
    for budget in (least, (least + path.stat().st_size) // 2):
        result, kills = in_group(path, budget)
        print(shape, sparse, {name: value >> 20 for name, value in result.items()}, "of", budget >> 20)
        assert kills == 0 and result["missed"] > 0
        assert result["peak"] <= budget
