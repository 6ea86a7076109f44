# SPDX-License-Identifier: Apache-2.0
"""The demo's measurements, one row per method."""

from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from vllm_crop.demo.client import Answer, Client
from vllm_crop.demo.setting import (
    ANSWER_TOKENS,
    BLOCK_SIZE,
    EVICTION_LAYERS,
    PICTURE_SIZE,
    PRUNING_RATE,
    REPEATS,
    SIGN,
)
from vllm_crop.dummy_llava import DEMO
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.sample_picture import draw_sample_picture

METHODS = ("plc", "ilp", "plc+ilp")
LAYER_TOKEN_BYTES = 2 * DEMO.hidden * 4  # keys and values in float32


def crop_fields() -> list[dict[str, Any]]:
    """The body fields compared, the stock path first."""
    asked = {"regions": [SIGN.as_lists()], "pruning_rate": PRUNING_RATE}
    return [{"method": "off"}, *({"method": method, **asked} for method in METHODS)]


def measure(client: Client, console: Console) -> list[dict[str, Any]]:
    """Ask everything once to warm up, then several times in turn, each time about a picture of its own."""
    fields = crop_fields()
    picture = draw_sample_picture(size=PICTURE_SIZE)
    answers = []
    for index, field in enumerate(track(fields, "warming up", console=console, transient=True)):
        # Another pixel each time: no cache may answer.
        fresh = marked(picture, index)
        answers.append(client.ask(fresh, field, ANSWER_TOKENS, look_at_kv=True))
    times: list[list[float]] = [[] for _ in fields]
    for repeat in track(range(1, REPEATS + 1), "asking", console=console, transient=True):
        for index, field in enumerate(fields):
            fresh = marked(picture, repeat * len(fields) + index)
            times[index].append(client.ask(fresh, field).ttft_ms)
    return [
        row(field, answer, measured) for field, answer, measured in zip(fields, answers, times, strict=True)
    ]


def marked(picture: Image.Image, number: int) -> Image.Image:
    """The picture with one pixel that tells it from all others."""
    copy = picture.copy()
    copy.putpixel((0, 0), (number % 256, 1 + number // 256, 7))
    return copy


def row(field: dict[str, Any], answer: Answer, ttft_ms: list[float]) -> dict[str, Any]:
    """One line of summary.json."""
    return {
        "method": field["method"],
        "regions": field.get("regions"),
        "pruning_rate": field.get("pruning_rate"),
        "image_tokens": answer.facts["tokens_after_plc"],
        "tokens_avg": answer.facts["tokens_avg"],
        "prompt_tokens": answer.prompt_tokens,
        "kv_blocks": answer.kv_blocks,
        "kv_mib": round(kv_mib(answer.kv_blocks), 2),
        "ttft_ms_median": round(median(ttft_ms), 1),
        "ttft_ms_range": [round(min(ttft_ms), 1), round(max(ttft_ms), 1)],
        "answer": answer.text,
    }


def kv_mib(blocks: int) -> float:
    """Memory of KV blocks: a server prepared for eviction has more and smaller ones than plain vLLM."""
    grouping = predict_grouping(DEMO.layers, EVICTION_LAYERS, BLOCK_SIZE)
    return blocks * grouping.block_layer_tokens * LAYER_TOKEN_BYTES / 2**20
