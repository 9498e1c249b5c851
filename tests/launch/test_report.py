"""The demo's page: well-formed, complete, safe against any text, small enough, for every shape of cluster and model."""

import base64
import copy
import re
import struct
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from launch.demo import report, report_grids, timeline, words

DOMAINS = ("code", "prose", "arithmetic")
HOSTILE = "</pre><script>alert('1')</script> & \"x\" \x00\x1b[31m \x85 \ud800 \ufffe <b onclick=x>\ttab\nline"
VOID = {"meta", "br", "link", "input", "img", "hr"}


def made_up(servers=3, layers=6, experts=32, *, migrations=2, seconds=80.0, seed=0):
    """Plausible figures of the demo's format: every server has its own experts, which move with the workload."""
    rng = np.random.default_rng(seed)
    names = [f"edge-{chr(97 + s)}" for s in range(servers)]
    devices = [(names[s], d) for s in range(servers) for d in range(1 + (s == servers - 1))]
    taste = rng.dirichlet(np.full(experts, 0.4), (servers, layers))
    phase_names = ["uniform", "dance", "dance, workloads swapped", "dance, planned again"][: 2 * migrations or 1]
    start = np.linspace(0, seconds, len(phase_names) + 1)
    turn = [0, 0, 1, 1]
    base = [0.34, 0.7, 0.45, 0.68]
    works = [{n: DOMAINS[(s + turn[p]) % 3] for s, n in enumerate(names)} for p in range(len(phase_names))]
    ratios = [{n: base[p] + 0.04 * s / servers for s, n in enumerate(names)} for p in range(len(phase_names))]
    expert_bytes = 98304

    def placed(label, at, weights):
        held = np.zeros((len(devices), layers, experts), bool)
        for i, (name, _) in enumerate(devices):
            score = weights[names.index(name)] * rng.uniform(0.8, 1.2, (layers, experts))
            part = (1.3 + 0.5 * (i % 2)) / len(devices)
            held[i] = score >= np.quantile(score, max(1 - part, 0), axis=1, keepdims=True)
        alone = ~held.any(0)
        held[rng.integers(len(devices), size=alone.shape), np.arange(layers)[:, None], np.arange(experts)] |= alone
        return {
            "label": label,
            "at_s": at,
            "devices": [
                {
                    "server": n,
                    "device": d,
                    "experts": [np.flatnonzero(h).tolist() for h in held[i]],
                    "resident_bytes": int(held[i].sum()) * expert_bytes,
                    "budget_bytes": (int(held[i].sum()) + 3) * expert_bytes,
                }
                for i, (n, d) in enumerate(devices)
            ],
        }

    traded = np.roll(taste, -1, 0)
    placements = [placed("uniform", 0.0, np.ones_like(taste))]
    if migrations:
        placements += [placed("dance", start[1], taste), placed("dance, after the swap", start[3], traded)]
    by_server: dict[str, list] = {n: [] for n in names}
    for name, device in devices:
        mine = next(d for d in placements[-1]["devices"] if (d["server"], d["device"]) == (name, device))
        reserved = 3_200_000
        by_server[name].append(
            {
                "memory_bytes": mine["budget_bytes"] + reserved,
                "reserved_bytes": reserved,
                "budget_bytes": mine["budget_bytes"],
                "slots": mine["budget_bytes"] // expert_bytes,
                "resident_bytes": mine["resident_bytes"],
            }
        )
    times = np.linspace(0.5, seconds, 160)
    return {
        "format": "dancemoe.demo/1",
        "seed": seed,
        "wall_s": 93.1,
        "peak_memory_bytes": 1.2e9,
        "model": {
            "name": "tiny-moe",
            "layers": layers,
            "experts": experts,
            "top_k": 4,
            "hidden_size": 128,
            "expert_bytes": expert_bytes,
            "parameters": 5_073_024,
        },
        "cluster": {
            "servers": [{"name": n, "devices": d} for n, d in by_server.items()],
            "copies": 1.3,
            "latency_s": 2e-4,
            "bandwidth_bytes_per_s": 62.5e6,
        },
        "load": {"requests_per_s": 4.5, "holds_per_s": 9.0},
        "phases": [
            {
                "name": name,
                "placement": "dance" if p else "uniform",
                "workload": works[p],
                "start_s": start[p],
                "end_s": start[p + 1],
                "requests": 31 + p,
                "tokens": 1400 + 17 * p,
                "steps": 420,
                "local_ratio": ratios[p],
                "local_ratio_mean": base[p],
                "network_layers": 0.98 - 0.1 * p,
                "latency_p50_s": 0.82,
                "latency_p95_s": 1.44,
                "network_request_s": 0.114 - 0.03 * (p % 2),
                "network_request_uniform_s": 0.114,
                "remote_share": 1 - base[p],
                "remote_share_uniform": 0.66,
                "tokens_per_s": 210.4,
                "bytes_exchanged": 1.2e7,
                "bytes_needed": 9e6,
            }
            for p, name in enumerate(phase_names)
        ],
        "migrations": [
            {
                "at_s": start[2 * m + 1],
                "phase": 2 * m + 1,
                "from": ("uniform", "dance")[m],
                "to": "dance",
                "copies_added": 120 + m,
                "copies_dropped": 90,
                "bytes_moved": 1.1e7,
                "stage_s": 0.13,
                "seconds": 0.5,
                "commit_s": 0.021,
                "requests_in_flight": 5,
                "remote_share_before": 0.66,
                "remote_share_after": 0.30,
            }
            for m in range(migrations)
        ],
        "events": [{"at_s": start[2], "label": "workloads trade places"}] if migrations else [],
        "timeline": [
            {
                "t_s": float(t),
                "local_ratio": {
                    n: None
                    if rng.random() < 0.03
                    else float(np.clip(ratios[int(np.searchsorted(start[1:-1], t))][n] + rng.normal(0, 0.035), 0, 1))
                    for n in names
                },
            }
            for t in times
        ],
        "requests": [
            {
                "server": names[i % servers],
                "domain": DOMAINS[i % 3],
                "arrival_s": float(t) - 0.8,
                "finished_s": float(t),
                "tokens": 40,
            }
            for i, t in enumerate(times[2::3])
        ],
        "activation": [
            {
                "label": label,
                "workload": work,
                "counts": np.stack([[rng.multinomial(9000, row) for row in server] for server in weights]).tolist(),
            }
            for label, work, weights in (
                ("before the first migration", works[0], taste),
                ("after the workloads traded places", works[-1], traded),
            )
        ],
        "placements": placements,
        "samples": [
            {
                "phase": name,
                "server": n,
                "domain": works[p][n],
                "prompt": 'def area(radius):\n    """Area of a circle.',
                "output": '"""\n    return radius * radius\n\n\ndef main():\n    print(area(3) < 5 & 6)\n',
            }
            for p, name in enumerate(phase_names[:2])
            for n in names
        ],
        "checks": {
            "requests_checked": 60,
            "tokens_checked": 2900,
            "mismatches": 0,
            "compilations_after_warmup": 0,
            "within_budget": True,
        },
        "headline": {
            "remote_share_uniform": 0.66,
            "remote_share_first": 0.31,
            "remote_share_second": 0.33,
            "reduction_first": 0.53,
            "reduction_second": 0.5,
        }
        if migrations
        else {
            "remote_share_uniform": 0.66,
            "remote_share_first": None,
            "remote_share_second": None,
            "reduction_first": None,
            "reduction_second": None,
        },
    }


