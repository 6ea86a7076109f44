# SPDX-License-Identifier: Apache-2.0
"""Settles layers and label ids while the model's configuration is made, for every process to read."""

import importlib
import re
from typing import Any

from vllm_crop.eviction.labels import choose_label_ids
from vllm_crop.eviction.settings import EvictionSettings

# Names of tokens that checkpoints keep for later use: Llama 3, Gemma, BERT-like vocabularies.
_RESERVED = re.compile(r"reserved|unused|placeholder_token|extra_id", re.IGNORECASE)


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
        spare = sorted(token_id for token, token_id in vocabulary.items() if _RESERVED.search(token))
        label_ids = choose_label_ids(len(stages), model_config.get_vocab_size(), vocabulary.values(), spare)
    EvictionSettings(stages, label_ids).attach(model_config.hf_config)
