# SPDX-License-Identifier: Apache-2.0
"""Budgets as clients set them, in their own arithmetic: prompts cost what they say."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.e2e.conftest import MODEL, metric, serve
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.client import data_url, facts_of
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

SIDE, TOKEN = 256, 16  # pixels of a picture and of a visual token
FULL = (SIDE // TOKEN) ** 2
LONGEST, BLOCK = 2048, 32
LOW = 50
HISTORY = {"keep": 2, "max_tokens": 40, "stride": 4}
CROP = {"pruning_rate": 0.75, "detail_low_tokens": LOW, "fit_floor": 16}
HERE = [0.1, 0.1, 0.3, 0.3]


def square(most: int) -> int:
    """Visual tokens of a square picture that costs `most` at most, and may become a quarter wider."""
    sides = range(1, SIDE // TOKEN + 1)
    near = [(rows, cols) for rows in sides for cols in sides if 0.8 <= rows / cols <= 1.25]
    return max(rows * cols for rows, cols in near if rows * cols <= most)


@pytest.fixture(scope="module")
def budget_server(logs: Path) -> Iterator[Server]:
    options = (
        *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--block-size", "32"),
        *("--max-model-len", str(LONGEST), "--max-num-batched-tokens", "4096"),
        *("--limit-mm-per-prompt", '{"image": 64}', "--enable-prompt-tokens-details"),
    )
    crop = ("--plugin", "crop", "--crop-config", json.dumps(CROP))
    with serve(str(CHECKPOINT), *crop, *options, log_path=logs / "budgets.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(budget_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{budget_server.base_url}/v1", api_key="unused", max_retries=0)


def picture(seed: int) -> Image.Image:
    return noise_image(seed, SIDE, SIDE)


def image(seed: int, detail: str | None = None) -> dict[str, Any]:
    url = {"url": data_url(picture(seed))}
    return {"type": "image_url", "image_url": url if detail is None else {**url, "detail": detail}}


def user(*parts: dict[str, Any], text: str = "what is it?") -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def asked(
    client: openai.OpenAI, messages: Sequence[Any], crop: Any = None, max_tokens: int = 2
) -> tuple[Any, dict[str, Any]]:
    """The usage, and the facts of an answer."""
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=list(messages),
        max_tokens=max_tokens,
        temperature=0,
        extra_body={} if crop is None else {"crop": crop},
    )
    usage = answer.parse().usage
    assert usage is not None
    return usage, facts_of(answer.headers) or {}


def visual(
    client: openai.OpenAI, messages: Sequence[Any], crop: Any = None
) -> tuple[list[int], dict[str, Any]]:
    """What each image costs, by the facts; their sum is checked against the prompt's length."""
    usage, facts = asked(client, messages, crop)
    counts = [one["tokens_after_plc"] for one in facts["images"]]
    without = [{**one, "content": _texts(one["content"])} for one in messages]
    text, _ = asked(client, without)
    frames = 2 * sum(count > 0 for count in counts)  # <|vision_start|> and <|vision_end|>
    assert usage.prompt_tokens == text.prompt_tokens + frames + sum(counts)
    return counts, facts


def _texts(content: Any) -> Any:
    return content if isinstance(content, str) else [part for part in content if part["type"] == "text"]


def test_detail_is_what_an_image_costs(client: openai.OpenAI) -> None:
    counts, facts = visual(client, [user(image(1, "low"), image(2, "high"), image(3, "auto"), image(4))])
    assert counts == [square(LOW), FULL, FULL, FULL]
    assert [one.get("by") for one in facts["images"]] == ["detail", "detail", None, None]
    # Seen small: the vision tower made no more of it than the prompt has.
    assert facts["images"][0]["tower_tokens"] == square(LOW)


def test_crop_wins_over_detail(client: openai.OpenAI) -> None:
    low, high = image(5, "low"), image(6, "high")
    counts, _ = visual(client, [user(low, high)], {"max_tokens": 30})
    assert counts == [square(30)] * 2
    counts, _ = visual(client, [user(low, high)], {"regions": [HERE, None]})
    assert counts == [FULL // 4, FULL]
    counts, _ = visual(client, [user(low, high)], {"method": "off"})
    assert counts == [FULL, FULL]
    counts, facts = visual(client, [user(low, high)], {"max_tokens": [None, 0], "rim": 0})
    assert counts == [square(LOW), 0], "null says nothing of the first"
    assert facts["images"][1] == {
        **{"tokens": FULL, "tokens_after_plc": 0, "tokens_avg": 0.0, "region": None, "source": "none"},
        **{"by": "max_tokens", "max_tokens": 0},
    }


def test_an_image_that_is_not_seen_says_nothing(client: openai.OpenAI) -> None:
    """Its pixels change nothing, and the answer is that without it."""

    def logprobs(*images: dict[str, Any], crop: Any = None) -> Any:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[user(*images)],  # type: ignore[list-item]
            max_tokens=4,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
            extra_body={} if crop is None else {"crop": crop},
        )
        return answer.choices[0].logprobs

    kept = image(8)
    assert logprobs(image(7), kept, crop={"max_tokens": [0, 20]}) == logprobs(kept, crop={"max_tokens": 20})
    assert logprobs(image(7), crop={"max_tokens": 0}) == logprobs()
    assert logprobs(image(7)) != logprobs()


