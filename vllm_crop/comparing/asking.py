# SPDX-License-Identifier: Apache-2.0
"""Asks one question under every condition, and scores the unpruned answer under each."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_crop.client import CropAnswer, CropClient
from vllm_crop.comparing.conditions import UNPRUNED, Condition, asking_order
from vllm_crop.comparing.questions import Question
from vllm_crop.comparing.scoring import Score, Scorer


class Stopped(Exception):
    """The run ends before this question is done."""


@dataclass(frozen=True)
class Failure:
    """A request that failed: under which condition, what it was for, and what the server or client says."""

    question: str
    condition: str
    step: str
    message: str


@dataclass(frozen=True)
class Reply:
    """What one condition made of a question.

    Attributes:
        new_pictures: whether no request of the run had shown its pictures before: the vision tower ran.
        score: of the unpruned answer; None if there is none.
    """

    answer: CropAnswer
    new_pictures: bool
    score: Score | None = None

    @property
    def pruned(self) -> bool:
        """Whether any visual token was taken away."""
        return bool(self.answer.facts) and self.answer.facts["tokens_avg"] < self.answer.facts["tokens"]

    @property
    def region_keys(self) -> list[Any]:
        """Per image the boxes it was pruned by; empty where the header had no room for them."""
        return [image.get("region") for image in self.answer.facts.get("images", ())]


@dataclass
class Asked:
    """A question with what became of it.

    Attributes:
        replies: by the condition's name; those that failed are not in it.
    """

    question: Question
    replies: dict[str, Reply] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


@dataclass
class SeenPictures:
    """Which pictures the run has shown to the server; for several threads."""

    _keys: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def are_new(self, keys: Sequence[str]) -> bool:
        """Whether any of them has not been shown; from now on all have."""
        with self._lock:
            new = not self._keys.issuperset(keys)
            self._keys.update(keys)
            return new


@dataclass(frozen=True)
class Asker:
    """How the questions of one run are asked.

    Attributes:
        run: part of every `cache_salt`, so that no request finds the region or the KV blocks of another one.
        seed: of the order of the conditions.
        stopped: tells that the run ends.
    """

    client: CropClient
    conditions: Sequence[Condition]
    max_tokens: int
    run: str
    seed: int
    seen: SeenPictures
    stopped: Callable[[], bool]

    def ask(self, question: Question, index: int) -> Asked:
        """Ask under all conditions in turn, then score.

        Raises:
            Stopped: the run ends; the question is not to be counted.
        """
        asked = Asked(question)
        try:
            messages = question.to_send()
        except OSError as error:
            asked.failures.append(Failure(question.name, "all", "picture", str(error)))
            return asked
        for condition in asking_order(self.conditions, self.seed, index):
            self._attempt(asked, condition, "answer", self._answer, messages, index)
        if (unpruned := asked.replies.get(UNPRUNED.name)) is not None:
            scorer = Scorer(self.client, messages, unpruned.answer, question.body)
            for condition in self.conditions:
                if condition.name in asked.replies:
                    self._attempt(asked, condition, "score", self._score, scorer, index)
        return asked

    def _attempt(
        self, asked: Asked, condition: Condition, step: str, do: Callable[..., None], *args: Any
    ) -> None:
        """Note what fails, and go on."""
        if self.stopped():
            raise Stopped
        try:
            do(asked, condition, *args)
        # Whatever a server sends, or ceases to send in the middle of an answer, is that request's failure.
        except Exception as error:
            if self.stopped():
                raise Stopped from None
            said = str(getattr(error, "message", None) or error)
            message = f"{type(error).__name__}: {said}"
            asked.failures.append(Failure(asked.question.name, condition.name, step, message))

    def _answer(self, asked: Asked, condition: Condition, messages: Sequence[Any], index: int) -> None:
        question = asked.question
        new = self.seen.are_new(question.picture_keys())
        answer = self.client.ask_messages(
            messages,
            condition.field_for(question.crop),
            extra_body={
                **question.body,
                "return_token_ids": True,
                "cache_salt": self._salt(condition, index),
            },
            max_tokens=self.max_tokens,
        )
        if not answer.facts:
            raise ValueError("the answer has no x-crop-facts: nothing is known of its tokens")
        asked.replies[condition.name] = Reply(answer, new)

    def _score(self, asked: Asked, condition: Condition, scorer: Scorer, index: int) -> None:
        reply = asked.replies[condition.name]
        field_ = condition.field_for(asked.question.crop)
        score = scorer.score(reply.answer, field_, self._salt(condition, index))
        asked.replies[condition.name] = Reply(reply.answer, reply.new_pictures, score)

    def _salt(self, condition: Condition, index: int) -> str:
        return f"compare-{self.run}-{index}-{condition.name}"


def served_as(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How a server says that it prunes: method, rate, compression, eviction layers."""
    return {
        name: facts[name]
        for name in ("method", "pruning_rate", "compression", "eviction_layers")
        if name in facts
    }
