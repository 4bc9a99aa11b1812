from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.monitoring.report import AuditFigures, render_report
from dp_federated_lora.monitoring.statement import NOT_PRIVATE, row_in_words


class Page(HTMLParser):
    """What a browser would make of the page: tags in order, and text by enclosing tag."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture(scope="module")
def page(report, row):
    def make(**changes):
        arguments = {
            "title": "newswire",
            "config_toml": 'name = "newswire"\n',
            "reports": [report(k, public_metrics={"accuracy": 0.5 + k / 100}) for k in range(1, 6)],
            "statement": [row(), row(adversary="the server", epsilon=None, delta=None)],
            "budget_epsilon": 3.0,
            "facts": {"trained share": "0.65 %", "base model": "MiniLM"},
            "final_metrics": {"accuracy": 0.9623, "macro_f1": 0.8981},
            "insecure": False,
        }
        return render_report(**arguments | changes)

    return make


def tiles(source):
    parsed = Page(source).texts
    return dict(zip(parsed["dt"], parsed["dd"][::2], strict=True))


def test_the_headline_shows_utility_budget_delta_unit_and_trained_share(page):
    assert tiles(page()) == {
        "Accuracy": "96.2 %",
        "Macro-F1": "89.8 %",
        "Epsilon": "2",
        "Delta": "1e-5",
        "Protected unit": "client",
        "Trained share": "0.65 %",
    }
    assert "1.25 charged, of a budget of 3" in page()  # what is claimed is that of all rounds, run or not
    assert "5 of 10 rounds finished." in page()


def test_a_language_model_is_headlined_by_its_perplexity_and_charted_apart_from_percentages(page, report):
    reports = [report(10, public_metrics={"accuracy": 0.4, "perplexity": 28.0})]
    source = page(reports=reports, final_metrics={"loss": 3.3, "perplexity": 27.9})
    assert tiles(source)["Perplexity"] == "27.9"
    assert "Loss" not in tiles(source)
    assert {"Utility on public test data", "Perplexity on public test data"} <= set(Page(source).texts["h3"])
    assert "All 10 rounds finished." in source


def test_every_adversary_is_told_in_words_and_a_missing_guarantee_is_plain(page, row):
    source = page()
    texts = Page(source).texts
    assert row_in_words(row(), insecure=False) in texts["p"]
    assert any(text.startswith("No guarantee.") for text in texts["p"])
    assert [text for text in texts["span"] if text.strip()] == ["epsilon 2, delta 1e-5", "no guarantee"]
    assert NOT_PRIVATE not in source


def test_a_run_with_seeded_noise_carries_the_banner_and_claims_no_number(page):
    source = page(insecure=True)
    assert NOT_PRIVATE in Page(source).texts["p"][0]
    assert 'role="alert"' in source
    assert tiles(source)["Epsilon"] == "void"
    assert tiles(source)["Protected unit"] == "none"
    assert "Delta" not in tiles(source)
    assert not re.search(r"rests on|e\^|epsilon 2, delta", source)
    assert "protects nobody" in source


def test_the_page_needs_no_script_and_no_network(page):
    source = page()
    parsed = Page(source)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name in {"src", "href"} or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", source)
    assert "default-src 'none'" in source


def test_ids_are_unique_and_each_label_points_to_one(page, report):
    metrics = {"accuracy": 0.4, "perplexity": 28.0, "loss": 3.0}
    attributes = Page(page(reports=[report(1, public_metrics=metrics)])).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 10
    assert {key for name, value in attributes if name == "aria-labelledby" for key in value.split()} == set(ids)


def test_a_run_without_rounds_statement_or_metrics_still_gives_a_page(page):
    source = page(reports=[], statement=[], facts={}, final_metrics={})
    assert "dt" not in Page(source).texts
    assert "No round was finished." in source
    assert "assume no guarantee against anybody" in source
    assert source.count("No data") == 3


@pytest.mark.parametrize("budget", [math.inf, math.nan, 0.0])
def test_a_budget_that_cannot_be_drawn_is_left_out_of_the_meter(page, budget):
    assert 'class="meter"' not in page(budget_epsilon=budget)


def test_values_that_are_not_finite_are_named_not_drawn(page, report):
    reports = [report(1, update_norm=math.nan, public_metrics={"perplexity": math.inf}), report(2)]
    source = page(reports=reports, final_metrics={"perplexity": math.nan})
    assert tiles(source)["Perplexity"] == "n/a"
    assert not re.search(r"\bnan\b|\binf\b", source)


def test_equal_arguments_give_equal_pages(page):
    assert page() == page()


nasty = st.text() | st.sampled_from(
    [
        "</pre><script>alert(1)</script>",
        '"><img src=x onerror=a>',
        "&lt;b&gt;",
        "</style><!--",
        "\ud800",
        "\x00",
    ]
)


@settings(deadline=None)  # the machine is shared
@given(text=nasty)
def test_no_text_can_change_the_structure_of_the_page(page, report, row, text):
    def with_text(value):
        return page(
            title=value,
            config_toml=value,
            reports=[report(1, public_metrics={f"{value}.": 1.0})],
            statement=[row(adversary=value, unit=value, relation=value, assumptions=(value,))],
            facts={f"{value}.": value, "trained share": value},
            final_metrics={f"{value}.": 1.0},
        )

    source = with_text(text)
    source.encode()  # a lone surrogate would fail here, when the file is written
    parsed, plain = Page(source), Page(with_text("x"))
    assert parsed.tags == plain.tags
    assert len(parsed.attributes) == len(plain.attributes)
    kept = "".join("\ufffd" if re.match(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", c) else c for c in text)
    assert parsed.texts["h1"] == [kept]
    assert parsed.texts["pre"] == [kept]


def test_an_audit_shows_the_claim_beside_what_was_shown_and_says_which_is_larger(page):
    assert "Audit" not in page()
    passed = page(audit=AuditFigures(claimed=2.94001, lower_bound=1.23456, confidence=0.95, canaries=1000))
    assert "2.941" in passed  # a claim is rounded up, what was shown is rounded down
    assert "1.234" in passed
    assert "with 1,000 canaries, at 0.95 confidence: PASS" in passed
    failed = page(audit=AuditFigures(claimed=1.0, lower_bound=2.0, confidence=0.99, canaries=100))
    assert "at 0.99 confidence: FAIL" in failed
    assert Page(failed).open == []
    nothing = page(audit=AuditFigures(claimed=1.0, lower_bound=0.0, confidence=0.95, canaries=100))
    assert '<dd class="value">0</dd>' in nothing
