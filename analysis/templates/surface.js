"use strict";
// A surface over a grid: painter's algorithm on a plain canvas. Drag or arrow keys turn it, the pointer reads values.
(() => {
  const root = document.getElementById("surface");
  if (!root) return;
  const data = JSON.parse(document.getElementById("surface-data").textContent);
  const canvas = root.querySelector("canvas");
  const readout = root.querySelector("output");
  const context = canvas.getContext("2d");
  const stops = data.colors;
  const start = { azimuth: -0.9, elevation: 0.62, zoom: 1 };
  const view = { ...start };
  const state = { show: "loss", log: data.logarithmic, marker: null };
  const Q = data.y.length, P = data.x.length;
  const span = Math.max(data.x[P - 1] - data.x[0], data.y[Q - 1] - data.y[0]);
  const reach = Math.hypot(data.x[P - 1] - data.x[0], data.y[Q - 1] - data.y[0]) / span;
  const midX = (data.x[0] + data.x[P - 1]) / 2, midY = (data.y[0] + data.y[Q - 1]) / 2;
  let faces = [], projected = [], scale = 1, width = 0, height = 0, pending = false;

  const finite = (v) => v !== null && Number.isFinite(v);
  const lossValues = data.loss.flat().filter(finite);
  const lowest = Math.min(...lossValues), highest = Math.max(...lossValues);
  const clamp = (v, a, b) => Math.min(b, Math.max(a, v));

  function level(value) { // of a loss, from 0 to 1, on the scale of the true loss: both surfaces share it
    if (!finite(value)) return null;
    const use = (v) => (state.log ? Math.log10(Math.max(v, lowest * 0.5)) : v);
    const range = use(highest) - use(lowest) || 1;
    return (use(value) - use(lowest)) / range;
  }
  function color(u) {
    const place = clamp(u, 0, 1) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(place)), f = place - i;
    const mix = stops[i].map((c, k) => Math.round(c + f * (stops[i + 1][k] - c)));
    return `rgb(${mix.join(",")})`;
  }
  function turn(x, y, z) {
    const ca = Math.cos(view.azimuth), sa = Math.sin(view.azimuth), ce = Math.cos(view.elevation), se = Math.sin(view.elevation);
    const u = ca * x - sa * y, v = sa * x + ca * y;
    return [width / 2 + scale * u, height / 2 - scale * (ce * (z - 0.05) + se * v), ce * v - se * z]; // x, y, depth away from the eye
  }
  const place = (x, y, u) => turn((2 * (x - midX)) / span, (2 * (y - midY)) / span, 1.1 * u - 0.5);
  const grid = () => data[state.show];

  function draw() {
    pending = false;
    const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    width = box.width; height = box.height;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    }
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft"), rule = style.getPropertyValue("--figure-quiet");
    const tall = (elevation) => 1.1 * Math.cos(elevation) + 2 * reach * Math.sin(elevation); // of the whole box, turned
    const room = Math.max(tall(start.elevation), tall(view.elevation)); // so that tilting shrinks it only where it must
    scale = view.zoom * Math.min((width - 90) / (2 * reach), (height - 76) / room);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${style.fontFamily}`;
    context.lineJoin = "round";
    frame(rule, soft);
    const heights = grid().map((row) => row.map(level));
    projected = heights.map((row, j) => row.map((u, i) => (u === null ? null : place(data.x[i], data.y[j], clamp(u, -0.2, 1.6)))));
    faces = [];
    for (let j = 0; j + 1 < Q; j++) for (let i = 0; i + 1 < P; i++) {
      const corners = [projected[j][i], projected[j][i + 1], projected[j + 1][i + 1], projected[j + 1][i]];
      if (corners.some((c) => c === null)) continue;
      const u = (heights[j][i] + heights[j][i + 1] + heights[j + 1][i + 1] + heights[j + 1][i]) / 4;
      faces.push({ corners, u, i, j, depth: corners[0][2] + corners[1][2] + corners[2][2] + corners[3][2] });
    }
    faces.sort((a, b) => b.depth - a.depth);
    const lines = P * Q <= 3600;
    for (const face of faces) {
      context.beginPath();
      face.corners.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.fillStyle = color(face.u);
      context.fill();
      context.strokeStyle = lines ? "rgba(0,0,0,0.28)" : context.fillStyle;
      context.lineWidth = lines ? 0.5 : 0.8;
      context.stroke();
    }
    for (const path of data.trajectory) trace(path);
    dot(0, 0, level(data.centre), "#ffffff", "#111111", 4.5);
    if (state.marker) {
      const { i, j } = state.marker, c = projected[j][i];
      if (c) { context.beginPath(); context.arc(c[0], c[1], 6, 0, 7); context.strokeStyle = ink; context.lineWidth = 2; context.stroke(); }
    }
  }
  function frame(rule, soft) {
    const [x0, x1, y0, y1] = [data.x[0], data.x[P - 1], data.y[0], data.y[Q - 1]];
    const corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]].map(([x, y]) => place(x, y, 0));
    context.strokeStyle = rule; context.lineWidth = 1;
    context.beginPath();
    corners.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath(); context.stroke();
    const far = corners.reduce((best, c, k) => (c[2] > corners[best][2] ? k : best), 0);
    const post = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]][far], foot = place(...post, 0), top = place(...post, 1);
    context.beginPath(); context.moveTo(foot[0], foot[1]); context.lineTo(top[0], top[1]); context.stroke();
    context.fillStyle = soft;
    const text = (s, [x, y], dx, dy) => {
      const w = context.measureText(s).width;
      context.fillText(s, clamp(x + dx - w / 2, 2, width - w - 2), clamp(y + dy, 12, height - 4));
    };
    const nearX = se() ? y0 : y1, nearY = ce() ? x0 : x1, centre = place(midX, midY, 0);
    const beside = (s, x, y, side, gap) => { // away from the base, across the edge that it belongs to
      const at = place(x, y, 0), dx = side[0] - centre[0], dy = side[1] - centre[1], length = Math.hypot(dx, dy) || 1;
      text(s, at, (gap * 1.5 * dx) / length, (gap * dy) / length + 4);
    };
    const sideX = place(midX, nearX, 0), sideY = place(nearY, midY, 0);
    beside(data.names[0], midX, nearX, sideX, 34);
    beside(short(x0), x0, nearX, sideX, 15); beside(short(x1), x1, nearX, sideX, 15);
    beside(data.names[1], nearY, midY, sideY, 34);
    beside(short(y0), nearY, y0, sideY, 15); beside(short(y1), nearY, y1, sideY, 15);
    text(short(highest), top, 0, -8); text(short(lowest), foot, 0, -4);
  }
  // which sides of the box face the eye
  const se = () => Math.cos(view.azimuth) >= 0;
  const ce = () => Math.sin(view.azimuth) >= 0;
  function trace(path) {
    context.beginPath();
    path.x.forEach((x, k) => { const c = place(x, path.y[k], path.u(k)); k ? context.lineTo(c[0], c[1]) : context.moveTo(c[0], c[1]); });
    context.strokeStyle = "#ffffff"; context.lineWidth = 3.5; context.stroke();
    context.strokeStyle = "#d55e00"; context.lineWidth = 1.8; context.stroke();
  }
  function dot(x, y, u, fill, edge, r) {
    const c = place(x, y, u);
    context.beginPath(); context.arc(c[0], c[1], r, 0, 7); context.fillStyle = fill; context.fill();
    context.strokeStyle = edge; context.lineWidth = 1.2; context.stroke();
  }
  const short = (v) => {
    if (v === 0) return "0";
    const text = Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? String(Number(v.toPrecision(3))) : v.toExponential(2);
    return text.replace("-", "\u2212");
  };
  function interpolated(x, y) { // on the surface shown, for paths drawn over it
    const fi = clamp(((x - data.x[0]) / (data.x[P - 1] - data.x[0])) * (P - 1), 0, P - 1.001);
    const fj = clamp(((y - data.y[0]) / (data.y[Q - 1] - data.y[0])) * (Q - 1), 0, Q - 1.001);
    const i = Math.floor(fi), j = Math.floor(fj), a = fi - i, b = fj - j, g = grid();
    const [p, q, r, s] = [g[j][i], g[j][i + 1], g[j + 1][i], g[j + 1][i + 1]].map(level);
    if ([p, q, r, s].includes(null)) return 0;
    return (1 - b) * ((1 - a) * p + a * q) + b * ((1 - a) * r + a * s);
  }
  data.trajectory.forEach((path) => { path.u = (k) => interpolated(path.x[k], path.y[k]); });

  function redraw() { if (!pending) { pending = true; requestAnimationFrame(draw); } }
  function say() {
    if (!state.marker) { readout.textContent = data.hint; return; }
    const { i, j } = state.marker, v = data.loss[j][i], m = data.model[j][i];
    readout.textContent = `${data.names[0]} ${short(data.x[i])}, ${data.names[1]} ${short(data.y[j])}: loss ` +
      `${finite(v) ? short(v) : "not finite"}, quadratic model ${short(m)}`;
  }
  function inside(corners, x, y) {
    let odd = false;
    for (let k = 0, l = 3; k < 4; l = k++) {
      const [ax, ay] = corners[k], [bx, by] = corners[l];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
    }
    return odd;
  }
  function point(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    for (let k = faces.length - 1; k >= 0; k--) {
      const face = faces[k];
      if (!inside(face.corners, x, y)) continue;
      const near = face.corners.map(([cx, cy]) => (cx - x) ** 2 + (cy - y) ** 2);
      const c = near.indexOf(Math.min(...near));
      state.marker = { i: face.i + (c === 1 || c === 2 ? 1 : 0), j: face.j + (c >= 2 ? 1 : 0) };
      say(); redraw(); return;
    }
  }
  let held = null;
  canvas.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); point(event); });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!held) { if (event.pointerType === "mouse") point(event); return; }
    rotate((event.clientX - held[0]) * 0.01, event.pointerType === "touch" ? 0 : (event.clientY - held[1]) * 0.008);
    held = [event.clientX, event.clientY];
  });
  function rotate(da, de) { view.azimuth -= da; view.elevation = clamp(view.elevation + de, 0.05, 1.55); redraw(); }
  const actions = {
    left: () => rotate(-0.15, 0), right: () => rotate(0.15, 0), up: () => rotate(0, 0.1), down: () => rotate(0, -0.1),
    in: () => { view.zoom = Math.min(3, view.zoom * 1.15); redraw(); },
    out: () => { view.zoom = Math.max(0.5, view.zoom / 1.15); redraw(); },
    reset: () => { Object.assign(view, start); state.marker = null; say(); redraw(); },
    scale: (button) => { state.log = !state.log; button.setAttribute("aria-pressed", state.log); redraw(); },
    model: (button) => { state.show = state.show === "loss" ? "model" : "loss"; button.setAttribute("aria-pressed", state.show === "model"); redraw(); },
  };
  root.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => actions[button.dataset.action](button)));
  const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", "+": "in", "=": "in", "-": "out", Home: "reset" };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.shiftKey && event.key.startsWith("Arrow")) {
      const m = state.marker || { i: Math.floor(P / 2), j: Math.floor(Q / 2) };
      const di = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0, dj = { ArrowDown: -1, ArrowUp: 1 }[event.key] || 0;
      state.marker = { i: clamp(m.i + di, 0, P - 1), j: clamp(m.j + dj, 0, Q - 1) };
      say(); redraw();
    } else if (keys[event.key]) actions[keys[event.key]]();
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(redraw).observe(canvas);
  say(); redraw();
})();
