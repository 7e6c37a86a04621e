import re
from html.parser import HTMLParser

import pytest

from fakes import fake_result
from unpoison.report.as_html import as_html
from unpoison.report.document import make_report

NASTY = [
    "<script>alert(1)</script>.png",
    "\"><img src=x onerror='alert(1)'>.png",
    "gnp.\u202egpj.exe",
    "{{ 7 * 7 }}.png",
    "n" * 300 + ".png",
    "&lt;b&gt;.png",
]


class Page(HTMLParser):
    """Tags and attributes of a page, and whether every tag was closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("verdict", ["poisoned", "no_evidence", "inconclusive"])
def test_the_page_is_well_formed_and_loads_nothing(verdict):
    text = as_html(make_report(fake_result(verdict, skipped={"a.png": "truncated"})))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "http" not in re.sub(r'"data:[^"]*"', "", text).replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in text


def test_the_page_opens_with_the_verdict_and_ends_with_how_to_repeat_it():
    text = Page(as_html(make_report(fake_result(), command="unpoison scan images --out run"))).text
    order = [
        "Poisoned",
        "What to do next",
        "The trigger",
        "Where it sits",
        "Images to remove",
        "What was tested",
    ]
    order += ["could not be examined", "How the answer was reached", "Cost", "To repeat this scan"]
    places = [text.index(words, text.index("unpoison · scan report")) for words in order]
    assert places == sorted(places)
    assert "unpoison scan images --out run" in text and "moved 71% of them into cluster 7" in text


def test_without_evidence_the_best_candidates_are_shown_as_unconfirmed():
    text = Page(as_html(make_report(fake_result("no_evidence")))).text
    assert "Closest things to a trigger, none confirmed" in text and "Images to remove" not in text


def test_names_that_attackers_choose_stay_text():
    ids = NASTY + [f"{row}.png" for row in range(34)]
    report = make_report(
        fake_result(ids=ids, skipped={"<script>x</script>": "<b>reason</b>"}, scope="<i>scope</i>"),
        location="<u>place</u>",
        command="<s>command</s>",
    )
    text = as_html(report)
    page = Page(text)
    assert not {"script", "b", "u", "s"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>.png" in page.text and "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in text and "\\u202e" in text
    assert "n" * 300 not in text


def test_the_same_report_gives_the_same_page():
    assert as_html(make_report(fake_result())) == as_html(make_report(fake_result()))


def test_a_page_of_many_images_stays_small():
    import torch

    from unpoison.records import ImageSet

    pixels = torch.randint(0, 256, (300, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    result = fake_result(n_images=300, n_flagged=300)
    report = make_report(result, images=ImageSet(tuple(result.findings["id"]), pixels))
    assert len(as_html(report)) < 300 * 6_500 + 400_000  # noise is the worst case for every codec
