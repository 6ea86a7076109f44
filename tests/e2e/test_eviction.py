# SPDX-License-Identifier: Apache-2.0
"""A server configured by a YAML file alone: prepared to evict, with learned queries that compress, finding
regions where the model looks, on two tensor-parallel workers, with the shared-memory image cache, prefix
caching and no API key."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.conftest import MODEL, OPTIONS, metric, one_core_each, serve
from tests.e2e.test_serve import (
    EVERY_TOKEN,
    FIRST,
    SECOND,
    SQUARE,
    STEPS,
    TEXT,
    WIDE,
    chat,
    expected,
    messages,
)
from tests.reference import HfLlava
from tests.resampler_reference import resampling, weights_of, write_random_resampler
from vllm_crop.client import facts_of
from vllm_crop.compression.weights import read_resampler
from vllm_crop.families.checkpoint import load_model_config
from vllm_crop.heat.request import NOWHERE
from vllm_crop.localizers.heat import HeatMap, heat_grid
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.measuring.server import Server
from vllm_crop.planning.budget import Method, retained_per_stage
from vllm_crop.planning.geometry import Region

pytestmark = pytest.mark.e2e

RATE = 0.667
# The model looks in a layer that sees every token and in one that would see some.
LAYERS = [1, 5]
SETTINGS = f"""
plugin: crop
crop-config:
  method: ilp
  eviction_layers: [2]
  pruning_rate: {RATE}
  compression: resampler
  resampler: {{weights: {{weights}}}}
  localizer: {{kind: attention, layers: {LAYERS}, prompt: "{{question}}", whole_below: 0, timeout_s: 60}}
