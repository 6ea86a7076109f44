# SPDX-License-Identifier: Apache-2.0
"""Asks a running server about a picture, for `vllm-crop preview --base-url`."""

import json
import os
from dataclasses import dataclass
from typing import Any

import typer
from PIL import Image

from vllm_crop.data_url import question_about
from vllm_crop.geometry import Box, Region

ANSWER_TOKENS = 64
_OPTION = "--base-url"


@dataclass(frozen=True)
class ServerAnswer:
    """What a server made of a question about one image.

    Attributes:
        checkpoint: the model's name or folder as the server knows it.
        tokens: visual tokens unpruned.
        tokens_avg: embeddings a decoder layer runs with, averaged over layers.
        region: None where the image was served whole.
        source: where the region came from.
        localizer: what the server's localizer did; None if it was not asked.
        settings: how the server pruned: method, pruning rate, compression, eviction layers.
    """

    text: str
    checkpoint: str
    tokens: int
    tokens_avg: float
    region: Region | None
    source: str
    localizer: dict[str, Any] | None
    settings: dict[str, Any]

    def describe(self) -> str:
        """A sentence on the region."""
        if self.localizer is None:
            return f"region: {self.source}"
        confidence = self.localizer["confidence"]
        sure = "" if confidence is None else f", confidence {confidence:.2f}"
        return (
            f"region found by {self.source}: {self.localizer['outcome']}{sure}, {self.localizer['ms']:.0f} ms"
        )


def ask_server(base_url: str, picture: Image.Image, question: str, crop: dict[str, Any]) -> ServerAnswer:
    """One chat completion about a picture.

    Args:
        base_url: with `/v1`; the key is taken from OPENAI_API_KEY.
        crop: the request's field.

    Raises:
        typer.BadParameter: the server cannot be asked, refuses, or does not prune.
    """
    try:
        import openai
    except ImportError:
        raise typer.BadParameter(
            "needs the package openai: pip install 'vllm-crop[openai]'", param_hint=_OPTION
        ) from None
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    try:
        model = client.models.list().data[0]
        response = client.chat.completions.with_raw_response.create(
            model=model.id,
            messages=question_about(picture.convert("RGB"), question),
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={"crop": crop},
        )
    except openai.APIStatusError as error:
        raise typer.BadParameter(f"{base_url} refuses: {error.message}", param_hint=_OPTION) from None
    except openai.OpenAIError as error:
        raise typer.BadParameter(f"{base_url} cannot be asked: {error}", param_hint=_OPTION) from None
    header = response.headers.get("x-crop-facts")
    if header is None:
        raise typer.BadParameter(
            f"{base_url} does not prune: start it with vllm serve ... --plugin crop", param_hint=_OPTION
        )
    facts = json.loads(header)
    (image,) = facts["images"]
    boxes = image["region"]
    return ServerAnswer(
        text=response.parse().choices[0].message.content or "",
        checkpoint=getattr(model, "root", None) or model.id,
        tokens=image["tokens"],
        tokens_avg=image["tokens_avg"],
        region=Region(tuple(Box(*box) for box in boxes)) if boxes else None,
        source=image["source"],
        localizer=image.get("localizer"),
        settings=facts,
    )
