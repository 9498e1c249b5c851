"""Replay: a trace's texts become profiles and requests; every token goes through exactly one step with its own routing."""

import json

import numpy as np
import pytest

from launch.bench.harness.replay import Replay, Spent, summary
from launch.bench.harness.trace import OUTPUT_SHARE, ReplayRequest, Trace, poisson
from placement import InputError
from placement.data.arrivals import Arrivals
from tests.helpers.paths import DEEPSEEK

AZURE = DEEPSEEK.parents[1] / "arrivals/azure_llm_2023_conv.csv"
LAYERS, K, EXPERTS = 3, 2, 8
SIZES = {"hidden_size": 16, "expert_bytes": 100}
DEVICE_SERVER = (0, 1, 1)


def write_trace(path, rng, lengths=((5, 9, 4, 12), (20, 3, 7)), **changes):
    arrays = {"meta": np.array(json.dumps({"model": "toy", "domains": ["code", "law"]}))}
    for domain, texts in zip(("code", "law"), lengths, strict=True):
        shape = (sum(texts), LAYERS)
        arrays[f"ids_{domain}"] = rng.random((*shape, EXPERTS)).argsort(-1)[..., :K].astype(np.uint8)
        arrays[f"gate_{domain}"] = rng.random((*shape, K)).astype(np.float16)
        arrays[f"seq_lens_{domain}"] = np.array(texts, np.int32)
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


@pytest.fixture
def trace(tmp_path, rng):
    return Trace.load(write_trace(tmp_path / "trace.npz", rng))


def make_request(server=0, arrival=0.0, prompt=5, output=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (prompt + output, LAYERS, K)
    return ReplayRequest(
        server, arrival, rng.integers(0, EXPERTS, shape, np.int32), rng.random(shape, np.float32), prompt
    )


# Traces


def test_profiles_of_the_halves_share_no_text_and_cover_all(trace):
    first, second = (trace.profile(later, **SIZES) for later in (False, True))
    assert first.servers == ("code", "law")
    assert (len(first.ids), len(second.ids)) == (5 + 9 + 20, 4 + 12 + 3 + 7)
    everything = np.stack([_count(ids) for ids in trace.ids])
    np.testing.assert_array_equal(first.counts + second.counts, everything)
    assert len(np.unique(first.sequence)) == 3
    np.testing.assert_array_equal(second.ids[:16], trace.ids[0][14:])
    assert trace.profile(servers=("a", "b"), **SIZES).servers == ("a", "b")
    with pytest.raises(InputError, match="3 servers for 2 domains"):
        trace.profile(servers=("a", "b", "c"), **SIZES)


def _count(ids):
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    np.add.at(counts, (np.arange(LAYERS)[None, :, None], ids), 1)
    return counts


def test_requests_take_the_texts_of_their_servers_domain_in_turn(trace):
    arrivals = Arrivals(*(np.array(x) for x in ([0.0, 1, 2, 3, 4], [0, 1, 0, 0, 1], [1] * 5, [1] * 5)))
    requests = trace.requests(arrivals, output_share=0.25)
    assert [r.label for r in requests] == ["code", "law", "code", "code", "law"]
    assert [(r.prompt, r.output) for r in requests] == [(3, 1), (2, 1), (9, 3), (3, 1), (5, 2)]
    np.testing.assert_array_equal(requests[2].ids, trace.ids[0][18:30])
    np.testing.assert_array_equal(requests[1].weights, trace.weights[1][20:23])
    assert [len(r.ids) for r in trace.requests(arrivals, later=False)] == [5, 20, 9, 5, 20]


def test_requests_of_recorded_arrivals_are_divided_as_those_were(trace, tmp_path):
    (tmp_path / "a.csv").write_text(
        "t_s,prompt_tokens,output_tokens,server\n0,500,500,law\n2,10,9990,law\n3,9990,10,law\n"
    )
    arrivals = Arrivals.load(tmp_path / "a.csv", trace.domains, stretch=10)
    requests = trace.requests(arrivals, output_share=None, later=False)
    assert [r.arrival_s for r in requests] == [0, 20, 30]
    assert [(r.prompt, r.output) for r in requests] == [(10, 10), (1, 19), (19, 1)]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_leaves_no_prompt_or_no_answer_is_refused(trace, share):
    with pytest.raises(InputError, match="output share"):
        trace.requests(poisson(2, 1.0, 10.0), output_share=share)


def test_arrivals_at_a_server_without_domain_are_refused(trace):
    with pytest.raises(InputError, match="the trace has 2 domains"):
        trace.requests(poisson(3, 1.0, 50.0))


def test_poisson_arrivals_repeat_with_their_seed():
    one, same, other = poisson(3, 2.0, 4000.0, 1), poisson(3, 2.0, 4000.0, 1), poisson(3, 2.0, 4000.0, 2)
    np.testing.assert_array_equal(one.seconds, same.seconds)
    assert len(one) != len(other) or (one.seconds != other.seconds).any()
    for server in range(3):
        gaps = np.diff(one.seconds[one.server == server])
        assert gaps.mean() == pytest.approx(2.0, rel=0.1)
        assert gaps.std() == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids_law": None}, "ids_law: missing"),
        ({"meta": np.array("{}")}, "meta: must be JSON with model and domains"),
        ({"meta": np.array('{"model": "m", "domains": []}')}, "names no domain"),
        ({"gate_law": np.zeros((30, LAYERS, 1), np.float16)}, "gate_law has shape"),
        ({"ids_code": np.zeros((30, LAYERS), np.uint8)}, "ids_code has shape"),
        ({"seq_lens_code": np.array([29])}, "seq_lens_code: must be lengths from 2 that sum to 30"),
    ],
)
def test_an_incomplete_trace_is_one_line(tmp_path, rng, changes, said):
    with pytest.raises(InputError, match=said) as refused:
        Trace.load(write_trace(tmp_path / "bad.npz", rng, **changes))
    assert str(refused.value).startswith(f"{tmp_path}/bad.npz: ")
    assert "\n" not in str(refused.value)


