# SPDX-License-Identifier: Apache-2.0
"""Asks a running endpoint, through whatever is in front of it, what of pruning arrives at a client."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import BaseModel, FiniteFloat, ValidationError

from vllm_crop.crop_params import FACTS_HEADER
from vllm_crop.measuring.bounded_client import BoundedClient, EndpointError
from vllm_crop.measuring.endpoint_refusals import (
    NO_SERVER,
    check_key,
    checked_address,
    in_words,
    said_by,
    shown,
)

State = Literal["works", "fails", "absent"]

SIDE = 448  # pixels of the pictures that are sent
QUESTION = "What is in the picture?"
TIMEOUT_S = 20.0
_REGION = [0.25, 0.25, 0.5, 0.5]
_FEW = 100  # tokens of such a picture where there are no regions: less than any of them is whole
_OUTSIDE = [2.0, 0.0, 0.0, 0.0]
_FAILED = ("error", "timeout", "unreadable", "suspended")
_NOT_IMPLEMENTED = 501


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


# What is read of answers: anybody may have written them.


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Usage(BaseModel):
    prompt_tokens: int


class _Completion(BaseModel):
    usage: _Usage


class _Localized(BaseModel):
    outcome: str
    ms: FiniteFloat


class _ImageFacts(BaseModel):
    source: str | None = None
    localizer: _Localized | None = None


class _Facts(BaseModel):
    tokens: FiniteFloat
    tokens_avg: FiniteFloat
    method: str
    pruning_rate: FiniteFloat
    images: list[_ImageFacts]


class _Settings(BaseModel):
    methods: list[str]
    version: str | None = None


class _Version(BaseModel):
    version: str | None = None


Answered = TypeVar("Answered", bound=BaseModel)


def probe(
    base_url: str, model: str | None = None, num_requests: int = 4, timeout_s: float = TIMEOUT_S
) -> Iterator[Finding]:
    """Try one thing after the other; the first findings that fail say what the others hang on.

    Args:
        base_url: with `/v1`; the key is taken from OPENAI_API_KEY.
        model: the first that the endpoint serves where left out.
        num_requests: how often a region is sent, each time with another picture: behind a router servers
            may differ.
        timeout_s: for each question.

    Raises:
        EndpointError: nobody answers, or nobody may ask, or what answers is something else.
        ImportError: the package openai is not installed.
    """
    address = checked_address(base_url)
    check_key()
    import openai  # noqa: F401  # that it lacks is not the endpoint's fault

    try:
        yield from _try_all(BoundedClient(address, model, timeout_s), address, model, num_requests)
    except Exception as error:  # a hostile server makes the client's libraries raise anything
        raise EndpointError(in_words(error, address, timeout_s)) from None


def _try_all(client: BoundedClient, address: str, model: str | None, num_requests: int) -> Iterator[Finding]:
    served = _served(client, model)
    known = model is None or model in served
    if known:
        yield Finding("endpoint", "works", f"serves {shown(client.model)}")
    whole = _whole_prompt(client, served)
    if not known:  # a router may pass on what it does not list
        yield Finding("endpoint", "works", f"serves {shown(client.model)}, which its /models does not list")
    field = _field_read(client)
    yield field
    asked = _possible(client)
    answers = [_ask(client, seed, asked) for seed in range(num_requests)]
    told = [facts for _, facts in answers]
    yield _pruned(whole, [tokens for tokens, _ in answers], told, field, "regions" in asked)
    yield _header([*told, _facts_streamed(client, asked)])
    yield _saved(told)
    yield _regions_found(_ask(client, num_requests, None)[1])
    settings, instead = _settings(client)
    if settings is None:
        yield Finding("plugin routes", "absent", instead)
    else:
        methods = ", ".join(settings.methods)
        yield Finding("plugin routes", "works", f"methods {shown(methods)}; the playground too")
    yield _metrics(client, address)
    yield _versions(client, address, settings)


def _served(client: BoundedClient, model: str | None) -> list[str]:
    """The names of what is served; sets the client's model where none was named.

    Raises:
        EndpointError: it is none.
    """
    import openai

    try:
        body = client.within_time(lambda: client.openai.get("/models", cast_to=str))
    except openai.NotFoundError:
        if model is None:
            raise
        return []
    names = [one.id for one in _read(_Models, body).data]
    if model is None:
        if not names:
            raise EndpointError("it serves no model")
        client.model = names[0]
    return names


def _picture(seed: int) -> Image.Image:
    """Noise, so that no cache knows it."""
    pixels = np.random.default_rng([seed, *np.random.bytes(8)]).integers(0, 256, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _ask(client: BoundedClient, seed: int, crop: dict[str, Any] | None) -> tuple[int, _Facts | None]:
    """Prompt tokens and facts of one answer."""

    def ask() -> Any:
        return client.send(_picture(seed), QUESTION, crop, max_tokens=1).http_response

    response = client.within_time(ask)
    return _read(_Completion, response.text).usage.prompt_tokens, _facts(response)


def _possible(client: BoundedClient) -> dict[str, Any]:
    """What the model's images can be pruned by."""
    import openai

    asked: dict[str, Any] = {"regions": [_REGION]}
    try:
        _ask(client, 0, asked)
    except openai.BadRequestError as error:
        if "crop.regions: not possible with this model" not in said_by(error):
            raise
        return {"max_tokens": _FEW}
    return asked


