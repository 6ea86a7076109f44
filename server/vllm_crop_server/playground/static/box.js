// The reader's own box: drawn on the stage with mouse, pen or finger, or typed as four numbers.

const SIDES = ["left", "top", "right", "bottom"];
const WHOLE = [0, 0, 1, 1];
const SMALLEST_DRAG = 4; // pixels; less is a click

/**
 * `value` is the box in fractions of the image, null where there is none. Fractions have four decimals, as many
 * as the facts of an answer have.
 */
export class Box {
  value = null;
  problem = "";
  #suggested = null; // what the server found: where typing starts from

  /** onChange is called with every change, onDone when one is complete (a drag is many changes). */
  constructor(find, stage, onChange, onDone) {
    this.fields = SIDES.map((side) => find(`box-${side}`));
    this.shownProblem = find("box-problem");
    this.clearButton = find("clear");
    Object.assign(this, { stage, onChange, onDone });
    for (const field of this.fields) field.addEventListener("input", () => this.#typed(field));
    this.clearButton.addEventListener("click", () => {
      this.clear();
      this.fields[0].focus(); // a disabled button would lose the focus to nowhere
      onDone();
    });
    stage.canvas.addEventListener("pointerdown", (event) => this.#dragFrom(event));
  }

  /** Show what the server found, in grey, as long as there is no box. boxes: null for none. */
  suggest(boxes) {
    this.#suggested = boxes?.[0] ?? null;
    this.#show();
  }

  clear() {
    this.value = null;
    this.#suggested = null;
    this.#show();
  }

  #typed(current) {
    const start = this.value ?? this.#suggested ?? WHOLE;
    this.value = this.fields.map((field, index) => {
      // The field itself may be empty for a moment, before another number is typed into it.
      if (field.value === "" && field !== current) field.value = percent(start[index]);
      return field.value === "" ? null : fraction(field.valueAsNumber / 100);
    });
    this.#check();
    this.onDone();
  }

  #dragFrom(event) {
    const byFinger = event.pointerType === "touch";
    if (!event.isPrimary || event.button !== 0 || (byFinger && !this.stage.canvas.classList.contains("finger"))) return;
    event.preventDefault();
    const { canvas } = this.stage;
    const [x, y] = this.stage.fractionsAt(event);
    let dragged = false;
    const moved = (at) => {
      dragged ||= Math.hypot(at.clientX - event.clientX, at.clientY - event.clientY) >= SMALLEST_DRAG;
      if (!dragged) return;
      const [otherX, otherY] = this.stage.fractionsAt(at);
      const box = [Math.min(x, otherX), Math.min(y, otherY), Math.max(x, otherX), Math.max(y, otherY)].map(fraction);
      if (box[0] >= box[2] || box[1] >= box[3]) return;
      this.value = box;
      this.#show();
      this.onChange();
    };
    const ended = () => {
      canvas.removeEventListener("pointermove", moved);
      if (dragged) this.onDone();
    };
    canvas.setPointerCapture(event.pointerId);
    canvas.addEventListener("pointermove", moved);
    canvas.addEventListener("lostpointercapture", ended, { once: true });
  }

  #show() {
    this.fields.forEach((field, index) => {
      field.value = this.value ? percent(this.value[index]) : "";
      field.placeholder = percent((this.#suggested ?? WHOLE)[index]);
    });
    this.#check();
  }

  #check() {
    this.problem = this.value ? problemOf(this.value) : "";
    this.shownProblem.textContent = this.problem;
    for (const field of this.fields) field.setAttribute("aria-invalid", String(this.problem !== ""));
    this.clearButton.disabled = !this.value;
  }
}

function problemOf([x0, y0, x1, y1]) {
  if (![x0, y0, x1, y1].every((side) => side !== null && side >= 0 && side <= 1)) return "All four must be from 0 to 100 %.";
  if (x0 >= x1) return "Right must be more than left.";
  return y0 >= y1 ? "Bottom must be more than top." : "";
}

function percent(side) {
  return String(Math.round(10000 * side) / 100);
}

function fraction(side) {
  return Math.round(10000 * side) / 10000;
}
