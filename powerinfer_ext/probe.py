"""Prove that the installed llama-cpp-python decodes: a tiny random model, in a child process that may crash.

The model (arch llama, two layers, n_embd 256) has Q4_0, Q8_0, F16 and BF16 weights in shapes that stock
llama.cpp hands to its repacked and AMX kernels. It decodes one prefill of 64 tokens and 8 single tokens, with
those kernels and without, and the two have to agree. Run by itself (``python probe.py``) it prints the result
as JSON; it imports nothing of powerinfer_ext, so that it also works before powerinfer_ext is built.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

N_EMBD, N_FF, N_HEAD, N_VOCAB, N_PREFILL, N_SINGLE = 256, 512, 4, 256, 64, 8

# Kernels with and without weight repacking quantise activations alike and differ by rounding (1 % on
# AVX-512); a kernel that reads a wrong tile configuration is off by the size of the logits themselves.
LARGEST_DISAGREEMENT = 0.1


@dataclass(frozen=True)
class ProbeResult:
    """``ok``; otherwise ``reason`` is one sentence. ``info`` is what the child found out before it ended."""

    ok: bool
    reason: str
    signal: int | None = None
    info: dict[str, Any] = field(default_factory=dict)


def version_in_range(version: str, requirement: str) -> bool:
    """Does ``version`` (its first three numbers) satisfy a requirement like ``name>=0.3.36,<0.3.37``?"""
    have = tuple(map(int, re.findall(r"\d+", version)[:3]))
    for operator, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        limit = tuple(map(int, bound.split(".")))
        if (have < limit) if operator == ">=" else (have >= limit):
            return False
    return True


def describe_end(returncode: int, stderr: str, what: str = "llama-cpp-python") -> ProbeResult:
    """Why ``what`` ended without a result: the signal by name, or the last line of its stderr."""
    if returncode < 0:
        number = -returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        meaning = {
            signal.SIGSEGV: "a segmentation fault; on a CPU with AMX this is how a build by a GCC that "
            "miscompiles AMX tile configuration ends",
            signal.SIGILL: "an illegal instruction: it was built for another CPU than this one",
            signal.SIGABRT: "an assertion in native code failed",
            signal.SIGKILL: "killed from outside, usually for want of memory",
        }.get(number, "not by its own doing")
        return ProbeResult(False, f"{what} died of {name} ({meaning})", signal=number)
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    return ProbeResult(False, f"{what} failed with exit code {returncode}: {last}")


def probe_dependency(command: list[str] | None = None, timeout: float = 120) -> ProbeResult:
    """Decode with this interpreter's llama-cpp-python in a child; never raises for what the child does.

    ``command`` replaces the child (tests use one that kills itself). ``timeout`` is in seconds.
    """
    env = {name: value for name, value in os.environ.items() if name != "GGML_BACKEND_PATH"}
    try:
        child = subprocess.run(
            command or [sys.executable, str(Path(__file__).resolve()), "--child"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=env,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(False, f"llama-cpp-python did not finish a tiny decode within {timeout:.0f} s")
    info: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            info.update(json.loads(line))
    if child.returncode != 0:
        return replace(describe_end(child.returncode, child.stderr), info=info)
    if "finite" not in info:
        return ProbeResult(False, "the probe of llama-cpp-python ended without a result", info=info)
    if not info["finite"]:
        return ProbeResult(False, "llama-cpp-python computes logits that are not finite", info=info)
    if not info["disagreement"] <= LARGEST_DISAGREEMENT:  # so that NaN fails too
        reason = (
            f"llama-cpp-python's repacked or AMX kernels disagree with its plain ones "
            f"(relative error {info['disagreement']:.2g} of the logits)"
        )
        return ProbeResult(False, reason, info=info)
    return ProbeResult(True, "decodes, and its fast kernels agree with its plain ones", info=info)


def write_tiny_model(path: str) -> None:
    """Write a random two-layer llama GGUF (about 0.9 MB) without a vocabulary; the seed is fixed."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Type

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(2)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)

    def matrix(name: str, rows: int, columns: int, kind: Type) -> None:
        values = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", N_VOCAB, N_EMBD, Type.Q8_0)
    matrix("output.weight", N_VOCAB, N_EMBD, Type.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer, kind, attention_kind in ((0, Type.Q4_0, Type.F16), (1, Type.Q8_0, Type.BF16)):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(N_EMBD, np.float32))
        matrix(f"blk.{layer}.attn_q.weight", N_EMBD, N_EMBD, kind)
        matrix(f"blk.{layer}.attn_k.weight", N_EMBD, N_EMBD, kind)
        matrix(f"blk.{layer}.attn_v.weight", N_EMBD, N_EMBD, attention_kind)
        matrix(f"blk.{layer}.attn_output.weight", N_EMBD, N_EMBD, attention_kind)
        matrix(f"blk.{layer}.ffn_gate.weight", N_FF, N_EMBD, kind)
        matrix(f"blk.{layer}.ffn_up.weight", N_FF, N_EMBD, kind)
        matrix(f"blk.{layer}.ffn_down.weight", N_EMBD, N_FF, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(path: str, extra_bufts: bool) -> Any:
    """Logits float32 [1 + N_SINGLE, N_VOCAB]: of the prefill's last token and of the single tokens after."""
    import llama_cpp
    import numpy as np

    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = extra_bufts
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise RuntimeError("llama.cpp refused the probe's model")
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = 128
    context_params.n_batch = context_params.n_ubatch = N_PREFILL
    context_params.n_threads = context_params.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        raise RuntimeError("llama.cpp could not make a context for the probe's model")
    tokens = [(7 * i + 3) % N_VOCAB for i in range(N_PREFILL + N_SINGLE)]
    logits = []
    for batch in [tokens[:N_PREFILL], *([token] for token in tokens[N_PREFILL:])]:
        array = (llama_cpp.llama_token * len(batch))(*batch)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(batch)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        last = llama_cpp.llama_get_logits_ith(context, -1)
        logits.append(np.ctypeslib.as_array(last, (N_VOCAB,)).copy())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(logits)


def child() -> None:
    """Print JSON lines: what the library is (before it can crash), then how decoding went."""
    import ctypes

    import llama_cpp
    import numpy as np

    # llama.cpp keeps the pointer, so the name has to live as long as this process uses llama.cpp.
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0"))
    ggml.ggml_version.restype = ctypes.c_char_p
    about = {
        "llama_cpp_python": llama_cpp.__version__,
        "ggml": ggml.ggml_version().decode(),
        "system_info": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(about), flush=True)
    with tempfile.TemporaryDirectory(prefix="powerinfer-probe-") as folder:
        path = os.path.join(folder, "tiny.gguf")
        write_tiny_model(path)
        fast, plain = decode(path, True), decode(path, False)
    disagreement = float(np.linalg.norm(fast - plain) / np.linalg.norm(plain))
    finite = bool(np.isfinite(fast).all() and np.isfinite(plain).all())
    print(json.dumps({"finite": finite, "disagreement": disagreement}), flush=True)


if __name__ == "__main__":
    if "--child" in sys.argv[1:]:
        child()
    else:
        result = probe_dependency()
        print(json.dumps(asdict(result)))
        sys.exit(0 if result.ok else 1)
