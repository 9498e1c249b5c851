"""`python -m launch bench peers`: this project beside llama.cpp and transformers, on the same shapes, in one run.

Each engine is a process of its own with random weights of the same shape. They take turns, round by round, so that whatever
else the machine does meets all of them. A figure is a median, a ratio is one of two medians of the same run.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from launch.bench.harness.peer_binaries import BINARY
from launch.bench.harness.peer_gguf import write_gguf
from launch.bench.harness.peer_shapes import SHAPES, VOCABULARY
from placement import InputError
from placement.files import parse_json
from placement.text_table import print_table, print_text

KINDS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # ours, and llama.cpp's beside it
_WARM_STEPS = 2  # of a decode measurement, not counted
_REMEDIES = {
    "llama.cpp": "pip install llama-cpp-python gguf, or give binaries by --llama-cpp DIR (and pip install gguf)",
    "transformers": "pip install torch transformers",
}


class Case(NamedTuple):
    """What is timed: a decode step of `number` sequences with `used` tokens each, or a prompt of `number` tokens."""

    what: str
    number: int
    used: int = 0

    def request(self, steps: int) -> dict[str, int]:
        """What a worker is asked (peer_worker)."""
        if self.what == "prefill":
            return {"prefill": self.number}
        return {"decode": self.number, "used": self.used, "steps": steps + _WARM_STEPS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help=f"which shapes ({','.join(SHAPES)})")
    add("--kinds", default=",".join(KINDS), help=f"types of weights ({','.join(KINDS)}); int8 stands beside q8_0")
    add("--layers", type=int, help="layers of each shape (so many that two copies in float32 fit 16 GB)")
    add("--batches", default="1,4,16", help="sequences of a decode step (1,4,16)")
    add("--used", default="50,4096", help="tokens that each of them has already (50,4096)")
    add("--prompts", default="128,1024,4096", help="tokens of prompts for prefill (128,1024,4096)")
    add("--rounds", type=int, default=3, help="measurements of each case and engine (3)")
    add("--steps", type=int, default=16, help="decode steps of a measurement (16)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every engine (all cores)")
    add(
        "--cache", choices=("same", "float16"), default="same", help="llama.cpp's cache: ours' type, or its own default"
    )
    add("--kernels", choices=("auto", "xla"), default="auto", help="ours: native calls, or XLA alone (auto)")
    add(
        "--wide",
        action=argparse.BooleanOptionalAction,
        help="ours: wide prefill steps where nobody decodes (as `launch serve`)",
    )
    add("--llama-cpp", type=Path, metavar="DIR", help="folder of llama.cpp's binaries (default: llama-cpp-python)")
    add("--folder", type=Path, help="where to make GGUF files, which takes some GB (a temporary folder)")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Time every shape and type on all engines that are here.

    Raises:
        InputError: a flag is out of range, or the disk is full.
    """
    shapes, kinds = _chosen("--shapes", args.shapes, SHAPES), _chosen("--kinds", args.kinds, KINDS)
    cases = _cases(args)
    absent = _absent(args)
    for side, why in absent.items():
        print(f"{side}: {why}", file=sys.stderr)
    found = []
    for shape in shapes:
        for kind in kinds:
            found += _measure(args, shape, kind, cases, [s for s in ("ours", *_REMEDIES) if s not in absent])
    settings = _settings(args)
    if args.json:
        print(json.dumps({"settings": settings, "absent": absent, "results": found}))
        return
    _print(found, settings)


def _chosen(flag: str, names: str, known: dict[str, Any]) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    wrong = [name for name in chosen if name not in known]
    if wrong or not chosen:
        raise InputError(f"{flag} {names}: give some of {', '.join(known)}")
    return chosen


def _cases(args: argparse.Namespace) -> list[Case]:
    """All cases; raises InputError where a flag is out of range."""

    def numbers(flag: str, text: str, least: int, most: int) -> list[int]:
        try:
            given = [int(part) for part in text.split(",") if part.strip()]
        except ValueError:
            given = [least - 1]
        if any(not least <= number <= most for number in given):
            raise InputError(f"{flag} {text}: give whole numbers from {least} to {most}, commas between")
        return given

    for flag, value, most in (
        ("rounds", args.rounds, 100),
        ("steps", args.steps, 1000),
        ("threads", args.threads, 512),
    ):
        if not 1 <= value <= most:
            raise InputError(f"--{flag} {value}: must be from 1 to {most}")
    if args.layers is not None and not 1 <= args.layers <= 100:
        raise InputError(f"--layers {args.layers}: must be from 1 to 100")
    batches, used = numbers("--batches", args.batches, 1, 64), numbers("--used", args.used, 2, 7000)
    prompts = numbers("--prompts", args.prompts, 1, 7000)
    cases = [Case("decode", batch, tokens) for tokens in used for batch in batches]
    cases += [Case("prefill", tokens) for tokens in prompts]
    if not cases:
        raise InputError("--batches, --used, --prompts: nothing is left to time; give some numbers")
    return cases


def _absent(args: argparse.Namespace) -> dict[str, str]:
    """Engines that are not here, and what to do about it; raises InputError where --llama-cpp names no such folder."""
    if args.llama_cpp and not (args.llama_cpp / BINARY).is_file():
        raise InputError(f"--llama-cpp {args.llama_cpp}: has no {BINARY}; give the folder that llama.cpp was built in")
    needs = {
        "llama.cpp": ["gguf"] + ([] if args.llama_cpp else ["llama_cpp"]),
        "transformers": ["torch", "transformers"],
    }
    missing = {side: [name for name in names if not importlib.util.find_spec(name)] for side, names in needs.items()}
    return {side: f"not here ({_REMEDIES[side]})" for side, names in missing.items() if names}