class Page(HTMLParser):
    """Text, attributes and the balance of tags of a page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.wrong, self.tags, self.urls, self.texts, self.marked = [], [], set(), [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.urls += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.wrong += [key for key, _ in attrs if key.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data):
        self.texts.append(data)
        if "ins" in self.open:
            self.marked.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def svgs(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def titles(page):
    return [element.text or "" for svg in svgs(page) for element in svg.iter("title")]


def check_page(page):
    parsed = Page(page)
    assert not parsed.wrong
    assert not parsed.open
    assert not parsed.tags & {"script", "link", "iframe", "img"}
    assert all(url.startswith("data:image/png;base64,") for url in parsed.urls)
    assert "http" not in page
    assert "url(" not in page.replace("url(#heat)", "")
    assert svgs(page)
    return parsed


@pytest.mark.parametrize("shape", [(3, 6, 32), (1, 1, 8), (8, 3, 16), (2, 12, 64)])
def test_page_is_whole_and_names_everything(shape):
    figures = made_up(*shape)
    page = report.render(figures)
    text = check_page(page).text
    for phase in figures["phases"]:
        assert phase["name"] in text
    for server in figures["cluster"]["servers"]:
        assert server["name"] in text
    for shown in ("53 % fewer remote expert calls", "50 % fewer after", "0 differences", "0 compilations", "1.2 GB"):
        assert shown in text


def test_reduction_names_its_reference_where_the_phases_have_one():
    figures = made_up(2, 2, 8)
    reference = "uniform placement would have had with the calls of the same phase"
    assert reference in check_page(report.render(figures)).text
    figures["phases"] = [p | {"remote_share_uniform": None} for p in figures["phases"]]
    assert reference not in check_page(report.render(figures)).text


def test_gains_are_drawn_phase_by_phase_to_one_scale():
    page = report.render(made_up())
    text = check_page(page).text
    for shown in ("500 Mbit/s and 0.20 ms", "114 ms → 84 ms (26 % less)", "4.5 requests a second, of 9.0"):
        assert shown in text
    share, network, latency = re.findall(r'<figure class="card gain">.*?</figure>', page, re.S)
    ghost, fill = (
        [float(w) for w in re.findall(f'class="{kind}"[^>]*>?<?i? ?style="width:([0-9.]+)%', share)]
        for kind in ("ghost", "fill")
    )
    assert np.allclose(ghost, 100, atol=0.1), "66 % under uniform is the longest of the picture"
    assert np.allclose(fill, np.array([0.66, 0.3, 0.55, 0.32]) / 0.66 * 100, atol=0.1)
    assert [words.NBSP.join(pair) in network for pair in (("114", "ms"), ("84", "ms"))] == [True, True]
    assert latency.count('class="more"') == 4
    assert f"0.93{words.NBSP}s" in latency, "0.82 s measured and 114 ms of network"


def test_migrations_give_the_shares_that_the_phases_have():
    figures = made_up()
    figures["migrations"][0] |= {"remote_share_before": 0.111, "remote_share_after": 0.222}
    text = check_page(report.render(figures)).text
    assert f"66{words.NBSP}% → 30{words.NBSP}%".replace(words.NBSP, " ") in text
    assert "11 %" not in text


def test_no_line_is_drawn_where_nothing_was_measured():
    points = [(float(t), 0.5) for t in (1, 2, 3, 4, 9, 10, 11, 12)]
    assert [t for t, ratio in timeline._curve(points) if ratio is None] == [6.5]
    assert [t for t, ratio in timeline._curve(points, [10.2]) if ratio is None] == [6.5, 10.5]
    broken = timeline._path((t, r) for t, r in timeline._curve(points))
    assert broken.count("M") == 2


def test_every_request_is_a_dot_of_its_latency_wide_and_narrow():
    figures = made_up()
    for name in ("timeline", "timeline narrow"):
        (picture,) = (svg for svg in svgs(report.render(figures)) if svg.get("class") == name)
        dots = [e for e in picture.iter("circle") if e.get("class") == "request"]
        assert len(dots) == len(figures["requests"])
        assert len({e.get("cy") for e in dots}) == 1, "all took 0.8 s"
        assert len([e for e in picture.iter("path") if e.get("class") == "median"]) == 4


def test_text_that_ends_in_spaces_stays_in_its_box():
    assert "white-space: break-spaces" in report.render(made_up())


def test_migrations_and_events_are_marked_where_they_happened():
    figures = made_up()
    (timeline,) = (svg for svg in svgs(report.render(figures)) if svg.get("class") == "timeline")
    lines = [e for e in timeline.iter("path") if (e.get("class") or "").startswith("event")]
    at = sorted(float(re.match(r"M([\d.]+)", e.get("d", ""))[1]) for e in lines)  # pyright: ignore
    assert np.allclose(np.diff(at), np.diff([20, 40, 60]) * (at[1] - at[0]) / 20, atol=0.2)
    labels = [e.text or "" for e in timeline.iter("text") if e.get("class") == "event-label"]
    assert sorted(labels) == ["migration 1: uniform → dance", "migration 2: dance → dance", "workloads trade places"]


def test_no_migration_no_samples_no_activation():
    figures = made_up(migrations=0) | {"samples": [], "activation": [], "placements": [], "timeline": []}
    page = report.render(figures)
    text = check_page(page).text
    assert "No migration took place" in text
    assert "event-label" not in "".join(re.findall(r"<svg.*?</svg>", page, re.S))


def test_missing_values_are_dashes():
    figures = made_up()
    phase = figures["phases"][1]
    phase.update(latency_p50_s=None, latency_p95_s=None, local_ratio_mean=None, network_layers=None)
    phase["tokens_per_s"] = phase["network_request_s"] = None
    phase["local_ratio"] = dict.fromkeys(phase["local_ratio"])
    figures["timeline"] = [p | {"local_ratio": dict.fromkeys(p["local_ratio"])} for p in figures["timeline"]]
    page = report.render(figures)
    check_page(page)
    row = re.findall(r"<tr title=.*?</tr>", page, re.S)[1]
    cells = [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.S)]
    assert [cell == words.DASH for cell in cells] == [False, True, True, True, False, False, True, True, True, False]
    assert "None" not in page
    assert "nan" not in page.split("</style>")[1].lower()


def test_hostile_text_stays_text():
    figures = made_up(2, 2, 8)
    hostile = copy.deepcopy(figures)
    hostile["samples"][0].update(prompt=HOSTILE, output=HOSTILE, domain=HOSTILE)
    hostile["model"]["name"] = hostile["events"][0]["label"] = hostile["placements"][0]["label"] = HOSTILE
    hostile["activation"][0]["label"] = hostile["phases"][0]["name"] = hostile["migrations"][0]["from"] = HOSTILE
    page = report.render(hostile)
    parsed = check_page(page)
    plain = check_page(report.render(figures))
    assert parsed.tags == plain.tags
    assert "</pre><script>alert('1')</script> & \"x\"" in parsed.marked[0]
    assert "\u2400\u241b[31m" in parsed.marked[0], "control characters are shown"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page)
    page.encode()


def test_server_names_stay_text():
    figures = made_up(1, 2, 8)
    name = "<i onload='x'>&"
    for part in ("phases", "timeline"):
        for entry in figures[part]:
            entry["local_ratio"] = {name: 0.5}
    for entry in figures["samples"] + figures["requests"] + [d for p in figures["placements"] for d in p["devices"]]:
        entry["server"] = name
    figures["cluster"]["servers"][0]["name"] = name
    assert name in check_page(report.render(figures)).text


def test_cells_carry_counts_and_copies():
    figures = made_up(2, 2, 8)
    figures["activation"][0]["counts"][1][1][5] = 777_777
    own = figures["placements"][0]["devices"]
    for device in own:
        device["experts"] = [[0, 1, 2], [3, 4]]
    own[0]["experts"] = [[0, 7], list(range(8))]
    found = titles(report.render(figures))
    assert any(title.startswith("layer 1, expert 5: 777,777 calls, ") for title in found)
    assert "layer 0, expert 7: 1 copy, on edge-a 0" in found
    assert "layer 0, expert 0: 3 copies, on edge-a 0, edge-b 0, edge-b 1" in found


def test_every_expert_of_a_layer_is_drawn_once_and_own_experts_come_first():
    figures = made_up(3, 4, 16)
    counts = np.array(figures["activation"][0]["counts"])
    order = report_grids.expert_order(figures)
    assert (np.sort(order, 1) == np.arange(16)).all()
    home = np.take_along_axis((counts / counts.sum(-1, keepdims=True)).argmax(0), order, 1)
    assert (np.diff(home, axis=1) >= 0).all()


def test_large_grids_become_images_within_the_size_bound():
    figures = made_up(8, 61, 256)
    page = report.render(figures)
    check_page(page)
    assert len(page.encode()) < 1_500_000
    images = [e.get("href", "") for svg in svgs(page) for e in svg.iter("image")]
    assert len(images) == 8 * (len(figures["activation"]) + len(figures["placements"]))
    held = figures["placements"][0]["devices"][0]["experts"]
    pixels = decode_png(base64.b64decode(images[0].split(",")[1]))
    assert pixels.shape == (61, 256)
    assert (pixels > 0).sum(1).tolist() == [len(layer) for layer in held]


def decode_png(data):
    """Palette indices of an unfiltered 8-bit image; checks what a reader would check."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks[kind] = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    assert rows.max() < len(chunks[b"PLTE"]) // 3 == len(chunks[b"tRNS"])
    return rows[:, 1:]


