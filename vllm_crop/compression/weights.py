# SPDX-License-Identifier: Apache-2.0
"""Compressors from and to their folders. torch only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vllm_crop.compression.files import (
    find_weights,
    parse_card,
    read_files,
    require_fingerprint,
    require_tensors,
)
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.settings import (
    CARD_FILE,
    WEIGHTS_FILE,
    ResamplerCard,
    ResamplerConfig,
    ResamplerError,
    ResamplerShape,
)
from vllm_crop.families.checkpoint import CONFIG_FILE
from vllm_crop.families.model_shape import feature_size

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_resampler(config: ResamplerConfig, dtype: torch.dtype) -> Resampler:
    """The compressor that a server's settings name, on the CPU.

    Raises:
        ResamplerError: it cannot be read, or is another than the settings say.
    """
    folder = find_weights(config)
    files = read_files(folder)
    require_fingerprint(config, files)
    return _require_finite(_made_of(files, folder).to(dtype), folder)


def read_resampler(folder: Path) -> Resampler:
    """The compressor in a folder, in float32 on the CPU.

    Raises:
        ResamplerError: the weights are not those that its config.json promises.
    """
    return _require_finite(_made_of(read_files(folder), folder), folder)


def _made_of(files: tuple[bytes, bytes], folder: Path) -> Resampler:
    card = parse_card(files[0], folder)
    require_tensors(card, files[1], folder)
    try:
        weights = load(files[1])
    except SafetensorError as error:
        raise ResamplerError(f"resampler.weights {folder / WEIGHTS_FILE} cannot be read: {error}") from None
    if strange := [name for name, part in weights.items() if part.dtype not in _DTYPES]:
        raise ResamplerError(
            f"resampler.weights {folder}: {strange[0]} is of {weights[strange[0]].dtype}, and must be of "
            "float32, float16 or bfloat16"
        )
    with torch.device("meta"):  # nothing to be overwritten takes memory
        resampler = Resampler(card.shape)
    resampler.load_state_dict({name: part.float() for name, part in weights.items()}, assign=True)
    return resampler.eval().requires_grad_(False)


def _require_finite(resampler: Resampler, folder: Path) -> Resampler:
    for name, part in resampler.named_parameters():
        if not bool(part.isfinite().all()):
            raise ResamplerError(
                f"resampler.weights {folder}: {name} has numbers that are none in {part.dtype}"
            )
    return resampler


def write_untrained(folder: Path, name: str, model: Mapping[str, Any]) -> Path:
    """Write weights that do what compression "pool" does, for a model with this config.json.

    Args:
        name: of the model.

    Raises:
        ResamplerError: its config.json does not say how wide its features are.
    """
    columns = feature_size(model)
    if columns is None:
        raise ResamplerError(f"the config.json of {name} has no hidden_size to make a compressor for")
    shape = ResamplerShape.suited_to(columns)
    card = ResamplerCard.untrained(shape, name, model)
    write_resampler(folder, Resampler(shape), card, f"# An untrained compressor for {card.base_model}\n")
    return folder


def write_resampler(folder: Path, resampler: Resampler, card: ResamplerCard, text: str) -> None:
    """Write a folder that `resampler.weights` can name.

    Args:
        text: of the card, markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(card.model_dump(), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(f"{content}\n", encoding="utf-8")
    weights = {name: part.detach().float().contiguous() for name, part in resampler.state_dict().items()}
    # Not `save_file`, which lets nobody but the owner read it.
    (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
