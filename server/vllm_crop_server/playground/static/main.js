// Wires the page together.
import { Answer } from "./answer.js";
import { Failure, Server } from "./api.js";
import { Asking } from "./asking.js";
import { Box } from "./box.js";
import { takePictures } from "./picture.js";
import { PlanView } from "./plan_view.js";
import { Pruning } from "./pruning.js";
import { Stage } from "./stage.js";

const find = (id) => document.getElementById(id);
let apiKey = ""; // once it is typed to its end, and not letter by letter
const server = new Server(() => apiKey);
const stage = new Stage(find("stage"), find("canvas"), find("empty"));
const pruning = new Pruning(find, () => planView.refresh());
const box = new Box(find, stage, () => planView.outline(), boxDone);
const planView = new PlanView(find, server, stage, pruning, box);
const answers = [new Answer(find("with")), new Answer(find("without"))];
const asking = new Asking(server, pruning, box, answers, planView);
let connecting = null; // the promise of the model's name
let attempts = 0; // to connect; only the last one counts
let running = null; // the AbortController of the question being asked

function say(status, problem = "") {
  find("status").textContent = status;
  find("problem").textContent = problem;
}

function boxDone() {
  planView.forget();
  planView.refresh();
}

/** Ask the server what it serves; says in words why not, and then gives null. */
async function connect() {
  const attempt = ++attempts;
  const key = find("key");
  try {
    if (!apiKey && (await server.keyNeeded())) throw new Failure("This server asks for an API key.", 401);
    const [model, settings] = [await server.model(), await server.settings()];
    find("server").textContent = `Model ${model}`;
    key.setAttribute("aria-invalid", "false");
    pruning.offer(settings);
    if (!running) say("");
    planView.connected = true;
    planView.refresh();
    return model;
  } catch (failure) {
    if (attempt !== attempts) return connecting; // another key has been typed
    connecting = null; // asked again by the next question
    find("server").textContent = "Not connected";
    key.setAttribute("aria-invalid", String(failure.status === 401));
    say("", failure.message);
    return null;
  }
}

/** What is missing before a question can be asked: its element and words, or null. */
function missing() {
  if (!stage.picture) return [find("file"), "Choose an image first."];
  if (!find("question").value.trim()) return [find("question"), "Type a question first."];
  if (box.problem) return [box.fields[0], `The region is no box: ${box.problem}`];
  if (!find("most").checkValidity()) return [find("most"), "At most so many image tokens: a whole number from 1, or nothing."];
  if (!find("longest").checkValidity()) return [find("longest"), "The answer needs room: a whole number of tokens from 1."];
  return null;
}

async function ask() {
  const lacking = missing();
  if (lacking) {
    lacking[0].focus();
    say("", lacking[1]);
    return;
  }
  running = new AbortController();
  setBusy(true);
  say("Asking with CROP…");
  try {
    const model = await (connecting ??= connect());
    if (!model) return;
    const question = find("question").value.trim();
    await asking.ask(model, stage.picture, question, Number(find("longest").value), running.signal, say);
  } catch (failure) {
    if (failure.name === "AbortError") say("Stopped.");
    else say("", failure.message);
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  const stopHadFocus = document.activeElement === find("stop");
  find("stop").hidden = !busy;
  find("ask").setAttribute("aria-disabled", String(busy)); // and not disabled, which would lose the focus
  if (stopHadFocus) find("ask").focus();
}

takePictures(find("file"), find("stage"), (picture) => {
  running?.abort();
  stage.picture = picture;
  box.clear();
  for (const answer of answers) answer.clear();
  say("");
  planView.forget();
  planView.refresh();
}, (problem) => say("", problem));

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("form").requestSubmit();
});
find("stop").addEventListener("click", () => running?.abort());
find("finger").hidden = !navigator.maxTouchPoints;
find("key").addEventListener("change", (event) => {
  apiKey = event.target.value.trim();
  connecting = connect();
});
find("show-tokens").addEventListener("change", (event) => {
  stage.showTokens = event.target.checked;
  stage.draw();
});
find("show-heat").addEventListener("change", (event) => {
  stage.showHeat = event.target.checked;
  stage.draw();
});
find("finger").addEventListener("click", (event) => {
  // Off, a finger on the image scrolls the page.
  const drawing = stage.canvas.classList.toggle("finger");
  event.target.setAttribute("aria-pressed", String(drawing));
});
connecting = connect();
