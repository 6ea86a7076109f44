// The looks that occur in the overlay, each with what it means and how many tokens it is true for.
import { PIECE_COLOUR, REGION_COLOUR, shade } from "./overlay.js";
import { countsOf } from "./tokens.js";

/** Fill the list `element`; plan null empties it. */
export function showLegend(element, plan, outlined) {
  element.replaceChildren(...(plan ? entriesOf(plan, outlined).map(item) : []));
}

function entriesOf(plan, outlined) {
  const { kept, pooled, evicted, leftOut } = countsOf(plan);
  const [x0, y0, x1, y1] = plan.window;
  const entries = [];
  if (outlined) entries.push(["region", "region"]);
  if (kept) entries.push(["kept", `kept: one token per cell (${kept})`]);
  if (pooled) entries.push(["pooled", `pooled: one token per group (${pooled})`]);
  evicted.forEach(({ layer, count }, stage) => {
    entries.push(["evicted", `evicted: seen below layer ${layer} (${count})`, shade(stage, evicted.length)]);
  });
  if (leftOut) entries.push(["left-out", `left out (${leftOut})`]);
  if (x0 > 0 || y0 > 0 || x1 < 1 || y1 < 1) entries.push(["unseen", "not seen by the model"]);
  if (plan.pieces) entries.push(["piece", `seen larger than the rest (${plan.tower_tokens} tokens in all)`]);
  return entries;
}

function item([look, words, colour]) {
  const swatch = document.createElement("span");
  swatch.className = `swatch ${look}`;
  if (colour) swatch.style.setProperty("--shade", colour);
  if (look === "region") swatch.style.borderColor = REGION_COLOUR;
  if (look === "piece") swatch.style.borderColor = PIECE_COLOUR;
  const element = document.createElement("li");
  element.append(swatch, words);
  return element;
}
