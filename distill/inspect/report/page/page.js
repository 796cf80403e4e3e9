"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paper = window.matchMedia("print");
  const root = document.documentElement;
  const places = Object.keys(figures).filter((id) => document.getElementById(id));
  let metric = null;

  const named = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const pale = (hex) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},0.16)`;
  };
  const colour = (text) => {
    const name = text.slice(4);
    return name.endsWith("-pale") ? pale(named(name.slice(0, -5))) : named(name);
  };
  const filled = (node) => {
    if (Array.isArray(node)) return node.map(filled);
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, filled(value)]));
    }
    return typeof node === "string" && node.startsWith("var:") ? colour(node) : node;
  };

  const powers = [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6];
  // Of a logarithmic axis: 1, 2, 5 of each power of ten, or the costs themselves where there are few of them.
  const ticks = (values, own) => {
    const all = [...new Set(values)].sort((a, b) => a - b);
    if (own) return all.filter((v, i) => i === all.length - 1 || all[i + 1] > 1.35 * v);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const digits = high / low > 300 ? [1] : high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
    return powers.flatMap((p) => digits.map((d) => Number(`${d}e${p}`))).filter((v) => v > low / 2.5 && v < high * 2.5);
  };
  const short = (value) => (value >= 1000 || value < 0.001 ? value.toExponential(0).replace("e+", "e") : String(value));

  const axis = (spec, values, vertical, own) => {
    const log = spec.type === "log";
    const at = log && values.length ? ticks(values, own) : null;
    return {
      type: spec.type || "linear",
      title: vertical ? undefined : { text: spec.title, font: { size: 13, color: named("soft") }, standoff: 8 },
      gridcolor: named("grid"), linecolor: named("line"), zeroline: false, showline: !vertical, ticks: vertical ? "" : "outside",
      tickcolor: named("line"), tickfont: { size: 12, color: named("soft") }, automargin: true, fixedrange: false,
      ...(at ? { tickvals: at, ticktext: at.map(short) } : {}),
    };
  };
  const layout = (figure, id) => {
    const all = (key) => figure.data.flatMap((t) => t[key]).filter((v) => typeof v === "number" && v > 0);
    const [x, y] = [figure.layout.xaxis, figure.layout.yaxis];
    const fixed = root.classList.contains("printing") ? { width: 336, height: 268, autosize: false } : { autosize: true };
    return {
      ...fixed,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: named("ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      title: { text: y.title, x: 0, xref: "container", xanchor: "left", y: 1, yanchor: "top", pad: { t: 4 }, font: { size: 14, color: named("ink") } },
      margin: { l: 44, r: 12, t: 34, b: 44 }, hovermode: "closest",
      hoverlabel: { bgcolor: named("paper"), bordercolor: named("line"), font: { color: named("ink") } },
      legend: { orientation: "h", x: 0, y: fixed.height ? -0.34 : -0.2, yanchor: "top", font: { size: 12 }, bgcolor: "rgba(0,0,0,0)", traceorder: "normal" },
      annotations: figure.layout.meta ? [{
        text: figure.layout.meta, xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "bottom", showarrow: false,
        font: { size: 12, color: named("soft") },
      }] : [],
      xaxis: axis(x, all("x"), false, id === "quality-nfe"), yaxis: axis(y, all("y"), true, false),
    };
  };

  const draw = () => Promise.all(places.map((id) => {
    const found = figures[id];
    const figure = found[metric in found ? metric : Object.keys(found)[0]];
    return Plotly.react(id, filled(figure.data), layout(figure, id), { responsive: true, displaylogo: false, displayModeBar: false });
  }));

  document.querySelectorAll("button[data-metric]").forEach((button) => {
    metric = metric || button.dataset.metric;
    button.addEventListener("click", () => {
      metric = button.dataset.metric;
      document.querySelectorAll("button[data-metric]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      document.querySelectorAll("[data-of]").forEach((part) => { part.hidden = part.dataset.of !== metric; });
      draw();
    });
  });
  const printing = (on) => {
    root.classList.toggle("printing", on);
    draw();
    if (!on) places.forEach((id) => Plotly.Plots.resize(id));
  };
  dark.addEventListener("change", draw);
  paper.addEventListener("change", (event) => printing(event.matches));
  window.addEventListener("beforeprint", () => printing(true));
  window.addEventListener("afterprint", () => printing(false));
  draw().then(() => root.setAttribute("data-drawn", String(document.querySelectorAll(".chart .main-svg").length)));
})();
