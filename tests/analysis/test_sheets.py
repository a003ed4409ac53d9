import csv
import io
import re

import pytest

from effnet_train.analysis.sheets import FORMATS, Column, Sheet

SHEET = Sheet(
    "A title",
    [
        Column("name", "network"),
        Column("paper", "paper", "top-1, %", ".1f", True),
        Column("mine", "here", "top-1, %", ".1f", True),
        Column("never", "never", form="d"),
        Column("size_m", "parameters, M", form="g"),
    ],
    [
        {"name": "A_1 & B", "paper": 0.771, "mine": 0.765, "mine_spread": 0.0021, "size_m": 5.3},
        {"name": "C|D", "paper": 0.5, "mine": 0.5, "from_paper": ["mine"], "size_m": None},
        {"name": "E~F", "size_m": -5.2},
    ],
    ["A note"],
)


def test_terminal_columns_stand_below_their_heads() -> None:
    title, _, groups, heads, first, second, _, _, note = SHEET.render("terminal").split("\n")
    assert (title, note) == ("A title", "A note")
    assert groups.strip() == "top-1, %"
    assert heads.split() == ["network", "paper", "here", "parameters,", "M"]
    assert first.split() == ["A_1", "&", "B", "77.1", "76.5", "±", "0.21", "5.3"]
    assert second.split() == ["C|D", "50.0", "50.0†"]
    assert heads.index("here") + len("here") == first.index("0.21") + 4 == len(second)


def test_csv_holds_bare_values_and_names_the_papers() -> None:
    rows = list(csv.DictReader(io.StringIO(SHEET.render("csv"))))
    assert rows == [
        {
            "name": "A_1 & B",
            "paper": "0.771",
            "mine": "0.765",
            "mine_spread": "0.0021",
            "size_m": "5.3",
            "from_paper": "",
        },
        {"name": "C|D", "paper": "0.5", "mine": "0.5", "mine_spread": "", "size_m": "", "from_paper": "mine"},
        {"name": "E~F", "paper": "", "mine": "", "mine_spread": "", "size_m": "-5.2", "from_paper": ""},
    ]


def test_markdown_has_as_many_cells_in_each_line() -> None:
    lines = [line for line in SHEET.render("markdown").split("\n") if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "top-1, %: here" in lines[0]
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert r"C\|D" in lines[3]


def test_latex_escapes_and_counts_its_columns() -> None:
    text = SHEET.render("latex")
    assert r"\begin{tabular}{lrrr}" in text
    assert r"A\_1 \& B & 77.1 & 76.5 $\pm$ 0.21 & 5.3 \\" in text
    assert r"C|D & 50.0 & 50.0\textsuperscript{\textdagger} &  \\" in text
    assert r"E\textasciitilde{}F &  &  & $-$5.2 \\" in text
    assert r"\multicolumn{1}{c}{} & \multicolumn{2}{c}{top-1, \%} & \multicolumn{1}{c}{} \\" in text


@pytest.mark.parametrize("form", FORMATS)
def test_a_column_without_values_is_left_out(form: str) -> None:
    assert "never" not in SHEET.render(form)
