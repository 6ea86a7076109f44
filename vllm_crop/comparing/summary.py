# SPDX-License-Identifier: Apache-2.0
"""From single answers to what a comparison says, each number with its n. Nothing is asked or printed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm_crop.comparing.answers import is_right, is_same
from vllm_crop.comparing.asking import Asked, Reply
from vllm_crop.comparing.conditions import UNPRUNED, Condition
from vllm_crop.comparing.statistics import Share, Spread, share, spread

_SOURCES = {"request": "region sent", "none": "no region", "off": "off", "out_of_view": "out of view"}


@dataclass(frozen=True)
class Gap:
    """How much less likely unpruned answers are under a condition, in nats: 0 is as likely, more is less.

    Attributes:
        answers: that were scored.
        tokens: of all of them.
        mean: per token, over all tokens.
        by_answer: of the mean gap per token of each answer.
    """

    answers: int
    tokens: int
    mean: float
    by_answer: Spread


@dataclass(frozen=True)
class Agreement:
    """How many answers are those of the unpruned picture."""

    exact: Share
    normalised: Share
    first_token: Share


@dataclass(frozen=True)
class Accuracy:
    """Right answers among questions whose answer is known, normalised, that both conditions answered.

    Attributes:
        lost, gained: right only unpruned, right only here.
    """

    right: Share
    unpruned: Share
    lost: int
    gained: int


@dataclass(frozen=True)
class Costs:
    """What a question took, over the questions that were answered.

    Attributes:
        visual_tokens: in the stock model.
        visual_tokens_after_plc: that are in the prompt.
        visual_tokens_avg: that a decoder layer runs with, averaged over layers.
        kv_tokens: tokens of the prompt whose KV is kept, averaged over layers, not rounded up to blocks.
        ttft_new_ms: time to the first token of pictures that the run showed to the server for the first time.
        ttft_known_ms: of others: the vision tower's features are known, and nothing else.
        ttft_ratio: to the unpruned request for the same question, where the picture was known to both.
        localizer_ms: what requests waited for their regions, within the times above.
    """

    visual_tokens: Spread | None
    visual_tokens_after_plc: Spread | None
    visual_tokens_avg: Spread | None
    prompt_tokens: Spread | None
    kv_tokens: Spread | None
    ttft_new_ms: Spread | None
    ttft_known_ms: Spread | None
    ttft_ratio: Spread | None
    localizer_ms: Spread | None


@dataclass(frozen=True)
class ConditionSummary:
    """Everything about one condition.

    Attributes:
        answered: questions with an answer here.
        compared: those with an unpruned one too.
        pruned: of those compared, how many had visual tokens taken away; the others were served whole.
        agreement, agreement_if_pruned: over those compared, and over the pruned ones of them.
        answer_gap: of whole answers; None if none could be scored.
        first_token_gap: of their first tokens.
        why_first_token: why answers were scored by their first token alone, and how many.
        outcomes: of images, what the localizer did; by source where it was not asked.
        failures: of requests, by step.
    """

    name: str
    answered: int
    compared: int
    pruned: int
    agreement: Agreement
    agreement_if_pruned: Agreement
    answer_gap: Gap | None
    first_token_gap: Gap | None
    why_first_token: dict[str, int]
    costs: Costs
    outcomes: dict[str, int]
    accuracy: Accuracy | None
    failures: dict[str, int]


def summarize(asked: Sequence[Asked], conditions: Sequence[Condition]) -> list[ConditionSummary]:
    """One summary per condition, the unpruned one first."""
    return [_summarize(asked, condition.name) for condition in conditions]


def differs(one: Asked) -> bool:
    """Whether an answer under any condition is not the unpruned one, normalised."""
    unpruned = one.replies.get(UNPRUNED.name)
    if unpruned is None:
        return False
    return not all(is_same(reply.answer.text, unpruned.answer.text) for reply in one.replies.values())


def _summarize(asked: Sequence[Asked], name: str) -> ConditionSummary:
    replies = [one.replies[name] for one in asked if name in one.replies]
    pairs = [
        (one.replies[name], one.replies[UNPRUNED.name])
        for one in asked
        if name in one.replies and UNPRUNED.name in one.replies
    ]
    pruned = [pair for pair in pairs if pair[0].pruned]
    scored = [(reply.score, base.score) for reply, base in pairs if reply.score and base.score]
    whole = [(here.logprobs, there.logprobs) for here, there in scored if here.whole and there.whole]
    firsts = [(here.logprobs[:1], there.logprobs[:1]) for here, there in scored]
    reasons = [here.why_not or there.why_not for here, there in scored if not (here.whole and there.whole)]
    return ConditionSummary(
        name=name,
        answered=len(replies),
        compared=len(pairs),
        pruned=len(pruned),
        agreement=_agreement(pairs),
        agreement_if_pruned=_agreement(pruned),
        answer_gap=_gap(whole),
        first_token_gap=_gap(firsts),
        why_first_token=dict(Counter(reasons).most_common()),
        costs=_costs(replies, pairs),
        outcomes=dict(Counter(chain.from_iterable(outcomes(one.answer.facts) for one in replies))),
        accuracy=_accuracy(asked, name),
        failures=dict(Counter(f.step for one in asked for f in one.failures if f.condition in (name, "all"))),
    )


def _agreement(pairs: Sequence[tuple[Reply, Reply]]) -> Agreement:
    texts = [(here.answer.text, there.answer.text) for here, there in pairs]
    tokens = [(here.answer.token_ids[:1], there.answer.token_ids[:1]) for here, there in pairs]
    return Agreement(
        share(here == there for here, there in texts),
        share(is_same(here, there) for here, there in texts),
        share(here == there for here, there in tokens if here and there),
    )


def _gap(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Gap | None:
    """Unpruned minus here."""
    gaps = [
        [before - after for after, before in zip(here, there, strict=True)] for here, there in pairs if here
    ]
    by_answer = spread(sum(gap) / len(gap) for gap in gaps)
    if by_answer is None:
        return None
    tokens = sum(map(len, gaps))
    return Gap(len(gaps), tokens, sum(map(sum, gaps)) / tokens, by_answer)


def _costs(replies: Sequence[Reply], pairs: Sequence[tuple[Reply, Reply]]) -> Costs:
    facts = [reply.answer.facts for reply in replies]
    return Costs(
        spread(one["tokens"] for one in facts),
        spread(one["tokens_after_plc"] for one in facts),
        spread(one["tokens_avg"] for one in facts),
        spread(reply.answer.prompt_tokens for reply in replies),
        spread(map(kv_tokens, replies)),
        spread(reply.answer.ttft_ms for reply in replies if reply.new_pictures),
        spread(reply.answer.ttft_ms for reply in replies if not reply.new_pictures),
        spread(
            here.answer.ttft_ms / there.answer.ttft_ms
            for here, there in pairs
            if not here.new_pictures and not there.new_pictures
        ),
        spread(one["localizer_ms"] for one in facts if one.get("localizer_ms") is not None),
    )


def kv_tokens(reply: Reply) -> float:
    """Tokens of the prompt that a layer keeps KV of, averaged over layers."""
    facts = reply.answer.facts
    return float(reply.answer.prompt_tokens - facts["tokens_after_plc"] + facts["tokens_avg"])


def outcomes(facts: Mapping[str, Any]) -> Iterable[str]:
    """Per image what the localizer did, or where its region came from."""
    if "images" not in facts:
        # The header has no room for so many images.
        return ["not told"] * int(facts.get("num_images", 0))
    return [
        image["localizer"]["outcome"]
        if "localizer" in image
        else _SOURCES.get(image["source"], str(image["source"]))
        for image in facts["images"]
    ]


def _accuracy(asked: Sequence[Asked], name: str) -> Accuracy | None:
    both = [
        (
            is_right(one.replies[name].answer.text, one.question.answers),
            is_right(one.replies[UNPRUNED.name].answer.text, one.question.answers),
        )
        for one in asked
        if one.question.answers and name in one.replies and UNPRUNED.name in one.replies
    ]
    if not both:
        return None
    return Accuracy(
        share(here for here, _ in both),
        share(there for _, there in both),
        sum(there and not here for here, there in both),
        sum(here and not there for here, there in both),
    )