def test_responses_have_details_too(client: openai.OpenAI) -> None:
    def prompt_tokens(**detail: Any) -> int:
        part = {"type": "input_image", "image_url": data_url(picture(9)), **detail}
        text = {"type": "input_text", "text": "what is it?"}
        answer = client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": [part, text]}],  # type: ignore[list-item, misc]
            max_output_tokens=2,
        )
        assert answer.usage is not None
        return answer.usage.input_tokens

    whole = prompt_tokens(detail="high")
    assert prompt_tokens() == whole
    assert prompt_tokens(detail="low") == whole - FULL + square(LOW)


def conversation(turns: int) -> list[dict[str, Any]]:
    """A screenshot a turn."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append(user(image(100 + turn), text=f"what number is on step {turn}?"))
        messages.append({"role": "assistant", "content": "7"})
    return messages[:-1]


def test_twenty_turns_keep_the_prefix_cache(client: openai.OpenAI) -> None:
    """Old screenshots cost little, and only every fourth turn changes what was said before."""
    for turn in range(1, 21):
        messages = conversation(turn)
        usage, facts = asked(client, messages, {"history": HISTORY})
        old = max(0, turn - 2) // 4 * 4
        counts = [square(40)] * old + [FULL] * (turn - old)
        assert [one["tokens_after_plc"] for one in facts["images"]] == counts
        assert [one.get("by") for one in facts["images"]] == ["history"] * old + [None] * (turn - old)
        cached = usage.prompt_tokens_details.cached_tokens
        if turn > 1:
            changed = turn > 2 and (turn - 2) % 4 == 0
            # All of the turn before but its last block; where more has grown old, what was old already.
            stays = old - 4 if changed else turn - 1
            least = sum((counts if not changed else [square(40)] * old)[:stays])
            assert cached >= least - BLOCK, (turn, cached, least)
            assert not changed or cached < least + FULL
        again, _ = asked(client, messages, {"history": HISTORY})  # a retry
        assert again.prompt_tokens == usage.prompt_tokens
        assert again.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - BLOCK
    with pytest.raises(openai.BadRequestError):
        asked(client, conversation(20))


def test_sixty_images_are_brought_to_fit(client: openai.OpenAI) -> None:
    """Those of the last message give way last, and the answer has room."""
    old = [user(*(image(200 + index) for index in range(40))), {"role": "assistant", "content": "7"}]
    messages = [*old, user(*(image(300 + index) for index in range(20)))]
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, messages)
    assert str(LONGEST) in str(refused.value)
    usage, facts = asked(client, messages, {"fit": "prune"}, max_tokens=100)
    # Squares of whole tokens: a little of the room is left over.
    assert 0.85 * (LONGEST - 100) < usage.prompt_tokens <= LONGEST - 100
    assert (facts["num_images"], facts["tokens"]) == (60, 60 * FULL)  # too many for a header
    assert 60 * 16 < facts["tokens_after_plc"] < usage.prompt_tokens
    usage, facts = asked(client, messages[:1], {"fit": "prune"})
    old_ones = facts["tokens_after_plc"]
    assert old_ones > 40 * 16  # alone they had more room
    # An answer that leaves too little for the images gets what vLLM would leave it.
    usage, _ = asked(client, messages, {"fit": "prune"}, max_tokens=1100)
    assert LONGEST - 1100 < usage.prompt_tokens < LONGEST
    long = [*messages, {"role": "assistant", "content": "7"}, user(text="x " * 1100)]
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, long, {"fit": "prune"})
    assert "at least 960 visual tokens" in str(refused.value)
    assert refused.value.param == "crop.fit"  # type: ignore[attr-defined]


def test_regions_give_way_last(client: openai.OpenAI) -> None:
    messages = [user(*(image(400 + index) for index in range(12)))]
    regions = [HERE] + [None] * 11
    counts, facts = visual(client, messages, {"fit": "prune", "regions": regions})
    inside = math.ceil(0.3 * SIDE / TOKEN) - math.floor(0.1 * SIDE / TOKEN)
    assert counts[0] >= min(inside**2, FULL // 4)
    assert [one["by"] for one in facts["images"][1:]] == ["fit"] * 11


@pytest.mark.parametrize(
    ("crop", "param"),
    [
        ({"max_tokens": [1, 2]}, "crop.max_tokens"),
        ({"max_tokens": "many"}, "crop.max_tokens"),
        ({"history": {"keep": 1, "max_tokens": 1, "of": 1}}, "crop.history"),
        ({"fit": "maybe"}, "crop.fit"),
        ({"max_tokens": 5, "pruning_rate": 0.5}, "crop"),
    ],
)
def test_what_cannot_be_meant_is_refused(client: openai.OpenAI, crop: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, [user(image(500))], crop)
    assert refused.value.param == param  # type: ignore[attr-defined]


def test_metrics_say_who_saved(client: openai.OpenAI, budget_server: Server) -> None:
    def saved(reason: str) -> float:
        return metric(budget_server, "crop:visual_tokens_saved_total", model_name=MODEL, reason=reason)

    before = {reason: saved(reason) for reason in ("detail", "max_tokens", "region", "fit", "history")}
    visual(client, [user(image(600, "low"))])
    visual(client, [user(image(601))], {"max_tokens": 0})
    visual(client, [user(image(602))], {"regions": [HERE]})
    assert saved("detail") - before["detail"] == FULL - square(LOW)
    assert saved("max_tokens") - before["max_tokens"] == FULL
    assert saved("region") - before["region"] == FULL - FULL // 4
    assert saved("fit") == before["fit"]
