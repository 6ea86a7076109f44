# SPDX-License-Identifier: Apache-2.0
"""The folder of a compressor's weights: what its config.json says, and which checkpoints it fits.

Such a folder, or a repository on the Hugging Face Hub, has

    config.json         model_type "crop_plc", its shape, the model it was trained for, how it was trained
    model.safetensors   the weights
    README.md           the card

Read once, while a server's configuration is made, which then carries a fingerprint of both files to every
worker: whoever loads other weights under the same name fails, and cached embeddings are named by it.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_crop.errors import CropError
from vllm_crop.families.checkpoint import CONFIG_FILE
from vllm_crop.families.model_shape import ModelShape, feature_size, merge_size

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
MODEL_TYPE = "crop_plc"
NUM_ZONES = 3  # far away, region, rim: those that are read, of `vllm_crop.planning.plan.Zones.codes`
_TRAIN = "train a compressor for the model (docs/compressing.md), or use compression 'pool'"


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
                f"{'; '.join(differences)}. {_TRAIN[0].upper()}{_TRAIN[1:]}"
            )


def find_weights(config: ResamplerConfig) -> Path:
    """The folder that a server's settings name, fetched from the Hub if it is none.

    Raises:
        ResamplerError: there is none, or it lacks a file.
    """
    assert config.weights is not None
    with _as_resampler_error(config.weights):
        folder = Path(config.weights).expanduser()
        if not folder.is_dir():
            folder = _download(config.weights, config.revision)
        elif config.revision is not None:
            raise ResamplerError(
                f"resampler.revision {config.revision!r} is of a repository on the Hub, and "
                f"{config.weights} is a folder: leave it out"
            )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ResamplerError(f"resampler.weights {config.weights} has no {name}: {_TRAIN}")
    return folder


@contextmanager
def _as_resampler_error(name: str) -> Iterator[None]:
    """Say whose files cannot be read.

    Raises:
        ResamplerError: in the place of what Python raises.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # of `expanduser`, for a user that is none
        raise ResamplerError(f"resampler.weights {name[:200]} cannot be read: {error}") from None


def read_card(folder: Path) -> ResamplerCard:
    """The config.json of a folder.

    Raises:
        ResamplerError: it is of something else, or of another version.
    """
    with _as_resampler_error(str(folder)):
        content = (folder / CONFIG_FILE).read_bytes()
    return parse_card(content, folder)


def parse_card(content: bytes, folder: Path) -> ResamplerCard:
    """A config.json; `folder` it is of, for messages.

    Raises:
        ResamplerError: it is of something else, or of another version.
    """
    path = folder / CONFIG_FILE
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ResamplerError(f"resampler.weights: {path} cannot be read ({error}): {_TRAIN}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != MODEL_TYPE:
        raise ResamplerError(
            f"resampler.weights {folder} is no compressor: its config.json says model_type {kind!r}, not "
            f"{MODEL_TYPE!r}. {_TRAIN[0].upper()}{_TRAIN[1:]}"
        )
    try:
        return ResamplerCard.model_validate(found)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        raise ResamplerError(
            f"resampler.weights {folder} is no compressor of this version "
            f"({'.'.join(map(str, wrong['loc']))}: {wrong['msg']}): {_TRAIN}"
        ) from None


def read_files(folder: Path) -> tuple[bytes, bytes]:
    """The config.json and the weights of a folder.

    Raises:
        ResamplerError: one cannot be read.
    """
    with _as_resampler_error(str(folder)):
        return (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()


def require_tensors(card: ResamplerCard, weights: bytes, folder: Path) -> None:
    """Check by a file's header that it has the weights that its config.json promises.

    Whoever starts a server shall hear of it at once, and not from a worker that dies a minute later.

    Raises:
        ResamplerError: it has others, or is cut off.
    """
    try:
        (length,) = struct.unpack("<Q", weights[:8])
        header = json.loads(weights[8 : 8 + length])
        found = {name: part["shape"] for name, part in header.items() if name != "__metadata__"}
        end = 8 + length + max(part["data_offsets"][1] for name, part in header.items() if name in found)
    except (struct.error, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ResamplerError(f"resampler.weights {folder / WEIGHTS_FILE} cannot be read: {error!r}") from None
    if end != len(weights):
        raise ResamplerError(
            f"resampler.weights {folder / WEIGHTS_FILE} cannot be read: it has {len(weights)} bytes, and its "
            f"header promises {end}"
        )
    wanted = card.shape.tensors()
    if wrong := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        raise ResamplerError(
            f"resampler.weights {folder}: model.safetensors does not fit its config.json ({wrong[0]} has "
            f"shape {found.get(wrong[0])}, not {wanted.get(wrong[0])})"
        )


def fingerprint_of(config: bytes, weights: bytes) -> str:
    """SHA-256 of both files, which decide what comes out."""
    return hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()


def require_fingerprint(config: ResamplerConfig, files: tuple[bytes, bytes]) -> str:
    """The fingerprint of a folder's files, which must be the one that the settings say, if they say one.

    Raises:
        ResamplerError: it is another.
    """
    found = fingerprint_of(*files)
    if config.fingerprint not in (None, found):
        raise ResamplerError(
            f"resampler.weights {config.weights} have changed: their fingerprint is {found}, and "
            f"{config.fingerprint} is asked for. Start again with the weights that are meant"
        )
    return found


def with_compressor(settings: Mapping[str, Any]) -> tuple[dict[str, Any], ResamplerCard | None]:
    """The settings of a server with the fingerprint of the weights they name; and what these are for.

    Args:
        settings: of CropConfig, as an operator gives them; checked.

    Raises:
        ResamplerError: the weights cannot be used.
    """
    named = ResamplerConfig.model_validate(settings.get("resampler") or {})
    if named.weights is None:
        return dict(settings), None
    folder = find_weights(named)
    files = read_files(folder)
    card, fingerprint = parse_card(files[0], folder), require_fingerprint(named, files)
    require_tensors(card, files[1], folder)
    # Workers may have another working directory, and a branch may move: what was found is what they load.
    if Path(named.weights).expanduser().is_dir():
        found: dict[str, str | None] = {"weights": str(folder.resolve())}
    else:
        found = {"revision": folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else named.revision}
    return {**settings, "resampler": {**named.model_dump(), **found, "fingerprint": fingerprint}}, card


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except HFValidationError:
        raise ResamplerError(
            f"resampler.weights {name!r} is neither a directory nor a name on the Hub"
        ) from None
    except LocalEntryNotFoundError:
        raise ResamplerError(
            f"resampler.weights: there is no directory {name!r}, nothing of that name is cached, and the Hub "
            "cannot be reached"
        ) from None
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ResamplerError(f"resampler.weights {name!r}: the Hub answers {reason}") from None
