# SPDX-License-Identifier: Apache-2.0
"""Compressors as operators name them, and as their config.json has them: sizes, and the model they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_crop.errors import CropError
from vllm_crop.families.model_shape import ModelShape, feature_size, merge_size

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
MODEL_TYPE = "crop_plc"
NUM_ZONES = 3  # far away, region, rim: those that are read, of `vllm_crop.planning.plan.Zones.codes`
ADVICE = "train a compressor for the model (docs/compressing.md), or use compression 'pool'"


class ResamplerError(CropError):
    """The weights of a compressor cannot be used; the message names them and what to do."""


class ResamplerConfig(BaseModel):
    """Whose weights compression 'resampler' uses."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weights: str | None = Field(
        default=None,
        max_length=4000,
        description="Folder of the compressor's weights, or the name of a repository on the Hub.",
    )
    revision: str | None = Field(
        default=None, max_length=200, description="Branch, tag or commit of that repository."
    )
    fingerprint: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 that the weights must have, as the server logs it at start. Left out: whatever "
        "is found then.",
    )


class ResamplerShape(BaseModel):
    """The sizes of a compressor.

    Attributes:
        feature_size: columns of a visual token's features: the model's hidden size, and as much again for
            each layer of deepstack.
        width: of queries, keys and values, all heads together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    feature_size: int = Field(ge=1, le=1 << 20)
    width: int = Field(ge=4, le=1 << 16)
    num_heads: int = Field(ge=1, le=1024)
    mlp_size: int = Field(ge=1, le=1 << 20)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 x {self.num_heads} heads")
        return self

    def tensors(self) -> dict[str, list[int]]:
        """The names and shapes of a compressor's weights (`vllm_crop.compression.resampler`)."""
        columns, width, mlp = self.feature_size, self.width, self.mlp_size
        linear = {
            **dict.fromkeys(("query", "key", "value"), (width, columns)),
            **{"out": (columns, width), "mlp_in": (mlp, columns), "mlp_out": (columns, mlp)},
        }
        norms = {f"{name}.{of}": [columns] for name in ("norm", "mlp_norm") for of in ("weight", "bias")}
        return {
            **{"zone_query": [NUM_ZONES, width], "size_query": [width]},
            **norms,
            **{f"{name}.weight": list(shape) for name, shape in linear.items()},
            **{f"{name}.bias": [shape[0]] for name, shape in linear.items()},
        }

    @classmethod
    def suited_to(cls, feature_size: int) -> Self:
        """A compressor a quarter as wide as the model's features, with heads of 64 or less."""
        width = max(16, 1 << max(0, (feature_size // 4 - 1).bit_length()))
        return cls(
            feature_size=feature_size,
            width=width,
            num_heads=max(1, width // 64) if width >= 64 else 1,
            mlp_size=width,
        )


class ResamplerCard(BaseModel):
    """The config.json of a compressor.

    Attributes:
        base_model: name of the checkpoint it was trained for, with its revision on the Hub if it has one.
        base: what of that checkpoint must be as it was.
        spatial_merge_size: patches in a row of a visual token, where models have them.
        training: recipe, data, steps, versions; as the trainer wrote it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_type: Literal["crop_plc"] = "crop_plc"
    version: Literal[1] = 1
    shape: ResamplerShape
    base_model: str
    base_model_revision: str | None = None
    base: ModelShape
    spatial_merge_size: int | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def untrained(cls, shape: ResamplerShape, base_model: str, model: Mapping[str, Any]) -> Self:
        """For a checkpoint with this config.json; the name of a folder is its last part."""
        return cls(
            shape=shape,
            base_model=Path(base_model).name if Path(base_model).is_dir() else base_model,
            base_model_revision=model.get("_commit_hash"),
            base=ModelShape.of(model),
            spatial_merge_size=merge_size(model),
        )

    def require_fit(self, name: str, model: Mapping[str, Any]) -> None:
        """Refuse another model than the one they were trained for.

        Args:
            name: of the weights, for the message.
            model: config.json, or the `to_dict()` of a loaded configuration.

        Raises:
            ResamplerError: the models differ in shape.
        """
        differences = self.base.differences(ModelShape.of(model))
        if (found := feature_size(model)) != self.shape.feature_size:
            differences.append(f"features of {found} columns, not {self.shape.feature_size}")
        if (merges := merge_size(model)) != self.spatial_merge_size:
            differences.append(f"spatial_merge_size {merges}, not {self.spatial_merge_size}")
        if differences:
            raise ResamplerError(
                f"resampler.weights {name} were trained for another model, {self.base_model}: this one has "
                f"{'; '.join(differences)}. {ADVICE[0].upper()}{ADVICE[1:]}"
            )
