"""The report page's style sheet: system fonts, light and dark, readable at 360 px."""

CSS = """
:root{color-scheme:light dark;
--paper:#fdfdfb;--ink:#1b1d21;--muted:#5b616a;--grid:#dfe1e4;--card:#fff;--zone:#d9efe9;
--protects:#0a7561;--leaks:#c0341d;--useless:#8a6205;--inconclusive:#3f5f9e;--not-measured:#5b616b;
--tint:198,148,20;--mask:#26282d;--maskink:#fff;--accent:#0a5a8a}
@media(prefers-color-scheme:dark){:root{
--paper:#15171a;--ink:#eceef0;--muted:#a3aab3;--grid:#343940;--card:#1c1f23;--zone:#173a33;
--protects:#4fd0b2;--leaks:#ff8a70;--useless:#e3b341;--inconclusive:#8fb1f0;--not-measured:#a3aab4;
--tint:214,162,40;--mask:#e4e6e9;--maskink:#15171a;--accent:#7cc4f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main{max-width:1000px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;margin:0 0 6px;letter-spacing:-.02em;
text-wrap:balance}
h2{font-size:1.25rem;line-height:1.25;margin:48px 0 10px;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 4px}
p{margin:0 0 10px;max-width:72ch}
.meta,.note,figcaption,.legend{color:var(--muted);font-size:.875rem}
.note,figcaption{max-width:84ch}
a{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:10px;background:var(--card);
margin:8px 0 10px}
.note+.scroll,.scroll+.scroll{margin-top:28px}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:12px 14px 4px;font-weight:600}
th,td{text-align:left;vertical-align:top;padding:8px 14px;border-top:1px solid var(--grid);
overflow-wrap:break-word}
thead th{border-top:0;color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600}
td.none{color:var(--muted);font-style:italic}
.nowrap td,.nowrap tbody th{white-space:nowrap}
.provenance th{width:9rem}.provenance td{overflow-wrap:anywhere}
.glance{font-size:1rem}
.glance td:nth-child(n+2){min-width:8em}
.glance .why{white-space:nowrap}.glance td:last-child .why{white-space:normal}
.glance .figure{font-weight:600}
.badge{display:inline-block;border-radius:99px;padding:1px 10px;font-weight:700;
border:1.5px solid currentColor;white-space:nowrap;margin-bottom:3px}
.badge.protects{color:var(--protects)}.badge.leaks{color:var(--leaks)}
.badge.useless{color:var(--useless)}.badge.inconclusive{color:var(--inconclusive)}
.badge.not-measured{color:var(--not-measured)}
.why{display:block;color:var(--muted);font-size:.875rem}
figure{margin:0 0 8px}
figure svg{display:block;width:100%;height:auto;max-width:820px;overflow:visible}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",
sans-serif!important}
.narrow{display:none}
figcaption{margin:0 0 12px}
.context{border:1px solid var(--grid);border-radius:10px;background:var(--card);
padding:14px 16px;margin:14px 0}
.tokens{font:15px/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;margin:10px 0;max-width:none}
.t{background:rgba(var(--tint),calc(var(--w)*.8));padding:2px 0;unicode-bidi:isolate}
.t.hid{background:var(--mask);color:var(--maskink);text-decoration:line-through;
text-decoration-thickness:1px}
.t.unknown{border-bottom:2px dotted var(--muted)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center}
.legend .t:not(.hid){color:var(--ink)}
.legend .t{padding:1px 7px;font-family:ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
details{margin-top:6px}summary{cursor:pointer;color:var(--accent);font-size:.875rem;padding:6px 0}
details ul{margin:4px 0;padding-left:20px;font-size:.875rem}
@media(max-width:640px){
main{padding:24px 14px 48px}h2{margin-top:36px}
.wide{display:none}.narrow{display:block}
.glance,.glance caption,.glance tbody,.glance tr,.glance td,
.glance tbody th{display:block;width:100%}
.glance thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.glance tr{border-top:1px solid var(--grid);padding:10px 0}
.glance tbody tr:first-child{border-top:0}
.glance td,.glance tbody th{border:0;padding:3px 14px}
.glance tbody th{font-size:1.1rem}
.glance td::before{content:attr(data-label);display:block;color:var(--muted);font-size:.8rem;
font-style:normal;font-weight:400}}
@media print{.scroll{overflow:visible}body{background:#fff}details>*{display:block}}
"""
