# SPDX-License-Identifier: Apache-2.0
"""Who reads what of one image: the queries of each zone, its tokens, and the anchors that stay as they are.

    zone        region            rim                far away
    tokens      a b c d e f       g h i j k l        m n o p q r s t
    embeddings  a b c d e f       gh  ij  k  l       mnop    qrst
                anchors           2 queries, which   2 queries, which
                                  read g to l        read m to t

An embedding stands for a group of tokens. It is an anchor if that is a single token and its zone has lost
none: then nothing is missing that could be read. A zone of which some tokens are left out (a region larger
than the budget) has no anchors, so that its queries read what is gone. Zones of different parts of an image
(tiles, their newlines) are read apart, since places in one mean nothing in another.
"""

from typing import NamedTuple

import torch

LEFT_OUT = 3  # as of `vllm_crop.planning.plan.Zones.codes`


class Group(NamedTuple):
    """Tokens that are read together, by which embeddings: indices, ascending, on the CPU."""

    queries: torch.Tensor
    tokens: torch.Tensor


class Reading(NamedTuple):
    """How one image is read; all on the CPU.

    Attributes:
        groups: none of an image whose embeddings are all anchors.
        zone: of each embedding, `[num_embeddings]`.
        size: how many tokens each embedding stands for, `[num_embeddings]`.
        middle: row and column of their centre, `[num_embeddings, 2]` float32.
        place: row and column of each token, `[num_tokens, 2]` float32.
    """

    groups: list[Group]
    zone: torch.Tensor
    size: torch.Tensor
    middle: torch.Tensor
    place: torch.Tensor


def plan_reading(assignment: torch.Tensor, places: torch.Tensor) -> Reading:
    """Say who reads what.

    Args:
        assignment: `[num_tokens]`, the embedding of each token, -1 for none (`TokenPlan.assignment`).
        places: `[num_tokens, 4]`, zone, part, row and column of each token.
    """
    assignment = assignment.long()
    zone, part, *_ = places.long().unbind(1)
    place = places[:, 2:].float()
    stays = assignment >= 0
    own = assignment[stays]
    size = torch.bincount(own)
    middle = torch.zeros(len(size), 2, dtype=torch.float32).index_add_(0, own, place[stays]) / size[:, None]
    apart = part * (LEFT_OUT + 1) + zone  # tokens of a group have one zone and one part
    of_embedding = torch.empty_like(size).index_put_((own,), apart[stays])
    groups = []
    for one in torch.unique(of_embedding).tolist():
        tokens = (apart == one).nonzero()[:, 0]
        reads = of_embedding == one
        if bool(stays[tokens].all()):
            reads &= size > 1
        if bool(reads.any()):
            groups.append(Group(reads.nonzero()[:, 0], tokens))
    return Reading(groups, of_embedding % (LEFT_OUT + 1), size, middle, place)
