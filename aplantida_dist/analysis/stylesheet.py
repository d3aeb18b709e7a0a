"""The looks of the page: one style sheet for light and dark, for a desk and for a phone."""

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
.verdicts { display: grid; gap: 12px; }
.verdict {
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--tone);
  border-radius: 4px 12px 12px 4px; padding: 14px 18px 15px;
}
.verdict h3 { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 10px; margin: 0 0 4px; font-size: 17px; line-height: 1.35; }
.verdict p { margin: 6px 0 0; max-width: 78ch; overflow-wrap: anywhere; }
.verdict .meaning, .verdict .remedy { color: var(--soft); }
.verdict .remedy b { color: var(--ink); font-weight: 600; }
.severity { font-size: 12px; font-weight: 700; letter-spacing: .07em; text-transform: uppercase; color: var(--tone); }
.error { --tone: var(--error); } .warning { --tone: var(--warning); } .note { --tone: var(--note); } .good { --tone: var(--good); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; align-items: start; }
.plots figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 10px 8px; }
.plots img { display: block; width: 100%; height: auto; }
.scroll { overflow: auto; max-height: 620px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
tr.marked td { background: var(--marked); font-weight: 650; }
.runs th:nth-child(-n+2), .runs td:nth-child(-n+2) { text-align: left; }
.runs th, .runs td { padding: 7px 10px; }
.runs td:nth-child(2) { white-space: normal; min-width: 150px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 12px; padding: 0 18px; }
summary { padding: 12px 0; font-weight: 600; cursor: pointer; overflow-wrap: anywhere; }
details .scroll, details .verdicts { margin: 0 0 16px; }
.verdicts + details { margin-top: 12px; }
.facts { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 5px 18px; margin: 0 0 16px; font-size: 14px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", Consolas, monospace; }
pre { margin: 0 0 16px; padding: 12px 14px; overflow-x: auto; background: var(--paper); border-radius: 8px; }
footer { margin-top: 44px; font-size: 13px; color: var(--soft); }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 11px 13px; } .tile dd { font-size: 20px; }
  .verdict { padding: 12px 14px 13px; }
  .plots figure { padding: 8px 4px 4px; }
  th, td { padding: 7px 10px; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 8px; }
}
@media print { .scroll { max-height: none; } .verdict, figure { break-inside: avoid; } }
"""
