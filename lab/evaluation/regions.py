# SPDX-License-Identifier: Apache-2.0
"""Where a question's region comes from: the truth, the model itself, or a control that should not help."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lab.evaluation.conditions import SERVER
from lab.evaluation.questions import TestScene
from lab.tinyvqa.questions import CellBox, Question
from vllm_crop.localizers.base import UnreadableAnswerError
from vllm_crop.localizers.dialects import read_cells
from vllm_crop.planning.geometry import Box, Region

Source = Literal["oracle", "localizer", "random", "centre", "shuffled", "whole"]
SOURCES: tuple[str, ...] = get_args(Source)
ALL_SOURCES = (*SOURCES, SERVER)
DESCRIPTIONS: dict[str, str] = {
    "oracle": "the smallest region that holds the answer",
    "localizer": "where the model itself says to look, from the thumbnail",
    "random": "a box of the true one's size, anywhere",
    "centre": "a box of the true one's size, in the middle",
    "shuffled": "the true region of another question of the family, about another scene",
    "whole": "the whole image, pruned evenly",
    SERVER: "where the server's own localizer says, not asked unless named and only with --base-url",
}


def parse_location(text: str) -> Region | None:
    """What the localizer said, as a region; the whole image, where it said so.

    None for what cannot be read: the image is then served whole, and counted.
    """
    try:
        return read_cells(text) or Region.whole()
    except UnreadableAnswerError:
        return None


def regions_for(
    source: str, scenes: Sequence[TestScene], located: Mapping[tuple[int, str], Region] | None = None
) -> list[list[Region | None]]:
    """The region of every question of every scene; None where the image is to be served unpruned.

    Args:
        located: the localizer's regions by scene seed and question, needed for "localizer" only.
    """
    if source == "localizer":
        assert located is not None, "nobody has asked the localizer"
        chosen = [[located.get((s.scene.seed, q.text)) for q in s.questions] for s in scenes]
        return [[_unless_whole(region) for region in row] for row in chosen]
    if source == "whole":
        return [[Region.whole() for _ in scene.questions] for scene in scenes]
    if source == "oracle":
        # The honest region of a search or a count is the whole image: nothing may be pruned.
        return [[_unless_whole(q.region(s.scene.side)) for q in s.questions] for s in scenes]
    if source == "shuffled":
        return _shuffled(scenes)
    return [[_control(source, scene, question) for question in scene.questions] for scene in scenes]


def coverage(region: Region | None, question: Question, side: int) -> float:
    """The share of the minimal region's cells that a region covers; None is the whole image."""
    if region is None:
        return 1.0
    wanted = cells_of(question.region(side), side)
    return len(wanted & cells_of(region, side)) / len(wanted)


def area(region: Region | None, side: int) -> float:
    """The share of the image's cells that a region touches."""
    return 1.0 if region is None else len(cells_of(region, side)) / side**2


def cells_of(region: Region, side: int) -> set[int]:
    """The cells a region touches, numbered row by row."""
    from vllm_crop.planning.geometry import TokenGrid

    return set(TokenGrid(side, side).mask(region).nonzero()[0].tolist())


def _unless_whole(region: Region | None) -> Region | None:
    return None if region == Region.whole() else region


def _shuffled(scenes: Sequence[TestScene]) -> list[list[Region | None]]:
    """The next scene's question of the same family lends its region."""
    lenders: dict[str, list[tuple[int, Question]]] = {}
    for index, scene in enumerate(scenes):
        for question in scene.questions:
            lenders.setdefault(question.family, []).append((index, question))
    rows: list[list[Region | None]] = []
    for index, scene in enumerate(scenes):
        row = []
        for question in scene.questions:
            same = lenders[question.family]
            later = [q for i, q in same if i > index] or [q for i, q in same if i != index]
            lender = later[0] if later else question
            row.append(_unless_whole(lender.region(scene.scene.side)))
        rows.append(row)
    return rows


def _control(source: str, scene: TestScene, question: Question) -> Region:
    """Boxes as large as the true ones; for a search or a count of two cells' side, as for a relation."""
    side = scene.scene.side
    chance = random.Random(f"{source} {scene.scene.seed} {question.text}")
    boxes: list[CellBox] = list(question.boxes) or [(0, 0, 1, 1)]
    return Region(tuple(_moved(source, box, side, chance) for box in boxes))


def _moved(source: str, box: CellBox, side: int, chance: random.Random) -> Box:
    width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
    if source == "random":
        x, y = chance.randint(0, side - width), chance.randint(0, side - height)
        return Box(x / side, y / side, (x + width) / side, (y + height) / side)
    assert source == "centre", source
    return Box(
        0.5 - width / side / 2, 0.5 - height / side / 2, 0.5 + width / side / 2, 0.5 + height / side / 2
    )
