# SPDX-License-Identifier: Apache-2.0
"""What a comparison prints and saves: a column per condition, and the JSON with every number and answer."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_crop.comparing.asking import Asked, Reply
from vllm_crop.comparing.conditions import UNPRUNED
from vllm_crop.comparing.metrics import score
from vllm_crop.comparing.questions import Question
from vllm_crop.comparing.reading import Data
from vllm_crop.comparing.run import Outcome
from vllm_crop.comparing.statistics import Spread
from vllm_crop.comparing.summary import ConditionSummary, Gap, kv_tokens, summarize


@dataclass(frozen=True)
class Report:
    """Everything that is shown.

    Attributes:
        setting: how it was asked.
        provenance: where this command ran.
    """

    outcome: Outcome
    data: Data
    setting: Mapping[str, Any]
    provenance: Mapping[str, Any]
    summaries: tuple[ConditionSummary, ...]


def make_report(
    outcome: Outcome, data: Data, setting: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Report:
    """Summarize an outcome."""
    summaries = tuple(summarize(outcome.asked, outcome.conditions))
    return Report(outcome, data, setting, provenance, summaries)


def table_rows(summaries: Sequence[ConditionSummary]) -> Iterator[tuple[str, list[str]]]:
    """A row for each thing that is reported: its name, and a cell for each condition."""

    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(one) for one in summaries]

    def compared(label: str, cell: Any) -> tuple[str, list[str]]:
        return row(label, lambda one: "" if one.name == UNPRUNED.name else cell(one))

    yield row("answered", lambda one: str(one.answered))
    yield compared("pruned, of those compared", lambda one: f"{one.pruned} of {one.compared}")
    yield compared("same answer exactly", lambda one: str(one.agreement.exact))
    yield compared("same, normalised", lambda one: str(one.agreement.normalised))
    yield compared("  of the pruned", lambda one: str(one.agreement_if_pruned.normalised))
    yield compared("same first token", lambda one: str(one.agreement.first_token))
    yield compared("nats lost per answer token", lambda one: gap_text(one.answer_gap))
    yield compared("nats lost, first token", lambda one: gap_text(one.first_token_gap))
    if any(one.accuracy for one in summaries):
        yield row("right answers", lambda one: str(one.accuracy.right) if one.accuracy else "-")
        yield compared("  lost, gained", lambda one: _changes(one))
    for kind, of in (("score", "scores"), ("family", "families")):
        for group in dict.fromkeys(group for one in summaries for group in getattr(one, of)):
            yield row(f"{kind} {group}", lambda one, of=of, group=group: _score(one, of, group, "score"))
            yield compared("  change", lambda one, of=of, group=group: _score(one, of, group, "change"))
    if any(one.found for one in summaries):
        yield compared("place of the answer covered", lambda one: _covered(one))
        yield compared("  by a region of, % of the picture", lambda one: _region_area(one))
    yield row("visual tokens", lambda one: _mean(one.costs.visual_tokens))
    yield row("  in the prompt", lambda one: _mean(one.costs.visual_tokens_after_plc))
    yield row("  averaged over layers", lambda one: _mean(one.costs.visual_tokens_avg))
    yield row("KV, tokens", lambda one: _mean(one.costs.kv_tokens))
    yield row("TTFT ms, picture first shown", lambda one: _median(one.costs.ttft_new_ms))
    yield row("TTFT ms, shown before", lambda one: _median(one.costs.ttft_known_ms))
    yield compared("  ratio to unpruned", lambda one: _median(one.costs.ttft_ratio, 2))
    yield row("  localizer in it, ms", lambda one: _median(one.costs.localizer_ms))
    yield row("images", lambda one: ", ".join(f"{count} {what}" for what, count in one.outcomes.items()))
    if any(one.failures for one in summaries):
        yield row("failed requests", lambda one: str(sum(one.failures.values())))


def gap_text(gap: Gap | None) -> str:
    """Mean per token, the middle eight tenths of the answers, n."""
    if gap is None:
        return "-"
    each = gap.by_answer
    return f"{gap.mean:.3f} ({each.p10:.3f} to {each.p90:.3f}), n {gap.answers}"


def _changes(one: ConditionSummary) -> str:
    return f"{one.accuracy.lost}, {one.accuracy.gained}" if one.accuracy else "-"


def _score(one: ConditionSummary, of: str, group: str, what: str) -> str:
    scored = getattr(one, of).get(group)
    return "-" if scored is None else str(getattr(scored, what))


def _covered(one: ConditionSummary) -> str:
    if one.found is None:
        return "-"
    whole = f", {one.found.whole} whole" if one.found.whole else ""
    return f"{one.found.covered or 'no region'}{whole}"


def _region_area(one: ConditionSummary) -> str:
    return "-" if one.found is None or one.found.area is None else str(one.found.area)


def _mean(value: Spread | None) -> str:
    return "-" if value is None else f"{value.mean:.1f}"


def _median(value: Spread | None, digits: int = 0) -> str:
    return "-" if value is None else value.text(digits)


def notes(report: Report) -> Iterator[str]:
    """What a reader must know to read the numbers."""
    outcome, data = report.outcome, report.data
    compared = [one for one in report.summaries if one.name != UNPRUNED.name]
    pruned = [one for one in compared if any(c.prunes and c.name == one.name for c in outcome.conditions)]
    if outcome.stopped:
        yield f"Stopped: {len(outcome.asked)} of {outcome.num_questions} questions were asked."
    if pruned and not any(one.pruned for one in pruned):
        yield (
            "Nothing was pruned: no region was sent or found, or the rate is 0. Send `regions`, or start the "
            "server with a localizer."
        )
    yield (
        "Shares are of questions with both answers, with 95 % intervals (Wilson). Normalised: without case, "
        "punctuation, white space and articles. A same answer need not be right, nor another one wrong."
    )
    yield (
        "Nats lost: by how much the log-probability of the unpruned answer falls, mean per token; in "
        f"brackets what eight tenths of the answers lie within. {_ways(pruned)}"
    )
    yield (
        "unpruned again is the control: what it shows, noise shows. Times: median, eight tenths in brackets, "
        "conditions in random order for every question, the localizer's time inside. The request that shows "
        "a picture first in this run pays for the vision tower, unless the server knew it already. A "
        "cache_salt of its own keeps each request from KV blocks and regions of others."
    )
    if any(one.scores or one.families for one in compared):
        yield (
            "Scores, of 100, are those of each question's metric; change: from the unpruned answer, question "
            "by question. Intervals are 95 %, questions about one picture (or of one group) taken together."
        )
    yield "KV: tokens of the prompt, averaged over layers, not rounded up to blocks."
    yield ("images: what the localizer did, or that a region was sent, or that pruning was off.")
    if report.setting["concurrency"] > 1:
        yield "Several questions were asked at once: times are of a loaded server."
    if data.without_image:
        yield f"{data.without_image} conversations without an image were left out."
    if data.not_sent:
        named = ", ".join(f"{key} ({count})" for key, count in sorted(data.not_sent.items()))
        yield f"Keys of logged requests that were not sent: {named}."


def _ways(pruned: Sequence[ConditionSummary]) -> str:
    """Which way of scoring was used for how many answers."""
    whole = sum(one.answer_gap.answers for one in pruned if one.answer_gap)
    why = [f"{one.name}: {count} {reason}" for one in pruned for reason, count in one.why_first_token.items()]
    used = f"{whole} whole answers by prompt_logprobs"
    return f"Used: {used}." if not why else f"Used: {used}; the first token alone ({'; '.join(why)})."


def print_report(console: Console, report: Report) -> None:
    """The table and how to read it."""
    setup = report.outcome.setup
    console.print(Text(f"{setup.model} at {setup.base_url}, {len(report.outcome.asked)} questions"))
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("")
    for one in report.summaries:
        shown.add_column(one.name)
    for label, cells in table_rows(report.summaries):
        shown.add_row(Text(label), *map(Text, cells))
    console.print(shown)
    listed = Table.grid(padding=(0, 1, 0, 0))
    for note in notes(report):
        listed.add_row("-", Text(note))
    console.print(listed)


def report_json(report: Report) -> dict[str, Any]:
    """Plain values: NaN, which JSON does not have, as null."""
    outcome, data = report.outcome, report.data
    plain = {
        "provenance": dict(report.provenance),
        "server": asdict(outcome.setup),
        "setting": dict(report.setting),
        "data": {
            "available": data.available,
            "to_ask": outcome.num_questions,
            "asked": len(outcome.asked),
            "without_image": data.without_image,
            "not_sent": data.not_sent,
            "stopped": outcome.stopped,
        },
        "notes": list(notes(report)),
        "summary": [asdict(one) for one in report.summaries],
        "questions": [_question_json(one) for one in outcome.asked],
        "failures": [asdict(failure) for one in outcome.asked for failure in one.failures],
    }
    without_nan: dict[str, Any] = _without_nan(plain)
    return without_nan


def _question_json(one: Asked) -> dict[str, Any]:
    return {
        "id": one.question.name,
        "question": one.question.text,
        "answers": list(one.question.answers),
        "metric": one.question.metric,
        "family": one.question.family,
        "group": one.question.cluster,
        "boxes": [list(box) for box in one.question.boxes],
        "replies": {name: _reply_json(reply, one.question) for name, reply in one.replies.items()},
    }


def _reply_json(reply: Reply, question: Question) -> dict[str, Any]:
    answer = reply.answer
    return {
        "text": answer.text,
        "right": score(answer.text, question.answers, question.metric) if question.answers else None,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "kv_tokens": kv_tokens(reply),
        "ttft_ms": answer.ttft_ms,
        "new_pictures": reply.new_pictures,
        "facts": answer.facts,
        "score": asdict(reply.score) if reply.score else None,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, report: Report) -> None:
    """Write all of it or nothing."""
    write_whole(path, json.dumps(report_json(report), indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once: a run that is stopped leaves the old one or the new one.

    Lone surrogates, which an answer may have and UTF-8 has not, are written as question marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "replace"))
    os.replace(partial, path)
