"""The HTML of a report: one page that loads nothing, its sections, figures and tables."""

from __future__ import annotations

import html
import json
from typing import Any

from . import __version__
from .tables import format_cell

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f5f7; --line: #d5dae0; --quiet: #57606a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171a; --soft: #1d2125; --line: #343a41; --quiet: #9aa4af }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
p { margin: .4rem 0; max-width: 45rem }
.quiet, figcaption, footer { color: var(--quiet); font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
@media (max-width: 30rem) {
  th, td { padding: .3rem .25rem; font-size: .8rem }
  th, td:first-child { white-space: normal }
}
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; padding: .6rem; background: var(--soft); border-radius: .5rem; min-width: 0 }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
footer { margin-top: 2rem }
"""


def page(title: str, introduction: str, sections: str) -> str:
    """The whole page around its sections, which are HTML; title and introduction are plain text."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(introduction)}</p>\n{sections}"
        f"<footer>flexdistill {__version__}</footer>\n</body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>\n"


def figure_grid(figures: dict[str, str]) -> str:
    """Figures by caption."""
    shown = (
        f"<figure>{svg.replace('<svg', f'<svg role=img aria-label={json.dumps(html.escape(caption))}', 1)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, svg in figures.items()
    )
    return f"<div class=figures>{''.join(shown)}</div>"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", [format_cell(value) for value in row]) for row in rows)
    return f"<div class=wide><table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table></div>"
