"""pytest configuration: the markers ``long`` and ``cross``, and the dependency's sources."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before numpy is imported: a second BLAS thread spins, and the tests' own matrices are tiny.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before libgomp is loaded: threads that spin at barriers make busy machines crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What a disk can do is measured once and kept; tests leave the user's cache alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="powerinfer-tests-")

import llama_cpp  # noqa: E402
import pytest  # noqa: E402
import tiny_models  # noqa: E402

from gguf_tools.convert import convert  # noqa: E402
from powerinfer_ext.loader import native  # noqa: E402
from powerinfer_ext.machine import parse_cpuinfo  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-long", action="store_true", help="also run the tests marked 'long' (minutes)")
    parser.addoption("--run-cross", action="store_true", help="also run the tests marked 'cross' (clang, ARM)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in ("long", "cross") if not config.getoption(f"--run-{name}")]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def llama_cpp_sources() -> Path:
    """The unpacked source distribution of the installed llama-cpp-python: headers and its own tests.

    `make sources` puts it into .cache/; POWERINFER_LLAMA_CPP_SDIST names another place.
    """
    default = ROOT / ".cache" / f"llama_cpp_python-{llama_cpp.__version__}"
    path = Path(os.environ.get("POWERINFER_LLAMA_CPP_SDIST", default))
    if not (path / "vendor" / "llama.cpp" / "ggml" / "include" / "ggml.h").exists():
        pytest.fail(f"the sources of llama-cpp-python are not in {path}: run 'make sources'")
    return path


@pytest.fixture
def with_vnni() -> Iterator[None]:
    """The best instructions with AVX-512 VNNI, whatever POWERINFER_KERNELS says: what tiles and panels need."""
    ffi, lib = native()
    levels = [level for level in (b"avx512bf16", b"avx512vnni") if lib.pi_kernel_force(level) == 0]
    if not levels:
        _, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
        assert "avx512_vnni" not in flags
        pytest.skip("this CPU has no AVX-512 VNNI")
    lib.pi_kernel_force(levels[0])
    yield
    lib.pi_kernel_force(ffi.NULL)


@pytest.fixture(scope="session")
def wide_relu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """67 MB of FFN: more than slots and buffers take at least. As a stock GGUF, and converted."""
    folder = tmp_path_factory.mktemp("wide_relu")
    stock = tiny_models.make(folder / "relu.gguf", "arcee", density=0.1, n_layer=4, n_ff=16384, quant="F16")
    convert(stock, folder / "relu.sparse.gguf")
    return Path(stock), folder / "relu.sparse.gguf"
