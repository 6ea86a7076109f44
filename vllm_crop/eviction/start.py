# SPDX-License-Identifier: Apache-2.0
"""Settles layers and label ids while the model's configuration is made, for every process to read."""

import importlib
import re
from typing import Any

from vllm_crop.eviction.labels import choose_label_ids
from vllm_crop.eviction.settings import EvictionSettings

# Tokens that checkpoints keep for later use: `<|reserved_special_token_0|>`, `<unused7>`, `[unused7]`.
_RESERVED = re.compile(r"(<\|?|\[)(reserved|unused|placeholder|extra_id)[\w-]*(\|?>|\])")


def attach_eviction(model_config: Any, stages: tuple[int, ...]) -> None:
    """Write the server's EvictionSettings into the HF config.

    Raises:
        UnsupportedModelError: the vocabulary has no id to spare.
    """
    if model_config.skip_tokenizer_init:
        label_ids: tuple[int, ...] = ()  # refused once the engine's configuration is complete
    else:
        tokenizer = importlib.import_module("vllm.tokenizers").cached_tokenizer_from_config(model_config)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        used = _used_by_model(model_config.hf_config)
        spare = sorted(
            token_id
            for token, token_id in vocabulary.items()
            if _RESERVED.fullmatch(token) and token_id not in used
        )
        known = {*vocabulary.values(), *used}
        label_ids = choose_label_ids(len(stages), model_config.get_vocab_size(), known, spare)
    EvictionSettings(stages, label_ids).attach(model_config.hf_config)


def _used_by_model(hf_config: Any) -> set[int]:
    """Ids the model's own configuration gives a meaning: images, beginning, end, padding."""
    configs = (hf_config.to_dict(), hf_config.get_text_config().to_dict())
    used: set[int] = set()
    for key, value in (entry for config in configs for entry in config.items()):
        if key.endswith(("token_id", "token_index")) and value is not None:
            used |= set(value if isinstance(value, list) else [value])
    return used
