// The live page of a trainer: follows the run, shows it, and steers it.

import { Board } from "./charts.js";
import { byId, duration, make, number } from "./format.js";
import { forgetSamples, showSamples } from "./samples.js";
import { events, get, post, Refused, token } from "./stream.js";

const MAX_STEPS = 5000;      // newest steps that are kept and drawn
const RATE_STEPS = 20;       // over which the time of a step is averaged
const RETRY_MS = [1000, 2000, 4000, 5000];
const SAMPLES_MS = 2000;     // between two questions for samples
const WORDS = { STARTING: "starting", RUNNING: "running", PAUSED: "paused", STOPPING: "stopping", STOPPED: "stopped",
  COMPLETED: "complete", FAILED: "failed", AWAY: "not reached" };
const COLUMNS = [["step", "step"], ["score_mean", "score"], ["kl_per_sequence", "KL"], ["reward_mean", "reward"], ["entropy", "entropy"],
  ["clip_fraction", "clip fraction"], ["response_length_mean", "length"], ["kl_coefficient", "β"], ["step_s", "seconds"]];

const board = new Board(byId("charts"), byId("phases"));
const rows = new Map();      // figures by step
let run = null;              // what the trainer said of itself last
let state = "STARTING";
let isOver = false;
let isAway = false;
let samplesAsked = 0;
let abort = null;

// ------------------------------------------------------------------------------------- showing

function announce(text) { byId("announcer").textContent = text; }

function notify(text, kind = "") {
  const notice = byId("notice");
  notice.hidden = !text;
  notice.dataset.kind = kind;
  notice.textContent = text;
}

function showState(next) {
  if (next !== state && run) announce(`The run is ${WORDS[next]}${run.step ? `, after step ${run.step} of ${run.total_steps}` : ""}.`);
  state = next;
  byId("state").dataset.state = next;
  byId("state").lastElementChild.textContent = WORDS[next];
  byId("pause").textContent = state === "PAUSED" ? "Resume" : "Pause";
  const canSteer = ["STARTING", "RUNNING", "PAUSED"].includes(state) && !isAway;
  byId("pause").disabled = byId("stop").disabled = !canSteer;
  byId("checkpoint").disabled = !canSteer || byId("checkpoint").dataset.busy === "yes";
}

function secondsAStep() {
  const newest = [...rows.values()].slice(-RATE_STEPS).map((row) => row.step_s);
  return newest.length ? newest.reduce((a, b) => a + b, 0) / newest.length : NaN;
}

function showRun() {
  const step = Number(run.step), total = Number(run.total_steps), pace = secondsAStep();
  byId("run-id").textContent = run.run_id || "Loading…";
  byId("bar").max = Math.max(total, 1);
  byId("bar").value = step;
  const left = (total - step) * pace, isLeft = !isOver && total > step;
  const facts = [
    ["Step", total ? `${step} of ${total}` : "–"],
    ["Time of a step", duration(pace)],
    [state === "PAUSED" ? "Left, once resumed" : "Time left", isLeft ? duration(left) : "–"],
    ["Weights version", total ? run.weights_version : "–"],
    ["Newest checkpoint", Number(run.checkpoint_step) ? `step ${run.checkpoint_step}` : "none yet"],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  document.title = `${total ? `${step}/${total} ` : ""}${WORDS[isAway ? "AWAY" : state]} · ${run.run_id || "Kleash"}`;
}

function showFigures() {
  const kept = [...rows.values()];
  board.show(kept);
  byId("hint").textContent = board.window ? `Thin: each step. Bold: mean of ${board.window}. ` : "";
  const newest = kept.slice(-20).reverse();
  byId("table").replaceChildren(
    make("thead", {}, make("tr", {}, ...COLUMNS.map(([, name]) => make("th", { scope: "col", textContent: name })))),
    make("tbody", {}, ...newest.map((row) => make("tr", {}, ...COLUMNS.map(([key]) => make("td", { textContent: key === "step" ? row.step : number(row[key]) }))))));
}

let isDue = false;
function showLater() {
  if (isDue) return;
  isDue = true;
  setTimeout(() => { isDue = false; if (run) { showRun(); showFigures(); } }, 60);
}

async function askForSamples() {
  const wait = samplesAsked + SAMPLES_MS - Date.now();
  if (samplesAsked < 0) return;
  if (wait > 0) {
    const before = samplesAsked;
    samplesAsked = -1;
    setTimeout(() => { samplesAsked = before - SAMPLES_MS; askForSamples(); }, wait);
    return;
  }
  samplesAsked = Date.now();
  if (document.hidden) return;
  try { showSamples(await get("v1/samples")); } catch { /* the stream tells what is wrong */ }
}

// ----------------------------------------------------------------------------------- following

function forget() {
  rows.clear();
  forgetSamples();
}

// Cuts back what a restarted trainer does again. Returns whether there was something.
function cutBack(step) {
  const later = [...rows.keys()].filter((each) => each > step);
  later.forEach((each) => rows.delete(each));
  return later.length > 0;
}

function takeStep(metrics) {
  const row = { step: Number(metrics.step), step_s: Number(metrics.step_s) };
  for (const [name, value] of Object.entries(metrics.values)) row[name] = Number(value);
  rows.set(row.step, row);
  if (rows.size > MAX_STEPS) rows.delete(rows.keys().next().value);
  if (run) {
    run.step = String(Math.max(Number(run.step), row.step));
    run.weights_version = metrics.weights_version;
  }
}

function takeRun(next) {
  const isOther = run && run.run_id && next.run_id && run.run_id !== next.run_id;
  if (isOther) { forget(); notify(`This is another run than before: ${next.run_id}.`, "warn"); }
  // A trainer that still loads does not know yet where its run is.
  const isBehind = next.run_id && next.total_steps !== "0" && cutBack(Number(next.step));
  if (next.run_id || !run) run = next;
  else run.state = next.state;
  showState(next.state.replace("RUN_STATE_", ""));
  if (isBehind) notify(`The trainer was started again, and goes on after step ${next.step}.`, "warn");
  return isOther || isBehind;
}

// One connection: to the end of the stream. Returns whether to begin at once at another step.
async function follow(first) {
  abort = new AbortController();
  const last = [...rows.keys()].pop();
  const path = last ? "v1/steps" : `v1/steps?from=${first}`;
  for await (const { event, data } of events(path, last, abort)) {
    if (isAway) cameBack();
    if (event === "step") {
      takeStep(data);
      askForSamples();
    } else if (event === "run" && takeRun(data)) {
      showLater();
      return true;
    } else if (event === "problem") {
      throw new Error(data.error.message);
    } else if (event === "end") {
      ended();
      return false;
    }
    showLater();
  }
  return false;
}

function cameBack() {
  isAway = isOver = false;
  notify("");
  announce("Connected again.");
}

function ended() {
  const word = state === "STOPPING" ? "STOPPED" : state;
  isOver = ["STOPPED", "COMPLETED", "FAILED"].includes(word);
  showState(word);
  if (word === "COMPLETED") notify(`The run is complete: all ${run.total_steps} steps are done.`, "good");
  if (word === "STOPPED") notify(`The run was stopped after step ${run.step}. kleash ppo --resume goes on; this page sees it when it does.`, "warn");
  if (word === "FAILED") notify(`The run has failed after step ${run.step}: ${run.error_message}`, "bad");
  showLater();
}

function wentAway(error, attempt) {
  if (isOver) return;
  isAway = true;
  const wait = RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)] / 1000;
  notify(`The trainer does not answer (${error ? error.message : "the connection has ended"}). Trying again every ${wait} s; what is shown is of before.`, "warn");
  showState("AWAY");
  if (run) showRun();
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function followForEver() {
  for (let attempt = 0; ;) {
    try {
      const now = await get("v1/run");
      reveal(now);
      attempt = 0;
      while (await follow(Math.max(1, Number(now.step) - MAX_STEPS + 1)));
      if (!isOver) throw new Error("the connection has ended");
      if (state === "COMPLETED") return;
    } catch (error) {
      if (error instanceof Refused) { askForToken(error.message); return; }
      wentAway(error, attempt);
    }
    await pause(RETRY_MS[Math.min(attempt++, RETRY_MS.length - 1)]);
  }
}

