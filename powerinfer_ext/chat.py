"""`powerinfer chat`: a conversation in the terminal, answers streamed as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import llama_cpp

from powerinfer_ext.llama import sparse_stats

COMMANDS = {
    "/exit": "leave (so does Ctrl-D)",
    "/reset": "forget the conversation",
    "/stats": "show how many neurons were computed so far, and what was read from disk",
    "/help": "show this list",
}


def chat(
    llama: llama_cpp.Llama, *, max_tokens: int, temperature: float, lines: Iterator[str], out: TextIO
) -> None:
    """Answer each of `lines` in turn on `out`, until they end or one of them is /exit.

    Ctrl-C while an answer is being written ends that answer only.
    """
    messages: list[dict[str, Any]] = []
    for line in lines:
        line = line.strip()
        if not line:
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages.clear()
            llama.reset()
            print("The conversation starts anew.", file=out)
        elif line == "/stats":
            print(_describe(sparse_stats(llama)), file=out)
        elif line.startswith("/"):
            print("\n".join(f"{name:8}{what}" for name, what in COMMANDS.items()), file=out)
        else:
            question = {"role": "user", "content": line}
            try:
                answer = _answer(llama, [*messages, question], max_tokens, temperature, out)
            except ValueError as error:  # the conversation no longer fits into the context
                print(f"{error} /reset starts anew.", file=out)
            else:
                messages += [question, {"role": "assistant", "content": answer}]


def _answer(
    llama: llama_cpp.Llama, messages: list[dict[str, Any]], max_tokens: int, temperature: float, out: TextIO
) -> str:
    """Stream the next answer to `out` and return what was written of it."""
    written: list[str] = []
    try:
        for chunk in llama.create_chat_completion(
            messages, max_tokens=max_tokens, temperature=temperature, stream=True
        ):
            piece = chunk["choices"][0]["delta"].get("content", "")
            written.append(piece)
            print(piece, end="", file=out, flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=out)
    print(file=out)
    return "".join(written)


def _describe(stats: dict[str, Any]) -> str:
    lines = []
    if stats["density"] is not None:
        layers = " ".join(f"{layer['density']:.0%}" for layer in stats["layers"])
        lines.append(
            f"{stats['density']:.1%} of the neurons computed over {stats['tokens']} tokens; per layer: {layers}"
        )
    flash = stats.get("flash")
    if flash is not None and flash["hit_rate"] is not None:
        ahead = flash["prefetch_accuracy"]
        lines.append(
            f"{flash['hit_rate']:.1%} of what was wanted was in memory; read {flash['read_bytes'] / 1e6:.0f} MB since "
            f"loading ({flash['engine']}), waited {flash['wait_seconds']:.1f} s for it, all threads together"
            + ("" if ahead is None else f"; {ahead:.0%} of what was read ahead was used")
        )
    return "\n".join(lines) or "Nothing was computed sparsely: this is a stock GGUF, or nothing was said yet."


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D; without a prompt when it comes from a file or a
    pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives input() editing and history)
    while True:
        try:
            yield input(prompt if interactive else "")
        except EOFError:
            return