tensor-parallel-size: 2
mm-processor-cache-type: shm
max-num-batched-tokens: 512
"""
METHODS: tuple[Method, ...] = ("off", "plc", "ilp", "plc+ilp")


@pytest.fixture(scope="module")
def weights(deep_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model_config(str(deep_checkpoint))
    return write_random_resampler(
        tmp_path_factory.mktemp("weights"), model["text_config"]["hidden_size"], model
    )


@pytest.fixture(scope="module")
def server(
    deep_checkpoint: Path, weights: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("settings") / "serve.yaml"
    file.write_text(SETTINGS.replace("{weights}", str(weights)))
    options_without_budget = OPTIONS[: OPTIONS.index("--max-num-batched-tokens")]
    options = ("--config", str(file), *options_without_budget)
    log_path = logs / "evicting.log"
    with serve(str(deep_checkpoint), *options, log_path=log_path, env=one_core_each()) as running:
        yield running
        # Before it is stopped: a worker may complain of a leader that is gone.
        assert "Traceback" not in log_path.read_text()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def hf(deep_checkpoint: Path, weights: Path) -> HfLlava:
    found: HfLlava = resampling(HfLlava, deep_checkpoint, weights_of(read_resampler(weights)))
    return found


ANSWERS: dict[Any, str] = {}


def answer_of(hf: HfLlava, image: Any, region: Any, method: Method) -> str:
    """What must be served; each is worked out once."""
    key = id(image), region, method
    if key not in ANSWERS:
        pruned = None if method == "off" else region
        stages = (2,) if "ilp" in method else ()
        ANSWERS[key] = expected(hf, [image], [pruned], RATE, "resampler", method, stages)[0]
    return ANSWERS[key]


def test_the_server_says_what_eviction_saves(server: Server) -> None:
    log = server.log_path.read_text()
    assert "KV cache groups: 4 (layers 0-1: 1 x 2; layers 2-7: 3 x 2)." in log
    assert "of plain vLLM's KV memory" in log


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_one_server(client: openai.OpenAI, hf: HfLlava, method: Method) -> None:
    """Twice: the second time everything but the last block comes from the prefix cache."""
    for _ in range(2):
        response = chat(client, [SQUARE], {"regions": FIRST.as_lists(), "method": method})
        assert response.parse().choices[0].message.content == answer_of(hf, SQUARE, FIRST, method)
    counts = retained_per_stage(576, RATE, method, 8, (2,) if "ilp" in method else ())
    facts = facts_of(response.headers)["images"][0]
    assert facts["tokens_after_plc"] == counts[0]
    assert facts["tokens_avg"] == pytest.approx((2 * counts[0] + 6 * counts[-1]) / 8, abs=0.01)


def test_tokens_are_shown_as_the_tokenizer_has_them(client: openai.OpenAI, server: Server) -> None:
    """Marks of what is evicted are for the engine: no text stands for them."""
    asked = {"model": MODEL, "messages": messages(SQUARE), "return_token_strs": True}
    for method in METHODS:
        body = {**asked, "crop": {"regions": FIRST.as_lists(), "method": method}}
        shown: Any = client.post(f"{server.base_url}/tokenize", body=body, cast_to=object)
        count = facts_of(chat(client, [SQUARE], body["crop"]).headers)["tokens_after_plc"]
        assert shown["token_strs"].count("<image>") == count
        assert len(set(shown["tokens"])) == len(set(shown["token_strs"]))


def test_all_at_once(client: openai.OpenAI, hf: HfLlava) -> None:
    asked = [
        (image, region, method)
        for image in (SQUARE, WIDE)
        for region in (FIRST, SECOND)
        for method in METHODS
    ]

    def ask(question: tuple[Any, Any, Method]) -> str:
        image, region, method = question
        response = chat(client, [image], {"regions": region.as_lists(), "method": method})
        return str(response.parse().choices[0].message.content)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    assert answers == [answer_of(hf, *question) for question in asked]


@pytest.mark.parametrize("method", METHODS)
def test_names_of_images_decide_nothing(client: openai.OpenAI, hf: HfLlava, method: Method) -> None:
    """On two workers that read images from shared memory: a name that moves, alone, and for two at once."""

    def named(*images: Any, sent: bool = True) -> Any:
        (message,) = messages(*images)
        for part in message["content"][: len(images)]:
            part["uuid"] = f"name-{method}"
            part["image_url"] = part["image_url"] if sent else None
        return [message]

    def ask(asked: list[Any], regions: int = 1) -> Any:
        crop = {"regions": [FIRST.as_lists()] * regions, "method": method}
        return client.chat.completions.create(
            model=MODEL,
            messages=asked,
            max_tokens=STEPS,
            temperature=0,
            extra_body={**EVERY_TOKEN, "crop": crop},
        )

    for image in (SQUARE, WIDE, SQUARE):
        for sent in (True, False):
            said = ask(named(image, sent=sent)).choices[0].message.content
            assert said == answer_of(hf, image, FIRST, method)
    for images in ((SQUARE, WIDE), (WIDE, SQUARE)):
        with pytest.raises(openai.BadRequestError, match="stands for two different images"):
            ask(named(*images), regions=2)


def test_requests_choose_method_and_rate(client: openai.OpenAI, hf: HfLlava, server: Server) -> None:
    """Not how tokens are compressed: that is the file's."""
    retained, noticed = metric(server, "crop:visual_tokens_retained_total"), []
    for regions in ([FIRST], [SECOND], [FIRST, SECOND], [FIRST]):
        images = [SQUARE] * len(regions)
        crop = {"regions": [one.as_lists() for one in regions], "method": "plc", "pruning_rate": 0.889}
        response = chat(client, images, crop)
        text, num_prompt_tokens = expected(hf, images, regions, 0.889, "resampler")
        noticed.append(text != expected(hf, images, regions, 0.889, "pool")[0])
        completion = response.parse()
        assert facts_of(response.headers)["tokens_after_plc"] == 64 * len(regions)
        assert completion.usage.prompt_tokens == num_prompt_tokens
        assert completion.choices[0].message.content == text
    assert metric(server, "crop:visual_tokens_retained_total") == retained + 5 * 64
    assert any(noticed), "means would have been answered alike"


