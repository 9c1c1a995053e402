"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const METRICS = data.metrics; // {key: {name, unit, better, text}}
  const cases = data.cases;
  const labels = [...new Set(cases.map((c) => c.label))];
  const shown = new Set(labels);
  const nfes = [...new Set(cases.map((c) => c.nfe))].sort((a, b) => a - b);
  const measured = Object.keys(METRICS).filter((k) => cases.some((c) => c[k] != null));

  // --- small helpers ---
  function el(name, attributes = {}, ...children) {
    const e = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) if (v != null) e.setAttribute(k, v);
    e.append(...children);
    return e;
  }
  function svg(name, attributes = {}, ...children) {
    const e = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) if (v != null) e.setAttribute(k, v);
    e.append(...children);
    return e;
  }
  const color = (label) => `var(--c${labels.indexOf(label) % 14})`;
  const number = (v, digits = 3) => {
    if (v == null) return "–";
    if (v === 0) return "0";
    const a = Math.abs(v);
    if (a >= 1e5 || a < 1e-4) return v.toExponential(1).replace("e+", "e");
    return Number(v.toPrecision(digits)).toString();
  };
  const value = (key, v) => (v == null ? "–" : METRICS[key]?.unit === "%" ? (100 * v).toFixed(1) + " %" : number(v));
  const ms = (c) => (c.seconds_per_image == null ? null : 1000 * c.seconds_per_image);
  const isBetter = (key, a, b) => (METRICS[key].better === "high" ? a > b : a < b);

  // Every solver has a colour and a shape: colour alone is not for everyone.
  const SHAPES = [
    (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    (r) => `M${-r * 0.88},${-r * 0.88}h${r * 1.76}v${r * 1.76}h${-r * 1.76}z`,
    (r) => `M0,${-r * 1.2}L${r * 1.1},${r * 0.8}H${-r * 1.1}z`,
    (r) => `M0,${-r * 1.25}L${r * 1.25},0L0,${r * 1.25}L${-r * 1.25},0z`,
    (r) => `M0,${r * 1.2}L${r * 1.1},${-r * 0.8}H${-r * 1.1}z`,
    (r) => { const w = r * 0.45; return `M${-w},${-r * 1.2}h${2 * w}v${r * 1.2 - w}h${r * 1.2 - w}v${2 * w}h${-(r * 1.2 - w)}v${r * 1.2 - w}h${-2 * w}v${-(r * 1.2 - w)}h${-(r * 1.2 - w)}v${-2 * w}h${r * 1.2 - w}z`; },
  ];
  const shape = (label, r) => SHAPES[labels.indexOf(label) % SHAPES.length](r);
  const glyph = (label) => svg("svg", { width: 13, height: 13, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    svg("path", { d: shape(label, 5), fill: color(label) }));

  // --- axes ---
  function niceTicks(low, high, count) {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw) || power;
    const ticks = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) ticks.push(Math.abs(t) < step * 1e-9 ? 0 : t);
    return ticks;
  }
  function logTicks(low, high) {
    for (const parts of [[1], [1, 3], [1, 2, 5]]) {
      const ticks = [];
      for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
        for (const m of parts) { const t = m * 10 ** p; if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t); }
      if (ticks.length >= 3) return ticks;
    }
    return niceTicks(low, high, 4); // less than a decade: equal distances in the value read better
  }
  const SCALES = {
    linear: { f: (v) => v, ticks: niceTicks },
    log: { f: Math.log10, ticks: logTicks },
    asinh: { // linear about 0, logarithmic far from it
      f: Math.asinh,
      ticks: (low, high) => [-1000, -100, -10, -1, 0, 1, 10, 100, 1000, 10000].filter((t) => t >= low && t <= high),
    },
  };

  // A chart: series of points with bars, a front, rules; pointer and arrow keys show what a point is.
  const charts = [];
  function chart(holder, describe) {
    const draw = () => render($(holder), describe());
    charts.push(draw);
    new ResizeObserver(draw).observe($(holder));
    return draw;
  }
  function render(holder, spec) {
    const width = holder.clientWidth, height = Math.max(250, Math.min(380, width * 0.68));
    if (!width) return;
    const points = spec.series.flatMap((s) => s.points.map((p) => ({ ...p, label: s.label })));
    const again = holder.querySelector("svg"), hadFocus = again && document.activeElement === again;
    holder.replaceChildren();
    const usable = points.filter((p) => p.x != null && p.y != null && (spec.yscale !== "log" || p.y > 0) && (spec.xscale !== "log" || p.x > 0));
    if (!usable.length) { holder.append(el("p", { class: "empty" }, "Nothing to show: choose a solver above.")); return; }
    const m = { l: 52, r: 14, t: 12, b: 42 };
    const xs = SCALES[spec.xscale || "linear"], ys = SCALES[spec.yscale || "linear"];
    const rules = (spec.rules || []).filter((r) => r.y != null && (spec.yscale !== "log" || r.y > 0));
    const around = (values, scale, pad) => {
      let low = Math.min(...values), high = Math.max(...values);
      const a = scale.f(low), b = scale.f(high), gap = (b - a || Math.abs(b) * 0.2 || 1) * pad;
      return [a - gap, b + gap];
    };
    const extra = (spec.under || []).flatMap((u) => u.points);
    const [x0, x1] = around([...usable, ...extra].map((p) => p.x), xs, 0.05);
    const [y0, y1] = around([...usable, ...extra].map((p) => p.y).concat(rules.map((r) => r.y)), ys, 0.07);
    const X = (v) => m.l + ((xs.f(v) - x0) / (x1 - x0)) * (width - m.l - m.r) , flip = spec.flipx;
    const PX = (v) => (flip ? width - m.r - (X(v) - m.l) : X(v));
    const PY = (v) => height - m.b - ((ys.f(v) - y0) / (y1 - y0)) * (height - m.t - m.b);
    const inverse = (scale, v) => (scale === SCALES.log ? 10 ** v : scale === SCALES.asinh ? Math.sinh(v) : v);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img",
      "aria-label": `${spec.title}. ${usable.length} points; use the arrow keys to read them.` });
    for (const t of spec.xticks || xs.ticks(inverse(xs, x0), inverse(xs, x1), width / 80)) {
      root.append(svg("line", { class: "gridline", x1: PX(t), x2: PX(t), y1: m.t, y2: height - m.b }));
      root.append(svg("text", { x: PX(t), y: height - m.b + 16, "text-anchor": "middle" }, number(t)));
    }
    for (const t of ys.ticks(inverse(ys, y0), inverse(ys, y1), height / 60)) {
      root.append(svg("line", { class: "gridline", x1: m.l, x2: width - m.r, y1: PY(t), y2: PY(t) }));
      root.append(svg("text", { x: m.l - 7, y: PY(t) + 4, "text-anchor": "end" }, spec.percent ? number(100 * t) + "%" : number(t)));
    }
    root.append(svg("line", { class: "axis", x1: m.l, x2: width - m.r, y1: height - m.b, y2: height - m.b }));
    root.append(svg("text", { class: "label", x: (m.l + width - m.r) / 2, y: height - 6, "text-anchor": "middle" }, spec.xlabel));
    root.append(svg("text", { class: "label", x: -(m.t + height - m.b) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, spec.ylabel));
    const line = (list) => list.map((p, i) => `${i ? "L" : "M"}${PX(p.x).toFixed(1)},${PY(p.y).toFixed(1)}`).join("");
    for (const r of rules) {
      root.append(svg("line", { class: "rule", x1: m.l, x2: width - m.r, y1: PY(r.y), y2: PY(r.y) }));
      root.append(svg("text", { x: width - m.r, y: PY(r.y) - 5, "text-anchor": "end" }, r.text));
    }
    for (const u of spec.under || []) root.append(svg("path", { class: "exact", d: line(u.points) }));
    if (spec.front && spec.front.length > 1) root.append(svg("path", { class: "front", d: line(spec.front) }));
    const drawn = [];
    for (const s of spec.series) {
      const list = s.points.filter((p) => usable.some((u) => u.x === p.x && u.y === p.y));
      const group = svg("g", { "data-label": s.label });
      group.append(svg("path", { class: "series", d: line(list), stroke: color(s.label) }));
      for (const p of list) {
        if (p.se > 0) {
          const low = spec.yscale === "log" ? Math.max(p.y - p.se, p.y * 0.05) : p.y - p.se;
          group.append(svg("line", { x1: PX(p.x), x2: PX(p.x), y1: Math.min(PY(low), height - m.b), y2: Math.max(PY(p.y + p.se), m.t), stroke: color(s.label), "stroke-width": 1.2 }));
        }
        const dot = svg("path", { class: "point", d: shape(s.label, 4.6), fill: color(s.label), transform: `translate(${PX(p.x).toFixed(1)},${PY(p.y).toFixed(1)})` });
        group.append(dot);
        drawn.push({ ...p, label: s.label, px: PX(p.x), py: PY(p.y), dot });
      }
      root.append(group);
    }
    drawn.sort((a, b) => a.px - b.px || a.py - b.py);
    let chosen = -1;
    const mark = (i, x, y) => {
      if (chosen >= 0) drawn[chosen].dot.classList.remove("chosen");
      chosen = i;
      for (const g of root.querySelectorAll("g[data-label]")) g.classList.toggle("dim", i >= 0 && g.dataset.label !== drawn[i].label);
      if (i < 0) { hideTip(); return; }
      drawn[i].dot.classList.add("chosen");
      const box = root.getBoundingClientRect();
      showTip(drawn[i].tip, x ?? box.left + drawn[i].px, y ?? box.top + drawn[i].py);
    };
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      let best = -1, distance = 28 ** 2;
      drawn.forEach((p, i) => { const d = (p.px - x) ** 2 + (p.py - y) ** 2; if (d < distance) { distance = d; best = i; } });
      mark(best);
    });
    root.addEventListener("pointerleave", () => mark(-1));
    root.addEventListener("blur", () => mark(-1));
    root.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") mark(-1);
      if (!move) return;
      event.preventDefault();
      mark((chosen + move + drawn.length) % drawn.length);
    });
    holder.append(root);
    if (hadFocus) root.focus();
  }
  const tip = $("tip");
  function showTip(lines, x, y) {
    tip.replaceChildren(...lines.flatMap((t, i) => (i ? [el("br"), t] : [el("b", {}, t)])));
    tip.hidden = false;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = Math.max(8, Math.min(innerWidth - w - 8, x + 14)) + "px";
    tip.style.top = (y - h - 14 < 8 ? y + 18 : y - h - 14) + "px";
  }
  function hideTip() { tip.hidden = true; }

  // --- what is shown ---
  let metric = measured.includes("rmse") ? "rmse" : measured[0];
  const visible = () => cases.filter((c) => shown.has(c.label));
  const series = (point) => labels.filter((l) => shown.has(l)).map((label) => ({
    label, points: cases.filter((c) => c.label === label).map(point).filter((p) => p && p.x != null && p.y != null).sort((a, b) => a.x - b.x),
  })).filter((s) => s.points.length);
  function tipOf(c) {
    const lines = [`${c.label}, ${c.nfe} evaluations`];
    for (const key of measured) if (c[key] != null) lines.push(`${METRICS[key].name} ${value(key, c[key])}${c[key + "_se"] ? " ± " + value(key, c[key + "_se"]) : ""}`);
    if (ms(c) != null) lines.push(`${number(ms(c))} ms per image`);
    lines.push(`levels: ${c.grid}${optionsOf(c) ? "; " + optionsOf(c) : ""}`);
    return lines;
  }
  const optionsOf = (c) => Object.entries(c.options || {}).map(([k, v]) => (v === true ? k : `${k}=${v}`)).join(", ");
  function front(points) {
    const found = [];
    for (const p of [...points].sort((a, b) => a.x - b.x || (isBetter(metric, a.y, b.y) ? -1 : 1)))
      if (!found.length || isBetter(metric, p.y, found[found.length - 1].y)) found.push(p);
    return found;
  }
  function quality(x, title, xlabel, more) {
    return () => {
      const s = series((c) => ({ x: x(c), y: c[metric], se: c[metric + "_se"], tip: tipOf(c) }));
      const rules = [];
      if (data.converged && data.converged[metric] != null) rules.push({ y: data.converged[metric], text: "converged" });
      if (metric === "frechet" && data.solution.frechet_floor != null) rules.push({ y: data.solution.frechet_floor, text: "perfect samples, this many" });
      const possible = $("logy").checked && METRICS[metric].better === "low";
      return { title: `${METRICS[metric].name} ${title}`, series: s, front: front(s.flatMap((q) => q.points)), rules, xlabel,
        ylabel: METRICS[metric].name, yscale: possible ? "log" : "linear", percent: METRICS[metric].unit === "%", ...more };
    };
  }
  const drawNfe = chart("by-nfe", quality((c) => c.nfe, "against evaluations", "evaluations of the network", { xticks: nfes }));
  const drawTime = chart("by-time", quality(ms, "against time per image", "ms per image", { xscale: "log" }));

  // --- best ---
  function best() {
    const holder = $("cards");
    holder.replaceChildren();
    for (const n of nfes) {
      const list = visible().filter((c) => c.nfe === n && c[metric] != null).sort((a, b) => (isBetter(metric, a[metric], b[metric]) ? -1 : 1));
      if (!list.length) continue;
      const [first, second] = list;
      const close = second && Math.abs(first[metric] - second[metric]) < 2 * Math.hypot(first[metric + "_se"] || 0, second[metric + "_se"] || 0);
      holder.append(el("li", {}, el("div", { class: "n" }, `${n} evaluations`), el("div", { class: "s" }, glyph(first.label), first.label),
        el("div", { class: "v" }, `${value(metric, first[metric])}${close ? `, close to ${second.label}` : ""}`)));
    }
    const high = METRICS[metric].better === "high" ? "highest" : "lowest";
    $("verdict").textContent = `By ${METRICS[metric].name} (${high} is best; choose another measure below). “Close” means within two standard errors of the difference, as if both were independent.`;
    $("explain").textContent = METRICS[metric].text;
  }

  // --- chips ---
  function chips() {
    $("chips").replaceChildren(...labels.map((label) => {
      const button = el("button", { type: "button", "aria-pressed": shown.has(label) }, glyph(label), label);
      button.addEventListener("click", () => {
        shown.has(label) ? shown.delete(label) : shown.add(label);
        button.setAttribute("aria-pressed", shown.has(label));
        update();
      });
      return button;
    }));
  }
  $("all").addEventListener("click", () => { labels.forEach((l) => shown.add(l)); chips(); update(); });
  $("none").addEventListener("click", () => { shown.clear(); chips(); update(); });

  // --- samples ---
  const slider = $("nfe");
  slider.max = nfes.length - 1; slider.min = 0; slider.value = Math.min(nfes.length - 1, Math.max(0, nfes.indexOf(5)));
  function strips() {
    const n = nfes[slider.value];
    $("nfe-out").textContent = n;
    slider.setAttribute("aria-valuetext", `${n} evaluations`);
    const rows = visible().filter((c) => c.nfe === n && c.picture);
    if (metric && rows[0]?.[metric] != null) rows.sort((a, b) => (isBetter(metric, a[metric], b[metric]) ? -1 : 1));
    const list = rows.map((c) => strip(c.label, `${METRICS[metric].name} ${value(metric, c[metric])}`, c.picture, `${data.solution.pictures} samples of ${c.label} at ${n} evaluations`, glyph(c.label)));
    if (data.converged?.picture) list.unshift(strip("converged", `${data.converged.nfe} evaluations, the ODE's solution`, data.converged.picture, "the converged samples of the same seeds"));
    $("strips").replaceChildren(...list);
  }
  function strip(name, text, picture, alt, mark) {
    return el("div", { class: "strip" }, el("div", { class: "who" }, ...(mark ? [mark, " "] : []), el("b", {}, name), el("br"), el("span", {}, text)),
      el("img", { src: "data:image/png;base64," + picture, alt, loading: "lazy" }));
  }
  slider.addEventListener("input", strips);

  // --- table ---
  const columns = [
    { key: "label", name: "solver", text: (c) => c.label },
    { key: "grid", name: "levels", text: (c) => c.grid + (optionsOf(c) ? `; ${optionsOf(c)}` : "") },
    { key: "nfe", name: "NFE", of: (c) => c.nfe },
    { key: "ms", name: "ms/image", of: ms, better: "low" },
    ...measured.map((key) => ({ key, name: METRICS[key].name, of: (c) => c[key], better: METRICS[key].better, show: (c) => value(key, c[key]), se: (c) => c[key + "_se"] && value(key, c[key + "_se"]) })),
    { key: "state_bytes", name: "buffers, KiB", of: (c) => c.state_bytes && c.state_bytes / 1024 },
  ];
  let sortKey = "nfe", ascending = true;
  function head() {
    $("table").tHead.replaceChildren(el("tr", {}, ...columns.map((k) => {
      const button = el("button", { type: "button" }, k.name);
      button.addEventListener("click", () => {
        ascending = sortKey === k.key ? !ascending : k.better !== "high";
        sortKey = k.key;
        head(); rows();
        $("table").tHead.querySelector(`[data-key="${k.key}"] button`).focus();
      });
      return el("th", { scope: "col", "data-key": k.key, "aria-sort": sortKey === k.key ? (ascending ? "ascending" : "descending") : "none" }, button);
    })));
  }
  function rows() {
    const words = $("filter").value.toLowerCase().split(/[\s,]+/).filter(Boolean), only = $("only").value;
    const list = visible().filter((c) => {
      const text = `${c.label} ${c.grid} ${optionsOf(c)} ${c.nfe}`.toLowerCase();
      return (only === "" || c.nfe === +only) && words.every((w) => (/^\d+$/.test(w) ? text.split(/[^\w.]+/).includes(w) : text.includes(w)));
    });
    const k = columns.find((q) => q.key === sortKey), key = (c) => (k.of ? k.of(c) : k.text(c));
    list.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x == null || y == null) return (x == null) - (y == null);
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (ascending ? 1 : -1);
    });
    const tops = Object.fromEntries(columns.filter((q) => q.better).map((q) => {
      const known = list.map(q.of).filter((v) => v != null);
      return [q.key, known.length ? (q.better === "high" ? Math.max(...known) : Math.min(...known)) : null];
    }));
    $("table").tBodies[0].replaceChildren(...list.map((c) => el("tr", {}, ...columns.map((q, i) => {
      if (i === 0) return el("td", {}, glyph(c.label), c.label);
      if (q.text) return el("td", {}, q.text(c));
      const v = q.of(c), cell = el("td", q.better && v != null && v === tops[q.key] && list.length > 1 ? { class: "top1" } : {}, q.show ? q.show(c) : number(v));
      if (q.se && q.se(c)) cell.append(el("small", {}, ` ± ${q.se(c)}`));
      return cell;
    }))));
    $("count").textContent = `${list.length} of ${cases.length} rows; the best of each column is marked.`;
  }
  $("filter").addEventListener("input", rows);
  $("only").append(el("option", { value: "" }, "all"), ...nfes.map((n) => el("option", { value: n }, n)));
  $("only").addEventListener("change", rows);

  // --- steps and planes ---
  const middle = nfes[Math.min(nfes.length - 1, Math.max(0, nfes.indexOf(5)))];
  for (const id of ["steps-nfe", "plane-nfe"]) {
    $(id).append(...nfes.map((n) => el("option", { value: n }, n)));
    $(id).value = middle;
  }
  const drawSteps = chart("by-step", () => ({
    title: "Local truncation error of every step", xlabel: "noise level σ where the step lands", ylabel: "error (RMS)",
    xscale: "log", yscale: "log", flipx: true,
    series: labels.filter((l) => shown.has(l)).map((label) => {
      const c = cases.find((q) => q.label === label && q.nfe === +$("steps-nfe").value && q.truncation);
      return { label, points: c ? c.truncation.map((y, i) => ({ x: c.sigmas[i + 1], y, tip: [`${label}, step ${i + 1} of ${c.truncation.length}`, `σ ${number(c.sigmas[i])} → ${number(c.sigmas[i + 1])}`, `error ${number(y)}`] })).filter((p) => p.x > 0) : [] };
    }).filter((s) => s.points.length),
  }));
  const seeds = data.solution.paths?.length || 0;
  $("plane-seed").append(...Array.from({ length: seeds }, (_, i) => el("option", { value: i }, data.first_seed + i)));
  const drawPlane = chart("by-plane", () => {
    const b = +$("plane-seed").value || 0, pair = ([x, y]) => ({ x, y });
    return {
      title: "Trajectories in the principal plane of the converged one", xlabel: "first component (start on the left)", ylabel: "second component",
      xscale: "asinh", flipx: true, under: seeds ? [{ points: data.solution.paths[b].map(pair) }] : [],
      series: labels.filter((l) => shown.has(l)).map((label) => {
        const c = cases.find((q) => q.label === label && q.nfe === +$("plane-nfe").value && q.trajectories?.[b]);
        return { label, points: c ? c.trajectories[b].map((p, i) => ({ ...pair(p), tip: [`${label}, level ${i}`, `σ ${number(c.sigmas[i])}`, `(${number(p[0])}, ${number(p[1])})`] })) : [] };
      }).filter((s) => s.points.length),
    };
  });
  const share = data.solution.variance;
  if (share) {
    const left = 1 - share[0] - share[1];
    $("variance").textContent = `The broad line is the converged trajectory. Its first two components hold all but ${number(100 * Math.max(left, 0), 2)} % of its variance (the second alone ${number(100 * share[1], 2)} %): it is nearly a curve in a plane. The first axis is logarithmic beyond 1.`;
  }
  $("steps-nfe").addEventListener("change", drawSteps);
  for (const id of ["plane-nfe", "plane-seed"]) $(id).addEventListener("change", drawPlane);

  // --- the rest ---
  $("model").textContent = data.model;
  $("facts").textContent = data.facts;
  $("metric").append(...measured.map((key) => el("option", { value: key }, METRICS[key].name)));
  $("metric").value = metric;
  $("metric").addEventListener("change", () => { metric = $("metric").value; best(); drawNfe(); drawTime(); strips(); });
  $("logy").addEventListener("change", () => { drawNfe(); drawTime(); });
  $("settings").append(...data.settings.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
  $("glossary").append(...measured.flatMap((key) => [el("dt", {}, METRICS[key].name), el("dd", {}, METRICS[key].text)]));
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  $("theme").setAttribute("aria-pressed", dark());
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    $("theme").setAttribute("aria-pressed", dark());
  });
  function update() { best(); strips(); rows(); charts.forEach((draw) => draw()); }
  chips(); head(); update();
  addEventListener("scroll", hideTip, { passive: true });
})();
