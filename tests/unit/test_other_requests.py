# SPDX-License-Identifier: Apache-2.0
"""What is kept of a request that vLLM turns into a chat completion's."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_crop.frontend.other_requests import keep_crop


class Other(BaseModel):
    """Of an API that has no `vllm_xargs`."""

    model_config = ConfigDict(extra="allow")


class Chat(BaseModel):
    """As vLLM's model: one of the fields is its own."""

    model_config = ConfigDict(extra="allow")
    vllm_xargs: dict[str, str | int] | None = None


def kept(**fields: Any) -> dict[str, Any]:
    chat = Chat()
    keep_crop(Other.model_validate(fields), chat)
    return chat.model_dump(exclude_none=True)


def test_the_field_is_kept_and_nothing_else() -> None:
    crop = {"regions": [[0, 0, 1, 1]]}
    assert kept(crop=crop, extra_body={"crop": 1}, other=2) == {"crop": crop, "extra_body": {"crop": 1}}


def test_no_field_of_vllms_own_gets_what_nobody_has_validated() -> None:
    assert kept(vllm_xargs="no object", crop={}) == {"crop": {}}
    assert kept(vllm_xargs={"crop": {"nested": [1]}}) == {}
