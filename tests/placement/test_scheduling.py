"""The rules of continuous batching: batch slots, rows of a step, and turns of prefill and decode."""

import doctest

import numpy as np
import pytest

from placement import scheduling
from placement.scheduling import Progress, SlotRows, admit, next_kind, plan_step


def test_examples_hold():
    assert doctest.testmod(scheduling).failed == 0


@pytest.mark.parametrize(
    ("free", "waiting", "given"),
    [
        ([[0, 1, 2], [1, 2]], 2, [(0, 0), (0, 1)]),  # the first of two with as many
        ([[0, 1, 2], [1, 2]], 3, [(0, 0), (0, 1), (1, 1)]),
        ([[3], [0, 2]], 9, [(1, 0), (0, 3), (1, 2)]),
        ([[], []], 2, []),
        ([[0]], 0, []),
    ],
)
def test_requests_go_where_most_slots_are_free(free, waiting, given):
    assert admit(free, waiting) == given


def test_prefill_and_decode_take_turns_where_both_are_wanted():
    assert [next_kind(last, True, True) for last in (None, "decode", "prefill")] == ["prefill", "prefill", "decode"]
    assert {next_kind(last, False, True) for last in (None, "decode", "prefill")} == {"decode"}
    assert {next_kind(last, True, False) for last in (None, "decode", "prefill")} == {"prefill"}
    assert next_kind("decode", False, False) is None


def test_a_chunk_is_of_the_prompt_that_came_first():
    slots = [[Progress(2.0, 9, 4, 3), None, Progress(1.0, 9, 6, 3), Progress(1.0, 9, 0, 3)], [Progress(0.0, 2, 2, 1)]]
    step = plan_step("prefill", slots, [False, False], 4)
    assert step.rows == (SlotRows(0, 2, 6, 3),)
    assert (step.prefill, step.decode) == ((True, False), (True, True))


def test_a_step_tells_what_is_wanted_after_it():
    ends, goes_on = Progress(0.0, 2, 4, 1), Progress(0.0, 2, 3, 2)
    assert plan_step("decode", [[ends]], [False], 4).decode == (False,)
    assert plan_step("decode", [[goes_on]], [False], 4).decode == (True,)
    # A request that waits gets the slot of one that ends with the step, and no slot of one that goes on.
    assert plan_step("decode", [[ends], [goes_on]], [True, True], 4).prefill == (True, False)
    # The last chunk of a prompt gives the first token of its answer, which may be the only one.
    assert plan_step("prefill", [[Progress(0.0, 8, 4, 1)]], [False], 4).decode == (False,)
    assert plan_step("prefill", [[Progress(0.0, 8, 4, 2)]], [False], 4).decode == (True,)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_processes_that_know_their_own_devices_plan_the_same_together(kind, rng):
    for _ in range(50):
        slots = [[_drawn(rng) for _ in range(3)] for _ in range(4)]
        waiting = (rng.random(4) < 0.5).tolist()
        whole = plan_step(kind, slots, waiting, 4)
        parts = [
            plan_step(kind, [own if device in known else [] for device, own in enumerate(slots)], waiting, 4)
            for known in ({0}, {1}, {2, 3})
        ]
        assert sum((part.rows for part in parts), ()) == whole.rows
        for wanted in ("prefill", "decode"):
            each = [getattr(part, wanted) for part in parts]
            assert tuple(np.any(each, axis=0)) == getattr(whole, wanted)


def _drawn(rng):
    prompt, answered = int(rng.integers(1, 12)), int(rng.integers(0, 5))
    cached = prompt + answered if rng.random() < 0.5 else int(rng.integers(0, prompt))
    return None if rng.random() < 0.3 else Progress(float(rng.integers(3)), prompt, cached, int(rng.integers(1, 4)))
