"""kill -9 of any server at any phase of a live migration: the others end, and the restart serves from what is recorded."""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import placement
from dancemoe_jax.checkpoint.writer import save_hf
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts
from launch import arguments
from launch.__main__ import main
from launch.cluster.addresses import free_port
from launch.cluster.secret import load_secret
from launch.engine.memory import reserved_bytes, sizes
from launch.migration.control import ask
from launch.migration.record import NAME, Record, clear_leftovers, read_record, write_record
from launch.model_flags import read_shape
from placement import Cluster, InputError
from placement.migration.adapt import fitted
from tests.helpers import killed_server
from tests.helpers.killed_server import EVERYWHERE, FIRST_ONLY

MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=16,
    top_k=2,
    expert_size=16,
    max_position=64,
    tie_embeddings=False,
    eos_token=256,
)
MEMORY = reserved_bytes(MODEL, 1) + 16 * MODEL.expert_bytes(4)  # of a device; scattered placements take 11 of the 16
CLUSTER = "".join(
    f'[[server]]\nname = "{name}"\ndevices = [{", ".join([f"{{ memory = {MEMORY} }}"] * devices)}]\n'
    for name, devices in (("edge-a", 1), ("edge-b", 1), ("edge-c", 2))
)
NAMES = ("edge-a", "edge-b", "edge-c")
PROMPTS = {"edge-a": "def main(", "edge-b": "The import statement", "edge-c": "import os"}
TOKENS, EPOCH = 8, 4
STAGING = 3 * MODEL.expert_bytes(4)  # so that a migration takes several rounds
CASES = [(phase, "edge-a") for phase in FIRST_ONLY] + [(phase, name) for phase in EVERYWHERE for name in NAMES]
RECORDED = ("after the rename",)  # phases of the first server after which the new placement is in the record
START_S = 200.0  # for a server to come to the phase at which it dies, or for a restart to answer, compiling included
END_S = 60.0  # within which survivors end
REASON = re.compile(
    "has ended or cannot be reached any more|another task died"
)  # the latter is JAX, where the first died


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.killed_server"])


class Servers:
    """A cluster's processes; `arguments` are those of `killed_server.run`, what they print goes to files in a folder."""

    def __init__(self, folder: Path, arguments: dict[str, tuple]) -> None:
        folder.mkdir()
        self.files = {name: folder / name for name in arguments}
        self.processes = {
            name: FORKS.Process(target=killed_server.run, args=(*own, str(self.files[name])))
            for name, own in arguments.items()
        }
        for process in self.processes.values():
            process.start()

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def ended(self, name: str, seconds: float) -> int:
        """A server's exit status, once it has ended by itself."""
        self.processes[name].join(seconds)
        status = self.processes[name].exitcode
        assert status is not None, f"{name} still runs after {seconds:g} s: {self.said(name)[-3000:]}"
        return status

    def said(self, name: str) -> str:
        return Path(f"{self.files[name]}.err").read_text(errors="replace")

    def answers(self) -> list[dict]:
        """Whole answers so far."""
        lines = [line for file in self.files.values() for line in Path(f"{file}.out").read_text().splitlines()]
        answers = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [answer for answer in answers if answer["finish_reason"] != "cancelled"]


