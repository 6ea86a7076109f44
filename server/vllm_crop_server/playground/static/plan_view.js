// Keeps the overlay true: to the last answer's region or the reader's box, and to the settings as they are now.
import { heatOf } from "./heat.js";
import { showLegend } from "./legend.js";
import { describe, describeGrids } from "./tokens.js";

const PAUSE_MS = 120; // of the slider, before the server is asked for another plan

/** Asks for plans and shows them. */
export class PlanView {
  connected = false;
  found = null; // boxes the server found, until the picture or the box changes
  #timer = null;
  #latest = 0; // the number of the last plan asked for

  constructor(find, server, stage, pruning, box) {
    Object.assign(this, { server, stage, pruning, box });
    this.legend = find("legend");
    this.described = find("overlay-text");
    this.planText = find("plan-text");
    this.heatChoice = find("heat-choice");
  }

  /** Take the region from an answer's facts. */
  foundBy(facts) {
    if (!this.box.value) {
      this.found = facts?.images?.[0]?.region ?? null;
      this.box.suggest(this.found);
    }
    this.#showHeat(heatOf(facts));
    this.refresh();
  }

  /** What was found is of another picture or question. */
  forget() {
    this.found = null;
    this.#showHeat(null);
  }

  #showHeat(heat) {
    this.stage.heat = heat;
    this.heatChoice.hidden = heat === null;
  }

  /** Draw the region as it is now, with the tokens of before. */
  outline() {
    const own = this.box.value && !this.box.problem ? [this.box.value] : null;
    this.stage.boxes = own ?? this.found ?? [];
    this.stage.draw();
  }

  /** Draw the region, and soon the tokens too. */
  refresh() {
    this.outline();
    clearTimeout(this.#timer);
    if (this.connected && this.stage.picture && !this.box.problem) {
      this.#timer = setTimeout(() => this.#load(), PAUSE_MS);
    }
  }

  async #load() {
    const request = ++this.#latest;
    const { boxes, picture } = this.stage;
    const body = { image_size: picture.size, region: boxes.length ? boxes : null, ...this.pruning.value };
    try {
      const plan = await this.server.plan(body);
      if (request === this.#latest) this.#show(plan, boxes.length > 0);
    } catch (failure) {
      if (request !== this.#latest) return; // overtaken by another
      this.#show(null, false);
      this.planText.textContent = failure.message;
    }
  }

  #show(plan, outlined) {
    this.stage.plan = plan;
    this.stage.draw();
    showLegend(this.legend, plan, outlined);
    const unseen = plan && outlined && !plan.region_in_view ? " The model sees nothing of the region." : "";
    const condition = plan && !outlined ? "Without a region: " : "";
    this.planText.textContent = plan ? condition + describe(plan) + unseen : "";
    this.described.textContent = plan ? describeGrids(plan) : "";
  }
}
