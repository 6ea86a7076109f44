# SPDX-License-Identifier: Apache-2.0
"""What scheduler and workers need to know of eviction; it travels in the HF config."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vllm_crop.plan import NEVER

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

    def stages_leaving_at(self, layers: NDArray[np.int32]) -> NDArray[np.int64]:
        """The stage that begins at each of some eviction layers, 0 for NEVER.

        Raises:
            ValueError: no stage begins at one of them.
        """
        stages = np.zeros(len(layers), dtype=np.int64)
        for stage, layer in enumerate(self.stages, start=1):
            stages[layers == layer] = stage
        if strangers := set(layers[stages == 0].tolist()) - {NEVER}:
            raise ValueError(f"layers {sorted(strangers)} are none of the stages {list(self.stages)}")
        return stages


def embed_indices(placeholder: Any) -> NDArray[np.int64]:
    """The token indices in a placeholder range that take an embedding (vLLM's PlaceholderRange)."""
    if placeholder.is_embed is None:
        return np.arange(placeholder.offset, placeholder.offset + placeholder.length)
    within: NDArray[np.int64] = placeholder.is_embed.nonzero()[:, 0].numpy()
    return placeholder.offset + within


def image_placeholders(mm_features: Iterable[Any]) -> list[tuple[int, int]]:
    """Offset and length of every image in a prompt (vLLM's MultiModalFeatureSpec)."""
    return [
        (feature.mm_position.offset, feature.mm_position.length)
        for feature in mm_features
        if feature.modality == "image"
    ]
