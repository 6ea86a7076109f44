# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of each family, prepared to evict, asked through the `openai` client."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.conftest import FAMILY_CROP, compression_of, metric
from tests.e2e.test_serve import FIRST, SECOND, chat, expected
from tests.families import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, Family
from tests.pictures import noise_image
from tests.reference import HfReference
from vllm_crop.client import facts_of
from vllm_crop.measuring.server import Server
from vllm_crop.planning.budget import Method

pytestmark = pytest.mark.e2e

RATE: Any = FAMILY_CROP["pruning_rate"]
METHODS: tuple[Method, ...] = ("off", "plc", "ilp", "plc+ilp")
WIDE, TALL = noise_image(80, 500, 400), noise_image(81, 300, 420)
TOKENS = {
    LLAVA: [24 * 24] * 2,
    LLAVA_NEXT: [10 * 10 + 16 * 21, 10 * 10 + 20 * 15],
    LLAVA_ONEVISION: [347, 201],
    QWEN2_5_VL: [18 * 14, 11 * 15],
    QWEN3_VL: [16 * 12, 9 * 13],
}


@pytest.fixture(scope="module")
def client(family_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{family_server.base_url}/v1", api_key="unused", max_retries=0)


def test_all_methods_at_once_about_images_of_two_sizes(
    family: Family, client: openai.OpenAI, family_hf: HfReference, family_server: Server
) -> None:
    def ask(method: Method) -> tuple[str, int]:
        crop = {"regions": [FIRST.as_lists(), SECOND.as_lists()], "method": method}
        response = chat(client, [WIDE, TALL], crop)
        facts = facts_of(response.headers)
        assert [image["tokens"] for image in facts["images"]] == TOKENS[family]
        share = facts["tokens_avg"] / sum(TOKENS[family])
        assert share == pytest.approx(1 if method == "off" else 1 - RATE, abs=0.01)
        foveated = compression_of(family) == "foveate" and "plc" in method
        assert any("pieces" in image for image in facts["images"]) == foveated
        completion = response.parse()
        return completion.choices[0].message.content, completion.usage.prompt_tokens

    with ThreadPoolExecutor(len(METHODS)) as pool:
        answers = list(pool.map(ask, METHODS))
    seen = metric(family_server, "crop:tower_tokens_total")
    assert (seen < metric(family_server, "crop:visual_tokens_total")) == (family is QWEN3_VL)
    for method, answer in zip(METHODS, answers, strict=True):
        regions = [None, None] if method == "off" else [FIRST, SECOND]
        stages = (2,) if "ilp" in method else ()
        assert answer == expected(
            family_hf,
            [WIDE, TALL],
            regions,
            RATE,
            compression_of(family),
            method=method,
            eviction_layers=stages,
        )


def test_a_bad_region_is_named_and_the_server_lives_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [WIDE], {"regions": [FIRST.as_lists(), None]})
    assert caught.value.param == "crop.regions"
    assert chat(client, [], None).parse().choices[0].message.content
