#!/usr/bin/env bash
# Draws a chart of a report as SVG, with Chromium:
#
#     docs/pictures/draw.sh report.html errors picture.svg
#
# Charts are named in `data-chart` of the page.
set -euo pipefail
[ $# = 3 ] || { echo "usage: $0 REPORT.html CHART PICTURE.svg" >&2; exit 2; }
page=$(mktemp --suffix .html)
seen=$(mktemp)
trap 'rm -f "$page" "$seen"' EXIT
{
    cat "$1"
    cat <<HTML
<script>(async () => {
    const chart = document.querySelector('[data-chart="$2"]');
    while (!chart || chart.dataset.drawn !== "yes") await new Promise((done) => setTimeout(done, 10));
    const url = await Plotly.toImage(chart.querySelector(".js-plotly-plot") ?? chart, { format: "svg", width: 960, height: 430 });
    const out = document.createElement("pre");
    out.id = "picture";
    out.textContent = url.slice(url.indexOf(",") + 1);
    document.body.append(out);
})();</script>
HTML
} >"$page"
chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=60000 --dump-dom "file://$page" >"$seen" 2>/dev/null
python3 - "$seen" "$3" <<'PYTHON'
import re, sys, urllib.parse
found = re.search(r'<pre id="picture">([^<]+)</pre>', open(sys.argv[1], encoding="utf-8").read())
if not found:
    sys.exit("the page has no such chart")
open(sys.argv[2], "w", encoding="utf-8").write(urllib.parse.unquote(found.group(1)) + "\n")
PYTHON
