# SPDX-License-Identifier: Apache-2.0
"""The demo's measurements: every question with every method, and once with a wrong region."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from lab.demo.client import Client
from lab.demo.setting import ANSWER_TOKENS, BLOCK_SIZE, EVICTION_LAYERS, SCENES
from lab.evaluation.questions import TestScene, make_test_set
from lab.tinyvqa.checkpoint import HIDDEN, LAYERS
from lab.tinyvqa.questions import FAMILIES, Question
from vllm_crop.client import CropAnswer
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.planning.geometry import GRID_CELLS, Region

METHODS = ("off", "plc", "ilp", "plc+ilp")
WRONG = "wrong region"
LAYER_TOKEN_BYTES = 2 * HIDDEN * 4  # keys and values in float32


@dataclass(frozen=True)
class Asked:
    """One question with its answers: by METHODS, and for local questions with a wrong region."""

    scene: TestScene
    question: Question
    answers: dict[str, CropAnswer]

    def right(self, column: str) -> bool:
        """Whether an answer is the true one."""
        return self.answers[column].text.strip() == self.question.answer


@dataclass(frozen=True)
class Measured:
    """All of it; `kv_blocks` by method, of the first local question."""

    asked: tuple[Asked, ...]
    kv_blocks: dict[str, int]


def measure(client: Client, console: Console) -> Measured:
    """Ask everything, each time about a picture that no cache has seen."""
    scenes = make_test_set(2 * SCENES)
    tasks = [(scene, question) for scene in scenes for question in scene.questions]
    fresh = _FreshPictures()
    scene, question = tasks[0]
    for method in METHODS:  # to warm up
        client.ask(fresh.of(scene), question.text, {"method": method}, max_tokens=ANSWER_TOKENS)
    kv_blocks = {
        method: client.kv_blocks(fresh.of(scene), question.text, {"method": method}) for method in METHODS
    }
    asked = []
    for scene, question in track(tasks, "asking", console=console, transient=True):
        fields: dict[str, dict[str, Any]] = {method: {"method": method} for method in METHODS}
        if question.boxes:
            fields[WRONG] = {"method": "plc", "regions": [wrong_region(question).as_lists()]}
        answers = {
            column: client.ask(fresh.of(scene), question.text, crop, max_tokens=ANSWER_TOKENS)
            for column, crop in fields.items()
        }
        asked.append(Asked(scene, question, answers))
    return Measured(tuple(asked), kv_blocks)


class _FreshPictures:
    """Pictures of scenes that differ from all before by one pixel."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, scene: TestScene) -> Image.Image:
        picture = scene.picture()
        self.number += 1
        picture.putpixel((0, 0), (self.number % 256, self.number // 256, 7))
        return picture


def wrong_region(question: Question) -> Region:
    """The cell farthest from everything the question needs."""
    needed = [(x, y) for x0, y0, x1, y1 in question.boxes for x in (x0, x1) for y in (y0, y1)]
    cells = [(x, y) for x in range(GRID_CELLS) for y in range(GRID_CELLS)]
    x, y = max(cells, key=lambda cell: min(max(abs(cell[0] - x), abs(cell[1] - y)) for x, y in needed))
    return Region.from_grid_cells(x, y, x, y)


def rows(measured: Measured) -> list[dict[str, Any]]:
    """A line of summary.json for each method: what a question with a region of its own costs."""
    return [_row(method, measured) for method in METHODS]


def shares(measured: Measured) -> dict[str, dict[str, list[int]]]:
    """Right answers and questions, by column and family."""
    table: dict[str, dict[str, list[int]]] = {}
    for column in (*METHODS, WRONG):
        for family in FAMILIES:
            some = [one for one in measured.asked if one.question.family == family and column in one.answers]
            if some:
                table.setdefault(column, {})[family] = [sum(one.right(column) for one in some), len(some)]
    return table


def _row(method: str, measured: Measured) -> dict[str, Any]:
    local = [one.answers[method] for one in measured.asked if one.question.boxes]
    waits = [answer.facts["localizer_ms"] for answer in local if answer.facts["localizer_ms"] is not None]
    times = [answer.ttft_ms for answer in local]
    return {
        "method": method,
        "image_tokens": _mean([answer.facts["tokens_after_plc"] for answer in local]),
        "tokens_avg": _mean([answer.facts["tokens_avg"] for answer in local]),
        "prompt_tokens": _mean([answer.prompt_tokens for answer in local]),
        "kv_blocks": measured.kv_blocks[method],
        "kv_mib": round(kv_mib(measured.kv_blocks[method]), 2),
        "ttft_ms_median": round(median(times), 1),
        "ttft_ms_range": [round(min(times), 1), round(max(times), 1)],
        "localizer_ms_median": round(median(waits), 1) if waits else None,
    }


def _mean(values: Sequence[float]) -> float:
    return round(fmean(values), 1)


def kv_mib(blocks: int) -> float:
    """Memory of KV blocks: a server prepared for eviction has more and smaller ones than plain vLLM."""
    grouping = predict_grouping(LAYERS, EVICTION_LAYERS, BLOCK_SIZE)
    return blocks * grouping.block_layer_tokens * LAYER_TOKEN_BYTES / 2**20
