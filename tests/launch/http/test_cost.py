"""What the front door costs: answers over HTTP beside those of the engine, called directly in another process, in turns.

COST_FLAGS="--model DIR --dtype bfloat16" takes another model than the bundled one, COST_ROUNDS=5 fewer rounds.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.helpers.front_door import front_door
from tests.helpers.paths import ROOT

SHAPE = ("--sequences", "16", "--context", "256", "--max-step-tokens", "64", *os.environ.get("COST_FLAGS", "").split())
PROMPT, TOKENS = "def main(", 200
BATCHES, ROUNDS = (1, 4, 8, 16), int(os.environ.get("COST_ROUNDS", "25"))
LEAST = 0.7  # of the engine's tokens a second: what a machine that others use too may leave

Found = tuple[float, float]  # tokens a second, and seconds to the first token (median of a batch's answers)


def directly(engine: subprocess.Popen[str], batch: int) -> Found:
    assert engine.stdin
    assert engine.stdout
    engine.stdin.write(json.dumps({"prompt": PROMPT, "batch": batch, "tokens": TOKENS}) + "\n")
    engine.stdin.flush()
    rate, first = json.loads(engine.stdout.readline())
    return rate, first


async def over_http(port: int, batch: int, stream: bool) -> Found:
    """With as little of a client as there can be: it runs on the same cores."""
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    fields |= {"stream_options": {"include_usage": True}} if stream else {}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"

    async def one() -> tuple[int, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        parts, first = [], 0.0
        while part := await reader.read(2**16):
            parts.append(part)
            if not first and b'"choices"' in part:
                first = time.perf_counter() - begin
        writer.close()
        said = b"".join(parts)
        return int(said[said.rindex(b'"completion_tokens":') + 20 :].split(b",")[0]), first

    begin = time.perf_counter()
    answers = await asyncio.gather(*(one() for _ in range(batch)))
    took = time.perf_counter() - begin
    return sum(tokens for tokens, _ in answers) / took, statistics.median(first for _, first in answers)


@pytest.mark.slow
def test_http_costs_little(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' own devices
    command = [sys.executable, "-m", "tests.helpers.direct_engine", *SHAPE]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with engine, front_door(tmp_path, *SHAPE) as door:
        for batch in BATCHES:
            found: dict[str, list[Found]] = {"engine": [], "whole": [], "streamed": []}
            for number in range(-1, ROUNDS):  # the first one counts for nothing
                turn = {
                    "engine": directly(engine, batch),
                    "whole": asyncio.run(over_http(door.port, batch, False)),
                    "streamed": asyncio.run(over_http(door.port, batch, True)),
                }
                for name, one in turn.items() if number >= 0 else ():
                    found[name].append(one)
            rate = {name: statistics.median(r for r, _ in all_) for name, all_ in found.items()}
            first = {name: 1e3 * statistics.median(f for _, f in all_) for name, all_ in found.items()}
            with capsys.disabled():
                for name in found:
                    share = rate[name] / rate["engine"]
                    print(
                        f"{batch} {name}: {rate[name]:.0f} tokens/s, {share:.2f}; first {first[name]:.1f} ms",
                        flush=True,
                    )
            assert min(rate["whole"], rate["streamed"]) > LEAST * rate["engine"]
        engine.kill()
