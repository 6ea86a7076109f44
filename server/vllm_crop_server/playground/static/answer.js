// One of the two answers, with what it cost.
import { number } from "./tokens.js";

const OUTCOMES = {
  region: "found by the localizer",
  widened: "found by the localizer, widened for want of confidence",
  global: "whole image: the question is about all of it",
  low_confidence: "whole image: the localizer was not sure enough",
  timeout: "whole image: the localizer took too long",
  error: "whole image: the localizer failed",
  unreadable: "whole image: the localizer's answer could not be read",
  no_question: "whole image: no question to look for",
  no_image: "whole image: the localizer got no image",
};
const SOURCES = {
  request: "your box",
  none: "none: served whole",
  off: "none: method off",
  out_of_view: "outside of what the model sees: served whole",
};

/** An article with the answer and a table; starts empty. */
export class Answer {
  text = "";

  constructor(article) {
    this.article = article;
    this.words = document.createElement("p");
    this.words.className = "answer";
    this.table = document.createElement("table");
    article.append(this.words, this.table);
    this.clear();
  }

  clear() {
    this.text = "";
    this.words.textContent = "No answer yet.";
    this.words.classList.add("quiet");
    this.table.replaceChildren();
    this.article.setAttribute("aria-busy", "false");
  }

  begin() {
    this.clear();
    this.words.textContent = "…";
    this.article.setAttribute("aria-busy", "true");
  }

  add(text) {
    this.text += text;
    this.words.textContent = this.text;
    this.words.classList.remove("quiet");
  }

  /**
   * asked: the field `crop` of the request; facts: the header, null without one; usage and firstTokenMs: null where
   * the stream did not tell.
   */
  finish(asked, { facts, usage, firstTokenMs }) {
    this.article.setAttribute("aria-busy", "false");
    if (!this.text) this.words.textContent = "(an empty answer)";
    const image = facts?.images?.[0];
    const localizer = image?.localizer;
    this.#row("asked", "Asked for", pruningOf(asked));
    this.#row("prompt-tokens", "Prompt tokens", usage?.prompt_tokens);
    this.#row("image-tokens", "Image tokens in the prompt", image && `${image.tokens_after_plc} of ${image.tokens}`);
    this.#row("average", "Image tokens per layer, average", image && averageOf(image));
    if (image?.tower_tokens) this.#row("tower", "Tokens of the vision tower", `${image.tower_tokens} of ${image.tokens}`);
    this.#row("first-token", "Time to first token, in this browser", milliseconds(firstTokenMs));
    this.#row("localizer", "Localizer’s part of it, by the server", localizer ? timeOf(localizer) : "not asked");
    this.#row("confidence", "Confidence", localizer ? confidenceOf(localizer) : "–");
    if (localizer?.peak) this.#row("looked", "Where it looked", lookedOf(localizer));
    this.#row("source", "Region", image && (SOURCES[image.source] ?? OUTCOMES[localizer?.outcome] ?? image.source));
  }

  /** The answer was stopped or failed. */
  abandon() {
    this.article.setAttribute("aria-busy", "false");
    if (!this.text) this.words.textContent = "No answer.";
  }

  #row(name, title, value) {
    const row = this.table.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = title;
    row.append(head);
    const cell = row.insertCell();
    cell.dataset.fact = name;
    cell.textContent = value ?? "unknown";
  }
}

function pruningOf({ method, pruning_rate: rate, max_tokens: most }) {
  if (method === "off") return "method off";
  return `method ${method}, ${most ? `at most ${number(most)} tokens` : `${number(100 * rate)} % pruned`}`;
}

function averageOf(image) {
  const change = 100 * (1 - image.tokens_avg / image.tokens);
  return change > 0 ? `${number(image.tokens_avg)} (−${number(change)} %)` : number(image.tokens_avg);
}

function timeOf({ ms, cached }) {
  return cached ? `${milliseconds(ms)}, known from before` : milliseconds(ms);
}

function confidenceOf({ confidence }) {
  return confidence === null ? "unknown" : `${number(100 * confidence)} %`;
}

function lookedOf({ peak, spread }) {
  return `hottest cell ${number(100 * peak)} % of the map, spread ${number(spread)}`;
}

function milliseconds(value) {
  return value === null ? null : `${value < 10 ? number(value) : Math.round(value)} ms`;
}
