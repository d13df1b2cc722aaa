"use strict";
(async () => {
  // What is large is compressed: plotly.js, and the data of the charts.
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const panel = document.getElementById("panel");
  const body = document.getElementById("panel-body");
  let charts = {};

  const show = (layer) => {
    const template = document.getElementById("layer-" + layer);
    if (!template || !panel) return;
    body.replaceChildren(template.content.cloneNode(true));
    panel.hidden = false;
    panel.scrollTop = 0;
    draw(body);
  };
  const draw = (root) => {
    for (const place of root.querySelectorAll("[data-chart]")) {
      const chart = charts[place.dataset.chart];
      if (!chart || typeof Plotly === "undefined") continue;
      const config = { responsive: true, displayModeBar: false };
      Plotly.newPlot(place, chart.data, chart.layout, config).then(() => { place.dataset.drawn = "yes"; });
      const byLayer = place.dataset.chart === "errors" || place.dataset.chart === "times";
      if (byLayer) place.on("plotly_click", (event) => show(event.points[0].x));
    }
  };

  document.addEventListener("click", (event) => {
    const heading = event.target.closest(".layers thead th");
    if (heading) return sort(heading);
    if (event.target.closest("#close")) { panel.hidden = true; return; }
    const layer = event.target.closest("[data-layer]");
    if (!layer) return;
    if (layer.tagName === "A") event.preventDefault();
    show(layer.dataset.layer);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel) panel.hidden = true;
  });

  const sort = (heading) => {
    const table = heading.closest("table");
    const column = [...heading.parentNode.children].indexOf(heading);
    const up = !heading.classList.contains("up");
    for (const other of heading.parentNode.children) other.classList.remove("sorted", "up");
    heading.classList.add("sorted");
    heading.classList.toggle("up", up);
    const key = (row) => {
      const cell = row.children[column];
      const value = cell.dataset.value;
      // What has no value comes last, whichever way it is sorted.
      if (value === undefined) return cell.textContent;
      return value === "" ? (up ? Infinity : -Infinity) : Number(value);
    };
    const order = (a, b) => (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b)) : a - b);
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort((a, b) => (up ? 1 : -1) * order(a[0], b[0]));
    table.tBodies[0].append(...rows.map((pair) => pair[1]));
  };

  try {
    const [script, data] = await Promise.all([unpack("plotly"), unpack("charts")]);
    const element = document.createElement("script");
    element.textContent = script;
    document.head.append(element);
    charts = JSON.parse(data);
    draw(document.querySelector("main"));
    // A link to one layer: report.html#layer-12.
    const linked = /^#layer-(\d+)$/.exec(location.hash);
    if (linked) show(linked[1]);
    document.body.dataset.ready = "yes";
  } catch (error) {
    for (const place of document.querySelectorAll("[data-chart]")) {
      place.textContent = "This browser cannot draw the charts: " + error;
      place.className = "failure";
    }
    console.error(error);
  }
})();
