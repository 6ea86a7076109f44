# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --plugin crop` through the `openai` and `anthropic` clients."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import API_KEY, MODEL, metric
from tests.pictures import noise_image
from tests.reference import HfLlava, HfReference
from vllm_crop.client import data_url, facts_of
from vllm_crop.measuring.server import Server, get_text
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import Compression

pytestmark = pytest.mark.e2e

STEPS = 8
RATE = 0.8333
FIRST = Region.from_grid_cells(1, 1, 2, 2)
SECOND = Region.from_grid_cells(5, 4, 6, 6)
SQUARE, WIDE = noise_image(70), noise_image(71, 450, 336)
TEXT = "What is it?"
EVERY_TOKEN = {"ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=API_KEY, max_retries=0)


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> HfLlava:
    return HfLlava(checkpoint)


def expected(
    hf: HfReference,
    images: Sequence[Image.Image],
    regions: Sequence[Region | None],
    rate: float = RATE,
    compression: Compression = "pool",
    method: Method = "plc",
    eviction_layers: tuple[int, ...] = (),
) -> tuple[str, int]:
    """What transformers answers from the same embeddings, layer by layer, and the prompt's length."""
    plans = [
        hf.plan(image, region, rate, compression, method, eviction_layers)
        for image, region in zip(images, regions, strict=True)
    ]
    tokenizer = hf.processor.tokenizer
    prompt = "USER: " + f"{hf.image}\n" * len(images) + TEXT + "\nASSISTANT:"
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    reference = hf.generate(ids, images, plans, STEPS)
    return tokenizer.decode(reference.token_ids), reference.num_prompt_tokens


def messages(*images: Image.Image) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": TEXT}]}]


def chat(client: openai.OpenAI, images: list[Image.Image], crop: Any = None, **options: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=messages(*images),
        max_tokens=STEPS,
        temperature=0,
        extra_body={**EVERY_TOKEN, **({} if crop is None else {"crop": crop})},
        **options,
    )


def test_without_the_field_the_image_is_served_whole(client: openai.OpenAI, hf: HfLlava) -> None:
    response = chat(client, [SQUARE])
    text, num_prompt_tokens = expected(hf, [SQUARE], [None])
    completion = response.parse()
    assert completion.choices[0].message.content == text
    assert completion.usage.prompt_tokens == num_prompt_tokens
    assert facts_of(response.headers)["images"][0]["source"] == "none"


def test_a_region_shortens_the_prompt_and_is_reported(client: openai.OpenAI, hf: HfLlava) -> None:
    response = chat(client, [SQUARE], {"regions": FIRST.as_lists()})
    text, num_prompt_tokens = expected(hf, [SQUARE], [FIRST])
    completion = response.parse()
    assert completion.choices[0].message.content == text
    assert completion.usage.prompt_tokens == num_prompt_tokens
    assert completion.usage.prompt_tokens_details.multimodal_tokens == {"image": 96}
    facts = facts_of(response.headers)
    assert facts["tokens"] == 576
    assert facts["tokens_after_plc"] == 96
    assert facts["images"] == [
        {
            "tokens": 576,
            "tokens_after_plc": 96,
            "tokens_avg": 96.0,
            "region": FIRST.as_lists(),
            "source": "request",
        }
    ]


def test_streaming_gives_the_same_answer_and_header(client: openai.OpenAI, hf: HfLlava) -> None:
    text, _ = expected(hf, [WIDE], [SECOND])
    response = chat(client, [WIDE], {"regions": SECOND.as_lists()}, stream=True)
    assert facts_of(response.headers)["tokens_after_plc"] == 96
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in response.parse() if chunk.choices)
    assert streamed == text


@pytest.mark.parametrize(
    "regions", [[FIRST, SECOND], [SECOND, FIRST], [None, FIRST]], ids=["1 2", "2 1", "none 1"]
)
def test_the_same_image_twice_with_two_regions(
    client: openai.OpenAI, hf: HfLlava, regions: list[Region | None]
) -> None:
    images = [SQUARE, SQUARE]
    response = chat(client, images, {"regions": [region and region.as_lists() for region in regions]})
    text, num_prompt_tokens = expected(hf, images, regions)
    completion = response.parse()
    assert completion.usage.prompt_tokens == num_prompt_tokens
    assert completion.choices[0].message.content == text


def test_many_at_once_never_mix_regions(client: openai.OpenAI, hf: HfLlava) -> None:
    cases = [([image], [region]) for image in (SQUARE, WIDE) for region in (FIRST, SECOND, None)] * 4
    wanted = [expected(hf, images, regions) for images, regions in cases[:6]] * 4

    def ask(case: tuple[list[Image.Image], list[Region | None]]) -> tuple[str, int]:
        images, regions = case
        crop = {"regions": [region and region.as_lists() for region in regions]}
        completion = chat(client, images, crop).parse()
        return completion.choices[0].message.content, completion.usage.prompt_tokens

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, cases)) == wanted


