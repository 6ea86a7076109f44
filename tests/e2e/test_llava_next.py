# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a LLaVA-NeXT that is prepared to evict, asked through the `openai` client."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conftest import CheckpointOf
from tests.e2e.conftest import OPTIONS, serve
from tests.e2e.test_serve import FIRST, SECOND, chat, expected
from tests.families import LLAVA_NEXT
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.client import facts_of
from vllm_crop.measuring.server import Server
from vllm_crop.planning.budget import Method

pytestmark = pytest.mark.e2e

RATE = 0.667
CROP = {"method": "plc+ilp", "eviction_layers": [2], "pruning_rate": RATE}
METHODS: tuple[Method, ...] = ("off", "plc", "ilp", "plc+ilp")
WIDE, TALL = noise_image(90, 500, 400), noise_image(91, 300, 420)
TOKENS = [10 * 10 + 16 * 21, 10 * 10 + 20 * 15]


@pytest.fixture(scope="module")
def server(checkpoint_of: CheckpointOf, logs: Path) -> Iterator[Server]:
    checkpoint = checkpoint_of(LLAVA_NEXT, LLAVA_NEXT.deep)
    options = ("--crop-config", json.dumps(CROP))
    with serve(str(checkpoint), *options, *OPTIONS, log_path=logs / "llava_next.log") as running:
        yield running


@pytest.fixture(scope="module")
def hf(checkpoint_of: CheckpointOf) -> HfReference:
    return LLAVA_NEXT.reference(checkpoint_of(LLAVA_NEXT, LLAVA_NEXT.deep))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_about_images_of_two_shapes(server: Server, hf: HfReference, method: Method) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)
    crop = {"regions": [FIRST.as_lists(), SECOND.as_lists()], "method": method}
    response = chat(client, [WIDE, TALL], crop)
    facts = facts_of(response.headers)
    assert [image["tokens"] for image in facts["images"]] == TOKENS
    share = facts["tokens_avg"] / sum(TOKENS)
    assert share == pytest.approx(1 if method == "off" else 1 - RATE, abs=0.01)
    completion = response.parse()
    regions = [None, None] if method == "off" else [FIRST, SECOND]
    stages = (2,) if "ilp" in method else ()
    assert (completion.choices[0].message.content, completion.usage.prompt_tokens) == expected(
        hf, [WIDE, TALL], regions, RATE, method=method, eviction_layers=stages
    )