class Runs:
    """Clusters that serve with one state folder, one after another, each of three processes."""

    def __init__(self, folder: Path, model: Path, reference: dict[str, list[int]]) -> None:
        self.folder, self.reference = folder, reference
        folder.mkdir()
        self.state, file = folder / "state", folder / "cluster.toml"
        self.state.mkdir()
        file.write_text(CLUSTER)
        self.flags = ["--cluster", str(file), "--model", str(model), "--context", "64", "--sequences", "1"]
        self.flags += ["--max-step-tokens", "8", "--staging-memory", f"{STAGING}B", "--state", str(self.state)]
        self.cache = str(model.with_name("cache"))
        parser = argparse.ArgumentParser()
        arguments.serve(parser)
        args = parser.parse_args(self.flags)
        args.devices = 1
        self.cluster = Cluster.from_toml(file)
        profile = sizes(model, read_shape(model, args), self.cluster, sequences=1)
        self.old = fitted(placement.plan(profile, self.cluster, "uniform"), profile, self.cluster)

    def serve(self, copies: int, interval: str, victim: str = "", phase: str = "none", n: int = 1) -> Servers:
        requests = self.folder / "requests.jsonl"
        given = [
            {"id": f"{name}-{i}", "server": name, "prompt": PROMPTS[name], "max_tokens": TOKENS}
            for i in range(copies)
            for name in NAMES
        ]
        requests.write_text("".join(json.dumps(line) + "\n" for line in given))
        rest = ["serve", *self.flags, "--interval", interval, "--requests", str(requests)]
        rest += ["--coordinator", f"127.0.0.1:{free_port()}"]
        arguments = {
            name: (self.cache, phase if name == victim else "none", n, [*rest, "--server", name]) for name in NAMES
        }
        return Servers(self.folder / ("killed" if victim else "again"), arguments)

    def scattered(self, rng: np.random.Generator) -> placement.Placement:
        """A random placement within memory that leaves nothing out."""
        for _ in range(1000):
            resident = rng.random(self.old.resident.shape) < 0.35
            resident[rng.integers(4), ~resident.any(0)] = True
            new = dataclasses.replace(self.old, resident=resident)
            with contextlib.suppress(InputError):
                new.validate(self.cluster)
                return new
        raise AssertionError("no valid placement")

    def check(self, answers: list[dict]) -> None:
        for answer in answers:
            assert answer["tokens"] == self.reference[answer["server"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small random model; beside it, compiled programs gather."""
    path = tmp_path_factory.mktemp("model") / "model"
    save_hf(path, MODEL, Decoder(MODEL, nnx.Rngs(0)), Experts(MODEL, nnx.Rngs(1)), "float32")
    return path


@pytest.fixture(scope="module")
def reference(model) -> dict[str, list[int]]:
    return reference_of(model)


def reference_of(model: Path) -> dict[str, list[int]]:
    """Tokens of each server's prompt on one device."""
    tokens = {}
    for name, prompt in PROMPTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            shape = ["--model", str(model), "--context", "64", f"--max-tokens={TOKENS}"]
            assert main(["generate", "--json", *shape, f"--prompt={prompt}"]) == 0
        tokens[name] = json.loads(out.getvalue())["tokens"]
    return tokens


def order(state: Path, target: placement.Placement, over: threading.Event) -> None:
    """Have a cluster migrate as soon as it listens."""
    while not over.wait(0.05):
        with contextlib.suppress(InputError):  # it does not listen yet, or the server that dies takes the answer along
            ask(state, {"what": "to", "placement": target.to_dict(), "source": "x.json"}, load_secret())
            return


def kill_and_resume(runs: Runs, victim: str, phase: str, n: int, rng: np.random.Generator) -> tuple[str, float, int]:
    """One run: which placement the cluster came back with, after how many seconds the last survivor had ended, and how
    many answers there were before."""
    before, new = write_record(runs.state, runs.old, EPOCH, "test", {}), runs.scattered(rng)
    over = threading.Event()
    with runs.serve(3000, "1s" if phase == "planning" else "0s", victim, phase, n) as servers:
        if phase != "planning":
            threading.Thread(target=order, args=(runs.state, new, over), daemon=True).start()
        try:
            assert servers.ended(victim, START_S) == -9, servers.said(victim)[-3000:]
        finally:
            over.set()
        killed = time.monotonic()
        for name in NAMES:
            if name != victim:
                assert servers.ended(name, END_S) != 0
                assert REASON.search(servers.said(name)), servers.said(name)[-3000:]
        took, early = time.monotonic() - killed, servers.answers()
    runs.check(early)
    record = read_record(runs.state)
    record.placement.validate(runs.cluster)
    which = came_back(record, before, dataclasses.replace(before, placement=new))
    if victim == "edge-a":
        assert which == ("new" if phase in RECORDED else "old")
    with runs.serve(2, "0s") as servers:
        for name in NAMES:
            assert servers.ended(name, START_S) == 0, servers.said(name)[-3000:]
        answers, said = servers.answers(), servers.said("edge-a")
    assert sorted(answer["id"] for answer in answers) == sorted(f"{name}-{i}" for name in NAMES for i in range(2))
    runs.check(answers)
    assert f"epoch {record.epoch} resumed, {record.hash[:12]}" in said
    assert "no more migrations" not in said
    assert read_record(runs.state).hash == record.hash
    assert {path.name for path in runs.state.iterdir()} <= {NAME, "decisions.jsonl"}
    return which, took, len(early)


def came_back(record: Record, before: Record, after: Record) -> str:
    """Whether a record is of the placement before a migration, after it, or of one in between."""
    if record.epoch == EPOCH:
        assert record.hash == before.hash
        return "old"
    assert record.epoch == EPOCH + 1
    return "new" if record.hash == after.hash else "between"


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "victim", "n"), [("before the rename", "edge-a", 1), ("after tables", "edge-b", 2)])
def test_a_server_killed_while_experts_migrate(phase, victim, n, tmp_path, model, reference, rng):
    kill_and_resume(Runs(tmp_path / "run", model, reference), victim, phase, n, rng)


@pytest.mark.slow
def test_fifty_kills_at_all_phases(tmp_path, model, reference):
    hit: Counter[tuple[str, str, str]] = Counter()
    begin = time.monotonic()
    for run in range(50):
        rng = np.random.default_rng([7, run])
        phase, victim = CASES[run % len(CASES)]
        n = 1 if phase == "planning" else int(rng.integers(1, 3))
        runs = Runs(tmp_path / f"run{run}", model, reference)
        which, took, early = kill_and_resume(runs, victim, phase, n, rng)
        hit[phase, victim, which] += 1
        print(
            f"{run + 1} {phase}, {victim}, n {n}: {early} answers, survivors ended within {took:.1f} s, came back with "
            f"the {which} placement; {time.monotonic() - begin:.0f} s in all",
            flush=True,
        )
    for (phase, victim, which), count in sorted(hit.items()):
        print(f"{count} x {phase}, {victim}: {which}")


def test_leftovers_of_a_killed_writer_block_nobody(tmp_path, rng):
    name = f".{NAME}.{os.getpid()}.tmp"
    (tmp_path / name).write_text("of a process that had this number")
    placement.files.write_bytes(tmp_path / NAME, b"whole")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {NAME: b"whole"}
    (tmp_path / f".{NAME}.99.tmp").write_text("half")
    (tmp_path / ".other.99.tmp").write_text("of somebody else")
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, ".other.99.tmp"}
