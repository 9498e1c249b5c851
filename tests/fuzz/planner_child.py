"""Many damaged runs of the planner in a process of limited memory: python -m tests.fuzz.planner_child SEED START COUNT FOLDER.

Prints a JSON object for every run that went wrong, and keeps the number of the run in progress in FOLDER/progress, which then
names the one that ended the process.
"""

import faulthandler
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

MEMORY_BYTES = 2 * 10**9
_ADDRESSES = 4 * 10**9  # of virtual memory: libraries map more than they use


def main() -> None:
    seed, start, count, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    faulthandler.enable()
    from tests.fuzz.planner_inputs import damaged, make_corpus, run

    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as work:
        make_corpus(Path(corpus))
        os.chdir(work)
        for number in range(start, start + count):
            (folder / "progress").write_text(str(number))
            arguments = damaged((seed << 32) + number, Path(corpus), Path(work))
            wrong = run(arguments)
            used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if used > MEMORY_BYTES:
                wrong = f"{wrong or ''} {used} bytes of memory"
            if wrong:
                shown = [text[:100].encode(errors="backslashreplace").decode() for text in arguments]
                print(json.dumps({"number": number, "arguments": shown, "wrong": wrong}), flush=True)
            if used > MEMORY_BYTES:
                sys.exit(3)  # the peak never falls again
    (folder / "progress").write_text(str(start + count))


if __name__ == "__main__":
    main()
