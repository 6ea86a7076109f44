# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file that loads nothing, with a card for every question whose answers differ."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vllm_crop.comparing.answers import is_same
from vllm_crop.comparing.asking import Asked, Reply
from vllm_crop.comparing.conditions import UNPRUNED
from vllm_crop.comparing.metrics import score
from vllm_crop.comparing.report import Report, notes, report_json, table_rows, write_whole
from vllm_crop.comparing.summary import differs, outcomes
from vllm_crop.drawing.preview import draw_region
from vllm_crop.planning.geometry import Box, Region

LONG_SIDE = 480  # pixels of a picture on the page
NOT_HERE = "The picture is not here: it was sent as a URL, which this command does not fetch."


@dataclass(frozen=True)
class Drawing:
    """A picture with one region, as a data URL; None where it is not here.

    Attributes:
        caption: which conditions looked there.
    """

    url: str | None
    caption: str


@dataclass(frozen=True)
class AnswerRow:
    """An answer on a card; `verdict` says how right it is, where that is known."""

    condition: str
    text: str
    same: bool
    verdict: str
    tokens: str
    became: str
    logprob: str


@dataclass(frozen=True)
class Card:
    """One question."""

    name: str
    question: str
    answers: tuple[str, ...]
    drawings: tuple[Drawing, ...]
    rows: tuple[AnswerRow, ...]


def write_page(path: Path, report: Report, max_cards: int) -> None:
    """Write the page with at most so many cards, and how many there would be."""
    write_whole(path, render_page(report, max_cards))


def render_page(report: Report, max_cards: int) -> str:
    """The page. What models and files say is escaped: none of it is trusted."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    outcome = report.outcome
    differing = [one for one in outcome.asked if differs(one)]
    failures = [failure for one in outcome.asked for failure in one.failures]
    return environment.get_template(
        "page.html.jinja"
    ).render(
        setup=outcome.setup,
        num_asked=len(outcome.asked),
        conditions=[one.name for one in report.summaries],
        rows=list(table_rows(report.summaries)),
        notes=list(notes(report)),
        cards=map(_card, differing[:max_cards]),  # one after the other: pictures take room
        num_differing=len(differing),
        num_cards=min(max_cards, len(differing)),
        failures=failures[:max_cards],
        num_failures=len(failures),
        setting=json.dumps(
            {key: report_json(report)[key] for key in ("server", "setting", "data", "provenance")}, indent=2
        ),
    )


def _card(one: Asked) -> Card:
    unpruned = one.replies[UNPRUNED.name]
    rows = tuple(_row(one, name, reply, unpruned) for name, reply in _in_order(one))
    return Card(one.question.name, one.question.text, one.question.answers, tuple(_drawings(one)), rows)


def _in_order(one: Asked) -> list[tuple[str, Reply]]:
    """Unpruned first, pruned ones from few tokens taken away to many."""
    return sorted(
        one.replies.items(),
        key=lambda item: (item[0] != UNPRUNED.name, -item[1].answer.facts["tokens_avg"], item[0]),
    )


def _row(one: Asked, name: str, reply: Reply, unpruned: Reply) -> AnswerRow:
    facts, known = reply.answer.facts, one.question.answers
    if reply.score is None:
        logprob = ""
    else:
        per_token = sum(reply.score.logprobs) / len(reply.score.logprobs)
        logprob = f"{per_token:.2f}{'' if reply.score.whole else ' (first token)'}"
    right = score(reply.answer.text, known, one.question.metric) if known else 0.0
    return AnswerRow(
        condition=name,
        text=reply.answer.text,
        same=is_same(reply.answer.text, unpruned.answer.text),
        verdict=_verdict(right) if known else "",
        tokens=f"{facts['tokens_avg']:g} of {facts['tokens']}",
        became=", ".join(outcomes(facts)),
        logprob=logprob,
    )


def _verdict(right: float) -> str:
    """In words; of an answer that is neither, in hundredths."""
    return {1.0: "right", 0.0: "wrong"}.get(right, f"{100 * right:.0f} of 100")


def _drawings(one: Asked) -> Iterator[Drawing]:
    """Every picture with every region that was used, each once."""
    try:
        pictures = one.question.pictures()
    except OSError:
        pictures = []
    for index, picture in enumerate(pictures):
        looked: dict[str, list[str]] = {}
        for name, reply in _in_order(one):
            boxes = reply.region_keys[index] if index < len(reply.region_keys) else None
            if name != UNPRUNED.name and reply.pruned:
                looked.setdefault(json.dumps(boxes), []).append(name)
        for boxes, names in (looked or {"null": []}).items():
            region = _region(json.loads(boxes))
            where = f"region of {', '.join(names)}" if region else "no region"
            if picture is None:
                yield Drawing(None, f"{NOT_HERE} {where.capitalize()}: {boxes}")
                continue
            buffer = io.BytesIO()
            draw_region(picture, region, LONG_SIDE).save(buffer, "JPEG", quality=85)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            yield Drawing(url, where)


def _region(boxes: list[list[float]] | None) -> Region | None:
    return Region(tuple(Box(*box) for box in boxes)) if boxes else None
