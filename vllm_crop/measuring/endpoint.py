# SPDX-License-Identifier: Apache-2.0
"""Asks a running endpoint, through whatever is in front of it, what of pruning arrives at a client."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from vllm_crop.client import CropClient, facts_of
from vllm_crop.errors import CropError

State = Literal["works", "fails", "absent"]

SIDE = 448  # pixels of the pictures that are sent
QUESTION = "What is in the picture?"
_REGION = [0.25, 0.25, 0.5, 0.5]
_OUTSIDE = [2.0, 0.0, 0.0, 0.0]
_FAILED = ("error", "timeout", "unreadable", "suspended")


class EndpointError(CropError):
    """The endpoint cannot be asked."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        what: in a few words.
        state: "absent" is what need not be there.
        detail: what was seen; what to do where it does not work.
    """

    what: str
    state: State
    detail: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


def probe(base_url: str, model: str | None = None, num_requests: int = 4) -> Iterator[Finding]:
    """Try one thing after the other; the first findings that fail say what the others hang on.

    Args:
        base_url: with `/v1`; the key is taken from OPENAI_API_KEY.
        model: the first that the endpoint serves where left out.
        num_requests: how often a region is sent, each time with another picture: behind a router servers
            may differ.

    Raises:
        EndpointError: nobody answers, or nobody may ask.
    """
    import openai

    client = CropClient(base_url, model, timeout=120.0)
    try:
        yield Finding("endpoint", "works", f"serves {client.model}")
        yield _field_read(client)
        whole = _prompt_tokens(client, 0, {"method": "off"})
        answers = [_ask(client, seed, {"regions": [_REGION]}) for seed in range(num_requests)]
        yield _pruned(whole, [answer.parse().usage.prompt_tokens for answer in answers])
        told = [facts_of(answer.headers) for answer in answers]
        streamed = facts_of(_ask(client, 0, {"regions": [_REGION]}, stream=True).headers)
        yield _header([*told, streamed])
        yield _saved(told)
        yield _regions_found(facts_of(_ask(client, num_requests, None).headers))
        yield _plugin_routes(client)
        yield _metrics(client, base_url)
        yield _versions(client, base_url)
    except openai.AuthenticationError as error:
        raise EndpointError(f"{base_url} asks for a key: set OPENAI_API_KEY ({error.message})") from None
    except openai.APIStatusError as error:
        raise EndpointError(f"{base_url} answers HTTP {error.status_code}: {error.message}") from None
    except (openai.OpenAIError, IndexError) as error:
        raise EndpointError(f"{base_url} cannot be asked: {error or 'it serves no model'}") from None


def _picture(seed: int) -> Image.Image:
    """Noise, so that no cache knows it."""
    pixels = np.random.default_rng([seed, *np.random.bytes(8)]).integers(0, 256, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _ask(client: CropClient, seed: int, crop: dict[str, Any] | None, **options: Any) -> Any:
    return client.send(_picture(seed), QUESTION, crop, max_tokens=1, **options)


def _prompt_tokens(client: CropClient, seed: int, crop: dict[str, Any] | None) -> int:
    return int(_ask(client, seed, crop).parse().usage.prompt_tokens)


def _field_read(client: CropClient) -> Finding:
    import openai

    what = "field `crop` read"
    try:
        _ask(client, 0, {"regions": [_OUTSIDE]})
    except openai.BadRequestError as error:
        if "crop.regions" in error.message:
            return Finding(what, "works", "a box outside of the image is refused")
        return Finding(what, "fails", f"refused, but not for the box: {error.message}")
    return Finding(
        what,
        "fails",
        "a box outside of the image was answered: nobody reads the field. Start the servers with "
        "`--plugin crop`; with Ray Serve see deploy/ray/; ask a server without its router",
    )


def _pruned(whole: int, prompt_tokens: Sequence[int]) -> Finding:
    pruned = sum(one < whole for one in prompt_tokens)
    counted = f"{pruned} of {len(prompt_tokens)} requests with a region took fewer than {whole} prompt tokens"
    if pruned == len(prompt_tokens):
        return Finding("regions honoured", "works", f"{counted}: {max(prompt_tokens)} at most")
    more = "some of the servers behind it do not prune" if pruned else "method, rate or limits of the server"
    return Finding("regions honoured", "fails", f"{counted}: {more}")


def _header(told: Sequence[dict[str, Any] | None]) -> Finding:
    seen = sum(one is not None for one in told)
    counted = f"on {seen} of {len(told)} answers, the last one streamed"
    if seen == len(told):
        return Finding("x-crop-facts", "works", counted)
    return Finding(
        "x-crop-facts",
        "fails",
        f"{counted}: the header is dropped on the way, or no middleware is there",
    )


def _saved(told: Sequence[dict[str, Any] | None]) -> Finding:
    known = [one for one in told if one is not None]
    if not known:
        return Finding("tokens saved", "absent", "not known without x-crop-facts")
    whole, left = sum(one["tokens"] for one in known), sum(one["tokens_avg"] for one in known)
    method, rate = known[0]["method"], known[0]["pruning_rate"]
    detail = f"{whole} visual tokens to {left:g} on average over layers ({method}, rate {rate:g})"
    return Finding("tokens saved", "works" if left < whole else "fails", detail)


def _regions_found(facts: dict[str, Any] | None) -> Finding:
    what = "regions found by the server"
    if facts is None:
        return Finding(what, "absent", "not known without x-crop-facts")
    (image,) = facts["images"]
    localizer = image.get("localizer")
    if localizer is None:
        return Finding(what, "absent", "no localizer is set: images without a region are served as they are")
    seen = f"{image['source']}: {localizer['outcome']} after {localizer['ms']:g} ms (of a picture of noise)"
    return Finding(what, "fails" if localizer["outcome"] in _FAILED else "works", seen)


def _get(client: CropClient, url: str) -> str | None:
    import openai

    try:
        return str(client.openai.get(url, cast_to=str))
    except openai.APIStatusError:
        return None


def _plugin_routes(client: CropClient) -> Finding:
    settings = _get(client, "/plugins/crop/settings")
    what = "plugin routes"
    if settings is None:
        hint = "the playground needs VLLM_PLUGINS=crop at the server; some routers pass no routes of plugins"
        return Finding(what, "absent", hint)
    return Finding(what, "works", f"methods {', '.join(json.loads(settings)['methods'])}; the playground too")


def _metrics(client: CropClient, base_url: str) -> Finding:
    found = _get(client, _root(base_url) + "/metrics") or ""
    if "crop:requests_total" in found:
        return Finding("metrics", "works", "crop:* on /metrics")
    return Finding("metrics", "absent", "no crop:* on /metrics: let Prometheus scrape the servers themselves")


def _versions(client: CropClient, base_url: str) -> Finding:
    vllm = json.loads(_get(client, _root(base_url) + "/version") or "{}").get("version")
    crop = json.loads(_get(client, "/plugins/crop/settings") or "{}").get("version")
    known = {"vllm": vllm, "vllm-crop": crop}
    shown = ", ".join(f"{name} {version or 'not told'}" for name, version in known.items())
    return Finding("versions", "works" if any(known.values()) else "absent", shown)


def _root(base_url: str) -> str:
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