def test_responses_api(client: openai.OpenAI, hf: HfLlava) -> None:
    content = [
        {"type": "input_image", "image_url": data_url(SQUARE), "detail": "auto"},
        {"type": "input_text", "text": TEXT},
    ]
    response = client.responses.with_raw_response.create(
        model=MODEL,
        input=[{"role": "user", "content": content}],
        max_output_tokens=STEPS,
        temperature=0,
        extra_body={**EVERY_TOKEN, "crop": {"regions": FIRST.as_lists()}},
    )
    text, num_prompt_tokens = expected(hf, [SQUARE], [FIRST])
    parsed = response.parse()
    assert parsed.usage.input_tokens == num_prompt_tokens
    assert parsed.output_text == text
    assert facts_of(response.headers)["tokens_after_plc"] == 96


def test_messages_api(server: Server, hf: HfLlava) -> None:
    client = anthropic.Anthropic(base_url=server.base_url, auth_token=API_KEY, max_retries=0)
    source = {"type": "base64", "media_type": "image/png", "data": data_url(SQUARE).partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": TEXT}]

    def ask(crop: Any) -> Any:
        return client.messages.with_raw_response.create(
            model=MODEL,
            max_tokens=STEPS,
            messages=[{"role": "user", "content": content}],
            extra_body={"temperature": 0, "crop": crop},
        )

    response = ask({"regions": FIRST.as_lists()})
    _, num_prompt_tokens = expected(hf, [SQUARE], [FIRST])
    usage = response.parse().usage
    assert usage.input_tokens + usage.cache_read_input_tokens == num_prompt_tokens
    assert facts_of(response.headers)["tokens_after_plc"] == 96
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask({"regions": 7})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "crop.regions" in caught.value.body["error"]["message"]


def test_tokenize_counts_the_pruned_prompt_and_not_the_metrics(
    server: Server, client: openai.OpenAI, hf: HfLlava
) -> None:
    before = metric(server, "crop:requests_total")
    body = {"model": MODEL, "messages": messages(SQUARE), "crop": {"regions": FIRST.as_lists()}}
    answer = client.post(f"{server.base_url}/tokenize", body=body, cast_to=object)
    assert answer["count"] == expected(hf, [SQUARE], [FIRST])[1]  # type: ignore[index]
    assert metric(server, "crop:requests_total") == before


def nested(depth: int) -> Any:
    value: Any = 0.5
    for _ in range(depth):
        value = [value]
    return value


MALFORMED: dict[str, tuple[Any, str]] = {
    "a number": (5, "crop"),
    "a string": ("whole", "crop"),
    "a list": ([[0, 0, 1, 1]], "crop"),
    "true": (True, "crop"),
    "unknown key": ({"region": [0, 0, 1, 1]}, "crop.region"),
    "two unknown keys": ({"boxes": 1, "x": 2}, "crop.boxes"),
    "a key of another type": ({"": 1}, "crop."),
    "regions a number": ({"regions": 3}, "crop.regions"),
    "regions a string": ({"regions": "all"}, "crop.regions"),
    "regions an object": ({"regions": {"0": [0, 0, 1, 1]}}, "crop.regions"),
    "no region": ({"regions": []}, "crop.regions"),
    "two regions for one image": ({"regions": [[0, 0, 1, 1], None]}, "crop.regions"),
    "a thousand regions": ({"regions": [None] * 1000}, "crop.regions"),
    "a million regions": ({"regions": [None] * 1_000_000}, "crop: longer than 256 KiB"),
    "three numbers": ({"regions": [[0, 0, 1]]}, "crop.regions[0]"),
    "five numbers": ({"regions": [[0, 0, 1, 1, 1]]}, "crop.regions[0]"),
    "an empty box": ({"regions": [[]]}, "crop.regions[0]"),
    "x0 = x1": ({"regions": [[0.5, 0, 0.5, 1]]}, "crop.regions[0]"),
    "x0 > x1": ({"regions": [[0.6, 0, 0.5, 1]]}, "crop.regions[0]"),
    "negative": ({"regions": [[-0.1, 0, 0.5, 1]]}, "crop.regions[0]"),
    "beyond 1": ({"regions": [[0, 0, 1.001, 1]]}, "crop.regions[0]"),
    "pixels": ({"regions": [[10, 20, 110, 220]]}, "crop.regions[0]"),
    "bools": ({"regions": [[False, False, True, True]]}, "crop.regions[0]"),
    "strings": ({"regions": [["0", "0", "1", "1"]]}, "crop.regions[0]"),
    "nulls": ({"regions": [[None, None, None, None]]}, "crop.regions[0]"),
    "NaN": ({"regions": [[float("nan"), 0, 1, 1]]}, "crop.regions[0]"),
    "infinity": ({"regions": [[0, 0, float("inf"), 1]]}, "crop.regions[0]"),
    "a huge integer": ({"regions": [[0, 0, 10**400, 1]]}, "crop.regions[0]"),
    "a box among boxes is wrong": ({"regions": [[[0, 0, 1, 1], [0, 0]]]}, "crop.regions[0]"),
    "boxes mixed with numbers": ({"regions": [[[0, 0, 1, 1], 0.5]]}, "crop.regions[0]"),
    "too many boxes": ({"regions": [[[0, 0, 1, 1]] * 17]}, "crop.regions[0]"),
    "a hundred thousand boxes": ({"regions": [[[0, 0, 1, 1]] * 100_000]}, "crop: longer than 256 KiB"),
    "nested 50 deep": ({"regions": nested(50)}, "crop.regions"),
    "nested 100000 deep": (nested(100_000), "crop"),
    "an object for a box": ({"regions": [{"x0": 0, "y0": 0, "x1": 1, "y1": 1}]}, "crop.regions[0]"),
    "a megabyte of text": ({"regions": "x" * 1_000_000}, "crop: longer than 256 KiB"),
    "a megabyte of key": ({"x" * 1_000_000: 1}, "crop: longer than 256 KiB"),
    "rate a string": ({"pruning_rate": "0.5"}, "crop.pruning_rate"),
    "rate a bool": ({"pruning_rate": True}, "crop.pruning_rate"),
    "rate 1": ({"pruning_rate": 1}, "crop.pruning_rate"),
    "rate negative": ({"pruning_rate": -0.01}, "crop.pruning_rate"),
    "rate NaN": ({"pruning_rate": float("nan")}, "crop.pruning_rate"),
    "rate beyond the server's limit": ({"pruning_rate": 0.995}, "crop.pruning_rate"),
    "rate a list": ({"pruning_rate": [0.5]}, "crop.pruning_rate"),
    "method unknown": ({"method": "fast"}, "crop.method"),
    "method the server is not prepared for": ({"method": "ilp"}, "crop.method"),
    "method a number": ({"method": 1}, "crop.method"),
    "server settings": ({"compression": "prune"}, "crop.compression"),
}


def to_json(value: Any) -> str:
    """json.dumps that can write what is nested too deeply for it."""
    if isinstance(value, list) and len(value) == 1:
        depth, inner = 0, value
        while isinstance(inner, list) and len(inner) == 1:
            depth, inner = depth + 1, inner[0]
        return "[" * depth + json.dumps(inner) + "]" * depth
    return json.dumps(value)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_crop_is_a_400_that_names_the_field(
    server: Server, client: openai.OpenAI, name: str
) -> None:
    value, field = MALFORMED[name]
    body = f'{{"model": "{MODEL}", "max_tokens": 1, "messages": {json.dumps(messages(SQUARE))}, '
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(
            "/chat/completions",
            content=(body + f'"crop": {to_json(value)}}}').encode(),
            options={"headers": {"Content-Type": "application/json"}},
            cast_to=object,
        )
    error = caught.value.body
    assert error["code"] == 400  # type: ignore[index]
    assert field in error["message"]  # type: ignore[index]
    assert len(error["message"]) < 1000  # type: ignore[index]
    get_text(f"{server.base_url}/health")


def test_the_server_answers_right_after_all_that(client: openai.OpenAI, hf: HfLlava) -> None:
    completion = chat(client, [SQUARE], {"regions": FIRST.as_lists()}).parse()
    assert completion.choices[0].message.content == expected(hf, [SQUARE], [FIRST])[0]


@pytest.mark.parametrize("crop", [{"regions": 5}, {"regions": [[0, 0, 1, 1]]}], ids=["malformed", "valid"])
def test_without_a_key_nothing_is_read(server: Server, crop: Any) -> None:
    stranger = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        chat(stranger, [SQUARE], crop)


def wait_for_running(server: Server, count: int) -> None:
    deadline = time.monotonic() + 5
    while (running := metric(server, "vllm:num_requests_running")) != count:
        assert time.monotonic() < deadline, f"{running} requests run, not {count}"
        time.sleep(0.02)


def test_a_client_that_goes_away_frees_the_engine(server: Server, client: openai.OpenAI, hf: HfLlava) -> None:
    response = client.chat.completions.create(
        model=MODEL,
        messages=messages(SQUARE),
        max_tokens=1500,
        stream=True,
        extra_body={**EVERY_TOKEN, "crop": {"regions": FIRST.as_lists()}},
    )
    next(iter(response))
    wait_for_running(server, 1)  # the first chunk comes before vLLM has counted the request
    response.close()
    wait_for_running(server, 0)
    completion = chat(client, [SQUARE], {"regions": SECOND.as_lists()}).parse()
    assert completion.choices[0].message.content == expected(hf, [SQUARE], [SECOND])[0]


def test_a_region_without_an_image_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"crop\.regions"):
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            extra_body={"crop": {"regions": [[0, 0, 1, 1]]}},
        )


def test_processor_kwargs_stay_closed_to_clients(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
        client.chat.completions.create(
            model=MODEL,
            messages=messages(SQUARE),
            extra_body={"mm_processor_kwargs": {"crop": {"regions": [[0, 0, 1, 1]]}}},
        )
