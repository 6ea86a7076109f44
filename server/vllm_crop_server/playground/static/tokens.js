// What a plan (POST /v1/plugins/crop/plan) does to each token, and in numbers.

/** Per embedding what happens to it: {pooled, stage}, stage null where all layers see it. */
export function looksOf(plan) {
  const layers = evictionLayers(plan);
  return plan.embeddings.map(({ tokens, evicted_from_layer: layer }) => ({
    pooled: tokens.length > 1,
    stage: layer === null ? null : layers.indexOf(layer),
  }));
}

/** The layers at which embeddings leave, ascending. */
export function evictionLayers(plan) {
  const layers = plan.embeddings.map((embedding) => embedding.evicted_from_layer).filter((layer) => layer !== null);
  return [...new Set(layers)].sort((one, other) => one - other);
}

/** The grids of an image's tokens; rows may be longer than they have columns, by a newline that shows nothing. */
export function gridsOf(plan) {
  const grids = plan.grids ?? [{ grid: plan.grid, window: [0, 0, 1, 1], newlines: false }];
  let first = 0;
  return grids.map(({ grid: [rows, cols], window, newlines }) => {
    const grid = { rows, cols, window, newlines, first, rowLength: cols + (newlines ? 1 : 0) };
    first += rows * grid.rowLength;
    return grid;
  });
}

/** For each token the index of the embedding it becomes part of, -1 if it is left out. */
export function assignmentOf(plan) {
  const last = gridsOf(plan).at(-1);
  const assigned = new Array(last.first + last.rows * last.rowLength).fill(-1);
  plan.embeddings.forEach(({ tokens }, index) => tokens.forEach((token) => (assigned[token] = index)));
  return assigned;
}

/** How many tokens end up where; each token counts once, an evicted one as evicted. */
export function countsOf(plan) {
  const assigned = assignmentOf(plan);
  const seenByAll = plan.embeddings.filter((embedding) => embedding.evicted_from_layer === null);
  const pooled = seenByAll.filter((embedding) => embedding.tokens.length > 1);
  return {
    tokens: assigned.length,
    kept: seenByAll.length - pooled.length,
    pooled: pooled.length,
    pooledTokens: pooled.reduce((sum, embedding) => sum + embedding.tokens.length, 0),
    evicted: evictionLayers(plan).map((layer) => ({
      layer,
      count: plan.embeddings.filter((embedding) => embedding.evicted_from_layer === layer).length,
    })),
    leftOut: assigned.filter((index) => index < 0).length,
    average: plan.tokens_per_layer.reduce((sum, count) => sum + count, 0) / plan.tokens_per_layer.length,
  };
}

/** One sentence, such as "576 tokens become 64: 36 kept, 28 pooled from 540". */
export function describe(plan) {
  const counts = countsOf(plan);
  if (counts.average === counts.tokens) return `${counts.tokens} tokens, all kept.`;
  const parts = [`${counts.kept} kept`];
  if (counts.pooled) parts.push(`${counts.pooled} pooled from ${counts.pooledTokens}`);
  for (const { layer, count } of counts.evicted) parts.push(`${count} evicted from layer ${layer} on`);
  if (counts.leftOut) parts.push(`${counts.leftOut} left out`);
  const perLayer = counts.evicted.length ? " per layer" : "";
  return `${counts.tokens} tokens become ${number(counts.average)}${perLayer}: ${parts.join(", ")}.`;
}

/** One sentence on the grids, such as "Grid of 24 × 24 visual tokens." */
export function describeGrids(plan) {
  const sizes = gridsOf(plan).map(({ rows, cols, newlines }) => `${rows} × ${cols}${newlines ? " with newlines" : ""}`);
  if (sizes.length === 1) return `Grid of ${sizes[0]} visual tokens.`;
  return `Grids of ${sizes.join(" and ")} visual tokens, of which the finest is drawn.`;
}

/** At most one decimal. */
export function number(value) {
  return String(Math.round(10 * value) / 10);
}
