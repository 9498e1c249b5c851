"""Programs that are kept on disk: a later start finds what an earlier one has compiled, also in another process."""

import os
import subprocess
import sys
import time

import jax

from launch.cluster.compile_cache import use_compile_cache
from launch.serve import warm_up
from tests.helpers.paths import ROOT

LOWERED = """
import hashlib
import jax
from tests.helpers.cluster_of_devices import Small, random_resident
import numpy as np
from dancemoe_jax import decode_step, init_state
jax.config.update("jax_num_cpu_devices", 4)
small = Small.make(shared_expert_size=8)
weights = small.place(random_resident(np.random.default_rng(0)))[1]
grid = np.zeros((4, 1), np.int32)
state = init_state(small.config, small.mesh, 1)
program = decode_step.lower(weights, state, grid, grid, grid == 0, **small.shapes)
print(hashlib.sha256(program.as_text().encode()).hexdigest())
"""


def test_a_step_is_the_same_program_in_every_process():
    """Python orders sets of texts anew in each process; a program that follows such an order is never found again."""
    texts = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        texts.append(
            subprocess.run([sys.executable, "-c", LOWERED], env=env, capture_output=True, text=True, check=True)
        )
    assert texts[0].stdout
    assert texts[0].stdout == texts[1].stdout


def test_all_programs_are_kept_however_quickly_they_were_compiled(tmp_path):
    before = {name: jax.config.values[name] for name in jax.config.values if "cache" in name}
    try:
        use_compile_cache(str(tmp_path / "programs"))
        assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "programs")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_long_compilation_says_now_and_then_that_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(warm_up, "_SAY_S", 0.01)
    with caplog.at_level("INFO", warm_up.__name__), warm_up._saying_that_it_goes_on("edge-a", time.monotonic()):
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages[0].startswith("edge-a: still compiling after ")
