# SPDX-License-Identifier: Apache-2.0
"""The trained checkpoint of this repository, and how it is served."""

import json
import math
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from lab.tinyvqa import words
from lab.tinyvqa.drawing import thumbnail
from tests.e2e.conftest import MODEL
from vllm_crop.client import facts_of, question_about
from vllm_crop.localizers.dialects import DIALECTS, read_cells
from vllm_crop.planning.geometry import Region

CHECKPOINT = Path(__file__).parent.parent / "lab" / "checkpoints" / "tinyvqa"
ENGINE = {"kind": "engine", "prompt": "where:{question}", "timeout_s": 60}


def crop_options(localizer: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """`--crop-config` with a localizer."""
    return "--crop-config", json.dumps({"pruning_rate": 0.889, "localizer": localizer, **settings})


def ask(
    client: openai.OpenAI,
    picture: Image.Image,
    question: str,
    crop: Any = None,
    body: Any = None,
    **options: Any,
) -> Any:
    """A chat completion about a picture, with its headers."""
    return client.chat.completions.with_raw_response.create(
        model=options.pop("model", MODEL),
        messages=options.pop("messages", None) or question_about(picture, question),
        max_tokens=options.pop("max_tokens", 5),
        temperature=0,
        extra_body={**(body or {}), **({} if crop is None else {"crop": crop})},
        **options,
    )


def facts(response: Any) -> Any:
    """The header `x-crop-facts`."""
    return facts_of(response.headers)


def found(response: Any) -> Any:
    """The facts of the only image."""
    (image,) = facts(response)["images"]
    return image


def said_of_thumbnail(
    client: openai.OpenAI, picture: Image.Image, question: str, model: str = MODEL
) -> tuple[Region | None, float]:
    """Region and probability that the model gives when a client itself asks it about a thumbnail."""
    response = ask(
        client,
        thumbnail(picture),
        words.LOCATE + question,
        {"method": "off"},
        max_tokens=DIALECTS["cells"].max_tokens,
        logprobs=True,
        model=model,
        body={"structured_outputs": {"regex": DIALECTS["cells"].regex}},
    )
    choice = response.parse().choices[0]
    return read_cells(choice.message.content), math.exp(sum(t.logprob for t in choice.logprobs.content))