def test_failed_checks_are_said_to_have_failed():
    good = report.render(made_up())
    figures = made_up()
    figures["checks"].update(mismatches=2, compilations_after_warmup=1, within_budget=False)
    bad = check_page(report.render(figures)).text
    assert "failed" not in check_page(good).text
    assert bad.count("failed") == 3
    assert "2 differences" in bad


def test_event_labels_never_overlap():
    marks = [(at, "migration 1: uniform → dance", "event") for at in (50.0, 60.0, 300.0, 1000.0, 1005.0)]
    boxes = [(x, x + 6.5 * len(text), lane) for _, x, text, _, lane in timeline._lanes(marks, 1120)]
    assert len(boxes) == 5
    for i, (x0, x1, lane) in enumerate(boxes):
        assert x0 >= 0
        assert x1 <= 1120
        assert all(x1 <= other[0] or other[1] <= x0 for other in boxes[i + 1 :] if other[2] == lane)


def test_render_is_pure_and_write_is_all_or_nothing(tmp_path):
    figures = made_up(2, 2, 8)
    before = copy.deepcopy(figures)
    path = tmp_path / "report.html"
    report.write(figures, path)
    assert figures == before
    assert path.read_text(encoding="utf-8") == report.render(figures)
    with path.open(encoding="utf-8") as reader:
        report.write(figures | {"seed": 12345}, path)
        assert reader.read() == report.render(figures), "readers of the old page keep the old page"
    del figures["headline"]
    with pytest.raises(KeyError):
        report.write(figures, path)
    assert path.read_text(encoding="utf-8") == report.render(before | {"seed": 12345})
    assert list(tmp_path.iterdir()) == [path]
