"""What the page of a build has of its own beside the looks that all our pages share."""

STYLESHEET = """
.remarks { margin: 20px 0 0; padding: 14px 18px 14px 34px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.remarks li { overflow-wrap: anywhere; }
.scroll:has(> .plain) { width: fit-content; max-width: 100%; }
.plain { width: auto; }
.plain th:first-child, .plain td:first-child { text-align: left; white-space: normal; min-width: 84px; overflow-wrap: break-word; }
.plain.told th:last-child, .plain.told td:last-child { text-align: left; color: var(--soft); }
.reasons th, .reasons td { text-align: left; }
.reasons td:nth-child(2), .reasons th:nth-child(2) { text-align: right; }
.reasons td:nth-child(3) { width: 22%; min-width: 90px; }
.reasons td:last-child { white-space: normal; min-width: 220px; color: var(--soft); }
a { color: var(--leaf); text-underline-offset: 3px; }
.bar { display: block; height: 8px; border-radius: 4px; background: var(--warning); }
.nothing { margin: 10px 2px 0; font-size: 13px; color: var(--soft); }
.scroll + details { margin-top: 12px; }
h3 { scroll-margin-top: 16px; }
h3 span { margin-left: 6px; font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
.meaning { margin: -8px 0 10px; font-size: 14px; color: var(--soft); }
.names { margin: 0; padding: 10px 18px; list-style: none; background: var(--card); border: 1px solid var(--line); border-radius: 12px; font-size: 14px; }
.names li { padding: 3px 0; overflow-wrap: anywhere; color: var(--soft); } .names code { color: var(--ink); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(142px, 1fr)); gap: 12px; }
.exhibit { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 10px; }
.exhibit.of2 { grid-column: span 2; } .exhibit.of3 { grid-column: span 3; } .exhibit.of4 { grid-column: span 4; }
.views { display: flex; flex-wrap: wrap; gap: 12px; }
.exhibit figure { flex: 1 1 110px; margin: 0; min-width: 0; }
.frame { display: grid; place-items: center; height: 128px; overflow: hidden; background: var(--paper); border-radius: 8px; }
.frame img { display: block; max-width: 100%; max-height: 128px; }
.frame.words { display: block; padding: 8px; font: 11px/1.4 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", Consolas, monospace; overflow-wrap: anywhere; color: var(--soft); }
.frame.none { font-size: 12px; color: var(--soft); border: 1px dashed var(--line); }
figcaption { margin-top: 7px; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b, figcaption code, figcaption span { display: block; }
figcaption b { font-weight: 600; } figcaption code { font-size: 11px; color: var(--soft); }
.role { font-size: 11px; font-weight: 700; color: var(--warning); } figure + figure .role { color: var(--good); }
.detail { margin: 6px 0 0; padding-top: 6px; border-top: 1px solid var(--line); font-size: 12px; line-height: 1.35; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 700px) { .reasons th:nth-child(3), .reasons td:nth-child(3) { display: none; } .exhibit.of3, .exhibit.of4 { grid-column: span 2; } }
@media print { .exhibit { break-inside: avoid; } }
"""
