# SPDX-License-Identifier: Apache-2.0
"""What scheduler and workers need to know of eviction; it travels in the HF config."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

STAGES, LABEL_IDS = "stages", "label_ids"


@dataclass(frozen=True)
class EvictionSettings:
    """The same in every process of a server.

    Attributes:
        stages: eviction layers, ascending; empty if nothing is ever evicted.
        label_ids: per stage the token id that labels what leaves there.
    """

    stages: tuple[int, ...]
    label_ids: tuple[int, ...]

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> Self:
        """Read what `attach` has written."""
        written = getattr(hf_config, "crop_eviction", None) or {STAGES: (), LABEL_IDS: ()}
        return cls(tuple(written[STAGES]), tuple(written[LABEL_IDS]))

    def attach(self, hf_config: Any) -> None:
        """Write the settings into the HF config."""
        hf_config.crop_eviction = {STAGES: list(self.stages), LABEL_IDS: list(self.label_ids)}

    def stage_leaving_at(self, layer: int | None) -> int:
        """The stage that begins at an eviction layer, 0 for None."""
        return 0 if layer is None else self.stages.index(layer) + 1


def embed_indices(placeholder: Any) -> list[int]:
    """The token indices in a placeholder range that take an embedding (vLLM's PlaceholderRange)."""
    within = (
        range(placeholder.length) if placeholder.is_embed is None else placeholder.is_embed.nonzero()[:, 0]
    )
    return [placeholder.offset + int(index) for index in within]


def image_placeholders(mm_features: Iterable[Any]) -> list[tuple[int, int]]:
    """Offset and length of every image in a prompt (vLLM's MultiModalFeatureSpec)."""
    return [
        (feature.mm_position.offset, feature.mm_position.length)
        for feature in mm_features
        if feature.modality == "image"
    ]
