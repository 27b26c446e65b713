"""Rows as text, records, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pose2id.report.comparison import Row

_RANKS = (1, 5, 10)
_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "²": "$^2$"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON, as fractions; published figures where a row has them."""
    return [
        {
            "name": row.name,
            "mAP": row.result.mAP,
            **{f"rank{r}": row.result.rank(r) for r in _RANKS},
            "mINP": row.result.mINP,
            "id2": row.id2,
            "num_valid_queries": row.result.num_valid_queries,
            **{f"published_{name}": value for name, value in row.published.items()},
        }
        for row in rows
    ]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A head and the rows, in percent; ID² as it is."""
    published = list(dict.fromkeys(name for row in rows for name in row.published))
    head = ["", "mAP", *(f"Rank-{r}" for r in _RANKS), "mINP", "ID²", *(f"{name}, published" for name in published)]
    lines = [head]
    for row in rows:
        values = (row.result.mAP, *map(row.result.rank, _RANKS), row.result.mINP)
        figures = [row.published.get(name) for name in published]
        lines.append(
            [
                row.name,
                *(f"{100 * value:.2f}" for value in values),
                "-" if row.id2 is None else f"{row.id2:.4f}",
                *("-" if value is None else f"{100 * value:.2f}" for value in figures),
            ]
        )
    return lines


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, in percent; ID² as it is."""
    return aligned(cells(rows))


def number_table(curves: Mapping[str, Sequence[float]]) -> str:
    """What `by_number` gives as aligned text, in percent, one column per number of generated images."""
    numbers = range(max(map(len, curves.values())))
    return aligned(
        [["mAP", *map(str, numbers)], *([name, *(f"{100 * v:.2f}" for v in mAPs)] for name, mAPs in curves.items())]
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *values in lines:
        numbers = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        text.append(f"{name.ljust(widths[0])}  {numbers}")
    return "\n".join(text)


def as_csv(rows: Sequence[Row]) -> str:
    """`records` as CSV, fractions in full precision."""
    content = records(rows)
    names = list(dict.fromkeys(name for record in content for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(content)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """`table` in Markdown."""
    head, *lines = ([cell.replace("|", r"\|") for cell in line] for line in cells(rows))
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def as_latex(rows: Sequence[Row]) -> str:
    r"""`table` as a tabular environment with the rules of booktabs (`\usepackage{booktabs}`)."""
    head, *lines = ([_escaped(cell) for cell in line] for line in cells(rows))
    top, *body = (f"{' & '.join(line)} \\\\" for line in (head, *lines))
    columns = "l" + "r" * (len(head) - 1)
    rules = r"\toprule", top, r"\midrule", *body, r"\bottomrule"
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *rules, r"\end{tabular}"])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


FORMATS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "text": table,
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}
