"""The `powerinfer` command: what it prints, its JSON, its exit codes, one sentence for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import pytest
from tiny_models import make

import powerinfer_ext
from powerinfer_ext import chat as conversation
from powerinfer_ext import cli
from powerinfer_ext.models import bundled

TEXT = "the quick brown fox jumps over the lazy dog, and then it sat on the mat. " * 20
COMMANDS = ["demo", "models", "convert", "export", "inspect", "run", "chat", "eval", "doctor",
            "synth", "trace", "calibrate", "bench"]  # fmt: skip


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """Runs `powerinfer` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, typed: str = "") -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["powerinfer", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = self._capsys.readouterr()
        return Outcome(exit.value.code or 0, captured.out, captured.err)

    def fails(self, *arguments: object) -> str:
        """The one sentence on stderr of a command that must fail with exit code 1."""
        outcome = self(*arguments)
        assert outcome.code == 1
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
        assert "Traceback" not in outcome.err
        return outcome.err.removeprefix("error: ").strip()


@pytest.fixture
def powerinfer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    yield Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arcee.gguf, arcee.sparse.gguf and heldout.txt."""
    from gguf_tools import convert

    folder = tmp_path_factory.mktemp("cli")
    make(folder / "arcee.gguf", "arcee", density=0.12)
    convert(folder / "arcee.gguf", folder / "arcee.sparse.gguf")
    (folder / "heldout.txt").write_text(TEXT)
    return folder


# ---- help and usage --------------------------------------------------------------------------------------


def test_help_lists_the_commands(powerinfer: Command) -> None:
    outcome = powerinfer("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.out


def test_version(powerinfer: Command) -> None:
    outcome = powerinfer("--version")
    assert outcome.code == 0
    assert outcome.out.split() == [
        "powerinfer-ext",
        powerinfer_ext.__version__,
        "llama-cpp-python",
        llama_cpp.__version__,
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(powerinfer: Command, command: str) -> None:
    outcome = powerinfer(command, "--help")
    assert outcome.code == 0
    assert f"Usage: powerinfer {command}" in outcome.out
    assert f"powerinfer {command}" in outcome.out.split("Examples")[1]
    assert command == "chat" or "--json" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "model.gguf"],
        ["run", "model.gguf", "-p", "x", "-n", "0"],
        ["run", "model.gguf", "-p", "x", "--temperature", "-1"],
        ["convert", "in.gguf", "out.gguf", "--activation", "tanh"],
        ["eval", "s.gguf", "--against", "d.gguf", "--text", "t.txt", "--mode", "both ways"],
    ],
)
def test_usage_errors_exit_with_2(powerinfer: Command, arguments: list[str]) -> None:
    outcome = powerinfer(*arguments)
    assert outcome.code == 2
    assert "Usage: powerinfer" in outcome.err and "Traceback" not in outcome.err


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, powerinfer_ext, powerinfer_ext.cli; print({'llama_cpp', 'numpy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(powerinfer_ext.__file__).parents[1])}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "set()\n"
    with pytest.raises(AttributeError, match="nonsense"):
        powerinfer_ext.nonsense  # noqa: B018
    assert set(powerinfer_ext.__all__) <= set(dir(powerinfer_ext))


# ---- the commands ----------------------------------------------------------------------------------------


def test_convert_run_export(powerinfer: Command, folder: Path, tmp_path: Path) -> None:
    sparse, back = tmp_path / "out.sparse.gguf", tmp_path / "back.gguf"
    outcome = powerinfer("convert", folder / "arcee.gguf", sparse)
    assert outcome.code == 0 and "arcee, relu2, 1024 neurons in 2 layers" in outcome.out
    assert "100 %" not in outcome.out  # the progress bar is for stderr
    assert sparse.read_bytes() == (folder / "arcee.sparse.gguf").read_bytes()
    outcome = powerinfer("export", sparse, back)
    assert outcome.code == 0 and "byte for byte" in outcome.out
    assert back.read_bytes() == (folder / "arcee.gguf").read_bytes()
    report = powerinfer("convert", folder / "arcee.gguf", sparse, "--down-type", "q8_0", "--json").json
    assert report["activation"] == "relu2" and report["layers"][0]["down_type"] == "Q8_0"
    report = powerinfer("export", sparse, back, "--json").json
    assert report["identical"] is False and len(report["requantised"]) == 2


def test_convert_says_what_it_requantised(powerinfer: Command, folder: Path, tmp_path: Path) -> None:
    outcome = powerinfer("convert", folder / "arcee.gguf", tmp_path / "q.gguf", "--down-type", "Q8_0")
    assert "re-quantised in 2 layers" in outcome.out


def test_calibrate_then_convert_to_predicted(
    powerinfer: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf_tools import training

    monkeypatch.setattr(training, "EFFORT", 0)  # speed; training has its own tests
    monkeypatch.setattr("powerinfer_ext.calibrate.TOKENS", 2048)
    model, profile, target = folder / "arcee.gguf", tmp_path / "p", tmp_path / "predicted.gguf"
    (tmp_path / "text.txt").write_text(TEXT * 4)
    said = powerinfer("calibrate", model, "-o", profile, "--text", tmp_path / "text.txt", "--json").json
    assert said["text"] == "text.txt" and said["tokens"] > 1000 and len(said["layers"]) == 2
    assert 0 < said["layers"][0]["density"] < 1 and said["layers"][0]["hottest_30"] > 0.3
    outcome = powerinfer("calibrate", model, "-o", profile, "--text", tmp_path / "text.txt")  # complete already
    assert "of neurons fire, the hottest 30 % make up" in outcome.out

    settings = ("--mode", "predict", "--recall", "0.5")
    outcome = powerinfer("convert", model, target, *settings, "--profile", profile)
    assert outcome.code == 0 and "layers are predicted" in outcome.out
    info = powerinfer("inspect", target, "--json").json
    assert info["mode"] == "predict"
    assert {layer["predictor"] for layer in info["layers"]} <= {"none", "linear", "lowrank", "direct"}
    before = target.read_bytes()
    message = powerinfer.fails("convert", folder / "arcee.gguf", target, *settings, "--profile", tmp_path)
    assert "is not a profile" in message and target.read_bytes() == before

    report = powerinfer("convert", model, target, "--profile", profile, "--json").json
    assert report["mode"] == "exact" and all(layer["hot_count"] for layer in report["layers"])
    report = powerinfer("convert", model, target, *settings, "--text", tmp_path / "text.txt", "--json").json
    assert report["mode"] == "predict"
    assert not list(tmp_path.glob("*.profile")) and not list(tmp_path.glob(".*"))
    other = powerinfer.fails("convert", "llama-drelu", target, *settings, "--profile", profile)
    assert "the profile of another model" in other
    assert "goes with neither" in powerinfer.fails(
        "convert", model, target, "--profile", profile, "--threshold", "cats"
    )


def test_inspect(powerinfer: Command, folder: Path) -> None:
    assert "sparse-GGUF" in powerinfer("inspect", folder / "arcee.sparse.gguf").out
    report = powerinfer("inspect", folder / "arcee.sparse.gguf", "--json").json
    assert report["architecture"] == "arcee" and report["activation"] == "relu2"
    assert powerinfer("inspect", folder / "arcee.gguf", "--json").json["architecture"] == "arcee"


def test_run(powerinfer: Command, folder: Path) -> None:
    arguments = ["-p", "the cat sat", "-n", 12, "--threads", 1]
    shown = powerinfer("run", folder / "arcee.sparse.gguf", *arguments)
    assert shown.code == 0 and "of neurons" in shown.err
    sparse, dense, stock = (
        powerinfer("run", *model, *arguments, "--json").json
        for model in (
            [folder / "arcee.sparse.gguf"],
            [folder / "arcee.sparse.gguf", "--dense"],
            [folder / "arcee.gguf"],
        )
    )
    figures = {"prompt_tokens", "tokens", "prefill_tps", "decode_tps", "density", "streaming", "missed", "verified"}
    assert set(sparse) == {"text", *figures}
    assert sparse["streaming"] is None and stock["streaming"] is None
    assert shown.out == sparse["text"] + "\n"
    assert sparse["text"] == dense["text"] == stock["text"]
    assert sparse["tokens"] == 12 and sparse["prompt_tokens"] > 2
    assert sparse["prefill_tps"] > 0 and sparse["decode_tps"] > 0
    assert 0 < sparse["density"] < 0.4
    assert stock["density"] is None


def test_run_with_a_seed(powerinfer: Command, folder: Path) -> None:
    def text(seed: int) -> str:
        model, sampling = folder / "arcee.sparse.gguf", ["--temperature", 1, "--seed", seed]
        return powerinfer("run", model, "-p", "the", "-n", 24, "--threads", 1, "--json", *sampling).json["text"]

    assert text(1) == text(1) != text(2)
    assert text(0) == text(0)  # 0 is a seed like any other


def test_run_stops_where_the_context_ends(powerinfer: Command, folder: Path) -> None:
    model, prompt = folder / "arcee.sparse.gguf", "the cat " * 16
    result = powerinfer("run", model, "-p", prompt, "-n", 5000, "--ctx", 256, "--threads", 1, "--json").json
    assert 0 < result["tokens"] <= 256 - result["prompt_tokens"]
    message = powerinfer.fails("run", model, "-p", prompt * 20, "--ctx", 256)
    assert "the context only 256" in message
    assert "empty" in powerinfer.fails("run", model, "-p", "")


def test_chat(powerinfer: Command, folder: Path) -> None:
    typed = "hello\n\n/stats\n/reset\n/help\nhello\n/exit\nnot reached\n"
    outcome = powerinfer(
        *("chat", folder / "arcee.sparse.gguf", "-n", 8, "--temperature", 0, "--threads", 1), typed=typed
    )
    assert outcome.code == 0 and outcome.err == ""
    before, after = outcome.out.split("The conversation starts anew.\n")
    assert "of the neurons computed" in before
    answer, _, _ = before.partition("\n")
    assert answer and after.endswith(answer + "\n") and "/reset" in after
    assert "not reached" not in outcome.out


def test_chat_says_when_the_conversation_is_too_long(powerinfer: Command, folder: Path) -> None:
    typed = "word " * 300 + "\n/exit\n"
    outcome = powerinfer("chat", folder / "arcee.sparse.gguf", "--ctx", 256, "--threads", 1, typed=typed)
    assert outcome.code == 0 and "/reset starts anew" in outcome.out


def test_an_interrupted_answer_ends_that_answer_only() -> None:
    class Interrupted:
        """A model whose first answer is interrupted after two pieces."""

        conversations: list[list[str]] = []

        def create_chat_completion(self, messages: list[dict[str, str]], **settings: Any) -> Iterator[Any]:
            self.conversations.append([message["content"] for message in messages])
            yield {"choices": [{"delta": {"role": "assistant"}}]}
            yield {"choices": [{"delta": {"content": "good"}}]}
            if len(self.conversations) == 1:
                raise KeyboardInterrupt
            yield {"choices": [{"delta": {"content": "bye"}}]}

    out, llama = io.StringIO(), Interrupted()
    conversation.chat(llama, max_tokens=8, temperature=0.0, lines=iter(["hello", "again"]), out=out)
    assert out.getvalue() == "good [stopped]\ngoodbye\n"
    assert llama.conversations == [["hello"], ["hello", "good", "again"]]


def test_eval(powerinfer: Command, folder: Path) -> None:
    arguments = [
        *("eval", folder / "arcee.sparse.gguf", "--against", folder / "arcee.gguf"),
        *("--text", folder / "heldout.txt", "--tokens", 128, "--window", 64, "--threads", 1),
    ]
    result = powerinfer(*arguments, "--json").json
    assert result["tokens"] == 128
    assert result["mean_kl"] < 1e-6 and result["top1_agreement"] == 1
    assert result["ppl_sparse"] == pytest.approx(result["ppl_dense"], rel=1e-4)
    assert 0 < result["density"] < 0.3 and len(result["layers"]) == 2
    assert result["stock_self"]["mean_kl"] >= 0
    assert set(result["passes"]) == {"prefill", "decode"}
    assert set(powerinfer(*arguments, "--json", "--pass", "decode").json["passes"]) == {"decode"}
    shown = powerinfer(*arguments, "--pass", "prefill")
    assert "prefill: sparse, dense" in shown.out and "Neurons computed per layer" in shown.out


def test_eval_against_the_reference(powerinfer: Command, folder: Path) -> None:
    arguments = [
        "eval",
        folder / "arcee.sparse.gguf",
        "--against",
        "reference",
        "--text",
        folder / "heldout.txt",
    ]
    few = ["--tokens", 64, "--window", 32, "--threads", 1]
    result = powerinfer(*arguments, *few, "--reference-model", folder / "arcee.gguf", "--json").json
    assert result["against"] == "reference" and result["mean_kl"] < 1e-6
    assert "name it with --reference-model" in powerinfer.fails(*arguments, *few)


def test_models(powerinfer: Command) -> None:
    listed = powerinfer("models", "--json").json
    assert {model["name"] for model in listed} == {model.name for model in bundled()}
    for model in listed:
        assert {"name", "architecture", "activation", "path", "heldout_text"} <= set(model)
        assert Path(model["path"]).exists() and Path(model["heldout_text"]).exists()
        assert model["name"] in powerinfer("models").out


def test_bundled_models_go_by_their_names(powerinfer: Command, tmp_path: Path) -> None:
    sparse = tmp_path / "arcee.sparse.gguf"
    assert powerinfer("convert", "arcee-relu2", sparse).code == 0
    ours, stock = (
        powerinfer("run", model, "-p", "import os\n", "-n", 8, "--threads", 1, "--json").json
        for model in (sparse, "arcee-relu2")
    )
    assert ours["text"] == stock["text"]
    assert stock["density"] is None
    assert "arcee-relu2" in powerinfer.fails("run", "arcee-relu", "-p", "x")


def test_demo(powerinfer: Command, tmp_path: Path) -> None:
    result = powerinfer("demo", "--no-shaped", "--json", "--keep", tmp_path / "kept").json
    assert Path(result["sparse_path"]).exists()
    assert result["stock"]["tokens"] > 0 and result["sparse"]["tokens"] > 0
    assert 0 < result["sparse"]["density"] < 1
    assert result["agreement"]["mean_kl"] < 1e-4
    assert result["agreement"]["top1_agreement"] >= 0.99
    shown = powerinfer("demo", "--no-shaped")
    assert shown.code == 0
    for part in (
        "stock llama-cpp-python",
        "powerinfer-ext",
        "Neurons computed per layer",
        "Agreement",
        "Speed",
    ):
        assert part in shown.out


def test_doctor_passes_its_exit_code_on(powerinfer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("powerinfer_ext.doctor.run", lambda json: seen.append(json) or 1)
    assert powerinfer("doctor").code == 1 and powerinfer("doctor", "--json").code == 1
    assert seen == [False, True]


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(powerinfer: Command, folder: Path, tmp_path: Path) -> None:
    text, sparse, stock = folder / "heldout.txt", folder / "arcee.sparse.gguf", folder / "arcee.gguf"
    cut, binary, out = tmp_path / "cut.gguf", tmp_path / "binary.txt", tmp_path / "out.gguf"
    cut.write_bytes(sparse.read_bytes()[:-1000])
    binary.write_bytes(b"\xff\xfe\x00")
    short = tmp_path / "short.txt"
    short.write_text("a")
    for arguments, words in (
        (["run", "missing.gguf", "-p", "x"], "missing.gguf: No such file"),
        (["run", "missing", "-p", "x"], "missing: there is no such file, and no bundled model"),
        (["run", text, "-p", "x"], "heldout.txt: magic: not a GGUF"),
        (["run", cut, "-p", "x"], "cut.gguf: .* truncated"),
        (["run", tmp_path, "-p", "x"], "not a regular file"),
        (["chat", text], "not a GGUF"),
        (["inspect", cut], "truncated"),
        (["convert", sparse, out], "sparse-GGUF already"),
        (["convert", stock, stock], "choose another name"),
        (["convert", stock, out, "--activation", "silu"], "arcee"),
        (["convert", stock, out, "--down-type", "Q9"], "down type 'q9' is not one of"),
        (["convert", stock, tmp_path / "no" / "folder.gguf"], "No such file or directory"),
        (["export", stock, out], "not a sparse-GGUF"),
        (["eval", sparse, "--against", stock, "--text", "missing.txt"], "missing.txt: No such file"),
        (["eval", sparse, "--against", stock, "--text", binary], "binary.txt: is not text in UTF-8"),
        (["eval", sparse, "--against", stock, "--text", short], "too little text"),
        (["eval", sparse, "--against", "missing.gguf", "--text", text], "missing.gguf"),
        (["eval", stock, "--against", "reference", "--text", text], "not a sparse-GGUF"),
    ):
        message = powerinfer.fails(*arguments)
        assert re.search(words, message), (arguments, message)
        assert not out.exists()


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(powerinfer_ext.__file__).parents[1])}
    code = "from powerinfer_ext.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(folder / "arcee.gguf"), "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
