# SPDX-License-Identifier: Apache-2.0
"""What a compressor must compute, written out: one embedding, one head, one token at a time; and weights."""

import math
from pathlib import Path
from typing import Any

import torch

from tests.reference import HfReference
from tests.slow_plan import embeddings_of
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.settings import ResamplerCard, ResamplerShape
from vllm_crop.compression.weights import write_resampler
from vllm_crop.planning.plan import TokenPlan


def naive_resample(features: torch.Tensor, plan: TokenPlan, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[num_tokens, columns]` -> `[num_embeddings, columns]`.

    Args:
        weights: of a Resampler; `num_heads` among them as a tensor of one number.
    """
    assert plan.zone is not None
    part, row, col = (axis.tolist() for axis in plan.grid.places())
    zone = plan.zone.tolist()
    lost = {(zone[token], part[token]) for token, of in enumerate(plan.assignment.tolist()) if of < 0}
    tokens = [_Token(row, weights) for row in features]
    rows = []
    for embedding in embeddings_of(plan):
        own = list(embedding.tokens)
        mean = features[own].mean(dim=0) if len(own) > 1 else features[own[0]]
        here = zone[own[0]], part[own[0]]
        if len(own) == 1 and here not in lost:  # an anchor
            rows.append(mean)
            continue
        near = [token for token in range(len(zone)) if (zone[token], part[token]) == here]
        middle = sum(row[token] for token in own) / len(own), sum(col[token] for token in own) / len(own)
        asked = _linear(_norm(mean, weights, "norm"), weights, "query")
        asked = asked + weights["zone_query"][here[0]] + math.log(len(own)) * weights["size_query"]
        width = len(asked) // int(weights["num_heads"])
        mixed = []
        for first in range(0, len(asked), width):
            columns = slice(first, first + width)
            query = _turn(asked[columns], middle)
            keys = torch.stack([tokens[token].key(columns, (row[token], col[token])) for token in near])
            shares = (keys @ query / math.sqrt(width)).softmax(0)
            mixed.append(shares @ torch.stack([tokens[token].value[columns] for token in near]))
        read = mean + _linear(torch.cat(mixed), weights, "out")
        inner = torch.nn.functional.gelu(_linear(_norm(read, weights, "mlp_norm"), weights, "mlp_in"))
        rows.append(read + _linear(inner, weights, "mlp_out"))
    return torch.stack(rows)


class _Token:
    """What queries meet of one token; nothing is worked out twice."""

    def __init__(self, row: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        seen = _norm(row, weights, "norm")
        self._key = _linear(seen, weights, "key")
        self.value = _linear(seen, weights, "value")
        self._turned: dict[int, torch.Tensor] = {}

    def key(self, columns: slice, place: tuple[int, int]) -> torch.Tensor:
        """Of one head."""
        if columns.start not in self._turned:
            self._turned[columns.start] = _turn(self._key[columns], place)
        return self._turned[columns.start]


def _linear(row: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return weights[f"{name}.weight"] @ row + weights[f"{name}.bias"]


def _norm(row: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = row - row.mean()
    scaled = centred / torch.sqrt((centred**2).mean() + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _turn(row: torch.Tensor, place: tuple[float, float]) -> torch.Tensor:
    """Pairs of columns, one of each half, turned by angles of the row, then of the column."""
    half = len(row) // 2
    count = half // 2
    turned = row.clone()
    for pair in range(half):
        wave = 100.0 ** -((pair % count) / count)
        angle = place[pair // count] * wave
        first, second = row[pair], row[pair + half]
        turned[pair] = first * math.cos(angle) - second * math.sin(angle)
        turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def resampling(reference: type[HfReference], checkpoint: Path, weights: dict[str, torch.Tensor]) -> Any:
    """A family's reference whose images are compressed with these weights, where a plan says so."""

    class Resampling(reference):  # type: ignore[misc, valid-type]
        def compressed(self, features: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
            stock: torch.Tensor = super().compressed(features, plan)
            return stock if plan.zone is None else naive_resample(features, plan, weights)

    return Resampling(checkpoint)


def weights_of(resampler: Resampler) -> dict[str, torch.Tensor]:
    """As `naive_resample` takes them."""
    return {**resampler.state_dict(), "num_heads": torch.tensor(resampler.num_heads)}


def random_resampler(feature_size: int, seed: int = 0) -> Resampler:
    """One whose every weight does something: what is read is about as large as what is there."""
    shape = ResamplerShape(feature_size=feature_size, width=32, num_heads=2, mlp_size=48)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        resampler = Resampler(shape).eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(seed)
    for part in resampler.parameters():
        noise = torch.randn(part.shape, generator=chance)
        if part.ndim > 1:
            part.copy_(noise / math.sqrt(part.shape[-1]))
        else:
            part.copy_(part * 0.5 + noise * 0.3)
    for name in ("query", "key", "zone_query"):  # else each would read one token and no other
        part = getattr(resampler, name)
        (part.weight if hasattr(part, "weight") else part).mul_(0.7)
    return resampler


def write_random_resampler(folder: Path, feature_size: int, model: dict[str, Any], seed: int = 0) -> Path:
    """A folder that `resampler.weights` can name, for a checkpoint with this config.json."""
    resampler = random_resampler(feature_size, seed)
    shape = ResamplerShape(feature_size=feature_size, width=32, num_heads=2, mlp_size=48)
    card = ResamplerCard.untrained(shape, "a test's checkpoint", model)
    write_resampler(folder, resampler, card, "# A test's compressor\n")
    return folder
