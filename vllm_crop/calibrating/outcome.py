# SPDX-License-Identifier: Apache-2.0
"""What a calibration measures and what it finds, as it is collected."""

from dataclasses import dataclass, field

from vllm_crop.calibrating.data import Asked
from vllm_crop.calibrating.looking import Look
from vllm_crop.calibrating.rule import FloatArray
from vllm_crop.calibrating.scoring import area, auroc, coverage, is_hit
from vllm_crop.frontend.attention_localizer import Rule
from vllm_crop.localizers.dialects import DialectName
from vllm_crop.measuring.shares import wilson

FEWEST_JUDGED = 10  # places: fewer would pass for better than chance by a hit or two

# Names of rows.
CHOSEN, FITTED, UNCALIBRATED = "chosen layers", "fitted weights", "layers taken by default"
CENTRE, RANDOM = "centre", "random place"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        layers: those that are watched.
        uncalibrated: those that a server takes by itself; empty if some of them are not watched.
        views: sizes of view that the chosen layers are tried at too, in visual tokens.
        dialects: in which the model is asked to say the place.
        prompt: of the dialects; their own if None.
        wanted: coverage that the threshold is set for.
        fit: also fit weights to the boxes.
    """

    layers: tuple[int, ...]
    uncalibrated: tuple[int, ...]
    views: tuple[int, ...]
    dialects: tuple[DialectName, ...]
    prompt: str | None
    wanted: float
    fit: bool = False


@dataclass
class Places:
    """Places found for questions about a known part of their picture, one entry for each question."""

    hits: list[bool] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, asked: Asked, look: Look) -> None:
        """Judge a place; none is a miss that covers nothing. Others' questions are passed over."""
        if asked.needs is None or not asked.is_local:
            return
        self.hits.append(look.window is not None and is_hit(look.window, asked.needs))
        self.covered.append(0.0 if look.region is None else coverage(look.region, asked.needs))
        self.areas.append(0.0 if look.region is None else area(look.region))
        self.seconds.append(look.seconds)


@dataclass
class Confidences:
    """Of questions whose needed part is known, all of the picture included: how sure, and what was covered.

    Attributes:
        hits: None for a question about all of the picture.
    """

    told: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)
    hits: list[bool | None] = field(default_factory=list)

    def tells_hits(self) -> float | None:
        """How well the confidence tells hits from misses: AUROC; None without both."""
        known = [(sure, hit) for sure, hit in zip(self.told, self.hits, strict=True) if hit is not None]
        return auroc([sure for sure, _ in known], [hit for _, hit in known])

    def tells_places(self) -> float | None:
        """How well it tells questions about a part of the picture from those about all of it."""
        return auroc(self.told, [hit is not None for hit in self.hits])

    def add(self, asked: Asked, look: Look) -> None:
        """Note one."""
        if asked.needs is None:
            return
        self.told.append(look.confidence)
        self.covered.append(0.0 if look.region is None else coverage(look.region, asked.needs))
        hit = look.window is not None and is_hit(look.window, asked.needs)
        self.hits.append(hit if asked.is_local else None)


@dataclass
class Outcome:
    """What a calibration found. "Dev" is the half of the pictures that decides, "test" the one that judges.

    Attributes:
        change: D_l of each of the plan's layers, dev.
        by_layer: of each, alone, test.
        sure_by_layer: its confidences.
        weights: of each layer, fitted on dev; None if none were wanted.
        rows: the chosen layers and all they are compared with, by name, test.
        dev, test: confidences of the rule that is served: that with weights where there are some.
        view_tokens: most visual tokens of the configured view, a value for each test picture.
        threshold: the confidence from which on enough is covered in the mean, dev; None if there is none.
        pictures, questions: how many, dev and test.
        seconds: of a localization of a picture never seen before, one at a time; all test questions.
    """

    plan: Plan
    change: FloatArray
    chosen: list[int]
    by_layer: dict[int, Places]
    sure_by_layer: dict[int, Confidences]
    weights: FloatArray | None = None
    rows: dict[str, Places] = field(default_factory=dict)
    dev: Confidences = field(default_factory=Confidences)
    test: Confidences = field(default_factory=Confidences)
    view_tokens: list[int] = field(default_factory=list)
    threshold: float | None = None
    pictures: tuple[int, int] = (0, 0)
    questions: tuple[int, int] = (0, 0)
    seconds: list[float] = field(default_factory=list)

    @property
    def served(self) -> str:
        """The name of the rule that is served."""
        return CHOSEN if self.weights is None else FITTED

    @property
    def rule(self) -> Rule:
        """The rule that is served."""
        if self.weights is None:
            return Rule(tuple(self.chosen))
        return Rule(self.plan.layers, tuple(self.weights.tolist()))

    @property
    def too_few(self) -> bool:
        """Whether so few places were judged that hits say nothing; not without boxes."""
        return 0 < len(self.rows[self.served].hits) < FEWEST_JUDGED

    def beats_chance(self) -> bool | None:
        """Whether what is served hits more often than random windows, at 95 %; None without boxes."""
        chosen, anywhere = self.rows[self.served].hits, self.rows.get(RANDOM, Places()).hits
        if not chosen or not anywhere:
            return None
        return wilson(sum(chosen), len(chosen)).low > sum(anywhere) / len(anywhere)