function reveal(now) {
  byId("run").hidden = false;
  byId("sign-in").hidden = true;
  byId("sign-out").hidden = !token.get();
  if (!run) { run = now; samplesAsked = 0; askForSamples(); }
  if (now.config_json) describe(JSON.parse(now.config_json));
  showLater();
}

function describe(config) {
  const name = (path) => String(path).split("/").filter(Boolean).pop();
  board.aims = config.kl.target ? { kl_per_sequence: config.kl.target } : {};
  const leash = config.kl.controller === "adaptive" ? `β steered to ${number(config.kl.target)} nats` : `β ${config.kl.coefficient}`;
  byId("about").textContent = `PPO of ${name(config.model)} · ${config.batch_size} responses a step · ${leash}`;
}

// ------------------------------------------------------------------------------------- steering

async function steer(verb) {
  try {
    const answer = await post(`v1/run:${verb}`);
    if (answer.state) { showState(answer.state.replace("RUN_STATE_", "")); showLater(); }
    return answer;
  } catch (error) {
    if (error instanceof Refused && !token.get()) askForToken(error.message);
    else notify(`This was not done: ${error.message}`, "bad");
    return null;
  }
}

byId("pause").addEventListener("click", async () => {
  const isPaused = state === "PAUSED";
  if (await steer(isPaused ? "resume" : "pause"))
    notify(isPaused ? "" : "Paused: the step in progress ends, and no other begins until the run is resumed.");
});

byId("checkpoint").addEventListener("click", async () => {
  const button = byId("checkpoint");
  button.dataset.busy = "yes";
  button.disabled = true;
  notify("A checkpoint is written after the step in progress…");
  const saved = await steer("checkpoint");
  button.dataset.busy = "";
  showState(state);
  if (saved) notify(`The checkpoint of step ${saved.step} is on disk: ${saved.path}`, "good");
});

byId("stop").addEventListener("click", () => byId("confirm").showModal());
byId("confirm").addEventListener("close", () => {
  if (byId("confirm").returnValue === "stop") steer("stop");
  byId("confirm").returnValue = "";
});

// ------------------------------------------------------------------------------------- the token

function askForToken(message) {
  const wasRefused = token.get() !== "";
  token.forget();
  forget();
  run = null;
  byId("run").hidden = true;
  byId("sign-in").hidden = false;
  byId("sign-in-text").textContent = wasRefused ? `The token was refused: ${message}` : "This trainer asks who calls.";
  byId("token").focus();
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(byId("token").value.trim());
  byId("token").value = "";
  followForEver();
});

byId("sign-out").addEventListener("click", () => { token.forget(); location.reload(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && run) { samplesAsked = Math.max(samplesAsked, 0); askForSamples(); } });

followForEver();
