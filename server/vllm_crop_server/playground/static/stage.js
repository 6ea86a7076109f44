// The canvas: image, tokens, and the region on top.
import { drawHeat } from "./heat.js";
import { drawPieces, drawTokens, drawUnseen, REGION_COLOUR } from "./overlay.js";

const LARGEST_PART_OF_WINDOW = 0.7; // the image's height, so that the question stays in sight

/** Shows one picture; set the fields, then call draw(). */
export class Stage {
  picture = null;
  plan = null; // of what a question would be answered with now
  boxes = []; // of the region, in fractions of the image
  heat = null; // where the model looked for the last answer
  showTokens = true;
  showHeat = false;

  constructor(element, canvas, empty) {
    Object.assign(this, { element, canvas, empty });
    new ResizeObserver(() => this.draw()).observe(element);
  }

  draw() {
    if (!this.picture) return;
    const size = this.#fit();
    const context = this.canvas.getContext("2d");
    context.drawImage(this.picture.image, 0, 0, ...size);
    if (this.plan && this.showTokens) this.#drawPlan(context, size);
    if (this.heat && this.showHeat) drawHeat(context, size, this.heat);
    this.#drawBoxes(context, size);
  }

  /** A pointer's place in fractions of the image. */
  fractionsAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const within = (value) => Math.min(1, Math.max(0, value));
    return [
      within((event.clientX - bounds.left) / bounds.width),
      within((event.clientY - bounds.top) / bounds.height),
    ];
  }

  /** Size the canvas to the screen's own pixels; returns them. */
  #fit() {
    this.empty.hidden = true;
    this.canvas.hidden = false;
    const [width, height] = this.picture.size;
    const most = LARGEST_PART_OF_WINDOW * window.innerHeight;
    const scale = Math.min(this.element.clientWidth / width, most / height);
    const shown = [Math.max(1, Math.floor(width * scale)), Math.max(1, Math.floor(height * scale))];
    [this.canvas.style.width, this.canvas.style.height] = shown.map((side) => `${side}px`);
    [this.canvas.width, this.canvas.height] = shown.map((side) => Math.round(side * window.devicePixelRatio));
    return [this.canvas.width, this.canvas.height];
  }

  #drawPlan(context, [width, height]) {
    const [x0, y0, x1, y1] = this.plan.window;
    const place = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height].map(Math.round);
    const [imageWidth, imageHeight] = this.picture.size;
    const source = [x0 * imageWidth, y0 * imageHeight, (x1 - x0) * imageWidth, (y1 - y0) * imageHeight];
    const [left, top, right, bottom] = [place[0], place[1], place[0] + place[2], place[1] + place[3]];
    for (const strip of [[0, 0, width, top], [0, bottom, width, height - bottom],
      [0, top, left, place[3]], [right, top, width - right, place[3]]]) {
      if (strip[2] > 0 && strip[3] > 0) drawUnseen(context, strip);
    }
    drawTokens(context, this.picture.image, source, place, this.plan);
    if (this.plan.pieces) drawPieces(context, place, this.plan.pieces);
  }

  #drawBoxes(context, [width, height]) {
    const pixel = window.devicePixelRatio;
    for (const [colour, thickness] of [["white", 6 * pixel], [REGION_COLOUR, 3.5 * pixel]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness;
      for (const [x0, y0, x1, y1] of this.boxes) {
        // Inside the canvas even where the region reaches its edge.
        const clamp = (value, most) => Math.min(Math.max(value, 3 * pixel), most - 3 * pixel);
        const [left, right] = [x0, x1].map((x) => clamp(x * width, width));
        const [top, bottom] = [y0, y1].map((y) => clamp(y * height, height));
        context.strokeRect(left, top, right - left, bottom - top);
      }
    }
  }
}
