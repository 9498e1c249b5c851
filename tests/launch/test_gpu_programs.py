"""What steps do on a GPU, read from programs compiled for cards that are not there."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from launch.bench.harness.gpu_program import Program, shape_bytes
from launch.cluster.gpu import has_gpu_plugin
from tests.helpers import gpu_programs
from tests.helpers.paths import ROOT

LAYERS = gpu_programs.CONFIG.num_layers


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    """Figures of each program, by what it is; from a process that looks for no devices but CPUs."""
    if not has_gpu_plugin():
        pytest.skip("the extra gpu-compiler is not installed: nothing compiles for a GPU here")
    command = [sys.executable, "-m", "tests.helpers.gpu_programs"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_largest_blocks_fit_a_card_of_little_shared_memory(programs):
    assert programs["wide, sm_86"]["waits"] == 0


@pytest.mark.parametrize("name", ["decode", "prefill", "float32", "int8, sm_86"])
def test_one_server_never_waits_for_the_host(programs, name):
    own = programs[name]
    assert own["waits"] == 0
    assert own["launches"] <= 66 * LAYERS
    assert own["collectives"] == {}


@pytest.mark.parametrize("name", ["decode", "prefill", "float32", "int8, sm_86", "three servers", "four cards"])
def test_no_part_of_the_cache_and_no_weight_is_copied(programs, name):
    own = programs[name]
    assert own["copied"] < programs["layer_cache_bytes"] / 8
    assert own["temporary"] < programs["layer_cache_bytes"]


@pytest.mark.parametrize("name", ["three servers", "four cards"])
def test_servers_send_what_is_needed_and_gather_counts_alone(programs, name):
    """An all-gather of buffers would have their rows, 16-bit words, in it."""
    own = programs[name]
    assert own["collectives"]["ragged-all-to-all"] > 0
    assert own["gathers"]
    assert not any("u16" in shape or shape_bytes(shape) > 1024 for shape in own["gathers"])
    # Whether anything leaves at all, and the sizes of either way: what a step's experts take is not among them.
    assert own["waits"] <= 3 * LAYERS


def test_a_card_that_the_kernels_are_not_for_does_not_wait_and_copies_no_expert(programs):
    own = programs["unknown card"]
    assert own["waits"] == 0
    assert not [name for name in own["copies"] if "moe" in name]
    assert [name for name in programs["loop"]["copies"] if "moe" in name]


def test_sums_of_floats_have_one_order(programs):
    for name in ("decode", "prefill", "float32", "three servers", "four cards"):
        assert programs[name]["float_scatters"] == []


def test_float32_is_multiplied_as_float32(programs):
    assert programs["float32"]["imprecise"] == []


def test_writing_an_expert_takes_no_second_pool(programs):
    own = programs["write"]
    assert own["rows"] == 1
    assert own["temporary"] < 2**20
    assert own["aliased"] == own["bank"]


def test_without_the_kernels_all_of_it_is_seen(programs):
    """The figures can tell: of the plain loop they are what they were."""
    assert programs["loop"]["copied"] > programs["cache_bytes"]


PROGRAM = """\
HloModule m

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %t = f32[4,8]{1,0} transpose(%x), dimensions={1,0}, metadata={op_name="moe/turn"}
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%p, %t)
}

%test (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %c = pred[] custom-call(%q), custom_call_target="less"
}

%left (a: f32[8,4]) -> f32[8,4] {
  ROOT %a = f32[8,4]{1,0} parameter(0)
}

%right (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[24,4]{1,0} all-gather(%b), dimensions={0}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%x.1), condition=%test, body=%body
  %k = (s32[], f32[8,4]{1,0}) while(%x.1), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %o = f32[8,4]{1,0} conditional(%x.1), branch_computations={%left, %right}
}
"""


def test_a_programs_work_is_that_of_its_loops_and_its_longest_branch():
    work = Program(PROGRAM, tiles=3, large=1).work()
    assert work.launches == 3 * 1 + 4 * 1 + 5 * 1 + 1  # bodies, conditions, bodies, a gather
    assert work.waits == 4 + 1
    assert work.copied == (3 + 5) * 128
    assert work.collectives == {"all-gather": 24 * 4 * 4}
    assert sum(work.copies.values()) == work.copied
