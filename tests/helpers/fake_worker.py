"""A worker without a model, for tests of the supervisor: fake_worker.py MODE COUNTER --front-door SOCKET.

refuse: ends with status 2; silent: says nothing; mute: serves, but takes no step; once: gives two tokens to each request and
dies, and as the next worker gives all; each start adds a line to the file COUNTER.
"""

import sys
import threading
import time
from pathlib import Path

from launch.cluster.framing import connect
from launch.serve.front_messages import LONGEST, PURPOSE, TO_WORKER

SECRET = b"secret of the fake worker"


def main(mode: str, counter: str, _: str, path: str) -> int:
    with open(counter, "a", encoding="utf-8") as file:
        file.write("started\n")
    started = len(Path(counter).read_text(encoding="utf-8").splitlines())
    if mode == "silent":
        time.sleep(60)
    requests, tokens = (connect(path, SECRET, PURPOSE, 5) for _ in range(2))
    requests.send({"role": "requests"})
    tokens.send({"role": "tokens"})
    if mode == "refuse":
        tokens.send({"phase": ["loading the model"]})
        time.sleep(0.2)
        return 2
    tokens.send({"phase": ["loading the model", "serving"]})

    def beat() -> None:
        while True:
            tokens.send({"beat": {"steps": 0}})
            time.sleep(0.1)

    threading.Thread(target=beat, daemon=True).start()
    while True:
        message = requests.receive(TO_WORKER, None, LONGEST)
        for given in message.get("submit", ()) if mode == "once" else ():
            count = 2 if started == 1 else given["max_tokens"]
            # The next token is the place in the answer, so that a lost or doubled one shows.
            places = range(len(given["output"]), min(count, given["max_tokens"]))
            tokens.send({"tokens": [[given["id"], 97 + place] for place in places]})
        if mode == "once" and started == 1:
            time.sleep(0.3)
            return 1
        if message.get("last"):
            return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
