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

/** For each grid token the index of the embedding it becomes part of, -1 if it is left out. */
export function assignmentOf(plan) {
  const assigned = new Array(plan.grid[0] * plan.grid[1]).fill(-1);
  plan.embeddings.forEach(({ tokens }, index) => tokens.forEach((token) => (assigned[token] = index)));
  return assigned;
}

/** How many tokens end up where; each token counts once, an evicted one as evicted. */
export function countsOf(plan) {
  const [rows, cols] = plan.grid;
  const seenByAll = plan.embeddings.filter((embedding) => embedding.evicted_from_layer === null);
  const pooled = seenByAll.filter((embedding) => embedding.tokens.length > 1);
  return {
    tokens: rows * cols,
    kept: seenByAll.length - pooled.length,
    pooled: pooled.length,
    pooledTokens: pooled.reduce((sum, embedding) => sum + embedding.tokens.length, 0),
    evicted: evictionLayers(plan).map((layer) => ({
      layer,
      count: plan.embeddings.filter((embedding) => embedding.evicted_from_layer === layer).length,
    })),
    leftOut: assignmentOf(plan).filter((index) => index < 0).length,
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

/** At most one decimal. */
export function number(value) {
  return String(Math.round(10 * value) / 10);
}
