"""Reports say what was promised, whether it is kept and what it cost, in the terminal, as HTML and as JSON."""

import io
import json
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest
from torch import nn

from resect.anatomy import dissect
from resect.evaluation import Evaluation, Latency, Timing
from resect.plan import Plan
from resect.reporting import Report, charts, html_report, print_report, record, record_text, report_files
from resect.reporting.report import before_after, best_trials, count, notes, verdict
from resect.searching import Floor, Found, Trial, certify
from resect.tracing import trace


def evaluation(right, examples=400):
    labels = np.arange(examples) % 3
    correct = np.arange(examples) < right
    return Evaluation(correct=correct, labels=labels, predictions=np.where(correct, labels, (labels + 1) % 3))


def timing(ratio):
    times = {"dense_ms": Timing(minimum=1.0, median=2.0), "small_ms": Timing(minimum=0.5, median=2.0 / ratio)}
    return Latency(batch=64, **times, ratio=ratio, wins=1.0 if ratio > 1 else 0.0, rounds=20, threads=1, clock="CPU time")


def make_report(*, right=390, floor=None, name="network", **changes):
    floor = floor or Floor(accuracy=0.95)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    anatomy = dissect(model, torch.zeros(2, 5))
    plan, dense_cost = Plan.random(anatomy, 0.5), Plan.all(anatomy).cost()
    trials = tuple(
        Trial(
            number=number,
            allocation="uniform",
            kept=(step := Plan.random(anatomy, number / 10)).kept,
            cost=step.cost(),
            accuracy=0.99 - 0.01 * number,
            above=number < 5,
            examples=400,
            stopped=False,
            passes=1.0,
            seconds=0.1,
            digest=step.digest,
        )
        for number in range(8)
    )
    dense = evaluation(395)
    found = Found(
        model=model,
        plan=plan,
        goal=floor,
        trials=trials,
        certificate=certify(floor, dense, [evaluation(right)]),
        frozen=("a",),
        passes=7.5,
        cost=plan.cost(),
        dense_cost=dense_cost,
        search_accuracy=0.96,
        dense_search_accuracy=0.98,
        repaired={"2.weight": "least_squares"},
        seconds=1.5,
        seed=0,
        notes=("a note",),
    )
    data = [(torch.randn(30, 5), torch.arange(30) % 3)]
    report = Report(
        found=found,
        model=name,
        data="digits",
        dense=evaluation(380),
        small=evaluation(370),
        latency=(timing(2.0),),
        trace=trace(model, data, anatomy),
        class_names=("cat", "dog", "hen"),
        settings={"seed": "0"},
    )
    return replace(report, **changes)


