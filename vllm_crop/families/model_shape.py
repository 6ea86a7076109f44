# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint's config.json things depend on that are learned of it: calibrations, compressors."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class ModelShape(BaseModel):
    """What of a checkpoint must be as it was: layers and features of another model mean something else.

    Weights may differ: a fine-tuned model usually looks where its base does, and `check` names both. None is
    what a config.json leaves out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    architecture: str
    model_type: str | None
    num_hidden_layers: int | None
    hidden_size: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Self:
        """Read a config.json, or the `to_dict()` of a loaded configuration."""
        text = language_config(model)
        architectures = model.get("architectures") or [""]
        return cls(
            architecture=str(architectures[0]).removeprefix("Crop"),
            model_type=model.get("model_type"),
            **{
                name: text.get(name)
                for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
            },
        )

    def differences(self, other: Self) -> list[str]:
        """Such as "num_hidden_layers 28, not 36" where both say something else than the other."""
        ours, others = self.model_dump(), other.model_dump()
        return [
            f"{name} {others[name]}, not {value}"
            for name, value in ours.items()
            if value is not None and others[name] is not None and others[name] != value
        ]


def language_config(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the language model, which may be all of it."""
    found: Mapping[str, Any] = model.get("text_config") or model.get("llm_config") or model
    return found


def feature_size(model: Mapping[str, Any]) -> int | None:
    """How many columns a visual token's features have where they are compressed.

    The language model's hidden size, and as much again for each layer of deepstack; None of a model that does
    not say.
    """
    vision = model.get("vision_config") or {}
    hidden: int | None = language_config(model).get("hidden_size")
    return hidden and hidden * (1 + len(vision.get("deepstack_visual_indexes") or ()))


def merge_size(model: Mapping[str, Any]) -> int | None:
    """Patches in a row of a visual token; None of a model that does not say."""
    vision = model.get("vision_config") or {}
    found: int | None = model.get("spatial_merge_size") or vision.get("spatial_merge_size")
    return found
