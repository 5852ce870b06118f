// Small charts over steps, in SVG. All of them show the step that the reader points at.

import { draw, duration, make, number } from "./format.js";

const HEIGHT = 150, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const SMOOTH_FROM = 20;  // steps from which on there is a bold line
export const PHASES = [
  ["generate", "generate"], ["score", "score"], ["old_log_probs", "old log-probs"],
  ["update", "update"], ["publish", "publish"],
];

// ticks at 1, 2 or 5 times a power of ten
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((each) => each * power >= raw) * power, found = [];
  for (let at = Math.ceil(low / size) * size; at <= high + size * 1e-6; at += size) found.push(Math.abs(at) < size * 1e-6 ? 0 : at);
  return found;
}

function range(values, holdsZero) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) return [0, 1];
  let low = Math.min(...finite), high = Math.max(...finite);
  if (holdsZero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [holdsZero && low === 0 ? 0 : low - room, high + room];
}

function means(values, count) {
  return values.map((_, at) => {
    const part = values.slice(Math.max(0, at - count + 1), at + 1).filter(Number.isFinite);
    return part.length ? part.reduce((sum, each) => sum + each, 0) / part.length : NaN;
  });
}

// no more points than twice the pixels: of each group the lowest and the highest
function thinned(points, most) {
  if (points.length <= most) return points;
  const size = Math.ceil((points.length * 2) / most), kept = [];
  for (let at = 0; at < points.length; at += size) {
    const group = points.slice(at, at + size).filter((each) => Number.isFinite(each[1]));
    if (!group.length) continue;
    const low = group.reduce((a, b) => (b[1] < a[1] ? b : a)), high = group.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low[0] < high[0] ? [low, high] : high === low ? [low] : [high, low]));
  }
  return kept;
}

