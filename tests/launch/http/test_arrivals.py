"""Real arrivals over a while, then ten times as many: nothing fails or grows, what is too much is refused at once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.helpers.front_door import Door, front_door
from tests.helpers.paths import ROOT

ARRIVALS = ROOT.parent / "shared" / "data" / "arrivals" / "azure_llm_2023_conv.csv"
PER_SECOND = 5.4  # in the file
USUAL = 0.2  # of what the server can answer
SECONDS = float(os.environ.get("ARRIVALS_SECONDS", "1200"))
PROMPT, OUTPUT = 48, 96


def load(door: Door, capsys, *flags: str) -> dict[str, Any]:
    """What `bench requests` says of a load."""
    shape = ["--prompt", str(PROMPT), "--output", str(OUTPUT), "--json", *flags]
    assert main(["bench", "requests", door.url, *shape]) == 0
    found = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(flags, json.dumps(found), flush=True)
    return found


def held(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_arrivals_and_then_ten_times_as_many(tmp_path, capsys):
    with front_door(tmp_path, "--sequences", "4", "--context", "256", "--queue", "10") as door:
        # What it can answer: more arrive than that, and the rest is refused.
        most = load(door, capsys, "--rate", "60", "--duration", "10")
        capacity = most["answered"] / most["seconds"]
        usual = PER_SECOND / (USUAL * capacity)
        given = ["--arrivals", str(ARRIVALS), "--stretch", f"{usual:.4f}"]
        load(door, capsys, *given, "--duration", "60")  # whatever is made once has been
        before = [held(pid) for pid in (door.process.pid, door.worker())]
        calm = load(door, capsys, *given, "--duration", f"{SECONDS:g}")
        after = [held(pid) for pid in (door.process.pid, door.worker())]
        assert calm["statuses"] == {"200": calm["requests"]}
        assert calm["answered"] == calm["requests"] > 0.5 * SECONDS * USUAL * capacity
        with capsys.disabled():
            print("bytes and descriptors of front door and worker:", before, "then", after, flush=True)
        for (bytes_before, open_before), (bytes_after, open_after) in zip(before, after, strict=True):
            assert bytes_after < 1.05 * bytes_before + 2**23
            assert open_after <= open_before + 2

        ten = load(door, capsys, "--arrivals", str(ARRIVALS), "--stretch", f"{usual / 10:.5f}", "--duration", "120")
        assert ten["statuses"].keys() == {"200", "429"}
        assert ten["answered"] == ten["statuses"]["200"]
        assert ten["whole_s"]["p95"] <= 2 * calm["whole_s"]["p95"]
        again = load(door, capsys, *given, "--duration", "60")
        assert again["statuses"] == {"200": again["requests"]}
        assert again["whole_s"]["p95"] <= 1.5 * calm["whole_s"]["p95"]
        refused = sum(found["statuses"].get("429", 0) for found in (most, ten))
        assert f'dancemoe_requests_total{{outcome="429"}} {refused}.0' in door.http.get("/metrics").text
        assert door.ready()["ready"]
        assert door.ready()["restarts"] == 0
