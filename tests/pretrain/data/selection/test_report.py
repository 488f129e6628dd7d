from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pretrain.data.selection.charts import bars, escaped, histogram
from pretrain.data.selection.report import write_report
from pretrain.data.selection.rules import BINS, Rule, Scale
from pretrain.data.selection.tally import EXAMPLES, LARGEST, Tally
from tests.pretrain.data.selection.making import changed, judged, page, selection

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>\0\x1b[31m\ud800 & more'


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, Page, Tally]:
    texts = [page(number) for number in range(30)] + [
        page(3),
        changed(page(4), 1, 150),
        HOSTILE,
        HOSTILE + "x",
        "short",
    ]
    chosen = selection(exact={}, near={}, gopher_quality={}, gopher_repetition={}, c4={})
    verdicts, summary = judged(chosen, [texts[:20], texts[20:]], tmp_path / "all")
    tally = Tally()
    tally.count([f"<b>{number}" for number in range(len(texts))], texts, verdicts)
    path = tmp_path / "report.html"
    write_report(path, chosen, tally, summary)
    text = path.read_text("utf-8")
    return text, Page(text), tally


def test_the_page_has_no_script_and_needs_nothing_from_elsewhere(written: tuple[str, Page, Tally]) -> None:
    text, found, _ = written
    assert set(found.tags) & {"script", "img", "link", "iframe", "object", "b", "use", "image", "a"} == {"b"}
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href", "srcset")}
    assert "url(" not in text and "@import" not in text and "//" not in text.replace("<!doctype", "")
    assert text.count("<b>") == 1 + text.count('<p class="name"><b>'), "names are no elements"
    assert "\0" not in text and "\x1b" not in text


def test_the_page_tells_counts_reasons_examples_and_clusters(written: tuple[str, Page, Tally]) -> None:
    text, found, tally = written
    words = " ".join("".join(found.words).split())
    assert "35 documents" in words and f"{tally.kept} documents" in words
    for reason, (documents, _) in tally.dropped.items():
        assert f'<td>{escaped(reason)}</td><td class="n">{documents:,}</td>' in text
    assert "1 exact copy and 1 near" in words and "in 2 clusters" in words
    assert '<script>alert("1")</script>' in words and "Gopher: words 1, at least 50 wanted" in words
    assert "<b>30" in words, "a document's name"
    assert found.tags.count("svg") > 20


def test_reports_of_the_same_numbers_are_the_same_bytes(written: tuple[str, Page, Tally], tmp_path: Path) -> None:
    chosen = selection(length={"min_words": 2})
    for name, names in (("one", "ab"), ("other", "ba")):
        parts = [Tally(), Tally()]
        parts[0].count(["a"], ["x"], chosen.judge(["x"]))
        parts[1].count(["b"], ["x y"], chosen.judge(["x y"]))
        total = Tally()
        for part in parts if names == "ab" else parts[::-1]:
            total.add(part)
        write_report(tmp_path / name, chosen, total)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_pictures_are_xml_with_each_count_and_threshold() -> None:
    counts = [0] * BINS
    counts[0], counts[20], counts[-1] = 5, 100, 1
    found = ElementTree.fromstring(histogram(Rule("x < y & z", 0.2, 0.5), counts))
    titles = [box.find("title") for box in found.findall("rect")]
    assert [title.text for title in titles if title is not None] == ["5", "100", "1"]
    assert [box.get("fill") for box in found.findall("rect")] == ["#d2452d", "#3b7dd8", "#d2452d"]
    assert [text.text for text in found.findall("text")] == ["0.2", "0.5", "0", "0.5", "1"]
    tall = [float(box.get("height", 0)) for box in found.findall("rect")]
    assert tall[1] == pytest.approx(max(tall)) and tall[0] / tall[1] == pytest.approx(0.05**0.5, rel=0.01)
    assert len(ElementTree.fromstring(bars([("2", 10), ("3 to 4", 0)])).findall("rect")) == 2


def test_signs_that_no_page_may_hold_are_shown_as_such() -> None:
    assert escaped("a\u00a0b\u3000c\u200dd\n") == "a\u00a0b\u3000c\u200dd\n"
    assert escaped("\0\x1b\u202e\ud800\x85") == "\ufffd" * 5 and escaped("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


def test_a_scale_puts_values_into_bins() -> None:
    import numpy as np

    plain, decades = Scale(0, 1), Scale(1, 1e6, log=True)
    assert plain.bins(np.array([-1, 0, 0.5, 0.999, 1, 7])).tolist() == [0, 0, BINS // 2, BINS - 1, BINS - 1, BINS - 1]
    assert decades.bins(np.array([0, 1, 1000, 1e9])).tolist() == [0, 0, BINS // 2, BINS - 1]
    assert [decades.value(place) for place in (0, 0.5, 1)] == pytest.approx([1, 1000, 1e6])


def test_tallies_add_in_any_order_and_keep_few_examples() -> None:
    chosen = selection(length={"min_words": 2, "max_words": 50})
    texts = [page(number, 10 + number) if number % 3 else f"w{number}" for number in range(90)]
    parts = []
    for first in range(0, 90, 10):
        part = Tally()
        names = [f"n{number}" for number in range(first, first + 10)]
        part.count(names, texts[first : first + 10], chosen.judge(texts[first : first + 10]))
        parts.append(part)
    totals = []
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        total = Tally()
        for part in order:
            total.add(Tally.from_json(part.to_json()))
        totals.append(total)
    whole = Tally()
    whole.count([f"n{number}" for number in range(90)], texts, chosen.judge(texts))
    assert all(total.to_json() == whole.to_json() for total in totals)
    assert whole.read == 90 and len(whole.examples["words"]) == EXAMPLES and len(whole.largest) <= LARGEST
    assert sum(whole.histograms[0]) == 90
