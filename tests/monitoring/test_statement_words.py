from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.monitoring.statement import NO_STATEMENT, NOT_PRIVATE, statement_in_words
from dp_federated_lora.monitoring.wording import metric_label, metric_text, one_in, rounded_up


def test_each_adversary_gets_a_paragraph_with_unit_relation_bound_and_assumptions(row):
    text = statement_in_words(
        [row(), row(adversary="the server", unit="example", epsilon=1.0, assumptions=("a", "b"))],
        insecure=False,
    )
    recipients, server = text.split("\n\n")
    assert recipients.startswith("Against recipients of the model: ")
    assert "one client with all of its data" in recipients
    assert "add or remove one" in recipients
    assert "1e-5 (1 in 100,000)" in recipients
    assert recipients.endswith("This rests on: the server is honest.")
    assert "one example" in server
    assert "Somebody with several examples in the data is protected less" in server
    assert server.endswith("This rests on: a; b.")


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(None, None), (1.0, None), (None, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (-1.0, 0.0), (1.0, 1.0)],
)
def test_a_missing_or_meaningless_number_is_said_to_be_no_guarantee(row, epsilon, delta):
    text = statement_in_words([row(epsilon=epsilon, delta=delta)], insecure=False)
    assert text.startswith("Against recipients of the model: No guarantee. Nothing here limits")
    assert "e^" not in text
    assert "This rests on" not in text


def test_a_row_without_guarantee_and_without_assumptions_ends_cleanly(row):
    text = statement_in_words([row(epsilon=None, delta=None, assumptions=())], insecure=False)
    assert text == text.rstrip()


def test_a_run_with_seeded_noise_claims_nothing(row):
    text = statement_in_words([row(), row(adversary="the server")], insecure=True)
    warning, *paragraphs = text.split("\n\n")
    assert warning == f"{NOT_PRIVATE}."
    assert len(paragraphs) == 2
    assert all("No guarantee. The noise came from a fixed seed" in paragraph for paragraph in paragraphs)
    assert not re.search(r"e\^|1e-5|at most", text)


@pytest.mark.parametrize("insecure", [False, True])
def test_an_empty_statement_promises_nothing(insecure):
    text = statement_in_words([], insecure=insecure)
    assert text.endswith(NO_STATEMENT)
    assert text.startswith(NOT_PRIVATE) == insecure


def test_a_pure_guarantee_without_assumptions_mentions_no_delta(row):
    text = statement_in_words([row(delta=0.0, assumptions=())], insecure=False)
    assert "additional probability" not in text
    assert text.endswith("It rests on no further assumption.")


def test_an_epsilon_without_practical_value_is_called_so(row):
    assert "close to none" in statement_in_words([row(epsilon=12.0)], insecure=False)
    assert "close to none" not in statement_in_words([row(epsilon=8.0)], insecure=False)
    assert "more than a million" in statement_in_words([row(epsilon=1e6)], insecure=False)


@settings(deadline=None)  # the machine is shared
@given(epsilon=st.floats(0, 13), delta=st.floats(0, 0.5))
def test_the_printed_factor_and_best_guess_are_never_better_than_the_truth(row, epsilon, delta):
    text = statement_in_words([row(epsilon=epsilon, delta=delta)], insecure=False)
    shown, factor = re.search(r"e\^(\S+) = ([\d.,]*\d)", text).groups()
    assert float(shown) >= epsilon
    # what is printed as equal is equal to four digits, rounded against us
    assert math.exp(epsilon) * (1 - 1e-12) <= float(factor.replace(",", "")) <= math.exp(float(shown)) * 1.001
    guess = float(re.search(r"right at most ([\d.]+) %", text).group(1)) / 100
    truth = (math.exp(epsilon) + delta) / (1 + math.exp(epsilon))
    assert truth - 1e-12 <= guess <= min(1.0, truth + 1.01e-4)


@settings(deadline=None)  # the machine is shared
@given(value=st.floats(0, 1e6))
def test_rounding_a_bound_never_lowers_it(value):
    shown = float(rounded_up(value))
    assert value <= shown <= value * 1.001 + 1e-300


@pytest.mark.parametrize(
    ("metric", "value", "label", "text"),
    [
        ("accuracy", 0.9623, "Accuracy", "96.2 %"),
        ("macro_f1", 1.0, "Macro-F1", "100.0 %"),
        ("perplexity", 27.9134, "Perplexity", "27.91"),
        ("top5_accuracy", math.nan, "Top5 accuracy", "n/a"),
    ],
)
def test_metrics_are_named_and_formatted_for_people(metric, value, label, text):
    assert metric_label(metric) == label
    assert metric_text(metric, value) == text


def test_one_in_says_nothing_where_it_would_mislead():
    assert one_in(1e-6) == "1 in 1,000,000"
    assert one_in(0.0) == one_in(5e-324) == one_in(0.5) == ""
    assert rounded_up(math.nan) == "n/a"
