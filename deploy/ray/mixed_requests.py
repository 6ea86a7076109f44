# SPDX-License-Identifier: Apache-2.0
"""Questions asked in every way a client may ask, many at once; each answer says what became of its images."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import openai
from PIL import Image

from lab.demo.setting import PRUNING_RATE
from lab.evaluation.questions import make_test_set
from lab.tinyvqa.questions import LOCAL
from vllm_crop.client import CropClient, facts_of
from vllm_crop.planning.geometry import GRID_CELLS

MODEL_NAME = "tinyvqa"
WHOLE = 576  # visual tokens of a scene
PRUNED = WHOLE - round(WHOLE * PRUNING_RATE)
NOWHERE = [2, 0, 0, 0]
AT_ONCE = 6
_BOUND = 30


@dataclass(frozen=True)
class Asked:
    """A question about a picture that is answered by one box of it."""

    picture: Image.Image
    text: str
    answer: str
    box: list[float]


@dataclass(frozen=True)
class Answered:
    """What was wrong with an answer, "" for nothing; whether it is true, None where that does not count."""

    wrong: str
    true: bool | None = None


@cache
def questions() -> tuple[Asked, ...]:
    """Of scenes the model was not trained on."""
    return tuple(
        Asked(picture, asked.text, asked.answer, asked.region(GRID_CELLS).boxes[0].as_list())
        for scene in make_test_set(4)
        for picture in [scene.picture()]
        for asked in scene.questions
        if asked.family in LOCAL and len(asked.boxes) == 1
    )


def ask_all(base_url: str, requests: int) -> Iterator[Answered]:
    """Ask so many questions; the ways take turns."""
    questions()  # drawn once, not by each thread
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda number: _ask(base_url, number), range(requests))


def _ask(base_url: str, number: int) -> Answered:
    asked = random.Random(number).choice(questions())
    kind, crop, source, tokens = (
        ("region", {"regions": [asked.box]}, "request", [PRUNED]),
        ("streamed", {"regions": [asked.box]}, "request", [PRUNED]),
        ("found", None, "attention", [PRUNED]),
        ("off", {"method": "off"}, "off", [WHOLE]),
        ("bound", {"max_tokens": _BOUND, "regions": [asked.box]}, "request", [_BOUND]),
        ("two", {"regions": [asked.box, None], "localize": "off"}, "request", [PRUNED, WHOLE]),
        ("nowhere", {"regions": [NOWHERE]}, "", []),
    )[number % 7]
    options: dict[str, Any] = {"stream": True} if kind == "streamed" else {}
    pictures = [asked.picture] * max(1, len(tokens))
    try:
        answer = CropClient(base_url, MODEL_NAME).send(pictures, asked.text, crop, max_tokens=5, **options)
        parsed = answer.parse()
        if kind == "streamed":
            text = "".join(chunk.choices[0].delta.content or "" for chunk in parsed if chunk.choices)
        else:
            text = parsed.choices[0].message.content
    except openai.BadRequestError as error:
        expected = kind == "nowhere" and "crop.regions" in error.message
        return Answered("" if expected else f"{kind}: {error}")
    except (openai.OpenAIError, httpx.TransportError) as error:
        return Answered(f"{kind}: {error}")
    facts = facts_of(answer.headers)
    if facts is None or kind == "nowhere":
        return Answered(f"{kind}: answered, facts {facts}")
    counts = [image["tokens_after_plc"] for image in facts["images"]]
    if counts != tokens or facts["images"][0]["source"] != source:
        return Answered(f"{kind}: {facts}")
    return Answered("", text.strip() == asked.answer if tokens == [PRUNED] else None)
