# SPDX-License-Identifier: Apache-2.0
"""The compressor: queries that read a zone of an image, added to the mean of the tokens they stand for.

After CROP, section 3.2, which publishes neither counts nor sizes: docs/compressing.md says what is ours. The
layers that write to the residual are zero before training, so that untrained weights are compression "pool"
to the bit. torch only.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_crop.compression.pooling import compress
from vllm_crop.compression.reading import Reading, plan_reading
from vllm_crop.compression.settings import NUM_ZONES, ResamplerShape

_ROTARY_BASE = 100.0  # the longest wave is as long as 600 tokens in a row
_PEAK = 4.0  # how much likelier, in nats, a query reads its own place than a far one, before training


class Resampler(nn.Module):
    """Compresses the visual tokens of one image as its plan says."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        head = shape.width // shape.num_heads
        self.norm = nn.LayerNorm(shape.feature_size)
        self.query = nn.Linear(shape.feature_size, shape.width)
        self.key = nn.Linear(shape.feature_size, shape.width)
        self.value = nn.Linear(shape.feature_size, shape.width)
        self.zone_query = nn.Parameter(torch.empty(NUM_ZONES, shape.width))
        self.size_query = nn.Parameter(torch.zeros(shape.width))
        self.out = nn.Linear(shape.width, shape.feature_size)
        self.mlp_norm = nn.LayerNorm(shape.feature_size)
        self.mlp_in = nn.Linear(shape.feature_size, shape.mlp_size)
        self.mlp_out = nn.Linear(shape.mlp_size, shape.feature_size)
        for last in (self.out, self.mlp_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        # Equal constants in queries and keys: rotated, they meet where the places do.
        towards = math.sqrt(2 * _PEAK / math.sqrt(head))
        pattern = torch.tensor([towards, 0.0]).repeat_interleave(head // 2).repeat(shape.num_heads)
        with torch.no_grad():
            self.zone_query.copy_(pattern.expand(NUM_ZONES, -1))
            self.key.bias.copy_(pattern)
            for linear in (self.query, self.key):
                linear.weight.mul_(0.5)

    def forward(self, features: Tensor, assignment: Tensor, places: Tensor) -> Tensor:
        """Compress one image.

        Args:
            features: `[num_tokens, feature_size]`.
            assignment, places: on the CPU, as `plan_reading` takes them.

        Returns:
            `[num_embeddings, feature_size]`; anchors are copied exactly.
        """
        means = compress(features, assignment)
        reading = plan_reading(assignment, places)
        return self.read(features, means, reading) if reading.groups else means

    def read(self, features: Tensor, means: Tensor, reading: Reading) -> Tensor:
        """Add to the means `[num_embeddings, feature_size]` what their queries read of the features."""
        device = features.device
        zone, size, middle, place = (
            part.to(device, non_blocking=True)
            for part in (reading.zone, reading.size, reading.middle, reading.place)
        )
        seen = self.norm(features)
        keys = self._rotated(self.key(seen), place)
        values = self._by_head(self.value(seen))
        asked = self.query(self.norm(means)) + self.zone_query[zone]
        asked = asked + size.log()[:, None].to(asked.dtype) * self.size_query
        queries = self._rotated(asked, middle)
        embeddings = means.clone()
        for group in reading.groups:
            rows, tokens = (index.to(device, non_blocking=True) for index in group)
            mixed = functional.scaled_dot_product_attention(
                queries[:, rows][None], keys[:, tokens][None], values[:, tokens][None]
            )[0]
            mean = means[rows].float()
            read = mean + self.out(mixed.transpose(0, 1).flatten(1)).float()
            inner = functional.gelu(self.mlp_in(self.mlp_norm(read.to(means.dtype))))
            embeddings = embeddings.index_copy(0, rows, (read + self.mlp_out(inner).float()).to(means.dtype))
        return embeddings

    def _by_head(self, rows: Tensor) -> Tensor:
        """`[heads, rows, head]`."""
        return rows.view(len(rows), self.num_heads, -1).transpose(0, 1)

    def _rotated(self, rows: Tensor, place: Tensor) -> Tensor:
        """Turn rows `[rows, width]` by their places `[rows, 2]`, each axis a half of every head.

        Returns:
            `[heads, rows, head]`.
        """
        first, second = self._by_head(rows).float().chunk(2, dim=-1)
        count = first.shape[-1] // 2
        waves = _ROTARY_BASE ** -(torch.arange(count, device=place.device, dtype=torch.float32) / count)
        angles = (place[:, :, None] * waves).flatten(1)  # [rows, head / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(rows.dtype)
