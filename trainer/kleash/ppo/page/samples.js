// The newest responses, each token coloured by its KL or its reward.

import { byId, make, number } from "./format.js";

const MEASURES = {
  // A drift away from the reference is warm; a reward above zero is cool, as a good sign.
  kl: { name: "KL", unit: "nats", low: "rarer than with the reference", high: "likelier", isFlipped: false },
  rewards: { name: "reward", unit: "", low: "punished", high: "rewarded", isFlipped: true },
};

let shown = null;

function measure() { return document.querySelector("input[name=colour]:checked").value; }

// The scale ends where one token in twenty lies beyond, so that one extreme does not pale the rest.
function limit(samples, key) {
  const sizes = samples.flatMap((each) => each[key].map((value) => Math.abs(Number(value)))).filter(Number.isFinite).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1 : 1;
}

function token(sample, at, key, most) {
  const value = Number(sample[key][at]), share = Math.max(-1, Math.min(1, value / most));
  const text = sample.tokens[at] ?? "";
  const span = make("span", {
    className: "token", textContent: text,
    title: `KL ${number(Number(sample.kl[at]))} nats, reward ${number(Number(sample.rewards[at]))}`,
  });
  const isWarm = share > 0 !== MEASURES[key].isFlipped;
  if (Number.isFinite(share) && Math.abs(share) > 0.02)
    span.style.backgroundColor = `rgba(var(--${isWarm ? "up" : "down"}), ${(0.6 * Math.abs(share)).toFixed(3)})`;
  return span;
}

function view(sample, key, most) {
  const sum = sample.kl.reduce((total, each) => total + Number(each), 0);
  const response = make("p", { className: "response", tabIndex: 0 });
  response.setAttribute("aria-label", "Response");
  if (sample.tokens.length) response.append(...sample.tokens.map((_, at) => token(sample, at, key, most)));
  else response.textContent = sample.response;
  return make("article", { className: "sample card" },
    make("header", {},
      make("span", {}, "score ", make("b", { textContent: number(sample.score) })),
      make("span", {}, "KL ", make("b", { textContent: number(sum) }), " nats"),
      make("span", { className: "soft", textContent: `${sample.kl.length} tokens, ${sample.finish_reason === "stop" ? "ended itself" : "cut at the limit"}` }),
      make("span", { className: "soft", textContent: `prompt ${sample.prompt_id}` })),
    make("p", { className: "prompt", textContent: sample.prompt }), response);
}

export function showSamples(answer) {
  const isNew = !shown || shown.step !== answer.step;
  shown = answer;
  if (isNew) render();
}

function render() {
  if (!shown || !shown.samples.length) return;
  const key = measure(), its = MEASURES[key], most = limit(shown.samples, key);
  byId("samples-step").textContent = `of step ${shown.step}`;
  byId("samples").replaceChildren(...shown.samples.map((each) => view(each, key, most)));
  byId("scale").classList.toggle("flipped", its.isFlipped);
  byId("scale").replaceChildren(`${its.low} −${number(most, 2)}`, make("i"), `+${number(most, 2)} ${its.unit} ${its.high}`);
}

export function forgetSamples() {
  shown = null;
  byId("samples").replaceChildren(make("p", { className: "soft", textContent: "None yet." }));
}

document.querySelectorAll("input[name=colour]").forEach((each) => each.addEventListener("change", render));
