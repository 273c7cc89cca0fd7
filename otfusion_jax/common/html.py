"""Text and tables as HTML for notebooks, which need no script, no style sheet and no other page."""

import html
from collections.abc import Sequence

# Colours are those of the page around, so that tables are as readable on dark pages as on light.
_TABLE = "border-collapse: collapse; color: inherit; background: transparent; font-size: 90%"
# Reasons why axes are pinned are long: cells wrap where a page is narrow.
_CELL = (
    "text-align: left; padding: 2px 10px; color: inherit; background: transparent; "
    "white-space: pre-wrap"
)
_RULE = "border-bottom: 1px solid currentColor"


def html_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, folded: bool = False
) -> str:
    """Writes a table.

    Args:
        columns: The names of the columns.
        rows: The rows, a text for each column. Whatever they hold is shown as it is.
        caption: What stands above the table.
        folded: Whether the table is shown only once its caption is clicked.

    Returns:
        A piece of HTML.
    """
    lines = [f'<table style="{_TABLE}">', _row("th", columns, f"{_CELL}; {_RULE}")]
    for row in rows:
        lines.append(_row("td", row, _CELL))
    lines.append("</table>")
    table = "\n".join(lines)
    if folded:
        return f"<details><summary>{html.escape(caption)}</summary>\n{table}\n</details>"
    return f"<div>{html.escape(caption)}</div>\n{table}"


def html_lines(lines: Sequence[str]) -> str:
    """Writes lines of text, each by itself.

    Args:
        lines: The lines, which are shown as they are.

    Returns:
        A piece of HTML.
    """
    return "\n".join([f"<div>{html.escape(line)}</div>" for line in lines])


def _row(tag: str, cells: Sequence[str], style: str) -> str:
    """Writes one row; every cell has its own style, as notebooks have styles of their own."""
    written = []
    for cell in cells:
        written.append(f'<{tag} style="{style}">{html.escape(cell)}</{tag}>')
    return f"<tr>{''.join(written)}</tr>"
