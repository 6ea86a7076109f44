# SPDX-License-Identifier: Apache-2.0
"""CoViPAL (Tang et al., EMNLP 2025, arXiv 2508.17243; after excerpts and a review).

A small module before the language model reads visual tokens and question and scores the tokens; the best
stay. It is trained first to foretell the attention that a deep layer pays to visual tokens, summed over
heads, then end to end by the answers, with a soft mask. Of all rivals it is closest to a trained localizer.

Deviations: the module's shape is ours (two layers of attention, 64 wide, 105,000 weights); the soft mask
multiplies what questions see, not what visual tokens see of each other. Trained here
(`lab/evaluation/covipal`) on scenes of the training split, as the checkpoint and its localizer were; the deep
layer is one of the two whose attention the checkpoint's training supervised. It is one training of twenty
minutes, nothing of which was chosen on the dev split.
"""

import torch
from torch import Tensor

from lab.evaluation.covipal.module import read_module
from lab.evaluation.runner.method import Kept, Pruning, Sight, top
from vllm_crop.planning.budget import retained_count


def scores_of(sight: Sight) -> Tensor:
    """`[questions, tokens]`."""
    lengths = [len(words) for words in sight.words]
    embedded = torch.nn.utils.rnn.pad_sequence(list(sight.words), batch_first=True)
    padding = torch.arange(embedded.shape[1]) >= torch.tensor(lengths)[:, None]
    features = sight.image.features.expand(len(lengths), -1, -1)
    scores: Tensor = read_module()(features, sight.image.grid.rows, embedded, padding)
    return scores


def covipal(num_tokens: int, num_layers: int, rate: float) -> Pruning:
    """CoViPAL at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: Kept.choose(sight.image.features, top(scores_of(sight), count)))
