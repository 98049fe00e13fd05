"""The store that streamed weights live in, under sanitizers (tests/c/stream_exercise.c)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_store_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    program, data = tmp_path / "stream_exercise", tmp_path / "data"
    offset = np.arange(1 << 20, dtype=np.uint64)
    (offset * 167 + (offset >> 8) * 13 + (offset >> 16)).astype(np.uint8).tofile(data)
    sources = ["tests/c/stream_exercise.c", "cpatch/store.c", *sorted(ROOT.glob("cpatch/io*.c"))]
    flags = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icpatch", f"-fsanitize={sanitizer}"]
    command = [os.environ.get("CC", "cc"), *flags, "-fno-sanitize-recover=all", *sources, "-lpthread", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    for seed in (1, 2):
        done = subprocess.run([program, data, str(seed)], capture_output=True, text=True, timeout=120)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("this compiler's ThreadSanitizer does not run on this kernel")
        assert done.returncode == 0, done.stderr[-6000:]
        assert done.stderr == ""
