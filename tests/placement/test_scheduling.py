"""The rules of continuous batching: batch slots, rows of a step, and turns of prefill and decode."""

import doctest

import pytest

from placement import scheduling
from placement.scheduling import (
    PROMPTS,
    Progress,
    SlotRows,
    Turn,
    Wish,
    admit,
    chunks_of,
    next_kind,
    next_turn,
    plan_step,
)

DECODE, PREFILL = Turn("decode", 4), Turn("prefill", 4)


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


def test_a_step_takes_what_is_nearest_to_its_end_and_some_of_what_came_first():
    slots = [[Progress(2.0, 9, 4, 3), None, Progress(1.0, 99, 6, 3), Progress(1.5, 9, 7, 3)], [Progress(0.0, 2, 2, 1)]]
    step = plan_step(PREFILL, slots, [[], []])
    assert step.rows == (SlotRows(0, 2, 6, 1), SlotRows(0, 3, 7, 2))
    assert step.wishes == (Wish(5 + 92, True), Wish(0, True))
    wide = plan_step(Turn("prefill", 40), slots, [[], []])
    assert wide.rows == (SlotRows(0, 0, 4, 5), SlotRows(0, 2, 6, 5), SlotRows(0, 3, 7, 2))
    alone = plan_step(PREFILL, [[Progress(2.0, 9, 4, 3)]], [[]])
    assert alone.rows == (SlotRows(0, 0, 4, 4),)
    # Of many prompts a step takes PROMPTS at most.
    many = plan_step(Turn("prefill", 40), [[Progress(float(n), 9, 8, 3) for n in range(9)]], [[]])
    assert many.rows == tuple(SlotRows(0, slot, 8, 1) for slot in range(PROMPTS))


def test_a_short_prompt_does_not_wait_for_long_ones_and_no_prompt_waits_for_ever(rng):
    slots = [Progress(0.0, 2000, 0, 1), Progress(1.0, 20, 0, 1), *[None] * 6]
    steps, short = 0, 1
    while not slots[1].ended:
        (step,) = [plan_step(Turn("prefill", 64), [slots], [[]])]
        for rows in step.rows:
            slots[rows.slot] = slots[rows.slot].after(rows.count)
        steps += 1
    assert steps == 1
    # Short prompts come without end: the long one goes on all the same.
    while not slots[0].ended:
        for slot in range(1, 8):
            if slots[slot] is None or slots[slot].ended:
                slots[slot], short = Progress(float(short), int(rng.integers(1, 40)), 0, 1), short + 1
        for rows in plan_step(Turn("prefill", 64), [slots], [[]]).rows:
            slots[rows.slot] = slots[rows.slot].after(rows.count)
        steps += 1
    assert steps <= 2000 / 8 + 1
    assert short > 150


def test_a_step_tells_what_is_wanted_after_it():
    ends, goes_on = Progress(0.0, 2, 4, 1), Progress(0.0, 2, 3, 2)
    assert plan_step(DECODE, [[ends]], [[]]).wishes == (Wish(0, False),)
    assert plan_step(DECODE, [[goes_on]], [[]]).wishes == (Wish(0, True),)
    # A request that waits gets the slot of one that ends with the step, and no slot of one that goes on.
    assert plan_step(DECODE, [[ends], [goes_on]], [[7, 3], [7, 3]]).wishes == (Wish(7, False), Wish(0, True))
    # The last chunk of a prompt gives the first token of its answer, which may be the only one.
    assert plan_step(PREFILL, [[Progress(0.0, 8, 4, 1)]], [[]]).wishes == (Wish(0, False),)
    assert plan_step(PREFILL, [[Progress(0.0, 8, 4, 2)]], [[]]).wishes == (Wish(0, True),)


def test_a_prefill_step_is_wide_only_where_nobody_decodes():
    chunks = chunks_of(64, 4096)
    for tokens, wanted in ((1, 64), (64, 64), (65, 256), (4000, 256)):
        assert next_turn("prefill", [Wish(tokens, False)], chunks) == Turn("prefill", wanted)
        assert next_turn("decode", [Wish(tokens, False), Wish(0, True)], chunks) == Turn("prefill", 64)
    assert next_turn("decode", [Wish(0, False)], chunks) is None


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_processes_that_know_their_own_devices_plan_the_same_together(kind, rng):
    turn = Turn(kind, 4)
    for _ in range(50):
        slots = [[_drawn(rng) for _ in range(3)] for _ in range(4)]
        waiting = [rng.integers(1, 9, rng.integers(0, 3)).tolist() for _ in range(4)]
        whole = plan_step(turn, slots, waiting)
        parts = [
            plan_step(turn, [own if device in known else [] for device, own in enumerate(slots)], waiting)
            for known in ({0}, {1}, {2, 3})
        ]
        assert sum((part.rows for part in parts), ()) == whole.rows
        for device, known in enumerate((0, 1, 2, 2)):
            assert parts[known].wishes[device] == whole.wishes[device]
            others = [part.wishes[device] for number, part in enumerate(parts) if number != known]
            assert others == [Wish(0, False)] * 2


def _drawn(rng):
    prompt, answered = int(rng.integers(1, 12)), int(rng.integers(0, 5))
    cached = prompt + answered if rng.random() < 0.5 else int(rng.integers(0, prompt))
    return None if rng.random() < 0.3 else Progress(float(rng.integers(3)), prompt, cached, int(rng.integers(1, 4)))
