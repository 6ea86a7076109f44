# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's config.json and image processor settings, from a directory or the Hugging Face Hub.

Plain JSON, read without torch, transformers or vLLM.
"""

import json
from pathlib import Path
from typing import Any

from vllm_crop.errors import CropError
from vllm_crop.families.registry import VisionGeometry, geometry_from_configs

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"


class CheckpointFileError(CropError):
    """A file of the checkpoint is missing, unreachable or no JSON object."""


def load_geometry(model: str) -> VisionGeometry:
    """The geometry of a checkpoint.

    Args:
        model: a directory, or the name of a repository on the Hub.

    Raises:
        CheckpointFileError: a file is missing, unreachable or broken.
        UnsupportedModelError: the checkpoint is none we can prune.
    """
    config = load_model_config(model)
    # First without the processor's settings: a model of another kind may have none, and is told why.
    geometry_from_configs(config, {})
    return geometry_from_configs(config, load_image_processor_settings(model))


def load_model_config(model: str) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointFileError: the file is missing, unreachable or broken.
    """
    return _read_json(_locate(model, CONFIG_FILE))


def load_image_processor_settings(model: str) -> dict[str, Any]:
    """The image processor's settings, from the file transformers would take them from.

    Raises:
        CheckpointFileError: no file has them.
    """
    try:
        processor = _read_json(_locate(model, PROCESSOR_FILE))
    except _MissingFileError:
        processor = {}
    nested = processor.get("image_processor")
    return nested if isinstance(nested, dict) else _read_json(_locate(model, PREPROCESSOR_FILE))


class _MissingFileError(CheckpointFileError):
    pass


def _locate(model: str, filename: str) -> Path:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _download(model, filename)
    if not (folder / filename).is_file():
        raise _MissingFileError(f"{folder} has no {filename}")
    return folder / filename


def _download(model: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(model, filename))
    except HFValidationError:
        raise CheckpointFileError(f"{model!r} is neither a directory nor a name on the Hub") from None
    except RemoteEntryNotFoundError:
        raise _MissingFileError(f"{model} on the Hub has no {filename}") from None
    except LocalEntryNotFoundError:
        raise _MissingFileError(
            f"no directory {model!r}, {filename} of that name is not cached, and the Hub cannot be reached"
        ) from None
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointFileError(f"{filename} of {model!r}: the Hub answers {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise CheckpointFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