class Worker:
    """An engine in a process of its own (peer_worker)."""

    def __init__(self, side: str, **load: Any) -> None:
        command = [sys.executable, "-m", "launch.bench.harness.peer_worker"]
        self._side = side
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self.ask(side=side, **load)
        except BaseException:
            self.close()
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer. Raises InputError where the engine cannot do what is asked."""
        process = self._process
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            line = json.dumps({"error": f"its process ended with {process.wait()}, out of memory perhaps"})
        said = parse_json(line, self._side)
        if "error" in said:
            raise InputError(f"{self._side}: {said['error']}; leave it out, or measure fewer --layers")
        return said

    def close(self) -> None:
        """End the process."""
        with self._process as process:
            process.kill()


def _measure(
    args: argparse.Namespace, shape: str, kind: str, cases: list[Case], sides: list[str]
) -> list[dict[str, Any]]:
    """Figures of one shape and type of weights: one entry a case, with the seconds of each engine."""
    config = SHAPES[shape].config(args.layers)
    seconds: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-", dir=args.folder))
            loads = _loads(args, config, kind, cases, Path(folder), sides)
        except OSError as error:
            where = args.folder or tempfile.gettempdir()
            raise InputError(f"--folder {where}: {error.strerror or error}") from None
        workers = {}
        for side, load in loads.items():
            workers[side] = Worker(side, threads=args.threads, **load)
            stack.callback(workers[side].close)
        for round_ in range(-1, args.rounds):  # the first one compiles and fills caches
            for case in cases:
                for side, worker in workers.items():
                    got = worker.ask(**case.request(args.steps))["seconds"]
                    if round_ >= 0:
                        seconds[case].setdefault(side, []).append(statistics.median(got[_WARM_STEPS:] or got))
    return [_entry(shape, config, kind, case, sides) for case, sides in seconds.items()]


def _loads(
    args: argparse.Namespace, config: dict[str, Any], kind: str, cases: list[Case], folder: Path, sides: list[str]
) -> dict[str, dict[str, Any]]:
    """What each engine is asked to load."""
    sequences = max([case.number for case in cases if case.what == "decode"], default=1)
    # Ours begin to decode one after another, so some have more steps.
    most = max((case.number for case in cases if case.used), default=0)
    context = max(case.used or case.number for case in cases) + args.steps + _WARM_STEPS + 1 + most
    loads: dict[str, dict[str, Any]] = {
        "ours": {
            "fields": config,
            "kind": kind,
            "sequences": sequences,
            "context": context,
            "kernels": args.kernels,
            "wide": args.wide,
        }
    }
    if "llama.cpp" in sides:
        path = folder / "model.gguf"
        write_gguf(path, config, KINDS[kind])
        cache = args.cache if args.cache != "same" else "float32" if kind == "float32" else "bfloat16"
        own = {"path": str(path), "context": context, "cache": cache}
        how = {"vocabulary": VOCABULARY, "sequences": sequences}
        loads["llama.cpp"] = own | ({"folder": str(args.llama_cpp)} if args.llama_cpp else how)
    if "transformers" in sides and kind != "int8":
        loads["transformers"] = {"fields": config, "kind": kind}
    return loads


def _entry(
    shape: str, config: dict[str, Any], kind: str, case: Case, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    medians = {side: statistics.median(all_) for side, all_ in seconds.items()}
    return {
        "shape": shape,
        "layers": config["num_hidden_layers"],
        "kind": kind,
        **case._asdict(),
        "seconds": medians,
        "spread": {side: [min(all_), max(all_)] for side, all_ in seconds.items()},
        "ratio": {side: medians[side] / medians["ours"] for side in medians if side != "ours"},
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader has to know to judge the figures."""
    cache = "float16, its default" if args.cache == "float16" else "float32 beside float32, else bfloat16, as ours"
    logits = "of the last token of a prompt" if args.llama_cpp else "of all tokens, so that no layer is skipped"
    prefill = "narrow" if args.wide is False or (args.wide is None and args.kernels == "xla") else "wide"
    return {
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "vocabulary": VOCABULARY,
        "int8": "ours: int8 experts, bfloat16 for the rest; llama.cpp: q8_0",
        "llama.cpp": f"cache {cache}; logits asked: {logits}; blocks of 512 tokens; weights mapped from the file",
        "ours": f"the serving engine, kernels {args.kernels}, {prefill} prefill steps",
    }


def _print(found: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    sides = [side for side in ("ours", *_REMEDIES) if any(side in entry["seconds"] for entry in found)]
    rows = []
    for entry in found:
        what = f"prefill {entry['number']}"
        if entry["what"] == "decode":
            what = f"decode {entry['number']} at {entry['used']}"
        cells = [f"{1e3 * entry['seconds'][side]:.1f}" if side in entry["seconds"] else "" for side in sides]
        ratios = [f"{entry['ratio'][side]:.2f}" if side in entry["ratio"] else "" for side in sides[1:]]
        rows.append([f"{entry['shape']} x{entry['layers']}", entry["kind"], what, *cells, *ratios])
    columns = (
        "shape",
        "weights",
        "what",
        *(f"{side}, ms" for side in sides),
        *(f"{side} : ours" for side in sides[1:]),
    )
    title = f"milliseconds of a step or a prompt, medians of {settings['rounds']}; ratios above 1: ours is faster"
    print_table(columns, rows, title=title, left=3)
    print_text("; ".join(f"{name}: {value}" for name, value in settings.items()) + ".")
