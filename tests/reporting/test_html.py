import re
from html.parser import HTMLParser

import pytest

from mtllm_fast.reporting.html import to_html
from tests.reporting.made import make_scores

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Checks nesting and collects attributes that can make a browser fetch something."""

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("count", [2, 9, 205])
def test_page_is_whole_and_asks_nobody(count):
    scores = make_scores(count, seeds=2, alignment=count > 2)
    page = to_html([scores])
    reader = Reader(page)
    assert all(link.startswith("#") for link in reader.links)
    assert not re.search(r"https?://|url\(|@import|<script", page)
    text = " ".join(reader.text)
    assert "zero-shot" in text
    assert "translate-test" in text
    assert "Not run" in text
    for code in scores.languages:
        assert scores.language(code).name in text
    bars = [code for code in scores.foreign() if code in scores.models[0].languages]
    assert page.count('<div class="bar"') == len(bars)
    assert page.count('<tr class="fam">') >= 1
    assert len(page) < 1_000_000


def test_bars_are_sorted_and_inside_the_track():
    page = to_html([make_scores(60)])
    values = [float(v) for v in re.findall(r'class="value">([+-]?[\d.]+)<', page)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0 > values[-1]  # both signs occur, so the order is one that could be wrong
    places = re.findall(r"left:([\d.-]+)%;width:([\d.-]+)%", page)
    assert places
    for left, width in places:
        assert float(left) >= 0 and float(left) + float(width) <= 100.01


def test_without_translate_test_and_with_markup_in_names():
    scores = make_scores(9, names=("<b>&amp;",), task="sib200")
    page = to_html([scores])
    assert "<b>&amp;amp;" not in page
    assert "&lt;b&gt;&amp;amp;" in page
    assert "Languages, the best first" in page
    assert "what a sentence is about" in page
    assert "above translate-test" not in page
    Reader(page)
    both = to_html([scores, make_scores(9)])
    assert 'href="#task-1"' in both
    Reader(both)
