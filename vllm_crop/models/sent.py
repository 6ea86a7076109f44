# SPDX-License-Identifier: Apache-2.0
"""Which items go to the engine with their data, and which are only named."""

from typing import Any


def newly_sent(prompt: Any) -> list[str]:
    """The items of a prompt whose data goes along: vLLM's cache did not know them before."""
    if not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
        return []
    return [
        mm_hash
        for modality, items in prompt["mm_kwargs"].items()
        for item, mm_hash in zip(items, prompt["mm_hashes"][modality], strict=True)
        if item is not None
    ]
