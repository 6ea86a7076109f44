# SPDX-License-Identifier: Apache-2.0
"""IVC-Prune (Sun et al., ICLR 2026, arXiv 2602.03060): tokens that anchor positions, and the foreground.

Anchors are where the rotations of RoPE are nearest to the identity (largest sum of cosines over frequencies)
or to a quarter turn (largest sum of sines); with M-RoPE each frequency belongs to an axis. Foreground tokens
are found by value vectors: seeds are nearest to the question's words, then come the tokens nearest to seeds.

The paper decides at a middle layer, after a full prefill up to there, for all layers' KV. A budget averaged
over layers cannot pay for that, so the values are those of the first layer, and the choice is made before it.
A quarter of the tokens are anchors (ours: the paper keeps half of the image, we less).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Sight, top
from vllm_crop.planning.budget import retained_count

ANCHORS = 0.25
SEEDS = 0.1  # of the foreground


def anchors(cosines: Tensor, sines: Tensor, count: int) -> Tensor:
    """`count` tokens, half by either sum over the frequencies `[tokens, frequencies]`, none twice."""
    even, quarter = cosines.sum(-1), sines.sum(-1)
    first = top(even, count - count // 2)
    quarter[first] = float("-inf")
    return torch.cat([first, top(quarter, count // 2)])


def foreground(values: Tensor, words: Tensor, taken: Tensor, count: int) -> Tensor:
    """`count` tokens by values `[tokens, width]`, none of those taken."""
    directions = normalize(values, dim=-1)
    seeds = top((directions @ normalize(words, dim=-1).T).mean(-1), max(1, round(SEEDS * count)))
    close = (directions @ directions[seeds].T).mean(-1)
    close[taken] = float("-inf")
    return top(close, count)


def choose(sight: Sight, count: int) -> Kept:
    """Anchors first, then for every question its foreground."""
    features, layer = sight.image.features, sight.language.layers[0]
    cos, sin = sight.language.rotary_emb(features[None], sight.positions[:, None])
    half = cos.shape[-1] // 2  # the second half repeats the first
    fixed = anchors(cos[0, :, :half], sin[0, :, :half], round(ANCHORS * count))

    def values(rows: Tensor) -> Tensor:
        projected: Tensor = layer.self_attn.v_proj(layer.input_layernorm(rows))
        return projected

    chosen = [
        torch.cat([fixed, foreground(values(features), values(words), fixed, count - len(fixed))])
        for words in sight.words
    ]
    return Kept.choose(features, torch.stack(chosen))


def ivc_prune(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """IVC-Prune's choice at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: choose(sight, count))
