# SPDX-License-Identifier: Apache-2.0
"""`crop` in a server without our middleware: honoured or refused, never ignored."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import MessageParam
from PIL import Image

from tests.e2e.conftest import ENVIRONMENT, MODEL
from tests.pictures import noise_image
from tests.tinyvqa import CHECKPOINT
from vllm_crop.client import data_url, question_about
from vllm_crop.measuring.server import HOST, free_port, stop_group, wait_until_ready

pytestmark = pytest.mark.e2e
SIDE, FULL = 256, 256  # pixels; visual tokens of a picture
HERE = [0.1, 0.1, 0.3, 0.3]


@pytest.fixture(scope="module")
def log_path(logs: Path) -> Path:
    return logs / "embedding.log"


@pytest.fixture(scope="module")
def client(log_path: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    crop = json.dumps({"crop": {"pruning_rate": 0.75, "limits": {"max_boxes_per_image": 2}}})
    command = [
        *(sys.executable, "-m", "tests.e2e.embedding_server", "--model", str(CHECKPOINT)),
        *("--host", HOST, "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "2048", "--additional-config", crop),
    ]
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_COHERE_API": "1"},
            start_new_session=True,
        )
    try:
        wait_until_ready(server, "the server", f"http://{HOST}:{port}/health", log_path, 300)
        yield openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="unused", max_retries=0)
    finally:
        stop_group(server)
    assert server.returncode == 0  # it has ended its engine itself


@pytest.mark.parametrize("parent", ["extra_body", "vllm_xargs"])
def test_where_nobody_looks_for_it_is_said(client: openai.OpenAI, parent: str) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"{parent}\.crop: nobody reads it there"):
        client.chat.completions.create(
            model=MODEL,
            messages=question_about(noise_image(3, SIDE, SIDE), "what is it?"),
            max_tokens=1,
            extra_body={parent: {"crop": "off"}},
        )


def prompt_tokens(client: openai.OpenAI, picture: Image.Image, crop: object = None) -> int:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=question_about(picture, "what is it?"),
        max_tokens=1,
        extra_body={} if crop is None else {"crop": crop},
    )
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_the_field_is_honoured_request_by_request(client: openai.OpenAI) -> None:
    """The same task answers all: what one request asks for is not the next one's."""
    picture = noise_image(1, SIDE, SIDE)
    whole = prompt_tokens(client, picture)
    for _ in range(2):
        assert whole - prompt_tokens(client, picture, {"regions": [HERE]}) == FULL - FULL // 4
        assert prompt_tokens(client, picture) == whole
    assert whole - prompt_tokens(client, picture, {"max_tokens": 9}) == FULL - 9
    assert prompt_tokens(client, picture, {"regions": [HERE], "method": "off"}) == whole


@pytest.mark.parametrize(
    ("crop", "words"),
    [
        ({"regions": [[2, 0, 0, 0]]}, r"crop\.regions.* four fractions"),
        ({"region": HERE}, r"crop\.region: unknown key"),
        ("whole", r"crop: must be an object"),
        ({"regions": [[HERE] * 3]}, r"at most 2 boxes per image"),
        ({"method": "ilp", "regions": [HERE]}, r"prepared to evict"),
        ({"regions": [HERE, HERE]}, r"one entry per image"),
    ],
)
def test_what_is_wrong_is_refused_and_the_next_request_served(
    client: openai.OpenAI, crop: object, words: str
) -> None:
    picture = noise_image(2, SIDE, SIDE)
    with pytest.raises(openai.BadRequestError, match=words):
        prompt_tokens(client, picture, crop)
    assert prompt_tokens(client, picture) > FULL


def messages(picture: Image.Image) -> list[MessageParam]:
    """The question as the messages API has it."""
    source: Any = {"type": "base64", "media_type": "image/png", "data": data_url(picture).partition(",")[2]}
    return [
        {
            "role": "user",
            "content": [{"type": "image", "source": source}, {"type": "text", "text": "what is it?"}],
        }
    ]


class Asked:
    """Other APIs of the same server: prompt tokens of a question about a picture."""

    def __init__(self, client: openai.OpenAI, early: str = "") -> None:
        self.base_url = str(client.base_url).removesuffix("/v1/") + early
        self.anthropic = anthropic.Anthropic(base_url=self.base_url, auth_token="unused", max_retries=0)

    def messages(self, picture: Image.Image, **fields: Any) -> int:
        answer = self.anthropic.messages.create(
            model=MODEL, max_tokens=1, messages=messages(picture), extra_body=fields
        )
        used = answer.usage
        new = (used.input_tokens, used.cache_creation_input_tokens)
        return sum(count or 0 for count in (*new, used.cache_read_input_tokens))

    def count_tokens(self, picture: Image.Image, **fields: Any) -> int:
        return self.anthropic.messages.count_tokens(
            model=MODEL, messages=messages(picture), extra_body=fields
        ).input_tokens

    def cohere(self, picture: Image.Image, **fields: Any) -> int:
        body = {"max_tokens": 1, "messages": question_about(picture, "what is it?"), **fields}
        return int(self._post("/cohere/v2/chat", body)["usage"]["tokens"]["input_tokens"])

    def tokenize(self, picture: Image.Image, **fields: Any) -> int:
        body = {"messages": question_about(picture, "what is it?"), **fields}
        return int(self._post("/tokenize", body)["count"])

    def _post(self, path: str, body: Any) -> Any:
        answer = httpx2.post(self.base_url + path, json={"model": MODEL, **body}, timeout=60)
        if answer.status_code == 400:
            raise ValueError(answer.text)
        return answer.raise_for_status().json()


@pytest.mark.parametrize("api", ["messages", "count_tokens", "cohere", "tokenize"])
def test_the_field_is_honoured_in_other_apis(client: openai.OpenAI, api: str) -> None:
    """vLLM makes a request of the chat completions API of them, and drops what it does not know."""
    asked, picture = getattr(Asked(client), api), noise_image(4, SIDE, SIDE)
    whole = asked(picture)
    assert whole - asked(picture, crop={"regions": [HERE]}) == FULL - FULL // 4
    assert asked(picture) == whole
    with pytest.raises((anthropic.BadRequestError, ValueError), match=r"crop\.region: unknown key"):
        asked(picture, crop={"region": HERE})
    with pytest.raises((anthropic.BadRequestError, ValueError), match=r"extra_body\.crop: nobody reads it"):
        asked(picture, extra_body={"crop": {"regions": [HERE]}})


def test_what_a_route_drops_is_said(client: openai.OpenAI, log_path: Path) -> None:
    """Its model was read before vLLM loaded its plugins: FastAPI keeps what it was."""
    picture = noise_image(5, SIDE, SIDE)
    early = Asked(client, early="/early")
    assert early.messages(picture, crop={"regions": [HERE]}) == early.messages(picture)
    said = "requests that this server reads as AnthropicMessagesRequest is dropped before anyone sees it"
    assert log_path.read_text().count(said) == 1
