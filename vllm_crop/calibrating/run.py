# SPDX-License-Identifier: Apache-2.0
"""One calibration: layers are chosen and the threshold is set on every other picture, judged on the rest."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_crop.calibrating.data import Pictured, halves
from vllm_crop.calibrating.fitting import Example, example, fit
from vllm_crop.calibrating.looking import Look, LookingModel
from vllm_crop.calibrating.outcome import (
    CENTRE,
    CHOSEN,
    FITTED,
    RANDOM,
    UNCALIBRATED,
    Confidences,
    Outcome,
    Places,
    Plan,
)
from vllm_crop.calibrating.rule import FloatArray, looking_layers, question_change
from vllm_crop.calibrating.scoring import lowest_threshold, random_windows, window_around
from vllm_crop.errors import CropError
from vllm_crop.frontend.attention_localizer import Rule
from vllm_crop.planning.geometry import Region, TokenGrid

_RANDOM = 20  # windows a question
_FRESH = {CHOSEN: 0, FITTED: 1000, UNCALIBRATED: 2000}  # numbers of pictures as if never seen


class CalibrationFailedError(CropError):
    """Nothing was learned; the message says why."""


async def calibrate(
    model: LookingModel, pictures: Sequence[Pictured], plan: Plan, console: Console
) -> Outcome:
    """Ask about every picture.

    Raises:
        CalibrationFailedError: no layer looks elsewhere for another question, or weights have too little to
            be fitted to.
    """
    parts = list(halves(pictures))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:

        def bar(what: str, part: Sequence[object]) -> Callable[[], None]:
            task = progress.add_task(what, total=len(part))
            return lambda: progress.advance(task)

        alone = await _look_by_layer(model, parts, plan, bar("each layer alone", parts))
        outcome = _chosen(alone, plan)
        await _look_together(model, parts, outcome, bar("the chosen layers", parts))
        if plan.fit:
            outcome.weights = _fitted(alone)
            await _look_together(model, parts, outcome, bar("fitted weights", parts))
        await _compare(model, [one for one, decides in parts if not decides], outcome, bar)
    if outcome.dev.told:
        outcome.threshold = lowest_threshold(outcome.dev.told, outcome.dev.covered, plan.wanted)
    return outcome


@dataclass
class _Alone:
    """Each layer by itself.

    Attributes:
        dev: pictures that decide, with looks by question and layer.
        places, sure: by layer, of the others.
    """

    dev: list[tuple[Pictured, list[list[Look]]]]
    places: dict[int, Places]
    sure: dict[int, Confidences]


async def _look_by_layer(
    model: LookingModel, parts: Sequence[tuple[Pictured, bool]], plan: Plan, done: Callable[[], None]
) -> _Alone:
    alone = _Alone(
        [], {layer: Places() for layer in plan.layers}, {layer: Confidences() for layer in plan.layers}
    )
    count = len(plan.layers)
    for pictured, decides in parts:
        picture = pictured.open()
        asked_by_layer = [(asked, layer) for asked in pictured.questions for layer in plan.layers]
        looks = await asyncio.gather(
            *(model.look(picture, asked.text, Rule((layer,))) for asked, layer in asked_by_layer)
        )
        if decides:
            by_question = [looks[first : first + count] for first in range(0, len(looks), count)]
            alone.dev.append((pictured, by_question))
        else:
            for (asked, layer), look in zip(asked_by_layer, looks, strict=True):
                alone.places[layer].add(asked, look)
                alone.sure[layer].add(asked, look)
        done()
    return alone


def _chosen(alone: _Alone, plan: Plan) -> Outcome:
    """Begin an outcome with the layers that look.

    Raises:
        CalibrationFailedError: none does.
    """
    try:
        change = question_change([_stacked(looks) for _, looks in alone.dev])
        return Outcome(plan, change, looking_layers(change, plan.layers), alone.places, alone.sure)
    except ValueError as error:
        raise CalibrationFailedError(
            f"nothing was learned: {error}. Does the model answer such questions about such pictures at all?"
        ) from None


def _fitted(alone: _Alone) -> FloatArray:
    """Weights, rounded as they are written.

    Raises:
        CalibrationFailedError: there is too little to fit to.
    """
    try:
        return fit(_examples(alone.dev)).round(4)
    except ValueError as error:
        raise CalibrationFailedError(
            f"{error} (in the deciding half). Use more --pictures, or leave --fit out"
        ) from None


def _stacked(by_question: Sequence[Sequence[Look]]) -> FloatArray:
    """Maps of one picture, `[questions, layers, cells]`; zero where a layer gave none."""
    cells = max(look.map.size for looks in by_question for look in looks)
    empty: NDArray[np.float64] = np.zeros(cells)
    return np.array(
        [[look.map.reshape(-1) if look.map.size else empty for look in looks] for looks in by_question]
    )


def _examples(dev: Sequence[tuple[Pictured, list[list[Look]]]]) -> list[Example]:
    """What weights are fitted to: questions about a place that every layer gave a map for."""
    found = []
    for number, (pictured, by_question) in enumerate(dev):
        for asked, looks in zip(pictured.questions, by_question, strict=True):
            shows = looks[0].shows
            if asked.needs is None or not asked.is_local or not all(look.map.size for look in looks):
                continue
            seen = None if shows is None else shows.project(asked.needs)
            if seen is not None:
                needed = TokenGrid(*looks[0].map.shape).mask(seen)
                found.append(example(np.array([look.map.reshape(-1) for look in looks]), needed, number))
    return [one for one in found if one is not None]


async def _look_together(
    model: LookingModel, parts: Sequence[tuple[Pictured, bool]], outcome: Outcome, done: Callable[[], None]
) -> None:
    """The rule that is served, one request at a time, each picture as if it came for the first time."""
    places = outcome.rows[outcome.served] = Places()
    outcome.dev, outcome.test, outcome.view_tokens, outcome.seconds = Confidences(), Confidences(), [], []
    fresh = _FRESH[outcome.served]
    counts = {True: [0, 0], False: [0, 0]}
    for pictured, decides in parts:
        picture = pictured.open()
        counts[decides][0] += 1
        counts[decides][1] += len(pictured.questions)
        if not decides:
            outcome.view_tokens.append(model.view_tokens(picture.size))
        for number, asked in enumerate(pictured.questions):
            look = await model.look(_never_seen(picture, fresh + number), asked.text, outcome.rule)
            (outcome.dev if decides else outcome.test).add(asked, look)
            if not decides:
                places.add(asked, look)
                outcome.seconds.append(look.seconds)
        done()
    outcome.pictures = counts[True][0], counts[False][0]
    outcome.questions = counts[True][1], counts[False][1]


async def _compare(
    model: LookingModel,
    pictures: Sequence[Pictured],
    outcome: Outcome,
    bar: Callable[[str, Sequence[object]], Callable[[], None]],
) -> None:
    """What else could be done, on the test pictures whose questions have a known place."""
    plan = outcome.plan
    told = [one for one in pictures if any(asked.is_local for asked in one.questions)]
    if not told:
        return
    for tokens in plan.views:
        if set(outcome.view_tokens) == {tokens}:
            continue  # the configured view
        row = outcome.rows[f"{outcome.served}, view of at most {tokens}"] = Places()
        done = bar(f"a view of {tokens} tokens", told)
        for pictured in told:
            picture = pictured.open()
            for number, asked in enumerate(pictured.questions):
                fresh = _never_seen(picture, tokens * 1000 + number)
                row.add(asked, await model.look(fresh, asked.text, outcome.rule, tokens))
            done()
    if plan.uncalibrated:
        row = outcome.rows[UNCALIBRATED] = Places()
        done = bar("layers taken by default", told)
        for pictured in told:
            picture = pictured.open()
            for number, asked in enumerate(pictured.questions):
                fresh = _never_seen(picture, _FRESH[UNCALIBRATED] + number)
                row.add(asked, await model.look(fresh, asked.text, Rule(plan.uncalibrated)))
            done()
    for place, dialect in enumerate(plan.dialects):
        row = outcome.rows[f"the model says it, {dialect}"] = Places()
        done = bar(f"said in {dialect}", told)
        for pictured in told:
            picture = pictured.open()
            for number, asked in enumerate(pictured.questions):
                fresh = _never_seen(picture, 3000 + 300 * place + number)
                row.add(asked, await model.say(fresh, asked.text, dialect, plan.prompt))
            done()
    questions = [asked for pictured in told for asked in pictured.questions]
    centre, anywhere = outcome.rows[CENTRE], outcome.rows[RANDOM] = Places(), Places()
    middle = window_around(0.5, 0.5)
    for number, asked in enumerate(questions):
        centre.add(asked, Look(np.zeros(0), middle, Region((middle,)), 0.0, 0.0))
        for window in random_windows(_RANDOM, number):
            anywhere.add(asked, Look(np.zeros(0), window, Region((window,)), 0.0, 0.0))


def _never_seen(picture: Image.Image, number: int) -> Image.Image:
    """A copy that no cache knows: one pixel in a corner is another one."""
    fresh = picture.convert("RGB")
    fresh = fresh.copy() if fresh is picture else fresh
    red, green, blue = fresh.getpixel((0, 0))  # type: ignore[misc]
    number += 1
    changed = red + number, green + number // 256, blue + number // 65536
    fresh.putpixel((0, 0), tuple(channel % 256 for channel in changed))
    return fresh
