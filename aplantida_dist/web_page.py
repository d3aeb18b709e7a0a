"""The web page: one file that needs nothing else, for light and dark, for a desk and for a phone. What our reports share of their looks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape

STYLESHEET = """
:root {
  color-scheme: light dark;
  --paper: #f6f8f6; --card: #ffffff; --ink: #1d2a24; --soft: #5d6a63; --line: #dfe5e1; --leaf: #1f7a4d;
  --error: #b3261e; --warning: #a15c00; --note: #3b5fa8; --good: #1f7a4d; --marked: #e9f4ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0e1210; --card: #151b18; --ink: #e8eeea; --soft: #9aa8a0; --line: #2a332e; --leaf: #54c98b;
    --error: #ff7b6b; --warning: #f0a25c; --note: #8fb0f2; --good: #54c98b; --marked: #18271f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
.overline { margin: 0; font-size: 13px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; color: var(--leaf); }
h1 { margin: 4px 0 4px; font-size: clamp(26px, 4.4vw, 38px); line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 21px; line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
h3 { margin: 24px 0 10px; font-size: 16px; overflow-wrap: anywhere; }
.lead { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 26px 0 0; padding: 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 13px 16px 12px; }
.tile dt { font-size: 13px; color: var(--soft); }
.tile dd { margin: 2px 0 0; font-size: 24px; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile small { display: block; font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.scroll { overflow: auto; max-height: 620px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
tr.marked td { background: var(--marked); font-weight: 650; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 12px; padding: 0 18px; }
summary { padding: 12px 0; font-weight: 600; cursor: pointer; overflow-wrap: anywhere; }
details .scroll { margin: 0 0 16px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", Consolas, monospace; }
pre { margin: 0 0 16px; padding: 12px 14px; overflow-x: auto; background: var(--paper); border-radius: 8px; }
footer { margin-top: 44px; font-size: 13px; color: var(--soft); }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 11px 13px; } .tile dd { font-size: 20px; }
  th, td { padding: 7px 10px; }
}
@media print { .scroll { max-height: none; } figure { break-inside: avoid; } }
"""


def web_page(title: str, sections: Sequence[str], *, stylesheet: str) -> str:
    """The whole page. `title` is text; `sections` are HTML whose names are escaped already; `stylesheet` adds to the common one.

    The content security policy forbids every load from elsewhere and every script, whatever a name may hold.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLESHEET}{stylesheet}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(overline: str, title: str, *, lead: str) -> str:
    """What a page opens with, out of text."""
    return f'<p class="overline">{escape(overline)}</p>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>'


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    """The few numbers that a reader wants first: (name, value, remark) of each, all text."""
    cells = (
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>'
        for name, value, remark in numbers
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str, marked: int | None = None) -> str:
    """A table of text; `kind` is its class in the style sheet, `marked` the row that stands out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr{' class=marked' if i == marked else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def data_uri(content: bytes, *, media_type: str) -> str:
    """A picture as an address that holds it."""
    return f"data:{media_type};base64,{b64encode(content).decode()}"
