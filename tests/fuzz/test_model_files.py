"""Damaged model files: whatever is wrong, one line of ours, soon and in little memory.

The quick run repeats the same inputs every time; the long one (`-m slow`) makes new ones from a seed that it prints.
"""

import contextlib
import faulthandler
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dancemoe_jax import DanceMoEError, bundled_model
from dancemoe_jax.checkpoint.families import read_config
from dancemoe_jax.checkpoint.fingerprint import model_fingerprint
from dancemoe_jax.checkpoint.orbax_store import MANIFEST
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.checkpoint.tensor_files import TensorFiles
from dancemoe_jax.text.tokenizer import load_tokenizer_bundle
from launch.__main__ import main
from tests.fuzz.mutators import mutate
from tests.helpers.paths import FIXTURES

FAMILIES = sorted((FIXTURES / "families").iterdir())
QUICK, LONG = 80, 4000
MOST_SECONDS, MOST_BYTES, LONGEST_MESSAGE = 10, 2 * 2**30, 4000


def open_all(path: Path) -> None:
    file = ExpertFile(path)
    file.read(0, 0)
    for name in file.decoder_names():
        file.decoder_tensors().read(name)


def read_tokenizer(path: Path) -> None:
    bundle = load_tokenizer_bundle(path, read_config(bundled_model()))
    bundle.decode(bundle.encode("The answer: 12 é\n<s>"))


@contextlib.contextmanager
def limited():
    """One line of ours or nothing, within time and memory; a hang in native code ends the run with a traceback."""

    def too_long(*_):
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    faulthandler.dump_traceback_later(6 * MOST_SECONDS, exit=True)
    old = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)  # of this process: the machine may be busy
    try:
        yield
    except DanceMoEError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < LONGEST_MESSAGE
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
        faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Sound directories of each kind; what is damaged in an example is put back after it."""
    root = tmp_path_factory.mktemp("models")
    made = {path.name: Path(shutil.copytree(path, root / path.name)) for path in FAMILIES}
    assert main(["convert", str(FIXTURES / "families" / "mixtral"), str(root / "store"), "--dtype", "float32"]) == 0
    made["store"] = root / "store"
    made["tokenizer"] = Path(shutil.copytree(bundled_model(), root / "tokenizer"))
    for name, text in {
        "special_tokens_map.json": '{"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}',
        "generation_config.json": '{"eos_token_id": [256], "temperature": 1.0}',
    }.items():
        (made["tokenizer"] / name).write_text(text)
    return made


def damage(file: Path, change: Callable, rnd, use: Callable[[], object]) -> None:
    sound = file.read_bytes()
    file.write_bytes(change(sound, rnd))
    try:
        with limited(), np.errstate(all="ignore"):
            use()
    finally:
        file.write_bytes(sound)


def config_json(models, rnd):
    path = models[rnd.choice([path.name for path in FAMILIES])]
    damage(path / "config.json", mutate, rnd, lambda: open_all(path))


def safetensors(models, rnd):
    path = models[rnd.choice([path.name for path in FAMILIES])]
    file = rnd.choice(sorted(path.glob("*.safetensors*")))
    damage(file, mutate, rnd, lambda: (open_all(path), TensorFiles(path).names(), model_fingerprint(path)))


def store_manifest(models, rnd):
    name = rnd.choice((MANIFEST, MANIFEST, MANIFEST, "config.json"))
    damage(models["store"] / name, mutate, rnd, lambda: open_all(models["store"]))


def store_files(models, rnd):
    path = models["store"]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and len(file.relative_to(path).parts) > 1]
    damage(rnd.choice(files), mutate, rnd, lambda: open_all(path))


def tokenizer_files(models, rnd):
    path = models["tokenizer"]
    names = (
        "tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    )
    damage(path / rnd.choice(names), mutate, rnd, lambda: read_tokenizer(path))


READERS = [config_json, safetensors, store_manifest, store_files, tokenizer_files]
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@settings(max_examples=QUICK, derandomize=True, **SETTINGS)
@given(rnd=st.randoms(use_true_random=False))
def test_damaged_files_are_one_line(models, reader, rnd):
    reader(models, rnd)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_many_damaged_files_are_one_line(models, reader, fuzz_seed):
    @seed(fuzz_seed)
    @settings(max_examples=LONG, **SETTINGS)
    @given(rnd=st.randoms(use_true_random=False))
    def run(rnd):
        reader(models, rnd)

    run()
