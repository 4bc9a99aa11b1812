"""The style sheet of the report page: light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

from typing import Final

STYLE_SHEET: Final = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #59657a; --line: #dde2ea; --grid: #e8ecf1;
  --c0: #2458c5; --c1: #b4560b; --c2: #13795b; --ref: #6b7689;
  --bad: #b3261e; --bad-soft: #fbeae9; --good-soft: #e8eefb; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #12161d; --card: #1a2029; --ink: #e6eaf0; --soft: #9ba7b8; --line: #2d3643; --grid: #28303b;
    --c0: #7ea6f8; --c1: #f0a35e; --c2: #5cc7a1; --ref: #8f9bae;
    --bad: #ff8a80; --bad-soft: #3a2123; --good-soft: #222f4a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 4px 0; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 48px 0 16px; }
h3 { font-size: 1rem; margin: 0; }
.eyebrow { margin: 0; color: var(--soft); font-size: .8125rem; font-weight: 600; }
.lead { margin: 0 0 28px; color: var(--soft); }
.banner { margin: 0; padding: 18px 24px; background: #b3261e; color: #fff; font-size: 1.25rem;
  font-weight: 700; text-align: center; position: sticky; top: 0; z-index: 1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.tile, .card, .chart, pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 16px 18px; }
.tile dt { color: var(--soft); font-size: .8125rem; font-weight: 600; }
.tile dd { margin: 0; }
.value { font-size: 1.625rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .8125rem; line-height: 1.4; }
.bad .value, .bad .badge { color: var(--bad); }
.meter { display: block; height: 6px; margin: 4px 0 6px; border-radius: 3px; overflow: hidden;
  background: var(--grid); }
.meter span { display: block; height: 100%; background: var(--c0); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.chart { margin: 0; padding: 20px; min-width: 0; }
.chart svg { display: block; width: 100%; height: auto; margin: 8px 0; }
.chart text { fill: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 6px 0 0; padding: 0;
  font-size: .8125rem; }
.key { display: inline-block; width: 20px; margin-right: 7px; border-top: 3px solid; vertical-align: middle; }
.key.ref { border-top-style: dashed; border-top-width: 2px; }
.s0 { stroke: var(--c0); color: var(--c0); } .s1 { stroke: var(--c1); color: var(--c1); }
.s2 { stroke: var(--c2); color: var(--c2); }
.ref { stroke: var(--ref); color: var(--ref); stroke-dasharray: 6 5; }
.grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.mark { fill: var(--card); stroke-width: 2; stroke-dasharray: none; }
.hover { fill: transparent; }
figcaption, details { color: var(--soft); font-size: .875rem; }
details { margin-top: 10px; }
summary { cursor: pointer; }
.scroll { overflow: auto; max-height: 360px; }
.facts { padding: 8px 20px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.facts tr:last-child > * { border-bottom: 0; }
.facts th { width: 32%; color: var(--soft); }
.facts th::first-letter { text-transform: uppercase; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 500; }
thead th { font-weight: 600; }
.card { padding: 20px; margin-bottom: 12px; }
.card p { margin: 8px 0 0; max-width: 76ch; }
.badge { display: inline-block; margin-left: 12px; padding: 2px 10px; border-radius: 6px;
  background: var(--good-soft); color: var(--c0); font-size: .8125rem; font-weight: 600; }
.bad .badge { background: var(--bad-soft); }
pre { margin: 0; padding: 18px 20px; overflow: auto;
  font: .8125rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { padding-top: 40px; padding-bottom: 48px; color: var(--soft); font-size: .8125rem; }
@media (min-width: 920px) {
  /* a figure without a neighbour puts its words where the neighbour would be */
  .chart:last-child:nth-child(odd) { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr;
    grid-template-rows: auto auto auto 1fr; column-gap: 56px; }
  .chart:last-child:nth-child(odd) svg { grid-column: 1; grid-row: 1 / 5; }
  .chart:last-child:nth-child(odd) > :not(svg) { grid-column: 2; }
  .chart:last-child:nth-child(odd) figcaption { margin-top: 12px; }
  .card { display: grid; grid-template-columns: 240px 1fr; column-gap: 24px; }
  .card .badge { display: table; margin: 8px 0 0; }
  .card p { margin: 0; }
}
@media (max-width: 600px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 36px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .chart, .card { padding: 16px; }
  .chart text { font-size: 17px; }
  .badge { display: table; margin: 6px 0 0; }
}
@media print {
  html { font-size: 9pt; }
  body { background: #fff; font-size: 1rem; }
  header, main, footer { padding-left: 0; padding-right: 0; }
  header { padding-top: 12px; }
  h2 { margin: 24px 0 8px; }
  .tiles { grid-template-columns: repeat(6, 1fr); gap: 8px; }
  .tile { padding: 10px 12px; }
  .chart { padding: 12px; }
  .chart text { font-size: 17px; }
  .banner { position: static; }
  .banner, .meter, .meter span, .badge { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .tile, .card, .chart { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  .scroll { max-height: none; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  details { display: none; }
}
"""