def printed(report, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_report(report, console)
    return console.file.getvalue()


class Page(HTMLParser):
    """Checks that every tag is closed, and collects what a browser would fetch and what a person would read."""

    void = frozenset({"meta", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_kept_promise():
    outcome = verdict(make_report())
    assert (outcome.kept, outcome.word) == (True, "Certified")
    assert outcome.promise == "Accuracy at least 95 %, 95 % sure."
    assert any("390 of 400" in sentence for sentence in outcome.evidence)


def test_a_promise_that_is_not_kept_says_so_everywhere():
    report = make_report(right=383)
    assert verdict(report).kept is False
    assert "Not certified" in printed(report)
    assert "Not certified" in html_report(report)
    assert record(report)["certified"] is False


def test_without_certify_data_nothing_is_certified():
    report = make_report()
    report = replace(report, found=replace(report.found, certificate=None))
    assert verdict(report).kept is False
    assert "Not certified" in printed(report)
    assert "Not certified" in html_report(report)


def test_before_and_after():
    rows = {row.name: row for row in before_after(make_report())}
    assert (rows["units"].dense, rows["units"].small, rows["units"].change) == ("12", "6", "-50.0%")
    assert (rows["parameters"].dense, rows["parameters"].small) == ("111", "57")
    assert rows["accuracy, test"].change == "-2.50 points"
    assert rows["accuracy, certify"].small == "97.50%"
    assert rows["latency, batch 64"].change == "2.00x as fast"


def test_a_network_that_is_not_faster_is_not_called_faster():
    report = make_report(latency=(timing(0.9),))
    assert any("not faster" in note for note in notes(report))
    assert "not faster" in printed(report)
    assert "no gain" not in html_report(make_report())
    assert "no gain" in html_report(report)


def test_a_test_set_below_the_floor_is_explained():
    assert not any("below the floor" in note for note in notes(make_report(small=evaluation(380))))
    below = [note for note in notes(make_report(small=evaluation(376))) if "below the floor" in note]
    exact = binomtest(376, 400).proportion_ci(0.95, method="exact")
    assert len(below) == 1
    assert f"94.00%. 400 examples leave {exact.low:.2%} to {exact.high:.2%} open" in below[0]


def test_best_trials_are_the_leanest_that_held():
    report = make_report()
    assert [trial.number for trial in best_trials(report, 3)] == [4, 3, 2]
    assert [trial.number for trial in best_trials(report)][-3:] == [5, 6, 7]


def test_the_terminal_report_shows_everything():
    text = printed(make_report())
    for part in ("Certified", "Before and after", "6 of 12", "hen", "uniform", "7.5 full passes", "a note"):
        assert part in text
    assert max(map(len, printed(make_report(), width=80).splitlines())) <= 80


def test_the_html_report_needs_nothing_else():
    text = html_report(make_report())
    page = Page(text)
    assert page.fetched
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    for part in ("Certified", "Before and after", "Size and accuracy", "Units kept", "responds to", "All trials", "hen"):
        assert any(part in words for words in page.words)


def test_names_cannot_break_the_page():
    page = Page(html_report(make_report(name="<script>alert(1)</script>", data="a & b", class_names=("<b>", "x", "y"))))
    assert "script" not in page.open
    assert "<script" not in html_report(make_report(name="<script>alert(1)</script>"))


def test_reports_with_little_to_say():
    report = make_report(dense=None, small=None, latency=(), trace=None, class_names=(), settings={})
    report = replace(report, found=replace(report.found, trials=(), notes=()))
    Page(html_report(report))
    assert "Certified" in printed(report)
    assert record(report)["test"] == {"dense": None, "small": None}


def test_one_point_for_every_trial():
    text = html_report(make_report())
    chart = text[text.index('<svg class="curve"') : text.index("</figure>")]
    kinds = re.findall(r"<circle class='(\w+)'", chart)
    assert (kinds.count("trial"), kinds.count("below"), kinds.count("dense"), kinds.count("delivered")) == (5, 3, 1, 1)


def test_a_promised_drop_is_drawn_against_the_dense_network_of_the_same_examples():
    text = html_report(make_report(floor=Floor(drop=0.05)))
    chart = text[text.index('<svg class="curve"') : text.index("</figure>")]
    height = {kind: float(y) for kind, y in re.findall(r"<circle class='(\w+)' cx='[\d.]+' cy='([\d.]+)'", chart)}
    line = float(re.search(r'class="floor" .*? y1="([\d.]+)"', chart)[1])
    assert height["dense"] < height["delivered"] < line
    assert "whisker" not in chart
    assert "+0<" in chart


def test_result_json_round_trips():
    report = make_report()
    result = json.loads(record_text(report))
    assert result["result_version"] == 1
    assert result["kept"] == report.found.plan.kept
    assert len(result["trials"]) == 8
    assert result["certificate"]["passed"] is True
    assert result["test"]["small"]["per_class"].keys() == {"0", "1", "2"}
    assert result["latency"][0]["ratio"] == 2.0


def test_report_files_are_the_same_every_time():
    report = make_report()
    assert report_files(report) == report_files(report)
    assert report_files(report).keys() == {"result.json", "report.html"}


def pixels(uri):
    """Decode a PNG that `charts.image` wrote: (rows, columns, 4)."""
    import base64

    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    columns, rows = struct.unpack(">II", raw[16:24])
    start = raw.index(b"IDAT")
    (length,) = struct.unpack(">I", raw[start - 4 : start])
    assert struct.unpack(">I", raw[start + 4 + length : start + 8 + length])[0] == zlib.crc32(raw[start : start + 4 + length])
    lines = np.frombuffer(zlib.decompress(raw[start + 4 : start + 4 + length]), dtype=np.uint8)
    return lines.reshape(rows, 1 + 4 * columns)[:, 1:].reshape(rows, columns, 4)


def test_strips_mark_the_units_that_stay():
    mask = np.array([True, False, False, True, True])
    assert (pixels(charts.strip(mask))[0, :, 3] == 255).tolist() == mask.tolist()
    wide = pixels(charts.strip(np.ones(1030, dtype=bool), columns=512))
    assert wide.shape[:2] == (3, 512)
    assert int((wide[..., 3] == 255).sum()) == 1030


def test_activity_is_opaque_for_the_strongest_class_of_a_unit():
    strength = np.array([[0.0, 0.5, 0.0], [2.0, 0.25, 0.0]])
    assert pixels(charts.activity(strength))[..., 3].tolist() == [[0, 255, 0], [255, 128, 0]]
    assert pixels(charts.activity(np.zeros((2, 2))))[..., 3].max() == 0


def test_units_are_ordered_by_the_class_that_moves_them():
    strength = np.array([[0.1, 0.6, 9.0], [0.8, 0.5, 1.0]])
    assert charts.by_preference(strength).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999_999, "999,999"), (1e6, "1.00 M"), (2.5e9, "2.50 G")])
def test_counts(value, text):
    assert count(value) == text
