# SPDX-License-Identifier: Apache-2.0
"""What most families are: a position id per token, all layers look, their vision tower sees images whole."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from vllm_crop.planning.foveation import Piece, Sight
from vllm_crop.planning.geometry import ImageTokens, Region


class _Layered(Protocol):
    @property
    def num_layers(self) -> int: ...


class PlainText:
    """The part of a VisionGeometry that is the language model's: every layer looks, tokens are counted on."""

    uses_mrope: ClassVar[bool] = False
    rotary_room: ClassVar[int] = 1
    first_eviction_layer: ClassVar[int] = 1
    why_no_regions: ClassVar[str] = ""
    fewest_tokens: ClassVar[int] = 1

    @property
    def state_tokens(self) -> int:
        """None: no layer has a state."""
        return 0

    @property
    def looking_layers(self: _Layered) -> Sequence[int]:
        """All."""
        return range(self.num_layers)

    def position_span(self, grid: ImageTokens) -> int:
        """One per token."""
        return grid.num_tokens


class SeenWhole:
    """The part of a VisionGeometry that is about foveation, without any: `why_no_foveation` says why."""

    foveation_settings: ClassVar[frozenset[str]] = frozenset()

    def foveate(
        self, width: int, height: int, region: Region, around: Region | None, sight: Sight
    ) -> tuple[Piece, ...]:
        """Nothing."""
        return ()

    def small(self, width: int, height: int, max_tokens: int) -> tuple[Piece, ...]:
        """Nothing: an image has the size it has."""
        return ()

    def overview(self, width: int, height: int) -> tuple[Piece, ...]:
        """None: nothing is seen in pieces."""
        return ()

    def unseen(self, width: int, height: int, pieces: Sequence[Piece]) -> None:
        """None: all of it is seen."""
