# SPDX-License-Identifier: Apache-2.0
"""The files of a compressor: found, read once, and checked before any worker starts.

A folder, or a repository on the Hugging Face Hub, has

    config.json         model_type "crop_plc", its shape, the model it was trained for, how it was trained
    model.safetensors   the weights
    README.md           the card

They are read while a server's configuration is made, which then carries a fingerprint of the first two to
every worker: whoever finds other weights under the same name fails, and cached embeddings are named by it. No
torch.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_crop.compression.settings import (
    ADVICE,
    MODEL_TYPE,
    WEIGHTS_FILE,
    ResamplerCard,
    ResamplerConfig,
    ResamplerError,
)
from vllm_crop.families.checkpoint import CONFIG_FILE


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
                raise ResamplerError(f"resampler.weights {config.weights} has no {name}: {ADVICE}")
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
        raise ResamplerError(f"resampler.weights: {path} cannot be read ({error}): {ADVICE}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != MODEL_TYPE:
        raise ResamplerError(
            f"resampler.weights {folder} is no compressor: its config.json says model_type {kind!r}, not "
            f"{MODEL_TYPE!r}. {ADVICE[0].upper()}{ADVICE[1:]}"
        )
    try:
        return ResamplerCard.model_validate(found)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        raise ResamplerError(
            f"resampler.weights {folder} is no compressor of this version "
            f"({'.'.join(map(str, wrong['loc']))}: {wrong['msg']}): {ADVICE}"
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
