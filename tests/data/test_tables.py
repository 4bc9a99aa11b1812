"""Tables: the four formats, and errors that name file and line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.data import read_table
from dp_federated_lora.errors import DataError

UNTIMED = settings(deadline=None)  # a busy machine is no failure

ORANGE = "Category\tText\nd\tstring\nclass\t\n"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("blank", ["", "\n", "\t\n"])
def test_orange_tables_skip_their_three_header_rows_and_an_empty_one(tmp_path: Path, blank: str) -> None:
    table = read_table(write(tmp_path, "x.tab", f"{ORANGE}{blank}earn\tprofit rose\nacq\tshares sold\n"))
    assert table.columns == {"Category": ["earn", "acq"], "Text": ["profit rose", "shares sold"]}
    assert len(table) == 2


def test_an_orange_table_of_one_column_may_have_an_empty_row_of_flags(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "x.tab", "Text\nstring\n\nhello\n")).columns == {"Text": ["hello"]}


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_values(tmp_path: Path) -> None:
    content = "\ufeff" + ORANGE.replace("\n", "\r\n") + "earn\tprofit\r\n"
    assert read_table(write(tmp_path, "x.tab", content)).columns == {"Category": ["earn"], "Text": ["profit"]}


@pytest.mark.parametrize(
    "text",
    [
        ' He said "hello" and left',
        "it's 5\" long",
        'ends with "quote"',
        "unusual\u2028separator\x85and\x1cmore",
        " spaces kept ",
        "",
    ],
)
def test_quotes_and_separators_inside_an_unquoted_value_are_kept(tmp_path: Path, text: str) -> None:
    assert read_table(write(tmp_path, "x.tab", f"{ORANGE}earn\t{text}\nacq\tnext\n")).column("Text") == [
        text,
        "next",
    ]


def test_a_quoted_value_loses_its_quotes_and_may_hold_tabs_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path, "x.tab", f'{ORANGE}earn\t"""smart"" he\tsaid\nthen"\nacq\tnext\n')
    assert read_table(path).column("Text") == ['"smart" he\tsaid\nthen', "next"]


@UNTIMED
@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([("x.csv", ","), ("x.tsv", "\t")]),
)
def test_whatever_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], kind: tuple[str, str]
) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=kind[1]).writerows([("a", "b"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), kind[0], out.getvalue())
    assert read_table(path).columns == {"a": [a for a, _ in rows], "b": [b for _, b in rows]}


@UNTIMED
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.integers()), min_size=1, max_size=5))
def test_json_lines_are_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    content = "\n".join(json.dumps({"text": text, "n": n}, ensure_ascii=False) for text, n in rows)
    table = read_table(write(tmp_path_factory.mktemp("jsonl"), "x.jsonl", content))
    assert table.columns == {"text": [text for text, _ in rows], "n": [str(n) for _, n in rows]}


def test_json_keys_may_come_in_another_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "x.jsonl", '{"a": "1", "b": true}\n\n{"b": 0.5, "a": "2"}\n'))
    assert table.columns == {"a": ["1", "2"], "b": ["true", "0.5"]}


def test_a_value_longer_than_the_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    book = "word " * 100_000
    assert read_table(write(tmp_path, "x.csv", f"text\n{book}\n")).column("text") == [book]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", "is empty"),
        ("x.tab", "\n\n", "is empty"),
        ("x.csv", "a,b\n", "no rows"),
        ("x.tab", ORANGE, "no rows"),
        ("x.jsonl", "{}\n", "no rows"),
        ("x.csv", "a,b\n1,2\n1\n", r"line 3: 1 values for the 2 columns"),
        ("x.csv", "a,b\n1,2,3\n", r"line 2: 3 values for the 2 columns"),
        ("x.tsv", "a\tb\n1\t2\t3\n", r"line 2: 3 values"),
        ("x.tab", f"{ORANGE}\nearn\n", r"line 5: 1 values"),
        ("x.csv", "a,a\n1,2\n", "distinct"),
        ("x.csv", 'a,b\n1,"never closed\n', r"line 2: .*doubled"),
        ("x.csv", 'a,b\n1,"closed" early\n', r"line 2: .*doubled"),
        ("x.tab", "Text\tLabel\nfirst row\tx\nsecond row\ty\n", r"line 2: no Orange column types.*\.tsv"),
        ("x.tab", "Text\nstring\n", r"line 2: no Orange"),
        ("x.jsonl", "not json\n", r"line 1: .*JSON object"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"line 2: not a JSON object"),
        ("x.jsonl", '{"a": 1}\n{"b": 1}\n', r"line 2: keys \['b'\] differ"),
        ("x.jsonl", '{"a": null}\n', r"line 1: column 'a' holds a NoneType"),
        ("x.jsonl", '{"a": ["x"]}\n', r"line 1: column 'a' holds a list"),
        ("x.parquet", "PAR1", r"\.csv, \.tsv, \.tab or \.jsonl"),
        ("x.csv", b"a\nfine\nr\xe9sum\xe9\n", r"line 3: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line_and_the_fix(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_directory_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "absent.csv", tmp_path / "folder.csv"):
        with pytest.raises(DataError, match=path.name):
            read_table(path)


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "x.csv", "text,label\nhello,greeting\n"))
    with pytest.raises(DataError, match=r"x\.csv has no column 'body'; choose one of \['text', 'label'\]"):
        table.column("body")
