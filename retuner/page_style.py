"""The style sheet of the data page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --dim: #626a73; --paper: #f6f5f1; --card: #fff; --line: #e1ded6;
  --train: #2f8f66; --held: #b5761b; --bad: #b3261e; --twice: #8a93a0; --leak: #7357b0; --long: #c9b458;
  --fill: #9fcdb7; --soft: #eceae3; --learnt: #cdeedd; --stop: #1f7a52; --link: #1f6b4a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ea; --dim: #9aa3ab; --paper: #16181a; --card: #1f2225;
  --line: #33383d; --train: #4cc38a; --held: #e0a54a; --bad: #f0857d; --twice: #7d8791; --leak: #a88ce0;
  --long: #b9a64d; --fill: #2b6b4e; --soft: #2a2e32; --learnt: #1c4a36; --stop: #4cc38a; --link: #6fd3a2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
small { font-size: .82em; color: var(--dim); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; }
.lead { color: var(--dim); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .9rem 0 1.5rem; font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1.1rem 1.25rem 1.25rem;
  margin: 0 0 1rem; scroll-margin-top: .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.25rem, 1fr)); gap: .75rem;
  margin: 0 0 1.25rem; }
.tile { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .75rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.5rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { font-size: .88rem; }
.stacked { display: flex; gap: 2px; height: 1.1rem; border-radius: 4px; overflow: hidden; background: var(--soft); }
.stacked i { flex-basis: 0; min-width: 3px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: 0; margin: .6rem 0 0;
  font-size: .9rem; }
.legend b { font-variant-numeric: tabular-nums; }
.legend i, .sides i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
i.train { background: var(--train); } i.held { background: var(--held); } i.bad { background: var(--bad); }
i.twice { background: var(--twice); } i.leak { background: var(--leak); } i.long { background: var(--long); }
i.rest { background: var(--soft); border: 1px solid var(--line); }
.look { margin: 0; padding-left: 1.2rem; } .look li { margin: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: var(--dim); font-size: .82rem; padding: .2rem .75rem .3rem 0;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: .32rem .75rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
td code { overflow-wrap: anywhere; }
td:has(> .bar) { vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0;
  padding-left: .75rem; }
table.narrow { width: auto; min-width: min(100%, 30rem); }
table.bars td:first-child { white-space: nowrap; } table.bars td:nth-child(2) { width: 100%; }
.bar { display: block; min-width: 3rem; } .bar i { display: block; height: .7rem; background: var(--fill);
  border-radius: 2px; min-width: 2px; }
.histogram { margin: .25rem 0 .75rem; }
.sides { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; padding: 0; margin: 0 0 .9rem;
  font-size: .9rem; }
.sides .line { background: none; border: 2px solid var(--held); }
.sides .block { background: var(--fill); }
.plot { position: relative; height: 13rem; border-bottom: 1px solid var(--dim); }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.filled { fill: var(--fill); }
.outlined { fill: none; stroke: var(--held); stroke-width: 1.75; vector-effect: non-scaling-stroke; }
.point rect { fill: transparent; } .point rect:hover { fill: color-mix(in srgb, var(--ink) 8%, transparent); }
.limit { position: absolute; top: 0; bottom: 0; border-left: 1.5px dashed var(--bad); pointer-events: none; }
.limit span { position: absolute; left: .4rem; top: -.2rem; white-space: nowrap; font-size: .82rem; color: var(--bad);
  background: color-mix(in srgb, var(--card) 80%, transparent); padding: 0 .2rem; }
.limit span.left { left: auto; right: .4rem; }
.ticks { position: relative; height: 1.3rem; font-size: .78rem; color: var(--dim);
  font-variant-numeric: tabular-nums; }
.ticks span { position: absolute; top: .2rem; transform: translateX(-50%); }
.ticks span:first-child { transform: none; }
.axis { text-align: center; font-size: .82rem; color: var(--dim); margin: .1rem auto 0; }
details { margin: .5rem 0 0; } summary { cursor: pointer; color: var(--link); font-size: .9rem; }
.said { overflow-wrap: anywhere; }
.cluster { margin: .6rem 0; padding-left: .75rem; border-left: 3px solid var(--line); font-size: .9rem; }
.cluster ol { margin: .15rem 0; padding: 0; list-style: none; } .cluster li { margin: .15rem 0; }
.cluster code, .two code { color: var(--dim); margin-right: .5rem; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px .75rem;
  margin: .6rem 0; font-size: .9rem; }
.two div { background: var(--paper); border-radius: 6px; padding: .5rem .7rem; }
.two span { display: block; font-size: .8rem; color: var(--dim); margin-bottom: .15rem; }
.two .shared { grid-column: 1 / -1; border-left: 3px solid var(--leak); }
.two .held { border-left: 3px solid var(--held); } .two .train { border-left: 3px solid var(--train); }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin: .8rem 0;
  overflow: hidden; }
article header { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: baseline; padding: .45rem .9rem;
  font-size: .85rem;
  border-bottom: 1px solid var(--line); color: var(--dim); }
article header span { margin-left: auto; }
article header b.held_out { color: var(--held); }
.text { padding: .8rem .9rem; max-height: 26rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--dim); font: 14px/1.8 ui-monospace, "DejaVu Sans Mono", monospace; }
.text span, .key span { padding: .1em 0; }
.key span { margin-right: .3rem; }
.y { background: var(--learnt); color: var(--ink);
  box-shadow: inset 1px 0 color-mix(in srgb, var(--ink) 14%, transparent); }
.text .c, .key .c { border: 1px solid currentColor; border-radius: 4px; padding: 0 .3em; margin: 0 .1em;
  font-size: .85em;
  white-space: nowrap; }
.text .c.y, .key .c.y { background: var(--stop); border-color: var(--stop); color: var(--card); font-weight: 600; }
.text .c { unicode-bidi: isolate; }
.text bdi { unicode-bidi: plaintext; }
.n { opacity: .45; font-style: normal; }
.b { border: 1px dotted currentColor; border-radius: 3px; padding: 0 .2em; margin: 0 .1em; font-size: .72em;
  font-style: normal; unicode-bidi: isolate; }
@media (max-width: 34rem) { body { padding: 1.25rem .75rem 3rem; } section { padding: .9rem .9rem 1rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tile b { font-size: 1.25rem; } .plot { height: 10rem; }
  table { font-size: .85rem; } th, th.num { white-space: normal; } th, td { padding-right: .4rem; }
  .num { padding-left: .4rem; padding-right: 0; } .bar { min-width: 1.5rem; } .two { grid-template-columns: 1fr; } }
@media print { body { background: none; } section { break-inside: avoid; } .text { max-height: none; } }
"""