def test_a_domain_of_one_text_has_no_halves(tmp_path, rng):
    trace = Trace.load(write_trace(tmp_path / "trace.npz", rng, lengths=((5, 9), (20,))))
    for use in (lambda: trace.profile(**SIZES), lambda: trace.requests(poisson(2, 1.0, 10.0))):
        with pytest.raises(InputError, match="domain law has fewer than 2 texts"):
            use()


def test_a_damaged_trace_is_one_line(tmp_path, rng):
    path = write_trace(tmp_path / "trace.npz", rng)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"not a readable \.npz file"):
        Trace.load(path)


# Serving


def test_one_request_takes_its_chunks_then_a_step_for_each_further_token():
    request = make_request(server=1, arrival=2.0, prompt=10, output=4)
    replay = Replay([request], DEVICE_SERVER, sequences=2, chunk=4)
    seen = []

    def step(rows):
        seen.append((rows.prefill, rows.active.sum(1).tolist(), rows.position[:, 0].tolist()))
        return Spent(0.5, 0.25)

    replay.run(step)
    chunks = [(True, [0, 4, 0], [0, 0, 0]), (True, [0, 4, 0], [0, 4, 0]), (True, [0, 2, 0], [0, 8, 0])]
    assert seen == [*chunks, *[(False, [0, 1, 0], [0, p, 0]) for p in (10, 11, 12)]]
    assert (request.first_token_s, request.finished_s) == (2.0 + 3 * 0.75, 2.0 + 6 * 0.75)
    assert (request.compute_s, request.network_s, request.waiting_s) == (3.0, 1.5, 0.0)
    assert (replay.now_s, replay.idle_s, replay.steps) == (6.5, 2.0, {"prefill": 3, "decode": 3})


def test_an_answer_of_one_token_ends_with_its_prompt():
    request = make_request(prompt=3, output=1)
    replay = Replay([request], DEVICE_SERVER)
    replay.run(lambda rows: Spent(1.0))
    assert request.first_token_s == request.finished_s == 1.0
    assert replay.steps == {"prefill": 1, "decode": 0}


def test_every_token_goes_through_one_step_on_its_server_with_its_routing(trace, rng):
    requests = trace.requests(poisson(2, 3.0, 60.0))
    assert len(requests) > 20
    replay = Replay(requests, DEVICE_SERVER, sequences=2, chunk=4)
    places = {}  # device, place -> routing of the sequence that it holds, by position
    texts = []

    def step(rows):
        assert rows.active.any()
        assert not rows.ids[~rows.active].any()
        assert not rows.weights[~rows.active].any()
        for device, row in np.argwhere(rows.active):
            key, position = (int(device), int(rows.sequence[device, row])), int(rows.position[device, row])
            if position == 0:
                texts.append(places.setdefault(key, []))
                places[key] = texts[-1] = []
            assert position == len(places[key]), "tokens of a sequence come in order, without gap"
            places[key].append((DEVICE_SERVER[device], rows.ids[device, row], rows.weights[device, row]))
        return Spent(*rng.random(2))

    replay.run(step)
    assert not replay.in_flight
    assert len(texts) == len(requests)
    for request in requests:
        fed = len(request.ids) - 1
        assert request.done == max(fed, request.prompt)
        assert any(
            len(text) == fed
            and all(server == request.server for server, _, _ in text)
            and all(np.array_equal(ids, request.ids[i]) for i, (_, ids, _) in enumerate(text))
            and all(np.array_equal(weights, request.weights[i]) for i, (_, _, weights) in enumerate(text))
            for text in texts
        )
        assert request.waiting_s > -1e-9
        assert request.arrival_s < request.first_token_s <= request.finished_s