function path(points, x, y) {
  let text = "", isDrawing = false;
  for (const [step, value] of points) {
    if (!Number.isFinite(value)) { isDrawing = false; continue; }
    text += `${isDrawing ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    isDrawing = true;
  }
  return text;
}

class Chart {
  constructor(board, title, unit) {
    this.board = board;
    this.title = title;
    this.value = make("span", { className: "value" });
    this.svg = draw("svg", { height: HEIGHT, tabindex: 0, role: "slider", "aria-label": `${title}, ${unit}` });
    this.unit = unit;
    this.place = make("span", { textContent: unit });
    this.more = make("span");
    this.element = make("figure", { className: "chart card" },
      make("figcaption", {}, make("h3", { textContent: title }), this.value),
      make("p", { className: "beside soft" }, this.place, this.more), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.board.point(this.stepAt(event)));
    this.svg.addEventListener("pointerleave", () => this.board.point(null));
    this.svg.addEventListener("blur", () => this.board.point(null));
    this.svg.addEventListener("keydown", (event) => this.board.key(event));
  }

  stepAt(event) {
    const box = this.svg.getBoundingClientRect(), steps = this.board.steps;
    if (!steps.length || !this.x) return null;
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    const wanted = this.first - this.half + share * (this.last - this.first + 2 * this.half);
    return this.board.nearest(wanted);
  }

  // isBanded: each step has a band of its own, in place of a point
  frame(low, high, isBanded = false) {
    const width = this.svg.clientWidth || 320, steps = this.board.steps;
    this.width = width;
    this.first = steps[0] ?? 0;
    this.last = Math.max(steps[steps.length - 1] ?? 1, this.first + 1);
    this.half = isBanded ? 0.5 : 0;
    this.x = (step) => LEFT + ((step - this.first + this.half) / (this.last - this.first + 2 * this.half)) * (width - LEFT - RIGHT);
    this.y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren();
    const marks = ticks(low, high, 4);
    const decimals = Math.max(0, -Math.floor(Math.log10((marks[1] ?? 1) - (marks[0] ?? 0)) + 1e-6));
    for (const at of marks) {
      this.add("line", { x1: LEFT, x2: width - RIGHT, y1: this.y(at), y2: this.y(at), class: at === 0 ? "zero-line" : "grid-line" });
      this.add("text", { x: LEFT - 6, y: this.y(at) + 4, "text-anchor": "end" }, (decimals < 6 ? at.toFixed(decimals) : number(at, 2)).replace("-", "−"));
    }
    for (const at of ticks(this.first, this.last, Math.min(12, width / 52)))
      if (Number.isInteger(at)) this.add("text", { x: this.x(at), y: HEIGHT - 4, "text-anchor": "middle" }, String(at));
  }

  add(tag, attributes, ...children) { this.svg.append(draw(tag, attributes, ...children)); }

  // the step that is pointed at, if any
  mark(step) {
    const isPointed = step !== null && step !== undefined;
    this.place.textContent = isPointed ? `at step ${step}` : this.unit;
    if (isPointed) this.add("line", { class: "cross", x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM });
  }

  say(step, text) {
    const steps = this.board.steps;
    this.svg.setAttribute("aria-valuemin", steps[0] ?? 0);
    this.svg.setAttribute("aria-valuemax", steps[steps.length - 1] ?? 0);
    this.svg.setAttribute("aria-valuenow", step ?? 0);
    this.svg.setAttribute("aria-valuetext", step === undefined ? "no step yet" : `step ${step}: ${text}`);
  }
}

class Line extends Chart {
  constructor(board, { title, unit, key, spread, also, holdsZero = false }) {
    super(board, title, unit);
    Object.assign(this, { key, spread, also, holdsZero });
  }

  render() {
    const { rows, steps, pointed } = this.board, values = rows.map((row) => row[this.key]);
    const aim = this.board.aims[this.key];
    const edges = this.spread ? rows.map((row) => [row[this.key] - row[this.spread], row[this.key] + row[this.spread]]) : [];
    const others = rows.map((row) => row[this.also]).filter((each) => each !== undefined);
    const [low, high] = range([...values, ...edges.flat(), ...others, ...(aim ? [aim] : [])], this.holdsZero);
    this.frame(low, high);
    const most = 2 * this.width, points = steps.map((step, at) => [step, values[at]]);
    if (edges.length > 1) {
      const upper = thinned(steps.map((step, at) => [step, edges[at][1]]).filter((each) => Number.isFinite(each[1])), most);
      const lower = thinned(steps.map((step, at) => [step, edges[at][0]]).filter((each) => Number.isFinite(each[1])), most);
      if (upper.length) this.add("path", { class: "band", d: path(upper, this.x, this.y) + path(lower.reverse(), this.x, this.y).replace("M", "L") + "Z" });
    }
    if (aim) this.add("line", { class: "aim", x1: LEFT, x2: this.width - RIGHT, y1: this.y(aim), y2: this.y(aim) });
    const isLong = this.board.window > 0;
    this.add("path", { class: isLong ? "raw" : "raw alone", d: path(thinned(points, most), this.x, this.y) });
    if (isLong) this.add("path", { class: "smooth", d: path(thinned(means(values, this.board.window).map((each, at) => [steps[at], each]), most), this.x, this.y) });
    rows.forEach((row, at) => {
      if (row[this.also] !== undefined) this.add("circle", { class: "dot", cx: this.x(steps[at]), cy: this.y(row[this.also]), r: 3.5 });
    });
    const at = pointed === null ? rows.length - 1 : steps.indexOf(pointed), row = rows[at];
    const text = row ? number(row[this.key]) : "–";
    this.value.textContent = text;
    const more = [];
    if (row && this.spread) more.push(`± ${number(row[this.spread], 2)}`);
    if (row && row[this.also] !== undefined) more.push(`held-out ${number(row[this.also])}`);
    this.more.textContent = more.join(" · ");
    this.mark(row && pointed);
    if (row && Number.isFinite(row[this.key]) && (pointed !== null || steps.length === 1))
      this.add("circle", { class: "mark", cx: this.x(steps[at]), cy: this.y(row[this.key]), r: 4.5 });
    this.say(steps[at], text);
  }
}

class Phases extends Chart {
  constructor(board) {
    super(board, "Time of a step", "seconds by phase");
    this.legend = make("ul", { className: "legend" });
    this.items = PHASES.map(([key, name]) => {
      const swatch = make("i"), value = make("b");
      swatch.style.background = `var(--phase-${key})`;
      this.legend.append(make("li", {}, swatch, name + " ", value));
      return value;
    });
    this.element.append(this.legend);
  }

  render() {
    const { rows, steps, pointed } = this.board;
    const times = rows.map((row) => PHASES.map(([key]) => row[`time_${key}_s`] || 0));
    const totals = times.map((each) => each.reduce((a, b) => a + b, 0));
    this.frame(0, range(totals, true)[1], true);
    const room = (this.width - LEFT - RIGHT) / (this.last - this.first + 1);
    // A pixel's worth of steps is one bar, with their mean.
    const size = Math.max(1, Math.ceil(2 / room)), wide = Math.max(1, Math.min(room * size - (room * size > 4 ? 1.5 : 0), 28));
    for (let at = 0; at < rows.length; at += size) {
      const group = times.slice(at, at + size);
      let below = 0;
      PHASES.forEach(([key], phase) => {
        const mean = group.reduce((sum, each) => sum + each[phase], 0) / group.length;
        const top = this.y(below + mean), height = this.y(below) - top;
        const middle = this.x(steps[at] + (group.length - 1) / 2);
        const bar = draw("rect", { x: middle - wide / 2, y: top, width: wide, height: Math.max(0, height) });
        bar.style.fill = `var(--phase-${key})`;
        if (height > 0.2) this.svg.append(bar);
        below += mean;
      });
    }
    const at = pointed === null ? rows.length - 1 : steps.indexOf(pointed), row = rows[at];
    this.items.forEach((item, phase) => { item.textContent = row ? duration(times[at][phase]) : "–"; });
    this.value.textContent = row ? duration(row.step_s) : "–";
    this.mark(row && pointed);
    this.say(steps[at], row ? `${duration(row.step_s)}; ` + PHASES.map(([, name], phase) => `${name} ${duration(times[at][phase])}`).join(", ") : "");
  }
}

const LINES = [
  { title: "Score", unit: "reward model, mean ± std", key: "score_mean", spread: "score_std", also: "evaluation/score_mean" },
  { title: "KL from the reference", unit: "nats a response", key: "kl_per_sequence", also: "evaluation/kl_per_sequence", holdsZero: true },
  { title: "Reward", unit: "score − β · KL", key: "reward_mean" },
  { title: "Entropy", unit: "nats a token", key: "entropy", holdsZero: true },
  { title: "Clip fraction", unit: "of tokens", key: "clip_fraction", holdsZero: true },
  { title: "Response length", unit: "tokens", key: "response_length_mean", also: "evaluation/response_length_mean", holdsZero: true },
];

// All charts, over the same rows.
export class Board {
  constructor(lines, phases) {
    this.rows = [];
    this.steps = [];
    this.pointed = null;
    this.window = 0;  // steps of the bold line's mean; 0 for no bold line
    this.aims = {};  // wanted values by key
    this.charts = LINES.map((each) => new Line(this, each));
    lines.append(...this.charts.map((each) => each.element));
    this.charts.push(new Phases(this));
    phases.append(this.charts[this.charts.length - 1].element);
    new ResizeObserver(() => this.later()).observe(lines);
  }

  show(rows) {
    this.rows = rows;
    this.steps = rows.map((row) => row.step);
    // In a short run a mean of ten would tell of the start for most of it.
    this.window = rows.length < SMOOTH_FROM ? 0 : Math.min(10, Math.round(rows.length / 8));
    if (!this.steps.includes(this.pointed)) this.pointed = null;
    this.later();
  }

  later() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => { this.isDue = false; this.charts.forEach((each) => each.render()); });
  }

  nearest(wanted) {
    return this.steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), this.steps[0]);
  }

  point(step) {
    if (step !== this.pointed) { this.pointed = step; this.later(); }
  }

  key(event) {
    const last = this.steps.length - 1, at = this.pointed === null ? last : this.steps.indexOf(this.pointed);
    const moved = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.point(null);
    if (moved === undefined || last < 0) return;
    event.preventDefault();
    this.point(this.steps[Math.max(0, Math.min(last, moved))]);
  }
}
