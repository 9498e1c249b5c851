"""In bfloat16 a request's text depends on nothing but the request: not on the placement, the batch or its neighbors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancemoe_jax import (
    SamplingParams,
    Weights,
    assign_slots,
    bundled_model,
    fill_pool,
    make_mesh,
    place_decoder,
    place_tables,
    pool_layout,
    routing_tables,
)
from dancemoe_jax.checkpoint.reader import ExpertFile
from launch.engine.engine import Engine
from launch.engine.request import Request
from tests.helpers.cluster_of_devices import DEVICE_SERVER, random_resident

TOKENS, PLACEMENTS = 24, 10


def requests_of(rng, count, vocab):
    """Greedy and sampled ones in turn, at servers and of lengths drawn at random."""
    for number in range(count):
        params = SamplingParams(temperature=0.9 * (number % 2), top_p=0.95, seed=number)
        prompt = rng.integers(0, vocab, int(rng.integers(1, 90))).tolist()
        yield Request(int(rng.integers(3)), prompt, TOKENS, 0.0, params=params)


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_text_depends_on_its_request_alone(native, count, rng):
    file = ExpertFile(bundled_model(), jnp.bfloat16)
    config = dataclasses.replace(file.config, max_position=128)
    mesh, decoder = make_mesh(jax.devices()[:4]), file.decoder()
    copies = config.num_moe_layers * config.num_experts
    capacity = tuple(round(share * copies) for share in (0.2, 0.3, 0.4, 0.5))
    layout = pool_layout(capacity, DEVICE_SERVER)
    requests, expected = list(requests_of(rng, count, config.vocab_size)), None
    for seed in range(PLACEMENTS if count > 10 else 2):
        slots = assign_slots(layout, random_resident(np.random.default_rng(seed), capacity, config))
        tables = place_tables(routing_tables(layout, slots), mesh)
        weights = Weights(place_decoder(decoder, mesh), fill_pool(mesh, layout, slots, file.read), tables)
        # XLA's own products may add up otherwise in a program for another number of rows.
        sequences = [16, 1, 3, 8, 2][seed % 5] if native else 8
        how = {"kernels": "auto" if native else "xla"}
        engine = Engine(config, layout, mesh, weights, DEVICE_SERVER, sequences, chunk=32, **how)
        served = [dataclasses.replace(request, output=[], epochs=set()) for request in requests]
        for number in rng.permutation(count):
            engine.submit(served[number])
        while not engine.idle:
            engine.step()
        texts = [request.output for request in served]
        expected = texts if expected is None else expected
        assert texts == expected
