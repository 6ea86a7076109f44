# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of each family, prepared to evict, asked through the `openai` client."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from playwright.sync_api import expect

from tests.browser import PIECE_PIXEL, Reader, chromium
from tests.e2e.conftest import FAMILY_CROP, compression_of, metric
from tests.e2e.test_serve import FIRST, SECOND, chat, expected
from tests.families import (
    GLM4V,
    INTERNVL,
    INTERNVL_CHAT,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    MISTRAL3,
    QWEN2_5_VL,
    QWEN3_VL,
    Family,
)
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
    INTERNVL: [13 * 16] * 2,
    INTERNVL_CHAT: [13 * 16] * 2,
    MISTRAL3: [15 * 18 + 14, 15 * 11 + 14],
    GLM4V: [18 * 14, 11 * 15],
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


def test_the_page_frames_what_the_vision_tower_sees(
    family: Family, family_server: Server, tmp_path: Path
) -> None:
    if compression_of(family) != "foveate":
        pytest.skip("it sees all of an image at one size")
    WIDE.save(tmp_path / "wide.png")
    with chromium() as browser:
        reader = Reader(browser, family_server.base_url)
        reader.open("")
        reader.prepare(tmp_path / "wide.png", "What is it?")
        reader.page.mouse.move(*reader.place(0.3, 0.3))
        reader.page.mouse.down()
        reader.page.mouse.move(*reader.place(0.45, 0.5), steps=4)
        reader.page.mouse.up()
        expect(reader["legend"]).to_contain_text("seen larger than the rest")
        pruned, full = reader.ask()
        (image,) = pruned["images"]
        view, *crops = image["pieces"]
        assert sum(piece["tokens"] for piece in (view, *crops)) == image["tower_tokens"]
        assert "pieces" not in full["images"][0]
        expect(reader["legend"]).to_contain_text(f"({image['tower_tokens']} tokens in all)")
        for crop in crops:
            (rows, cols), (row0, row1, col0, col1) = crop["scale"], crop["window"]
            top, bottom, left, right = row0 / rows, row1 / rows, col0 / cols, col1 / cols
            for x, y in ((left, (top + bottom) / 2), ((left + right) / 2, bottom)):
                assert reader.pixel(x, y) == PIECE_PIXEL
            assert reader.pixel((left + right) / 2, (top + bottom) / 2) != PIECE_PIXEL
        reader.check_quiet()


def test_a_bad_region_is_named_and_the_server_lives_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [WIDE], {"regions": [FIRST.as_lists(), None]})
    assert caught.value.param == "crop.regions"
    assert chat(client, [], None).parse().choices[0].message.content
