"""The demo's page: well-formed, complete, safe against any text, small enough, for every shape of cluster and model."""

import base64
import copy
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from launch.demo import console, picture, report, report_grids, timeline, words
from tests.helpers.demo_figures import made_up

HOSTILE = "</pre><script>alert('1')</script> & \"x\" \x00\x1b[31m \x85 \ud800 \ufffe <b onclick=x>\ttab\nline"
VOID = {"meta", "br", "link", "input", "img", "hr"}


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
    device = figures["placements"][0]["devices"][0]
    used = sum(map(len, device["experts"]))
    assert f"device 0: {used} of {used} slots in use" in text
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
    for shown in ("500 Mbit/s and 0.20 ms", "114 ms → 84 ms (26 % less)", "4.5 requests a second came, of 9.0 that"):
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


def test_what_is_printed_fits_eighty_columns():
    figures = made_up()
    for number, phase in enumerate(figures["phases"]):
        lines = console.phase_lines(phase, number == 0)
        assert len(lines) == 1 + (number == 0)
        assert len({len(line) for line in lines}) == 1
        assert all(len(line) <= 80 for line in lines)
    assert all(len(line) <= 80 for line in console.text_lines(figures["samples"]))
    assert not any(line.endswith(" ") for line in console.text_lines(figures["samples"]))


def test_the_result_is_said_in_ten_lines():
    lines = console.summary_lines(made_up(), Path("report.html"))
    assert len(lines) <= 10
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(lines)
    for shown in (
        "66 %",
        "30 %",
        "84 ms",
        "0.82 s",
        "−53 %",
        "−50 %",
        "0 differ",
        "0 compilations",
        "within its budget",
    ):
        assert shown in text


def test_the_result_says_what_went_wrong():
    figures = made_up()
    figures["checks"] |= {"mismatches": 2, "within_budget": False}
    text = " ".join(console.summary_lines(figures, Path("report.html")))
    assert "2 differ" in text
    assert "NOT within" in text


def test_picture_is_a_small_png(tmp_path):
    picture.draw(made_up(), tmp_path / "demo.png")
    data = (tmp_path / "demo.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24])[0] == 800
    assert len(data) <= 200_000
