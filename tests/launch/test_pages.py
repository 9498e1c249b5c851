"""Pages of the cache: nothing leaks, nobody writes what others read, and texts do not depend on who had which pages."""

import dataclasses

import numpy as np
import pytest

from dancemoe_jax import SamplingParams
from dancemoe_jax.inference import steps
from dancemoe_jax.inference.cache import PAGE
from dancemoe_jax.model.config import Latent
from launch.engine.engine import Engine
from launch.engine.pages import Pages, least_pages
from launch.engine.request import Request
from tests.helpers.cluster_of_devices import Small, random_resident

WINDOWS = (0, 40, 0)


def texts(rng):
    """Sequences of tokens that begin alike now and then, or are alike but for how they begin."""
    seen = [rng.integers(0, 9, 400).tolist()]
    while True:
        begin = seen[int(rng.integers(len(seen)))][: int(rng.integers(0, 300))]
        seen.append(begin + rng.integers(0, 9, 400 - len(begin)).tolist())
        if rng.random() < 0.3:
            other = seen[int(rng.integers(len(seen)))]
            seen.append([9 - other[0], *other[1:]])
        yield seen[-1]


@pytest.mark.parametrize("windows", [(0, 0, 0), WINDOWS, (40, 40, 40)])
def test_pages_come_back_and_nobody_writes_into_what_another_reads(windows, rng):
    least = least_pages(windows, 400, 64)
    pages, source = Pages(3 * least, windows, 5, 400, 64), texts(rng)
    lengths, held = {}, {}
    content = {}  # of every page, as the device would have it: (layer, positions, all tokens up to them)
    for _ in range(3000):
        slot = int(rng.integers(5))
        if slot not in held:
            text, prompt = next(source), int(rng.integers(1, 399))
            found = pages.begin(slot, lambda start, count, text=text: text[start : start + count], prompt)
            if found is None:
                continue
            assert found % PAGE == 0
            assert found < prompt
            held[slot], lengths[slot] = text, found
        elif rng.random() < 0.1 or lengths[slot] == 400:
            pages.end(slot)
            del held[slot]
            continue
        text, start = held[slot], lengths[slot]
        count = min(int(rng.choice([1, 1, 7, 64])), 400 - start)
        if not pages.extend(slot, start, count):
            assert len(held) > 1  # one alone always fits
            pages.end(slot)
            del held[slot]
            continue
        for layer, window in enumerate(windows):
            for at in range(start, start + count):  # what the step writes
                page = pages.table[layer, slot, at // PAGE]
                content[page, at % PAGE] = (layer, tuple(text[: at + 1]))
            for at in range(max(0, start + 1 - window) if window else 0, start + count):  # what it reads
                page = pages.table[layer, slot, at // PAGE]
                assert content[page, at % PAGE] == (layer, tuple(text[: at + 1]))
        lengths[slot] = start + count
        pages.note(slot, lambda start, count, text=text: text[start : start + count], lengths[slot])
    assert pages.found > 1000
    assert pages.evicted > 10
    for slot in list(held):
        pages.end(slot)
    assert pages.used == 0
    assert sorted(pages._free + [page for block in pages._kept for page in block.pages]) == list(range(3 * least))


def test_a_window_needs_no_more_pages_than_it_spans(rng):
    pages = Pages(10 * least_pages((40,), 4000, 64), (40,), 1, 4000, 64)
    text = rng.integers(0, 9, 4000).tolist()
    pages.begin(0, lambda start, count: text[start : start + count], 3000, share=False)
    for start in range(0, 3000, 50):
        assert pages.extend(0, start, 50)
        assert pages.used <= least_pages((40,), 4000, 64)


MODELS = {
    "plain": {},
    "windows": {"windows": WINDOWS, "sinks": True},
    "latent": {"latent": Latent(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)},
}


def drawn_requests(rng, count):
    """Prompts that begin alike, greedy and sampled ones, with and without a penalty."""
    source = texts(rng)
    for number in range(count):
        params = SamplingParams(
            temperature=float(number % 2), seed=number, repetition_penalty=1.3 if number % 5 == 4 else 1.0
        )
        prompt = next(source)[: int(rng.integers(1, 110 if number % 3 else 30))]
        server = 0 if number % 8 else int(rng.integers(3))  # most meet in one cache
        yield Request(server, prompt, int(rng.integers(1, 90)), float(number), params=params)


def serve(engine, requests, rng, cancelled=frozenset()):
    """Serve requests that come now and then; those in `cancelled` leave before their end."""
    coming, finished = list(requests), []
    while coming or not engine.idle:
        for _ in range(int(rng.integers(0, 4))):
            if coming:
                engine.submit(coming.pop(0))
        for request in engine.in_flight:
            if request.label in cancelled and len(request.output) > 3:
                request.cancelled = True
        finished += engine.step()
    return finished


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_texts_are_the_same_however_requests_join_leave_share_and_begin_anew(model, count, rng):
    small = Small.make(max_position=200, **MODELS[model])
    _, weights = small.place(random_resident(rng))

    def engine(sequences, pages):
        return Engine(small.config, small.layout, small.mesh, weights, small.device_server, sequences, 32, pages=pages)

    requests = [dataclasses.replace(r, label=str(number)) for number, r in enumerate(drawn_requests(rng, count))]
    alone = engine(1, None)
    for request in (expected := [dataclasses.replace(r, output=[], epochs=set()) for r in requests]):
        alone.forget()  # nothing is shared
        alone.submit(request)
        while not alone.idle:
            alone.step()
    greedy = next(r for r in expected if r.greedy)
    assert greedy.output == small.reference_text(greedy.prompt, greedy.max_tokens)
    least = least_pages(small.config.layer_windows, 200, 32)
    crowded, cancelled = engine(6, least), {str(number) for number in range(0, count, 7)}
    served = [dataclasses.replace(r, output=[], epochs=set()) for r in requests]
    finished = serve(crowded, served, rng, cancelled)
    assert len(finished) == count
    for request, other in zip(served, expected, strict=True):
        if request.reason == "cancelled":
            assert request.output == other.output[: len(request.output)]
        else:
            assert request.output == other.output
    pages = crowded.batch.pages.values()
    assert crowded.batch.preempted > 0
    assert sum(own.found for own in pages) > 0
    assert all(own.used == 0 for own in pages)


def test_a_common_beginning_is_computed_once(rng):
    small = Small.make(max_position=200)
    _, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 32)
    begin = rng.integers(0, 64, 100).tolist()
    requests = [Request(0, [*begin, *rng.integers(0, 64, 20).tolist()], 4, float(n)) for n in range(3)]
    each = []
    for request in requests:
        before = engine.counts().sum()
        engine.submit(request)
        while not engine.idle:
            engine.step()
        each.append((engine.counts().sum() - before) // (small.config.num_layers * small.config.top_k))
        assert request.output == small.reference_text(request.prompt, 4)
    assert each == [120 + 3, 120 + 3 - 96, 120 + 3 - 96]


def test_an_engine_without_room_for_one_sequence_is_refused(rng):
    small = Small.make(max_position=200)
    _, weights = small.place(random_resident(rng))
    with pytest.raises(ValueError, match="pages: 3, one sequence of 200 tokens takes"):
        Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 32, pages=3)


def test_a_new_table_compiles_nothing(rng):
    small = Small.make(max_position=200)
    _, weights = small.place(random_resident(rng))
    engine = Engine(small.config, small.layout, small.mesh, weights, small.device_server, 2, 32, pages=40)
    requests = [dataclasses.replace(r, params=SamplingParams()) for r in drawn_requests(rng, 12)]
    serve(engine, requests[:6], rng)
    before = steps.decode_step._cache_size(), steps.prefill._cache_size()
    serve(engine, requests[6:], rng)
    assert (steps.decode_step._cache_size(), steps.prefill._cache_size()) == before


def test_tables_of_several_devices_are_their_own(rng):
    pages = [Pages(20, (0,), 2, 100, 32) for _ in range(2)]
    text = rng.integers(0, 9, 100).tolist()
    for own in pages:
        own.begin(0, lambda start, count: text[start : start + count], 60)
    np.testing.assert_array_equal(pages[0].table, pages[1].table)
    assert (pages[0].table[0, 1] == 20).all()
