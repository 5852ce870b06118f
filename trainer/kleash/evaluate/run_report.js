"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const make = (tag, properties = {}, children = []) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/* Theme: the system's, unless the reader chooses. */
const remembered = () => { try { return localStorage.getItem("kleash-theme"); } catch { return null; } };
const useTheme = (theme) => {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("kleash-theme", theme); } catch { /* a page from a file may have no storage */ }
};
for (const input of document.querySelectorAll("#theme input")) {
  input.addEventListener("change", () => useTheme(input.value));
  if (input.value === remembered()) { input.checked = true; useTheme(input.value); }
}

/* The section that is read, in the navigation. */
const links = [...document.querySelectorAll("nav a")];
const sections = links.map((link) => document.querySelector(link.hash));
const markSection = () => {
  const middle = innerHeight / 3;
  const index = Math.max(0, sections.findLastIndex((section) => section.getBoundingClientRect().top <= middle));
  links.forEach((link, each) => each === index ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
};
addEventListener("scroll", markSection, { passive: true });
markSection();

/* A cursor that reads the curves: pointer, or arrow keys on the range that covers the chart. */
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2"];
const swatch = (style) => {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "swatch"); svg.setAttribute("viewBox", "0 0 26 10"); svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("class", `line c${style}`); line.setAttribute("d", "M1 5H25");
  if (DASHES[style]) line.setAttribute("stroke-dasharray", DASHES[style]);
  svg.append(line);
  return svg;
};
for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = data.charts[figure.dataset.chart];
  const svg = figure.querySelector(".chart"), cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout"), range = figure.querySelector(".scrub");
  const places = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  range.max = places.length - 1;
  const show = (index) => {
    const place = places[index];
    const near = chart.lines.map((line) => [line, line.points.reduce((a, b) => Math.abs(b[0] - place) < Math.abs(a[0] - place) ? b : a)])
      .filter(([, point]) => Math.abs(point[0] - place) < 8);
    cursor.replaceChildren();
    const rule = document.createElementNS(SVG, "path");
    rule.setAttribute("d", `M${place} ${chart.top}V${chart.bottom}`);
    cursor.append(rule);
    const entries = near.map(([line, [x, y, step, mean, spread]]) => {
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("class", `c${line.style}`); dot.setAttribute("cx", x); dot.setAttribute("cy", y); dot.setAttribute("r", 3.5);
      cursor.append(dot);
      return { line, step, mean, spread };
    });
    cursor.removeAttribute("hidden");
    readout.replaceChildren(make("span", { className: "entry", textContent: `at ${entries[0].step}` }),
      ...entries.map(({ line, mean, spread }) => make("span", { className: "entry" },
        [swatch(line.style), make("b", { textContent: mean }), spread ? ` (${spread})` : ""])));
    range.setAttribute("aria-valuetext",
      `${entries[0].step}: ${entries.map(({ line, mean, spread }) => `${line.label} ${mean}${spread ? `, ${spread}` : ""}`).join("; ")}`);
  };
  const hide = () => { cursor.setAttribute("hidden", ""); readout.textContent = "\u00a0"; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let index = 0;
    places.forEach((place, each) => { if (Math.abs(place - x) < Math.abs(places[index] - x)) index = each; });
    range.value = index;
    show(index);
  });
  svg.addEventListener("pointerleave", hide);
  range.addEventListener("input", () => show(Number(range.value)));
  range.addEventListener("focus", () => show(Number(range.value)));
  range.addEventListener("blur", hide);
}

/* Samples with their tokens coloured. */
const list = document.getElementById("sample-list");
if (!list) return;
const { rows, scales } = data.samples;
const runChoice = document.getElementById("sample-run"), stepChoice = document.getElementById("sample-step");
const NAMES = { rewards: "reward", kl: "KL" };
const UNITS = { rewards: "normalised score", kl: "nats" };
const FULL_PERCENT = 62;
let colour = "rewards";

const figures = (value) => {
  const text = Math.abs(value) >= 1e-3 || value === 0 ? value.toPrecision(3) : value.toExponential(1);
  return String(Number(text)).replace("-", "\u2212");
};
const visible = (text) => text === "" ? ["\u00b7", "part of a letter"] : text === "\n" ? ["\u23ce\n", "line break"]
  : text.trim() === "" ? [text.replaceAll("\n", "\u23ce\n").replaceAll(" ", "\u2423"), "space"] : [text, ""];
