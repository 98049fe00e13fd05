"""The C backend under AddressSanitizer and UndefinedBehaviorSanitizer: self-test, every FFN family, fuzzed inputs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import llama_cpp
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/c/exercise.c with the backend's sources, built with both sanitizers and the backend's own flags."""
    spec = importlib.util.spec_from_file_location("cpatch_build", ROOT / "cpatch" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    output = tmp_path_factory.mktemp("sanitizers") / "exercise"
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Icpatch"]
    kept = [flag for flag in build.CFLAGS if flag != "-O3"]
    command = [os.environ.get("CC", "cc"), *kept, *flags, "tests/c/exercise.c", *build.SOURCES, *build.LDFLAGS, "-lm"]
    subprocess.run([*command, "-o", str(output)], cwd=ROOT, check=True)
    return output


@pytest.mark.parametrize("seed", [1, 2])
def test_the_backend_is_clean(program: Path, seed: int) -> None:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1", "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [str(program), str(LIBRARIES), str(seed)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
