"""One engine in a process of its own, for `bench peers`: a first line of JSON says what to load, each further one what to time.

    {"side": "ours", …}  ->  {"loaded_s": 12.3}
    {"prefill": 128}  ->  {"seconds": [0.5]}
    {"decode": 4, "used": 50, "steps": 16}  ->  {"seconds": [0.1, …]}

What goes wrong is answered as {"error": "…"}.
"""

import json
import os
import sys
import time
from typing import Any

from placement.files import parse_json


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    side: Any = None
    for line in sys.stdin:
        asked = parse_json(line, "bench peers")
        try:
            if side is None:
                begin = time.perf_counter()
                side = _load(**asked)
                answer(loaded_s=time.perf_counter() - begin)
            elif "prefill" in asked:
                answer(seconds=[side.prefill(asked["prefill"])])
            else:
                answer(seconds=side.decode(asked["decode"], asked["used"], asked["steps"]))
        except Exception as error:  # the other engines' errors are of any type
            answer(error=f"{type(error).__name__}: {error}".partition("\n")[0])


def _load(side: str, threads: int, **arguments: Any) -> Any:
    """The engine; only its own module is imported, so that no other's package need be there."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA takes as many threads as it may use cores
    if side == "ours":
        from launch.bench.harness.peer_ours import Ours

        return Ours(**arguments)
    if side == "transformers":
        from launch.bench.harness.peer_torch import Transformers

        return Transformers(threads=threads, **arguments)
    if "folder" in arguments:
        from launch.bench.harness.peer_binaries import LlamaBinaries

        return LlamaBinaries(threads=threads, **arguments)
    from launch.bench.harness.peer_llama import LlamaCpp

    return LlamaCpp(threads=threads, **arguments)


if __name__ == "__main__":
    main()
