# SPDX-License-Identifier: Apache-2.0
"""How likely the model finds the unpruned answer when its visual tokens are pruned.

Two ways, both with the answer's own token ids, and a report says which was used:

* the whole answer, "teacher forcing": the answer is the beginning of the assistant's message
  (`continue_final_message`), and vLLM gives the log-probability of each token of the prompt
  (`prompt_logprobs`). It counts only where the prompt is the one that was asked, followed by the very tokens
  that were answered: chat templates and tokenizers may write them differently.
* the first token: `logprob_token_ids` names it, so it needs not be among the likeliest. Where visual tokens
  are evicted (`prompt_logprobs` reads positions that later layers do not have), or the first way fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_crop.client import CropAnswer, CropClient, facts_of
from vllm_crop.planning.budget import method_evicts


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the first tokens of an answer, in nats.

    Attributes:
        whole: whether they are all of it.
        why_not: why they are not.
    """

    logprobs: tuple[float, ...]
    whole: bool
    why_not: str = ""


class _NotForcedError(ValueError):
    """The whole answer cannot be scored, for this reason."""


@dataclass(frozen=True)
class Scorer:
    """Scores the unpruned answer to one question.

    Attributes:
        messages: of the question.
        answer: the unpruned one, with token ids.
        body: further keys of every request.
    """

    client: CropClient
    messages: Sequence[Any]
    answer: CropAnswer
    body: Mapping[str, Any]

    def score(self, asked: CropAnswer, crop: Mapping[str, Any], salt: str) -> Score | None:
        """Score the answer under a condition; None if it has no token, or the server says nothing of it.

        Args:
            asked: what the condition's own request got: its prompt and facts are to be met again.
            crop: that request's field.
            salt: that request's `cache_salt`: the region it found is used again.
        """
        if not self.answer.token_ids:
            return None
        try:
            return Score(self._forced(asked, crop, salt), whole=True)
        except _NotForcedError as reason:
            first = self._first(asked, crop, salt)
            return None if first is None else Score((first,), False, str(reason))

    def _forced(self, asked: CropAnswer, crop: Mapping[str, Any], salt: str) -> tuple[float, ...]:
        from openai import BadRequestError

        method = asked.facts.get("method", "off")
        if method != "off" and method_evicts(method):
            raise _NotForcedError("visual tokens are evicted")
        if not self.answer.text:
            raise _NotForcedError("the answer is empty")
        forced = {
            "continue_final_message": True,
            "add_generation_prompt": False,
            "prompt_logprobs": 0,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        messages = [*self.messages, {"role": "assistant", "content": self.answer.text}]
        try:
            response = self.client.send_messages(messages, crop, {**self.body, **forced}, max_tokens=1)
        except BadRequestError as error:
            raise _NotForcedError(f"refused: {error.message}") from None
        parsed = response.parse()
        token_ids = answer_tokens(parsed.prompt_token_ids, asked.prompt_token_ids, self.answer.token_ids)
        facts = facts_of(response.headers) or {}
        if facts.get("tokens_avg") != asked.facts.get("tokens_avg"):
            raise _NotForcedError("it was pruned differently")
        places = parsed.prompt_logprobs[-len(token_ids) :]
        return tuple(
            float(place[str(token)]["logprob"]) for place, token in zip(places, token_ids, strict=True)
        )

    def _first(self, asked: CropAnswer, crop: Mapping[str, Any], salt: str) -> float | None:
        token_id = self.answer.token_ids[0]
        named = {
            "logprob_token_ids": [token_id],
            "return_tokens_as_token_ids": True,
            "cache_salt": salt,
        }
        response = self.client.send_messages(
            self.messages, crop, {**self.body, **named}, max_tokens=1, logprobs=True
        )
        facts = facts_of(response.headers) or {}
        if facts.get("tokens_avg") != asked.facts.get("tokens_avg"):
            return None  # pruned differently: the log-probability of another prompt
        (place, *_) = response.parse().choices[0].logprobs.content
        found = {one.token: one.logprob for one in (place, *place.top_logprobs)}
        return found.get(f"token_id:{token_id}")


def answer_tokens(forced: Sequence[int], prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, ...]:
    """The answer's tokens in a prompt that it was appended to.

    Args:
        forced: token ids of that prompt.
        prompt: those of the prompt the answer was given to.
        answer: those of the answer; the last one may end it, and is then in no prompt.

    Raises:
        _NotForcedError: it is not this prompt, or not followed by these tokens.
    """
    if list(forced[: len(prompt)]) != list(prompt):
        raise _NotForcedError("the chat template writes the question differently before an answer")
    tail = tuple(forced[len(prompt) :])
    if not tail or tail not in (tuple(answer), tuple(answer[:-1])):
        raise _NotForcedError("the answer's text is written with other tokens than the model chose")
    return tail
