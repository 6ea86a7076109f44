# SPDX-License-Identifier: Apache-2.0
"""MMTok (arXiv 2508.18264; after a review of the authors' code).

Chosen tokens are to cover the words of the question and the image. How much token j covers a word is a
softmax over the image of their cosines at one temperature, how much it covers another token a softmax at
another, of the tower's features; each is divided by the number of what is to be covered, the second halved.
Tokens are chosen one by one by the largest gain, everything being covered by its best token.

Deviations: words are their embeddings in the language model; the list of words that do not count is ours.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lab.evaluation.runner.method import Kept, Pruning, Sight
from vllm_crop.planning.budget import retained_count

STOP_WORDS = {
    *("a", "an", "the", "this", "that", "these", "there", "and", "or", "than", "of", "on", "in", "at", "to"),
    *("by", "for", "from", "with", "as", "is", "are", "was", "were", "be", "do", "does", "has", "have"),
    *("it", "its", "their", "what", "where", "which", "who", "how", "many", "?", ".", ",", "!"),
}
CONFIGURATIONS: dict[str, dict[str, float]] = {
    "0.02 and 0.2, half": {},
    "words 0.01": {"of_words": 0.01},
    "words 0.05": {"of_words": 0.05},
    "words 0.2": {"of_words": 0.2},
    "image 0.05": {"of_image": 0.05},
    "image 0.1": {"of_image": 0.1},
    "image 0.5": {"of_image": 0.5},
    "image as much as words": {"weight": 1.0},
    "image twice as much": {"weight": 2.0},
    "image a fifth as much": {"weight": 0.1},
    "image alone": {"weight": 1e6},
}


def worded(words: Tensor, spelled: tuple[str, ...]) -> Tensor:
    """The embeddings of the words that count; all, where none does."""
    counts = torch.tensor([word.strip().lower() not in STOP_WORDS for word in spelled])
    return words[counts] if counts.any() else words


def shares(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """`[rows, columns]` how much each column covers a row; all rows together sum to one."""
    close = normalize(rows, dim=-1) @ normalize(columns, dim=-1).T
    return (close / temperature).softmax(dim=-1) / len(rows)


def covering(cover: Tensor, count: int, weights: Tensor | float = 1.0) -> Tensor:
    """Greedy: `count` columns of `[rows, columns]` by their gains times weights, in the order chosen."""
    best, taken, chosen = torch.zeros(len(cover)), torch.zeros(cover.shape[1], dtype=torch.bool), []
    for _ in range(count):
        gains = (cover - best[:, None]).clamp(min=0).sum(0) * weights
        chosen.append(int(gains.masked_fill(taken, -1.0).argmax()))
        taken[chosen[-1]] = True
        best = torch.maximum(best, cover[:, chosen[-1]])
    return torch.tensor(chosen)


def choose(sight: Sight, count: int, of_words: float, of_image: float, weight: float) -> Kept:
    """For every question the tokens that cover its words and the image."""
    image = sight.image
    whole = weight * shares(image.tower, image.tower, of_image)
    rows = []
    for words, spelled in zip(sight.words, sight.spelled, strict=True):
        asked = shares(worded(words, spelled), image.features, of_words)
        rows.append(covering(torch.cat([asked, whole]), count))
    return Kept.choose(image.features, torch.stack(rows))


def mmtok(
    num_tokens: int,
    num_layers: int,
    rate: float,
    of_words: float = 0.02,
    of_image: float = 0.2,
    weight: float = 0.5,
) -> Pruning:
    """MMTok at a pruning rate.

    Args:
        of_words: temperature of the softmax by which tokens cover words.
        of_image: the same by which they cover each other.
        weight: of the image beside the words.
    """
    count = retained_count(num_tokens, rate)
    return Pruning(lambda sight: choose(sight, count, of_words, of_image, weight))
