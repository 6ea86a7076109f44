# SPDX-License-Identifier: Apache-2.0
"""The `hf_overrides` callable that selects our model classes; it travels with the config to every process."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vllm_crop.config import PositionIds
from vllm_crop.errors import InvalidConfigError
from vllm_crop.families.registry import VisionGeometry, family_of, geometry_from_configs

HfConfig = Any
UserOverrides = Mapping[str, Any] | Callable[[HfConfig], HfConfig]


def compose_hf_overrides(
    crop: Mapping[str, Any], user_overrides: UserOverrides
) -> Callable[[HfConfig], HfConfig]:
    """A picklable callable that applies the user's own overrides first, then ours."""
    return partial(apply_overrides, crop=dict(crop), user_overrides=user_overrides)


def apply_overrides(hf_config: HfConfig, crop: Mapping[str, Any], user_overrides: UserOverrides) -> HfConfig:
    """Name the Crop architectures and attach the settings as `hf_config.crop`.

    Raises:
        UnsupportedModelError: the checkpoint is none we can prune.
        InvalidConfigError: it cannot have the position ids asked for.
    """
    if callable(user_overrides):
        hf_config = user_overrides(hf_config)
    else:
        _update(hf_config, user_overrides)
    if hf_config.model_type.startswith("dummy_"):  # vLLM asks whether overrides change the model type
        return hf_config
    configuration = hf_config.to_dict()
    geometry = geometry_from_configs(configuration, {})
    position_ids = settle_position_ids(crop.get("position_ids"), geometry)
    hf_config.architectures = [f"Crop{family_of(configuration)}"]
    hf_config.crop = {**crop, "position_ids": position_ids}
    if position_ids == "original" and not geometry.uses_mrope:
        # At the top level only: the runner then asks the model for positions (three equal rows of them),
        # while the language model below keeps its plain 1-D RoPE.
        hf_config.mrope_section = [1, 0, 0]
    return hf_config


def settle_position_ids(asked: PositionIds | None, geometry: VisionGeometry) -> PositionIds:
    """Those that are asked for, or the model's own.

    Raises:
        InvalidConfigError: the model cannot have them.
    """
    if asked == "renumbered" and geometry.uses_mrope:
        raise InvalidConfigError(
            "--crop-config position_ids='renumbered' is not possible for a model with M-RoPE, whose position "
            "ids are rows and columns of the image: leave it out"
        )
    return asked or ("original" if geometry.uses_mrope else "renumbered")


def _update(hf_config: HfConfig, overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        nested = getattr(hf_config, key, None)
        if isinstance(value, Mapping) and hasattr(nested, "model_type"):
            _update(nested, value)
        else:
            setattr(hf_config, key, value)