def test_two_workers_look_where_the_whole_model_does(client: openai.OpenAI, hf: HfLlava) -> None:
    """Each of them sees some of the heads."""
    wanted, confidence = looked_at(hf, LAYERS)
    for _ in range(2):  # alone, and as it is remembered
        (image,) = facts_of(chat(client, [SQUARE]).headers)["images"]
        assert image["source"] == "attention"
        assert image["region"] == [[pytest.approx(side) for side in box] for box in wanted.as_lists()]
        assert image["localizer"]["confidence"] == pytest.approx(confidence, abs=1e-4)
        assert image["tokens_avg"] < image["tokens_after_plc"] == 576
    for layer in LAYERS:
        assert looked_at(hf, [layer])[1] != pytest.approx(confidence, abs=1e-4)


def looked_at(hf: HfLlava, layers: list[int]) -> tuple[Region, float]:
    """Region and confidence that transformers' attention gives, by the rule of docs/localization.md."""
    settings = LocalizerConfig(kind="attention")
    full = hf.geometry.grid(*SQUARE.size)
    count = settings.view_tokens(full.num_tokens)
    view = hf.plan(SQUARE, Region.whole(), 1 - count / full.num_tokens, "prune")
    assert view is not None
    ids = hf.processor.tokenizer.encode(f"USER: {hf.image}\n{TEXT}\nASSISTANT:", add_special_tokens=False)
    start = ids.index(hf.image_token_id)
    grid = heat_grid(full, view.assignment)
    where = np.array(grid.cells)
    attention = hf.attention(hf.embed(ids, [SQUARE], [view]))[layers, start : start + count].numpy()
    heat = (attention / attention[:, where != NOWHERE].sum(-1, keepdims=True)).max(0)
    cells = [heat[where == cell].mean() if (where == cell).any() else 0 for cell in range(grid.num_cells)]
    found = HeatMap.of(grid, np.array(cells))
    region = found.region(settings.window, settings.max_windows, settings.further_window)
    shown = hf.geometry.view(*SQUARE.size).unproject(region)
    assert shown is not None
    return shown, found.within(region)


def test_clients_that_hang_up_leave_nothing_behind(
    client: openai.OpenAI, hf: HfLlava, server: Server
) -> None:
    for region in (FIRST, SECOND, FIRST):
        stream = chat(client, [WIDE], {"regions": region.as_lists()}, stream=True).parse()
        next(iter(stream))
        stream.close()
    response = chat(client, [WIDE], {"regions": SECOND.as_lists()})
    assert response.parse().choices[0].message.content == answer_of(hf, WIDE, SECOND, "ilp")
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_several_answers_to_one_prompt(client: openai.OpenAI, hf: HfLlava) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=messages(SQUARE),
        max_tokens=STEPS,
        n=3,
        temperature=1,
        extra_body={**EVERY_TOKEN, "crop": {"regions": SECOND.as_lists()}, "top_k": 1},
    )
    answer = answer_of(hf, SQUARE, SECOND, "ilp")
    assert [choice.message.content for choice in completion.choices] == [answer] * 3


def test_structured_output(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=messages(SQUARE),
        max_tokens=8,
        temperature=0,
        extra_body={"crop": {"regions": FIRST.as_lists()}, "structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert completion.choices[0].message.content in ("yes", "no")


def test_prompt_logprobs_are_refused_where_they_would_be_made_up(client: openai.OpenAI, hf: HfLlava) -> None:
    crop = {"regions": FIRST.as_lists()}
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: not possible") as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=messages(SQUARE),
            max_tokens=1,
            extra_body={"crop": crop, "prompt_logprobs": 1},
        )
    assert caught.value.status_code == 400
    unpruned = client.chat.completions.create(
        model=MODEL,
        messages=messages(SQUARE),
        max_tokens=1,
        extra_body={"crop": {"method": "off"}, "prompt_logprobs": 1},
    )
    assert len(unpruned.prompt_logprobs or ()) > 576  # type: ignore[attr-defined]


def test_a_rate_these_layers_cannot_meet_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="eviction from layer 2 of 8") as caught:
        chat(client, [SQUARE], {"regions": FIRST.as_lists(), "pruning_rate": 0.9})
    assert caught.value.param == "crop.pruning_rate"
