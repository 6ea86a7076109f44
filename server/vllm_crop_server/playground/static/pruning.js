// The choices of method and budget, as far as the server offers them.

const METHODS = {
  plc: "plc: compress",
  ilp: "ilp: evict",
  "plc+ilp": "plc+ilp: both",
};
const HINTS = {
  request: "This server has no localizer: without a box the image is served whole.",
  engine: "Without a box the served model itself looks for the region.",
  openai: "Without a box another model looks for the region.",
};
const BOUNDED = "Without a box the image costs the tokens named below, all of it alike.";

/** Shows the server's settings; onChange is called when the reader changes one. */
export class Pruning {
  constructor(find, onChange) {
    this.method = find("method");
    this.rate = find("rate");
    this.shownRate = find("rate-shown");
    this.most = find("most");
    this.hint = find("box-hint");
    this.method.addEventListener("change", onChange);
    for (const each of [this.rate, this.most]) {
      each.addEventListener("input", () => {
        this.#show();
        onChange();
      });
    }
    this.#show();
  }

  /** settings: the answer of /v1/plugins/crop/settings. Keeps the reader's own choices where it can. */
  offer(settings) {
    const chosen = this.method.value;
    const options = settings.methods.map((method) => new Option(METHODS[method] ?? method, method));
    this.method.replaceChildren(...options);
    this.method.value = settings.methods.includes(chosen) ? chosen : settings.method;
    this.rate.max = settings.max_pruning_rate;
    if (!chosen) {
      this.rate.value = settings.pruning_rate;
      this.most.value = settings.max_tokens ?? "";
    }
    const alone = settings.localizer === "request" && settings.max_tokens;
    this.hint.textContent = alone ? BOUNDED : (HINTS[settings.localizer] ?? "");
    this.#show();
  }

  /** As fields of `crop` and of a plan. */
  get value() {
    const budget = this.#bound ? { max_tokens: this.#bound } : { pruning_rate: Number(this.rate.value) };
    return { method: this.method.value, ...budget };
  }

  /** Tokens an image may cost; 0 where the rate counts. */
  get #bound() {
    return this.most.validity.valid ? Number(this.most.value) : 0;
  }

  #show() {
    this.rate.disabled = this.#bound > 0;
    this.shownRate.textContent = `${Math.round(1000 * this.rate.value) / 10} %`;
    this.rate.setAttribute("aria-valuetext", `${this.shownRate.textContent} of the image's tokens removed`);
  }
}
