"""The style sheet of a report: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1f2933; --soft: #52606d; --line: #dfe3e8;
  --good: #00795a; --caution: #a05a00; --bad: #b42318; --neutral: #0b62a4;
  --C: #74808c; --H: #c3ccd4; --N: #3f6fd8; --O: #d8433f; --P: #d9771f; --S: #c99a10; --other: #8d6bb0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --card: #1b2128; --ink: #e8ecf1; --soft: #a3afbb; --line: #303942;
    --good: #4cc9a0; --caution: #f0b429; --bad: #ff8a7a; --neutral: #6cb8ea;
    --C: #919da9; --H: #e3e9ee; --N: #6f97f0; --O: #ef6a64; --P: #f09a4d; --S: #e5bd45; --other: #b394d4;
  }
  .canvas svg { filter: invert(1) hue-rotate(180deg); } /* drawn dark on light: every hue stays, dark and light swap */
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 1rem/1.6 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem; }
p { max-width: 46rem; margin: 0 0 1rem; text-wrap: pretty; }
h1, h2, h3 { line-height: 1.25; letter-spacing: -0.01em; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); margin: 0 0 1.4rem; letter-spacing: -0.02em; }
h2 { font-size: 1.3rem; margin: 3rem 0 1.1rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }

.headed { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin: 0 0 0.6rem; }
a.data { color: var(--neutral); font-size: 0.8rem; text-underline-offset: 0.2em; }
a.data:not(:hover) { text-decoration-color: color-mix(in srgb, currentcolor 35%, transparent); }
:focus-visible { outline: 2px solid var(--neutral); outline-offset: 3px; }

.verdict { border-left: 4px solid var(--tone); padding: 0.15rem 0 0.15rem 1.1rem; margin: 0 0 1.4rem; }
.verdict strong {
  display: block; color: var(--tone); font-size: 0.8rem; letter-spacing: 0.07em; text-transform: uppercase;
}
.verdict p { font-size: clamp(1.1rem, 2.4vw, 1.35rem); line-height: 1.45; max-width: 52rem; margin: 0; }
.good { --tone: var(--good); }
.caution { --tone: var(--caution); }
.bad { --tone: var(--bad); }
.neutral { --tone: var(--neutral); }
.lead { color: var(--soft); }

.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11.5rem, 45%), 1fr)); gap: 0.9rem;
  margin: 1.8rem 0 0;
}
.cards > div {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.7rem; padding: 0.9rem 1rem;
  break-inside: avoid;
}
.cards dt { color: var(--soft); font-size: 0.85rem; line-height: 1.4; }
.cards dd { margin: 0; }
.cards .value {
  font-size: clamp(1.1rem, 2.6vw, 1.45rem); font-weight: 650; line-height: 1.35; letter-spacing: -0.02em;
  margin: 0.1rem 0 0.2rem;
}
.cards .note { color: var(--soft); font-size: 0.82rem; line-height: 1.4; }

.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(29rem, 100%), 1fr)); gap: 1.2rem;
  align-items: start;
}
figure {
  margin: 0; padding: 1.1rem 1.2rem 1.2rem; min-width: 0; break-inside: avoid;
  background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: 0.7rem;
}
figure.wide { grid-column: 1 / -1; }
.canvas { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; max-height: 36rem; }
figcaption { color: var(--soft); font-size: 0.88rem; line-height: 1.5; margin-top: 0.7rem; max-width: 52rem; }

.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 0.6rem 1rem; }
.panels.live { cursor: grab; touch-action: pan-y; user-select: none; border-radius: 0.4rem; }
.panels.live:active { cursor: grabbing; }
.panels svg { max-height: 22rem; overflow: visible; }
.panels p { text-align: center; font-size: 0.88rem; line-height: 1.4; margin: 0.2rem auto 0; }
.hint { color: var(--soft); font-size: 0.8rem; text-align: center; margin: 0.7rem auto 0; }
.C { --tint: var(--C); } .H { --tint: var(--H); } .N { --tint: var(--N); } .O { --tint: var(--O); }
.P { --tint: var(--P); } .S { --tint: var(--S); } .other { --tint: var(--other); }
.ball { fill: var(--tint); }
.stick { stroke: var(--tint); }
/* what is far fades into the card */
@supports (color: color-mix(in srgb, red 50%, blue)) {
  .ball { fill: color-mix(in srgb, var(--card) calc(45% * var(--depth)), var(--tint)); }
  .stick { stroke: color-mix(in srgb, var(--card) calc(45% * var(--depth)), var(--tint)); }
}

.table { margin: 0 0 2rem; break-inside: avoid; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 0.7rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { padding: 0.55rem 1rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 550; font-size: 0.82rem; white-space: nowrap; }
tbody th { font-weight: 550; min-width: 9rem; }
tbody tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; }
.number { text-align: right; }
.table p { color: var(--soft); font-size: 0.88rem; margin: 0.6rem 0 0; }

ul.notes { padding-left: 1.1rem; margin: 0; }
ul.notes li { max-width: 46rem; margin-bottom: 0.6rem; }
dl.facts {
  display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 0.4rem 1.6rem; margin: 0;
  font-size: 0.9rem;
}
dl.facts dt { color: var(--soft); }
dl.facts dd {
  margin: 0; overflow-wrap: anywhere; font-size: 0.84rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
footer { margin-top: 3rem; color: var(--soft); font-size: 0.82rem; }

@media (max-width: 40rem) {
  figure { padding: 0.9rem 0.7rem 1rem; }
  figure.wide .canvas svg { min-width: 36rem; }
  th, td { padding: 0.5rem 0.7rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 0.7rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  @page { margin: 16mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 8mm; }
  .grid { grid-template-columns: 1fr 1fr; gap: 4mm; }
  .panels { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
  .scroll, .canvas { overflow: visible; }
  figure.wide .canvas svg { min-width: 0; }
  th, td { white-space: normal; padding: 0.35rem 0.5rem; }
  thead th { white-space: normal; }
  tbody th { min-width: 0; }
  a.data, .hint { display: none; }
}
"""
