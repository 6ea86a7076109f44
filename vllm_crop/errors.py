# SPDX-License-Identifier: Apache-2.0
"""What stops a server or a command on purpose. What is wrong with one request is request.InvalidCropError.

CropError
├── UnsupportedVersionError   this vLLM is not one we know
├── UnsupportedModelError     this checkpoint cannot be pruned, with the reason
├── MissingCompilerError      a server on a CPU could not compile what it must while it serves
├── UnsupportedFlagError      a vLLM option that does not go together with pruning
├── InvalidConfigError        a setting of ours is wrong, or this model cannot have it
└── UnsupportedImageError     the checkpoint's own image processor refuses such an image
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CropError(ValueError):
    """Base of our errors, most of which stop a server at start; the message says what to change."""


class UnsupportedVersionError(CropError):
    """The installed vLLM is outside the supported range or has another shape than expected."""


@contextmanager
def reads_settings() -> Iterator[None]:
    """Say it in words where a setting of vLLM's is gone, of which it is asked whether it stands in the way.

    Raises:
        UnsupportedVersionError: naming the setting.
    """
    try:
        yield
    except AttributeError as error:
        raise UnsupportedVersionError(
            f"this vLLM has no setting {error.name} any more, which pruning may not go together with"
        ) from error


class UnsupportedModelError(CropError):
    """The checkpoint's architecture or vision tower is not supported."""


class MissingCompilerError(CropError):
    """torch cannot compile C++ here, which a server on a CPU needs once it is asked."""


class UnsupportedFlagError(CropError):
    """A vLLM option is set that pruning would silently break."""


class InvalidConfigError(CropError):
    """A value of `--crop-config` is none, or cannot be had with this model."""


class UnsupportedImageError(CropError):
    """An image of this shape cannot be processed, pruned or not: stock vLLM answers HTTP 400 too."""
