# SPDX-License-Identifier: Apache-2.0
"""FoPru (arXiv 2411.14164; after the authors' code).

A token's significance is the attention that it receives or that it pays in the tower, mean over heads,
whichever varies more over tokens. "rank" keeps the most significant tokens, "row" whole rows of the grid, in
the order of their sums.

Deviations: what a token pays is a mean over a softmax, the same for every token, so that what it receives
always varies more and is taken. The last row is filled by rank to meet the count exactly.
"""

from typing import Literal

from torch import Tensor

from lab.evaluation.runner.method import Kept, Pruning, Seen, top
from vllm_crop.planning.budget import retained_count

CONFIGURATIONS: dict[str, dict[str, str]] = {"rank": {}, "row": {"strategy": "row"}}


def significant(image: Seen, count: int, strategy: Literal["rank", "row"]) -> Tensor:
    """`count` indices."""
    if strategy == "rank":
        return top(image.received, count)
    field = image.received.view(image.grid.rows, image.grid.cols)
    order = field.sum(1).argsort(descending=True, stable=True)
    place = order.argsort()  # of every row
    # Received attention is below one: a better row wins whatever its tokens receive.
    return top((field - 2.0 * place[:, None]).flatten(), count)


def fopru(
    num_tokens: int, num_layers: int, rate: float, strategy: Literal["rank", "row"] = "rank"
) -> Pruning:
    """FoPru at a pruning rate."""
    count = retained_count(num_tokens, rate)
    return Pruning(
        lambda sight: Kept.choose(sight.image.features, significant(sight.image, count, strategy)[None])
    )
