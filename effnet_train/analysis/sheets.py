"""A table of values for the terminal, Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("terminal", "markdown", "csv", "latex")
FROM_PAPER = "†"
_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
        **{FROM_PAPER: r"\textsuperscript{\textdagger}", "±": r"$\pm$"},
    }
)


@dataclass(frozen=True)
class Column:
    """Describe a column: the key of its values, its head under that of its group, and how a value is worded.

    `form` is a format specification; percentages are fractions among the values, in CSV too.
    """

    key: str
    head: str
    group: str = ""
    form: str = ""
    percent: bool = False

    def word(self, row: Mapping[str, Any]) -> str:
        """Word the value of a row; nothing where it has none."""
        value = row.get(self.key)
        if value is None:
            return ""
        text = format(100 * value if self.percent else value, self.form)
        spread = row.get(f"{self.key}_spread")
        text += f" ± {100 * spread:.2f}" if spread is not None and self.percent else ""
        return text + FROM_PAPER * (self.key in row.get("from_paper", ()))


@dataclass(frozen=True)
class Sheet:
    """Hold a table: a title, columns, rows by the columns' keys, and notes.

    A row's `from_paper` names the keys whose values were not found here, and are the paper's.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()

    def render(self, form: str) -> str:
        """Return the table in one of FORMATS, without an end of line."""
        shown = [column for column in self.columns if any(row.get(column.key) is not None for row in self.rows)]
        return _RENDERERS[form](self, shown)


def _terminal(sheet: Sheet, columns: Sequence[Column]) -> str:
    body = [[column.word(row) for column in columns] for row in sheet.rows]
    widths = [max(len(text) for text in (column.head, *(line[i] for line in body))) for i, column in enumerate(columns)]
    # A group's name may be wider than what stands below it: its last column makes room.
    for first, last in _groups(columns):
        room = sum(widths[first:last]) + 2 * (last - first - 1)
        widths[last - 1] += max(0, len(columns[first].group) - room)
    left = [not (column.form or column.percent) for column in columns]
    heads = [column.head for column in columns]
    groups = ["  ".join(_group_cells(columns, widths)).rstrip()] if any(column.group for column in columns) else []
    lines = [_line(cells, widths, left) for cells in (heads, *body)]
    notes = ["", *sheet.notes] if sheet.notes else []
    return "\n".join([sheet.title, "", *groups, *lines, *notes])


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    padded = (
        cell.ljust(width) if flush else cell.rjust(width)
        for cell, width, flush in zip(cells, widths, left, strict=True)
    )
    return "  ".join(padded).rstrip()


def _groups(columns: Sequence[Column]) -> list[tuple[int, int]]:
    """Return where runs of columns of the same group begin and end."""
    starts = [i for i in range(len(columns)) if i == 0 or columns[i].group != columns[i - 1].group]
    return list(zip(starts, [*starts[1:], len(columns)], strict=True))


def _group_cells(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    return [
        columns[first].group.center(sum(widths[first:last]) + 2 * (last - first - 1))
        for first, last in _groups(columns)
    ]


def _full_head(column: Column) -> str:
    return f"{column.group}: {column.head}" if column.group else column.head


def _markdown(sheet: Sheet, columns: Sequence[Column]) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rules = ["---:" if column.form or column.percent else "---" for column in columns]
    body = [row([column.word(values) for column in columns]) for values in sheet.rows]
    notes = [line for note in sheet.notes for line in ("", note)]
    return "\n".join(
        [f"**{sheet.title}**", "", row([_full_head(column) for column in columns]), row(rules), *body, *notes]
    )


def _csv(sheet: Sheet, columns: Sequence[Column]) -> str:
    """Return the bare values under the columns' keys; `from_paper` names those that are the paper's."""
    names = [
        name
        for column in columns
        for name in (column.key, f"{column.key}_spread")
        if name == column.key or any(row.get(name) is not None for row in sheet.rows)
    ]
    marked = any(row.get("from_paper") for row in sheet.rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(["from_paper"] if marked else [])])
    for row in sheet.rows:
        cells = ["" if row.get(name) is None else _bare(row[name]) for name in names]
        writer.writerow([*cells, *([" ".join(row.get("from_paper", ()))] if marked else [])])
    return text.getvalue().rstrip("\n")


def _bare(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _latex(sheet: Sheet, columns: Sequence[Column]) -> str:
    def row(cells: Sequence[str]) -> str:
        signs = ("$-$" if cell.startswith("-") else "" for cell in cells)  # a hyphen is shorter
        texts = (cell.removeprefix("-").translate(_LATEX) for cell in cells)
        return " & ".join(sign + text for sign, text in zip(signs, texts, strict=True)) + r" \\"

    kinds = "".join("r" if column.form or column.percent else "l" for column in columns)
    groups = " & ".join(
        rf"\multicolumn{{{last - first}}}{{c}}{{{columns[first].group.translate(_LATEX)}}}"
        for first, last in _groups(columns)
    )
    head = [groups + r" \\"] if any(column.group for column in columns) else []
    return "\n".join(
        [
            f"% {sheet.title}",
            *(f"% {note}" for note in sheet.notes),
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\hline",
            *head,
            row([column.head for column in columns]),
            r"\hline",
            *(row([column.word(values) for column in columns]) for values in sheet.rows),
            r"\hline",
            r"\end{tabular}",
        ]
    )


_RENDERERS: Mapping[str, Callable[[Sheet, Sequence[Column]], str]] = {
    "terminal": _terminal,
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
}
