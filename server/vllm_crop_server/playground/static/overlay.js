// Draws a plan on the part of the image that the model sees. Looks and colours are those of `vllm-crop preview`
// (vllm_crop/drawing/tokens.py and looks.py).
import { assignmentOf, evictionLayers, gridsOf, looksOf } from "./tokens.js";

export const REGION_COLOUR = "rgb(255, 45, 120)";
export const PIECE_COLOUR = "rgb(0, 190, 220)";
const LEFT_OUT_LINE = ["rgba(255, 255, 255, 0.16)", 1];
const KEPT_LINE = ["rgba(255, 255, 255, 0.39)", 1];
const PATCH_LINE = ["rgba(20, 24, 32, 0.75)", 2];
const LINES = [LEFT_OUT_LINE, KEPT_LINE, PATCH_LINE];
const PATCH_OPACITY = 0.86; // a trace of the picture shows what was averaged
const PALE = "rgba(216, 219, 224, 0.72)";
const EVICTED_FIRST = [44, 30, 138, 0.8];
const EVICTED_LAST = [158, 122, 246, 0.6];

/** The violet of tokens evicted at `stage` of `stages`: the darker the fewer layers see them. */
export function shade(stage, stages) {
  const lateness = stage / Math.max(1, stages - 1);
  const [red, green, blue, opacity] = EVICTED_FIRST.map((from, i) => from + (EVICTED_LAST[i] - from) * lateness);
  return `rgba(${Math.round(red)}, ${Math.round(green)}, ${Math.round(blue)}, ${opacity})`;
}

/** Draw the finest grid of tokens into `view` = [x, y, width, height]; `seen` is the same part in pixels of the image. */
export function drawTokens(context, image, seen, view, plan) {
  const grid = gridsOf(plan).reduce((one, other) => (other.rows * other.cols > one.rows * one.cols ? other : one));
  const { rows, cols } = grid;
  const source = within(seen, grid.window);
  const place = within(view, grid.window).map(Math.round);
  const colours = meanColours(image, source, rows, cols);
  const looks = looksOf(plan);
  const stages = evictionLayers(plan).length;
  const assigned = withoutNewlines(assignmentOf(plan), grid);
  const cells = new Map();
  assigned.forEach((index, cell) => cells.set(index, [...(cells.get(index) ?? []), cell]));
  const patches = new Map([...cells].map(([index, of]) => [index, mean(of.map((cell) => colours[cell]))]));
  assigned.forEach((index, token) => {
    const cell = cellOf(place, rows, cols, token);
    const look = looks[index];
    if (!look) drawPale(context, image, source, place, cell);
    if (look?.pooled) fill(context, `rgba(${patches.get(index).join()}, ${PATCH_OPACITY})`, cell);
    if (look && look.stage !== null) fill(context, shade(look.stage, stages), cell);
  });
  const strengths = assigned.map((index) => (looks[index] ? (looks[index].pooled ? 2 : 1) : 0));
  drawLines(context, place, rows, cols, assigned, strengths);
}

/** Frame what the vision tower sees larger than the rest of the image; `view` as in drawTokens. */
export function drawPieces(context, view, pieces) {
  context.strokeStyle = PIECE_COLOUR;
  context.lineWidth = 2 * window.devicePixelRatio;
  for (const { scale: [rows, cols], window: [row0, row1, col0, col1] } of pieces.slice(1)) {
    context.strokeRect(...within(view, [col0 / cols, row0 / rows, col1 / cols, row1 / rows]));
  }
}

function within([x, y, width, height], [x0, y0, x1, y1]) {
  const [left, top, right, bottom] = [x + x0 * width, y + y0 * height, x + x1 * width, y + y1 * height];
  return [left, top, right - left, bottom - top];
}

/** What all tokens are assigned to, of a grid's cells alone, row by row. */
function withoutNewlines(assigned, { rows, cols, first, rowLength }) {
  return Array.from({ length: rows * cols }, (_, cell) => {
    return assigned[first + Math.floor(cell / cols) * rowLength + (cell % cols)];
  });
}

/** What preprocessing cuts away: dark and hatched. */
export function drawUnseen(context, [x, y, width, height]) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  fill(context, "rgba(20, 23, 29, 0.72)", [x, y, width, height]);
  context.strokeStyle = "rgba(120, 128, 140, 0.45)";
  context.lineWidth = 2;
  context.beginPath();
  for (let start = -height; start < width; start += 18) {
    context.moveTo(x + start, y + height);
    context.lineTo(x + start + height, y);
  }
  context.stroke();
  context.restore();
}

function drawPale(context, image, source, place, cell) {
  const [scaleX, scaleY] = [source[2] / place[2], source[3] / place[3]];
  const [x, y, width, height] = cell;
  const from = [source[0] + (x - place[0]) * scaleX, source[1] + (y - place[1]) * scaleY];
  context.filter = "grayscale(1)"; // a browser without filters shows it pale in colour
  context.drawImage(image, ...from, width * scaleX, height * scaleY, x, y, width, height);
  context.filter = "none";
  fill(context, PALE, cell);
}

/** Lines between neighbours that are not part of the same embedding. */
function drawLines(context, place, rows, cols, assigned, strengths) {
  const paths = LINES.map(() => new Path2D());
  assigned.forEach((index, token) => {
    const [x, y, width, height] = cellOf(place, rows, cols, token);
    const apart = (other) => index < 0 || assigned[other] !== index;
    const path = (other) => paths[Math.max(strengths[token], strengths[other])];
    if ((token + 1) % cols && apart(token + 1)) path(token + 1).rect(x + width, y, 0, height);
    if (token + cols < rows * cols && apart(token + cols)) path(token + cols).rect(x, y + height, width, 0);
  });
  LINES.forEach(([colour, width], strength) => {
    context.strokeStyle = colour;
    context.lineWidth = width * window.devicePixelRatio;
    context.stroke(paths[strength]);
  });
}

function cellOf([x, y, width, height], rows, cols, token) {
  const [row, col] = [Math.floor(token / cols), token % cols];
  const [left, right] = [col, col + 1].map((edge) => Math.round((edge * width) / cols));
  const [top, bottom] = [row, row + 1].map((edge) => Math.round((edge * height) / rows));
  return [x + left, y + top, right - left, bottom - top];
}

function meanColours(image, source, rows, cols) {
  const small = new OffscreenCanvas(cols, rows).getContext("2d", { willReadFrequently: true });
  small.imageSmoothingQuality = "high";
  small.drawImage(image, ...source, 0, 0, cols, rows);
  const { data } = small.getImageData(0, 0, cols, rows);
  return Array.from({ length: rows * cols }, (_, token) => [...data.slice(4 * token, 4 * token + 3)]);
}

function mean(colours) {
  return [0, 1, 2].map((i) => Math.round(colours.reduce((sum, colour) => sum + colour[i], 0) / colours.length));
}

function fill(context, colour, rectangle) {
  context.fillStyle = colour;
  context.fillRect(...rectangle);
}
