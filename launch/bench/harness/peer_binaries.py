"""llama.cpp through its own binary `llama-batched-bench`, where only a folder of binaries is at hand."""

import subprocess
from pathlib import Path

from placement.files import parse_json

BINARY = "llama-batched-bench"


class LlamaBinaries:
    """A GGUF file that each measurement loads anew, which costs no time that is measured.

    Prefill asks for the logits of the last token only: the last layer's experts are then computed for one token, which
    flatters models cut to a few layers.

    Args:
        folder: of the binary; path: of the file; the others as LlamaCpp's.
    """

    def __init__(self, folder: str, path: str, threads: int, context: int, cache: str) -> None:
        kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[cache]
        fixed = ["-b", "2048", "-ub", "512", "--output-format", "jsonl", "-ctk", kind, "-ctv", kind]
        self._command = [str(Path(folder) / BINARY), "-m", path, "-t", str(threads), *fixed]
        self._context = -(-context // 256) * 256

    def prefill(self, tokens: int) -> float:
        """Seconds of one prompt."""
        return float(self._run(1, tokens, 1)["t_pp"])

    def decode(self, batch: int, used: int, steps: int) -> list[float]:
        """Mean seconds of a step with `batch` sequences that share a prompt of `used` tokens, once."""
        found = self._run(batch, used, steps)
        return [float(found["t_tg"]) / steps]

    def _run(self, batch: int, tokens: int, steps: int) -> dict[str, float]:
        sizes = ["-c", str(batch * self._context), "-npp", str(tokens), "-ntg", str(steps), "-npl", str(batch), "-pps"]
        done = subprocess.run([*self._command, *sizes], capture_output=True, text=True, check=False)
        for line in (done.stdout + done.stderr).split("\n"):
            if '"t_tg"' in line:
                return parse_json(line[line.index("{") :], BINARY)
        said = done.stderr.strip().split("\n")
        raise RuntimeError(f"{BINARY}: {said[-1] if said[-1] else f'ended with {done.returncode}'}")
