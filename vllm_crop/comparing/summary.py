# SPDX-License-Identifier: Apache-2.0
"""From single answers to what a comparison says, each number with its n. Nothing is asked or printed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm_crop.comparing.answers import is_same
from vllm_crop.comparing.asking import Asked, Reply
from vllm_crop.comparing.conditions import UNPRUNED, Condition
from vllm_crop.comparing.coverage import area, covered
from vllm_crop.comparing.metrics import score
from vllm_crop.comparing.questions import Question
from vllm_crop.comparing.statistics import Mean, Share, Spread, grouped_mean, share, spread

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
class Scored:
    """Scores of the questions whose answers are known, from 0 to 1, that both conditions answered.

    Attributes:
        change: from the unpruned answer to this one, question by question.
    """

    score: Mean
    unpruned: Mean
    change: Mean


@dataclass(frozen=True)
class Found:
    """Where pruned questions were looked at, of which is known where their answer stands.

    Attributes:
        covered: the share of that place that was in the region.
        area: the share of the picture that the region was.
        whole: how many more were served whole, which covers everything.
    """

    covered: Mean | None
    area: Mean | None
    whole: int


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
        accuracy: where answers are right or wrong (metric "exact").
        scores: by metric, of the others.
        families: by the family that questions say they are of, each scored by its own metric.
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
    scores: dict[str, Scored]
    families: dict[str, Scored]
    found: Found | None
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
        scores=_by(asked, name, lambda question: None if question.metric == "exact" else question.metric),
        families=_by(asked, name, lambda question: question.family),
        found=_found(asked, name),
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
    both = [(here == 1, there == 1) for one, here, there in _scores(asked, name) if one.metric == "exact"]
    if not both:
        return None
    return Accuracy(
        share(here for here, _ in both),
        share(there for _, there in both),
        sum(there and not here for here, there in both),
        sum(here and not there for here, there in both),
    )


def _scores(asked: Sequence[Asked], name: str) -> Iterator[tuple[Question, float, float]]:
    """Each question whose answers are known, with the score of this condition and of the unpruned answer."""
    for one in asked:
        known = one.question
        if known.answers and name in one.replies and UNPRUNED.name in one.replies:
            here, there = (one.replies[which].answer.text for which in (name, UNPRUNED.name))
            yield (
                known,
                score(here, known.answers, known.metric),
                score(there, known.answers, known.metric),
            )


def _by(asked: Sequence[Asked], name: str, group_of: Callable[[Question], str | None]) -> dict[str, Scored]:
    grouped: dict[str, list[tuple[Question, float, float]]] = {}
    for scored in _scores(asked, name):
        if (group := group_of(scored[0])) is not None:
            grouped.setdefault(group, []).append(scored)
    return {group: _scored(each) for group, each in grouped.items()}


def _scored(each: Sequence[tuple[Question, float, float]]) -> Scored:
    clusters = [question.cluster for question, *_ in each]
    here, there = [one[1] for one in each], [one[2] for one in each]
    change = [ours - theirs for ours, theirs in zip(here, there, strict=True)]
    means = [grouped_mean(values, clusters) for values in (here, there, change)]
    assert all(means), "a group has a question"
    return Scored(*(mean for mean in means if mean is not None))


def _found(asked: Sequence[Asked], name: str) -> Found | None:
    """Of questions about one picture whose facts have its region."""
    known = [
        (one.question, one.replies[name])
        for one in asked
        if one.question.boxes and name in one.replies and len(one.replies[name].region_keys) == 1
    ]
    if not known:
        return None
    looked = [
        (question, reply.region_keys[0])
        for question, reply in known
        if reply.pruned and reply.region_keys[0] is not None
    ]
    clusters = [question.cluster for question, _ in looked]
    return Found(
        grouped_mean([covered(question.boxes, region) for question, region in looked], clusters),
        grouped_mean([area(region) for _, region in looked], clusters),
        len(known) - len(looked),
    )