def _facts_streamed(client: BoundedClient, asked: dict[str, Any]) -> _Facts | None:
    def ask() -> Any:
        response = client.send(_picture(0), QUESTION, asked, max_tokens=1, stream=True).http_response
        response.close()  # the header has arrived
        return response

    return _facts(client.within_time(ask))


def _facts(response: Any) -> _Facts | None:
    header = response.headers.get(FACTS_HEADER)
    if header is None:
        return None
    unread = (
        f"its {FACTS_HEADER} is not as vllm-crop writes it: does something in front of the server change it?"
    )
    return _read(_Facts, header, unread)


def _read(kind: type[Answered], body: str, otherwise: str = NO_SERVER) -> Answered:
    """Read JSON strictly.

    Raises:
        EndpointError: it is something else.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise EndpointError(otherwise) from None


def _whole_prompt(client: BoundedClient, served: Sequence[str]) -> int:
    """Tokens of a prompt that is not pruned.

    Raises:
        EndpointError: no such model is served.
    """
    import openai

    try:
        return _ask(client, 0, {"method": "off"})[0]
    except openai.NotFoundError:
        if not served or client.model in served:
            raise
    raise EndpointError(f"it serves no model {shown(client.model)}, but: {shown(', '.join(served))}")


def _field_read(client: BoundedClient) -> Finding:
    import openai

    what = "field `crop` read"
    try:
        _ask(client, 0, {"regions": [_OUTSIDE]})
    except openai.BadRequestError as error:
        said = said_by(error)
        if "crop.regions" in said:
            return Finding(what, "works", "a box outside of the image is refused")
        return Finding(what, "fails", f"refused, but not for the box: {said}")
    return Finding(
        what,
        "fails",
        "a box outside of the image was answered: nobody reads the field. Start the servers with "
        "`--plugin crop`; with Ray Serve see deploy/ray/; ask a server without its router",
    )


def _pruned(
    whole: int, prompt_tokens: Sequence[int], told: Sequence[_Facts | None], field: Finding, regions: bool
) -> Finding:
    what, sent = ("regions honoured", "a region") if regions else ("max_tokens honoured", "max_tokens")
    pruned = sum(one < whole for one in prompt_tokens)
    counted = f"{pruned} of {len(prompt_tokens)} requests with {sent} took fewer than {whole} prompt tokens"
    if pruned == len(prompt_tokens):
        return Finding(what, "works", f"{counted}: {max(prompt_tokens)} at most")
    if all(facts is not None and facts.method == "ilp" and facts.tokens_avg < facts.tokens for facts in told):
        return Finding(what, "works", "the server's method is ilp: prompts keep their tokens, layers do not")
    if pruned:
        why = "some of the servers behind it do not prune"
    elif field.state == "fails":
        why = "as the field is not read, see above"
    elif any(facts is not None and facts.method == "off" for facts in told):
        why = "the server's method is off, so that only requests that name one are pruned"
    else:
        why = "method, rate or limits of the server"
    return Finding(what, "fails", f"{counted}: {why}")


def _header(told: Sequence[_Facts | None]) -> Finding:
    seen = sum(one is not None for one in told)
    counted = f"on {seen} of {len(told)} answers, the last one streamed"
    if seen == len(told):
        return Finding("x-crop-facts", "works", counted)
    return Finding(
        "x-crop-facts",
        "fails",
        f"{counted}: the header is dropped on the way, or no middleware is there",
    )


def _saved(told: Sequence[_Facts | None]) -> Finding:
    known = [one for one in told if one is not None]
    if not known:
        return Finding("tokens saved", "absent", "not known without x-crop-facts")
    whole, left = sum(one.tokens for one in known), sum(one.tokens_avg for one in known)
    detail = (
        f"{whole:.0f} visual tokens to {left:g} on average over layers "
        f"({shown(known[0].method)}, rate {known[0].pruning_rate:g})"
    )
    return Finding("tokens saved", "works" if left < whole else "fails", detail)


def _regions_found(facts: _Facts | None) -> Finding:
    what = "regions found by the server"
    if facts is None or not facts.images:
        return Finding(what, "absent", "not known without x-crop-facts")
    localizer = facts.images[0].localizer
    if localizer is None and facts.method == "off":
        return Finding(what, "absent", "the server's method is off: no localizer is asked")
    if localizer is None:
        return Finding(what, "absent", "no localizer is set: images without a region are served as they are")
    seen = f"{facts.images[0].source}: {localizer.outcome} after {localizer.ms:g} ms (of a picture of noise)"
    return Finding(what, "fails" if localizer.outcome in _FAILED else "works", shown(seen))


def _get(client: BoundedClient, url: str) -> str | None:
    import openai

    try:
        return client.within_time(lambda: str(client.openai.get(url, cast_to=str)))
    except openai.APIStatusError:
        return None


def _settings(client: BoundedClient) -> tuple[_Settings | None, str]:
    """What the plugin's routes say; else why they do not."""
    import openai

    try:
        body = client.within_time(lambda: client.openai.get("/plugins/crop/settings", cast_to=str))
        return _read(_Settings, body), ""
    except (openai.APIStatusError, EndpointError) as error:
        if isinstance(error, openai.APIStatusError) and error.status_code == _NOT_IMPLEMENTED:
            return None, said_by(error)
    return (
        None,
        "the playground needs VLLM_PLUGINS=crop at the server; some routers pass no routes of plugins",
    )


def _metrics(client: BoundedClient, address: str) -> Finding:
    found = _get(client, _root(address) + "/metrics") or ""
    if "crop:requests_total" in found:
        return Finding("metrics", "works", "crop:* on /metrics")
    return Finding("metrics", "absent", "no crop:* on /metrics: let Prometheus scrape the servers themselves")


def _versions(client: BoundedClient, address: str, settings: _Settings | None) -> Finding:
    try:
        vllm = _Version.model_validate_json(_get(client, _root(address) + "/version") or "{}").version
    except ValidationError:  # a page of what is in front
        vllm = None
    known = {"vllm": vllm, "vllm-crop": settings.version if settings else None}
    told = ", ".join(f"{name} {version or 'not told'}" for name, version in known.items())
    return Finding("versions", "works" if any(known.values()) else "absent", shown(told))


def _root(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
