"""JSON lines beside HTTP: each line has one answer, the same text as over HTTP, and nobody waits for lines."""

import json
import os
import time
from pathlib import Path

from tests.helpers.front_door import Door

PROMPTS = [f"def f{number}(" for number in range(10)]


def write_lines(file: Path) -> None:
    lines = [json.dumps({"id": prompt, "prompt": prompt, "max_tokens": 12, "temperature": 0}) for prompt in PROMPTS]
    broken = ['{"prompt": 7}', "no JSON", json.dumps({"prompt": "a", "server": "edge-q"})]
    file.write_text("\n".join([*lines, *broken, ""]))


def answers(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"id"')]


def waited_for(door: Door, count: int) -> list[dict]:
    deadline = time.monotonic() + 60
    while len(found := answers(door.log)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_lines_are_answered_beside_http(tmp_path):
    write_lines(tmp_path / "lines.jsonl")
    door = Door(tmp_path, "--requests", str(tmp_path / "lines.jsonl"))
    try:
        door.wait_until_ready()
        texts = {
            prompt: door.client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=12, temperature=0)
            for prompt in PROMPTS
        }
        found = waited_for(door, len(PROMPTS) + 3)
        assert {a["id"]: a["text"] for a in found if "text" in a} == {p: t.choices[0].text for p, t in texts.items()}
        errors = {answer["id"]: answer["error"] for answer in found if "error" in answer}
        assert errors.keys() == {11, 12, 13}
        assert "line 11: must have either a text prompt" in errors[11]
        assert "line 12: not JSON" in errors[12]
        assert "line 13: server 'edge-q' is unknown" in errors[13]
        assert "all lines have been read: 13 are answered here" in door.log
        assert door.ready()["ready"]  # HTTP goes on
        assert door.stop() == 0
        assert len(answers(door.log)) == len(PROMPTS) + 3
    finally:
        door.stop()


def test_lines_of_standard_input_are_answered_as_they_come_and_drained(tmp_path):
    reading, writing = os.pipe()
    door = Door(tmp_path, "--requests", "-", stdin=reading)
    os.close(reading)
    try:
        door.wait_until_ready()
        for number in (1, 2):
            os.write(writing, json.dumps({"prompt": "def main(", "max_tokens": 5, "temperature": 0}).encode() + b"\n")
            found = waited_for(door, number)
            assert [answer["id"] for answer in found] == list(range(1, number + 1))
        assert found[0]["text"] == found[1]["text"]
        many = b"".join(json.dumps({"prompt": "def ", "max_tokens": 100}).encode() + b"\n" for _ in range(40))
        os.write(writing, many)
        waited_for(door, 4)
        assert door.stop() == 0
        found = answers(door.log)
        assert len({answer["id"] for answer in found}) == len(found)
        assert all("text" in answer or "the server" in answer["error"] for answer in found)
        assert {answer["id"] for answer in found} == set(range(1, len(found) + 1))
    finally:
        os.close(writing)
        door.stop()
