# SPDX-License-Identifier: Apache-2.0
"""The grid: what is measured with which method, region source and pruning rate."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.evaluation.rivals.names import CHOOSERS, CONTROL_TITLES

CROP_METHODS = ("plc", "ilp", "plc+ilp")
CONTROLS = {
    "resize": "iso-token resize",
    "two-images": "thumb + crop",
    "no-image": "no image at all",
}
METHODS: tuple[str, ...] = ("off", *CROP_METHODS, *CONTROLS, *CHOOSERS)
RATES = (0.667, 0.778, 0.889, 0.926)
SERVER = "server"  # requests carry no region: the server finds one
TRUSTED = ("localizer", "oracle", SERVER)  # sources of regions that are meant to help
LOCATE = "locate"  # the localizer's own answers; no row of the table


@dataclass(frozen=True)
class Condition:
    """One condition: all questions of the test set, asked in one way.

    Attributes:
        region: the region source, None for methods that take no region.
        pruning_rate: None for methods that have none.
        configuration: of a rival; None: the first one that can meet the rate.
    """

    method: str
    region: str | None = None
    pruning_rate: float | None = None
    configuration: str | None = None

    @property
    def row(self) -> str:
        """The row of the table, as people read it."""
        if self.method in CROP_METHODS:
            return f"CROP {self.method}, {self.region}"
        if self.method in CONTROLS:
            return CONTROLS[self.method] + (f", {self.region}" if self.region else "")
        return CHOOSERS.get(self.method, "unpruned" if self.method == "off" else self.method)

    @property
    def slug(self) -> str:
        """A file name."""
        rate = None if self.pruning_rate is None else f"{self.pruning_rate:g}"
        configured = re.sub(r"[^a-z0-9.]+", "-", (self.configuration or "").lower()).strip("-")
        return "-".join(part for part in (self.method, self.region, rate, configured) if part)

    @property
    def locates(self) -> bool:
        """Whether the model has to find the region first."""
        return self.region in ("localizer", SERVER)

    @property
    def sends_regions(self) -> bool:
        """Whether its requests say where to look."""
        return self.region not in (None, SERVER)

    @property
    def chooses_tokens(self) -> bool:
        """Whether it is a rival or a control that only the transformers runner can do."""
        return self.method in CHOOSERS

    @property
    def is_control(self) -> bool:
        """Whether no method, but what methods are to be compared with."""
        return self.method in CONTROLS or self.method in CONTROL_TITLES


OFF = Condition("off")
Chosen = Callable[[str, float], str | None]  # the configuration of a method at a rate; None: its first


def no_configuration(method: str, rate: float) -> None:
    """Nothing is known of any."""
    return None


def make_grid(
    methods: Sequence[str],
    rates: Sequence[float],
    regions: Sequence[str],
    chosen: Chosen = no_configuration,
) -> list[Condition]:
    """The conditions in the order they run: the unpruned model first, which all others are compared with.

    Sources that are not meant to help are controls: they run with the first of CROP's methods only.
    """
    grid = [OFF]
    first = next((method for method in methods if method in CROP_METHODS), None)
    for method in dict.fromkeys(methods):
        if method == "no-image":
            grid.append(Condition(method))
        elif method in CROP_METHODS:
            sources = [one for one in regions if method == first or one in TRUSTED]
            grid += [Condition(method, source, rate) for source in sources for rate in rates]
        elif method == "two-images":
            sources = [one for one in regions if one in TRUSTED and one != SERVER]
            grid += [Condition(method, source, rate) for source in sources for rate in rates]
        elif method != "off":
            pick = chosen if method in CHOOSERS else no_configuration
            grid += [Condition(method, None, rate, pick(method, rate)) for rate in rates]
    return grid
