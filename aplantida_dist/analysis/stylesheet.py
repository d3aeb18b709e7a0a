"""What the page has of its own beside the looks that all our pages share."""

STYLESHEET = """
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
.runs th:nth-child(-n+2), .runs td:nth-child(-n+2) { text-align: left; }
.runs th, .runs td { padding: 7px 10px; }
.runs td:nth-child(2) { white-space: normal; min-width: 150px; }
details .verdicts { margin: 0 0 16px; }
.verdicts + details { margin-top: 12px; }
.facts { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 5px 18px; margin: 0 0 16px; font-size: 14px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  .verdict { padding: 12px 14px 13px; }
  .plots figure { padding: 8px 4px 4px; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 8px; }
}
@media print { .verdict { break-inside: avoid; } }
"""
