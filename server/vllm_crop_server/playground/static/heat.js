// Where the model looked while it read the question: the map of an answer's facts, laid over the picture.

const HOT = [255, 140, 0];
const MOST = 0.75; // opacity of the hottest cell

/** The map of facts as they come in the header; null if the region was found in another way. */
export function heatOf(facts) {
  const heat = facts?.images?.[0]?.localizer?.heat;
  if (!heat) return null;
  const values = Uint8Array.from(atob(heat.values), (character) => character.charCodeAt(0));
  return { ...heat, values };
}

/** Draw the map into a canvas of `size`; the window is in fractions of the picture. */
export function drawHeat(context, [width, height], { rows, cols, window: [x0, y0, x1, y1], values }) {
  const small = new OffscreenCanvas(cols, rows).getContext("2d");
  const pixels = small.createImageData(cols, rows);
  values.forEach((value, cell) => pixels.data.set([...HOT, MOST * value], 4 * cell));
  small.putImageData(pixels, 0, 0);
  context.save();
  context.imageSmoothingEnabled = false; // a cell is a cell: smoothing would move its place
  context.drawImage(small.canvas, x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height);
  context.restore();
}