const paint = (element, value) => {
  element.classList.remove("more", "less");
  if (colour === "none") return;
  const weight = Math.min(1, Math.sqrt(Math.abs(value) / scales[colour]));
  element.style.setProperty("--weight", `${(FULL_PERCENT * weight).toFixed(1)}%`);
  if (value) element.classList.add(value > 0 ? "more" : "less");
};
const versionOf = (row, index) => (row.versions.find(([start, end]) => start <= index && index < end) || [])[2];

const describeToken = (row, index, readout) => {
  const parts = [["reward", row.rewards[index]], ["KL", row.kl[index]], ["log-probability", row.log_probs[index]]];
  readout.replaceChildren(make("span", { className: "entry" }, [`token ${index + 1} of ${row.tokens.length} `,
    make("b", { textContent: JSON.stringify(row.tokens[index]) })]),
    ...parts.map(([name, value]) => make("span", { className: "entry" }, [`${name} `, make("b", { textContent: figures(value) })])),
    make("span", { className: "entry" }, ["weights version ", make("b", { textContent: versionOf(row, index) })]));
};

const drawSample = (row, number) => {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const readout = make("p", { className: "readout", textContent: "Reward and KL of a token: point at it." });
  readout.setAttribute("aria-live", "polite");
  const tokens = row.tokens.map((text, index) => {
    const [shown, name] = visible(text);
    const token = make("button", { className: name ? "token mark" : "token", type: "button", textContent: shown, tabIndex: index ? -1 : 0 });
    if (name) token.setAttribute("aria-label", name);
    token.addEventListener("pointerenter", () => describeToken(row, index, readout));
    token.addEventListener("focus", () => {
      tokens.forEach((each) => { each.tabIndex = each === token ? 0 : -1; });
      describeToken(row, index, readout);
    });
    token.addEventListener("keydown", (event) => {
      const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (target === undefined || !tokens[target]) return;
      event.preventDefault();
      tokens[target].focus();
    });
    token.repaint = () => colour === "none" ? paint(token, 0) : paint(token, row[colour][index]);
    return token;
  });
  const box = make("div", { className: "tokens" }, tokens);
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `Tokens of response ${number}; arrow keys move between them`);
  return make("article", { className: "card sample" }, [
    make("h3", {}, [`Response ${number}`, make("span", { textContent: `step ${row.step}` }),
      make("span", { textContent: `score ${figures(row.score)}` }),
      make("span", { textContent: `reward ${figures(sum(row.rewards))}` }),
      make("span", { textContent: `KL ${figures(sum(row.kl))}` }),
      make("span", { textContent: row.finish === "stop" ? "stopped by itself" : "cut at its length" })]),
    make("p", { className: "prompt", textContent: row.prompt }), box, readout]);
};

const drawScale = () => {
  const box = document.getElementById("scale");
  if (colour === "none") { box.replaceChildren("No colour."); return; }
  const bound = scales[colour];
  const items = [-1, -0.25, 0, 0.25, 1].map((share) => {
    const item = make("li", { textContent: (share === 1 ? "\u2265 " : share === -1 ? "\u2264 " : "") + figures(share * bound) });
    paint(item, share * bound);
    return item;
  });
  box.replaceChildren(`${NAMES[colour]} of a token, ${UNITS[colour]}:`, make("ol", {}, items),
    "Square-root scale; values below 0 are underlined." +
    (colour === "rewards" ? " The last token has the score." : ""));
};
const repaint = () => {
  list.dataset.colour = document.getElementById("scale").dataset.colour = colour;
  drawScale();
  for (const token of list.querySelectorAll(".token")) token.repaint();
};
const drawSteps = () => {
  const steps = [...new Set(rows.filter((row) => row.run === Number(runChoice.value)).map((row) => row.step))];
  stepChoice.replaceChildren(make("option", { value: "", textContent: "all" }),
    ...steps.map((step) => make("option", { value: step, textContent: step })));
  if (steps.length) stepChoice.value = steps[steps.length - 1];
};
const drawList = () => {
  const chosen = rows.filter((row) => row.run === Number(runChoice.value)
    && (stepChoice.value === "" || row.step === Number(stepChoice.value)));
  list.replaceChildren(...(chosen.length ? chosen.map((row, index) => drawSample(row, index + 1))
    : [make("p", { textContent: "This run kept no samples." })]));
  repaint();
};
runChoice.addEventListener("change", () => { drawSteps(); drawList(); });
stepChoice.addEventListener("change", drawList);
for (const input of document.querySelectorAll("#colour input"))
  input.addEventListener("change", () => { colour = input.value; repaint(); });
drawSteps();
drawList();
})();
