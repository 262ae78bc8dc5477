"""HTML skeleton and inline style sheet of the page: the report is one file without scripts or external resources."""

from __future__ import annotations

from string import Template

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="fastkd">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1b1e23; --muted: #5b6370; --line: #dfe2e7; --accent: #0b5cad;
  --up: #0b6b4f; --down: #b0310f;
  --run-1: #6b7280; --run-2: #d1620a; --run-3: #0072b2; --run-4: #a4478a; --run-5: #00815c; --run-6: #8a6d00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1b1f26; --ink: #e7eaee; --muted: #a0a9b6; --line: #323943; --accent: #7cb8f2;
    --up: #56c99e; --down: #f0896a;
    --run-1: #a3acb9; --run-2: #f59a4c; --run-3: #5db4f0; --run-4: #dd8fc6; --run-5: #45c79b; --run-6: #d8ba4a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.4rem; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 0.75rem; }
h3 { font-size: 0.95rem; margin: 1.75rem 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 44rem); gap: 0.4rem 1.25rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; }
.date, .caption { color: var(--muted); font-size: 0.9rem; }
.caption { margin-top: 0.6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.6rem 0.5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: 0.85rem; font-weight: 500; border-bottom: 2px solid var(--line); }
tbody tr { border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; white-space: normal; min-width: 11rem; }
.note { display: block; color: var(--muted); font-size: 0.85rem; font-weight: 400; line-height: 1.4; max-width: 26rem; }
.spread { color: var(--muted); font-size: 0.82em; }
.gain { display: block; font-size: 0.8rem; color: var(--muted); }
.gain.up { color: var(--up); } .gain.down { color: var(--down); }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem;
  margin: 0 0 0.75rem; padding: 0; list-style: none; font-size: 0.9rem;
}
.legend svg { width: 2rem; height: 0.7rem; margin-right: 0.5rem; vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1rem 0.6rem; }
.chart figcaption { font-size: 0.9rem; font-weight: 600; margin-bottom: 0.4rem; overflow-wrap: anywhere; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg * { stroke-linejoin: round; stroke-linecap: butt; }
.example { padding: 1.1rem 0 1.25rem; border-top: 1px solid var(--line); }
.example > figcaption { font-size: 1.05rem; margin-bottom: 0.75rem; overflow-wrap: anywhere; }
.example > figcaption::before { content: "\\201c"; color: var(--muted); }
.example > figcaption::after { content: "\\201d"; color: var(--muted); }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; }
.panel { width: 192px; font-size: 0.85rem; line-height: 1.4; }
.panel img { display: block; width: 192px; height: auto; border-radius: 4px; margin-bottom: 0.4rem; }
.panel .iou { color: var(--muted); font-variant-numeric: tabular-nums; white-space: nowrap; }
.key { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px; margin-right: 0.35em; }
.key.truth { background: #0072b2; } .key.hit { background: #009e73; } .key.false { background: #e67e00; }
.words { width: auto; }
.words th, .words td { text-align: center; padding: 0.25rem 0.2rem; min-width: 0; }
.words thead th, .words thead td { border-bottom: 0; vertical-align: bottom; color: var(--ink); }
.words tbody tr { border-bottom: 0; }
.words tbody th { text-align: left; vertical-align: middle; position: sticky; left: 0; background: var(--paper); }
.words img { display: block; width: 96px; height: auto; border-radius: 3px; }
.words .note { max-width: none; }
.scroll + .scroll { margin-top: 1.5rem; } .scroll + .legend { margin-top: 1rem; }
.panel.matrix .iou { white-space: normal; }
.matrix img { image-rendering: pixelated; }
.facts { width: auto; font-size: 0.9rem; }
.facts th, .facts td { text-align: left; padding: 0.35rem 2rem 0.35rem 0; white-space: normal; min-width: 0; }
.facts th { color: var(--muted); font-weight: 500; white-space: nowrap; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
@media (max-width: 32rem) {
  main { padding: 1.75rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .panel, .panel img { width: calc(50vw - 1.5rem); }
}
@media print {
  body { font-size: 10pt; background: none; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 1.5rem; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr 1fr; }
  .charts.wide { grid-template-columns: 1fr 1fr; }
  .panels { flex-wrap: nowrap; gap: 0.6rem; }
  .panel { width: auto; flex: 0 1 192px; }
  .panel img { width: 100%; }
  .panel img, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