def test_requests_wait_for_a_place_and_prompts_take_turns_with_decoding():
    requests = [make_request(0, 0.0, 4, 3), make_request(0, 0.0, 4, 3), make_request(0, 0.5, 4, 2)]
    replay = Replay(requests, (0,), sequences=2, chunk=4)
    kinds = []

    def step(rows):
        kinds.append(("prefill" if rows.prefill else "decode", int(rows.active[0].sum())))
        return Spent(1.0)

    replay.run(step)
    assert kinds == [
        ("prefill", 4),
        ("decode", 1),
        ("prefill", 4),
        ("decode", 2),
        ("prefill", 4),
        ("decode", 2),
    ]
    assert [r.finished_s for r in requests] == [4.0, 6.0, 6.0]
    assert requests[2].waiting_s == pytest.approx(5.5 - 2.0)


def test_time_that_passes_outside_steps_is_waiting():
    request = make_request(prompt=4, output=1)
    replay = Replay([request], (0,))
    replay.next_rows()
    replay.pause(3.0)
    assert replay.record(Spent(1.0)) == [request]
    assert (request.latency_s, request.waiting_s) == (4.0, 3.0)
    assert replay.next_rows() is None
    with pytest.raises(ValueError, match="must be finite"):
        replay.pause(float("nan"))


def test_summary_adds_up_and_is_json(trace):
    requests = trace.requests(poisson(2, 3.0, 60.0))
    Replay(requests, DEVICE_SERVER, chunk=4).run(lambda rows: Spent(0.01, 0.02))
    figures = json.loads(json.dumps(summary(requests, ("a", "b")), allow_nan=False))
    assert figures["requests"] == figures["finished"] == len(requests)
    assert sum(figures[part] for part in ("compute", "network", "waiting")) == pytest.approx(figures["latency"]["mean"])
    assert figures["prompt_tokens"] + figures["output_tokens"] == sum(len(r.ids) for r in requests)
    assert sum(server["finished"] for server in figures["servers"].values()) == len(requests)
    assert figures["latency"]["p50"] <= figures["latency"]["p95"] <= figures["latency"]["p99"]
    assert summary([make_request()], ("a",))["finished"] == 0


def test_decoding_time_is_per_further_token():
    request = make_request(prompt=4, output=5)
    Replay([request], (0,)).run(lambda rows: Spent(10.0) if rows.prefill else Spent(0.25))
    assert summary([request], ("a",))["per_output_token"] == pytest.approx(0.25)


# The published trace itself, where it is at hand


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="the published trace is not here")
def test_published_trace_gives_profiles_and_requests():
    trace = Trace.load(DEEPSEEK)
    assert (trace.domains, trace.experts) == (("intent", "law", "translation"), 64)
    first, second = (trace.profile(later, hidden_size=2048, expert_bytes=1000) for later in (False, True))
    shares = [p.counts / p.counts.sum(-1, keepdims=True) for p in (first, second)]
    for server in range(3):
        assert np.corrcoef(*(share[server].ravel() for share in shares))[0, 1] > 0.95
    requests = trace.requests(poisson(3, 10.0, 300.0))
    assert sum(r.output for r in requests) / sum(len(r.ids) for r in requests) == pytest.approx(OUTPUT_SHARE, abs=0.01)
    Replay(requests, (0, 1, 2, 2), chunk=64).run(lambda rows: Spent(0.1 if rows.prefill else 0.02, 0.03))
    assert summary(requests, trace.domains)["finished"] == len(requests)


@pytest.mark.skipif(not AZURE.exists(), reason="the published arrivals are not here")
def test_published_arrivals_divide_the_texts():
    trace = Trace.load(DEEPSEEK)
    arrivals = Arrivals.load(AZURE, trace.domains, stretch=20, duration=600)
    requests = trace.requests(arrivals, output_share=None)
    assert 50 < len(requests) < 1000
    assert 0.1 < sum(r.output for r in requests) / sum(len(r.ids) for r in requests) < 0.4
