"""Real arrivals over a while, then ten times as many: nothing fails or grows, what is too much is refused at once.

ARRIVALS_SECONDS=1200 makes the calm part 20 minutes, and the load after it 2.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from placement.data.arrivals import Arrivals
from tests.helpers.front_door import Door, front_door
from tests.helpers.paths import ROOT

ARRIVALS = ROOT.parent / "shared" / "data" / "arrivals" / "azure_llm_2023_conv.csv"
USUAL = 0.2  # of what the server can answer
SECONDS = float(os.environ.get("ARRIVALS_SECONDS", "80"))
OVERLOAD = min(120.0, SECONDS / 4)
NORMAL_AGAIN = 10.0
PROMPT, OUTPUT = 48, 96  # tokens at most
SERVER = ("--sequences", "4", "--context", "256", "--max-step-tokens", "64", "--wait", "auto")


def load(door: Door, capsys, per_second: float, seconds: float) -> dict[str, Any]:
    """What `bench requests` says of the file's first arrivals, stretched so that they come at a rate for so long."""
    times = Arrivals.load(ARRIVALS, ["server"], stretch=1.0, duration=1e6, seed=0).seconds
    stretch = seconds / times[round(per_second * seconds)]
    given = ["--arrivals", str(ARRIVALS), "--stretch", f"{stretch:.6f}", "--duration", f"{seconds:g}"]
    shape = ["--prompt", str(PROMPT), "--output", str(OUTPUT), "--json"]
    assert main(["bench", "requests", door.url, *shape, *given]) == 0
    found = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(f"{per_second:.2f} a second for {seconds:g} s:", json.dumps(found), flush=True)
    return found


def held(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_arrivals_and_then_ten_times_as_many(tmp_path, capsys):
    with front_door(tmp_path, *SERVER) as door:
        # What it can answer: more arrive than that, and the rest is refused.
        most = load(door, capsys, 80, 10)
        usual = USUAL * most["answered"] / most["seconds"]
        load(door, capsys, usual, min(60, SECONDS))  # whatever is made once has been
        before = [held(pid) for pid in (door.process.pid, door.worker())]
        calm = load(door, capsys, usual, SECONDS)
        after = [held(pid) for pid in (door.process.pid, door.worker())]
        with capsys.disabled():
            print("bytes and descriptors of front door and worker:", before, "then", after, flush=True)
        assert calm["statuses"] == {"200": calm["requests"]}
        assert calm["answered"] == calm["requests"] >= round(SECONDS * usual)
        for (bytes_before, open_before), (bytes_after, open_after) in zip(before, after, strict=True):
            assert bytes_after < 1.05 * bytes_before + 2**23
            assert open_after <= open_before + 2

        begun = time.monotonic()
        ten = load(door, capsys, 10 * usual, OVERLOAD)
        assert ten["statuses"].keys() == {"200", "429"}
        assert ten["answered"] == ten["statuses"]["200"]
        assert ten["whole_s"]["p95"] <= 2 * calm["whole_s"]["p95"]
        time.sleep(max(0.0, begun + OVERLOAD + NORMAL_AGAIN - time.monotonic()))
        again = load(door, capsys, usual, min(60, SECONDS))
        assert again["statuses"] == {"200": again["requests"]}
        assert again["whole_s"]["p95"] <= 1.5 * calm["whole_s"]["p95"]
        refused = sum(found["statuses"].get("429", 0) for found in (most, ten))
        assert f'dancemoe_requests_total{{outcome="429"}} {refused}.0' in door.http.get("/metrics").text
        assert door.ready()["ready"]
        assert door.ready()["restarts"] == 0
