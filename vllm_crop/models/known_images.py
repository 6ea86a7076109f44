# SPDX-License-Identifier: Apache-2.0
"""What images are known by: what they show, never the names (`uuid`) that clients give them.

A name only finds an image that was sent with it before, so that a later request can send the name alone. Keys
of caches are made of what an image shows (vllm/multimodal/hasher.py). Stock vLLM takes the name for the key:
two images of one name would share their features.
"""

import copy
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetools import LRUCache
from PIL import Image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_crop.config import shorten
from vllm_crop.crop_params import InvalidCropError
from vllm_crop.localizers.thumbnails import Picture, as_picture

MAX_NAMES = 65536  # images; what is kept of one, without its data, is a few hundred bytes
_SAME_FOR_ALL = None  # the salt under which an image is found by those who never sent it


@dataclass(frozen=True)
class KnownImage:
    """What is remembered of an image.

    Attributes:
        key: the hash of what it shows, as vLLM's caches of unpruned images have it.
        size: width and height in pixels.
        is_picture: whether parts of it can be cut out; not of a tensor of pixels.
    """

    key: str
    size: tuple[int, int]
    is_picture: bool = True


class KnownImages:
    """Remembers images that came with a name, their data as far as `max_bytes` allows.

    vLLM's processor cache keeps tensors of one region. Another region of an image known by its name needs the
    image again: its encoded bytes are kept, which are a small part of the tensors' size.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of image data; 0 keeps none."""
        self._lock = threading.Lock()  # vLLM may process requests in several threads
        self._images: LRUCache[bytes, KnownImage] = LRUCache(MAX_NAMES)
        self._data: LRUCache[str, Any] = LRUCache(max_bytes, getsizeof=_num_bytes)

    def remember(self, name: str, salt: str | None, image: KnownImage, data: Any) -> None:
        """Note an image that came with a name.

        Args:
            name: of any length.
            salt: the request's `cache_salt`.
            data: a PIL image, vLLM's MediaWithBytes around one, or an array.
        """
        with self._lock:
            self._images[_short(name, salt)] = image
            # A tenant that has a salt takes no name away from those who have none.
            self._images.setdefault(_short(name, _SAME_FOR_ALL), image)
            if image.key not in self._data and _num_bytes(data) <= self._data.maxsize:
                self._data[image.key] = _kept(data)

    def find(self, name: str, salt: str | None) -> KnownImage | None:
        """The image last sent with this name: by requests of this salt, else by any, as stock vLLM has it."""
        with self._lock:
            for scope in (salt, _SAME_FOR_ALL):
                if (image := self._images.get(_short(name, scope))) is not None:
                    return image
        return None

    def picture_of(self, image: KnownImage) -> Picture | None:
        """The image for a localizer, decoded when it is looked at; None if its data is forgotten."""
        with self._lock:
            kept = self._data.get(image.key)
        if isinstance(kept, _Encoded):
            return Picture(kept.decode, kept.original_bytes, kept.io_config)
        return as_picture(kept)

    def data_of(self, image: KnownImage) -> Any:
        """The image as it was sent, decoded as it was then; None if its data is forgotten."""
        with self._lock:
            kept = self._data.get(image.key)
        return kept.decode() if isinstance(kept, _Encoded) else kept


@dataclass(frozen=True)
class RequestImages:
    """The images of a request.

    Attributes:
        hashes: vLLM's cache keys of all items by modality, those of images that came with their data by what
            they show.
        keys: those of the images, also of images that came as a name alone.
        sizes: width and height in pixels, None where they are not known.
        by_name: the images that came as a name alone and are known, by index.
        named: names, images and data of those that came with both.
    """

    hashes: Mapping[str, Sequence[str]]
    keys: tuple[str, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    by_name: Mapping[int, KnownImage]
    named: Sequence[tuple[str, KnownImage, Any]] = ()


def identify(
    inputs: ProcessorInputs,
    hashes_of: Callable[[ProcessorInputs], Mapping[str, Sequence[str]]],
    known: KnownImages | None,
    salt: str | None,
) -> RequestImages:
    """Find out what every image of a request shows, and how large it is.

    Args:
        hashes_of: vLLM's own keys, which are names where names are given.
        known: where names are looked up; None where vLLM has no cache that would know them either.

    Raises:
        InvalidCropError: a name is no string, or stands for two images.
    """
    images: Any = inputs.mm_data_items.get("image") or ()
    data = [images.get(index) for index in range(len(images))]
    uuids = _checked_uuids(inputs, len(images))
    names: Sequence[str] = ()
    if any(uuid is not None for uuid in uuids):
        others = {name: ids for name, ids in (inputs.mm_uuid_items or {}).items() if name != "image"}
        trusted = [uuid if image is None else None for uuid, image in zip(uuids, data, strict=True)]
        hashes = hashes_of(replace(inputs, mm_uuid_items={**others, "image": trusted}))
        # As vLLM would key them: a name stands for an image processed with certain settings.
        given = [uuid or "" for uuid in uuids]
        names = hashes_of(replace(inputs, mm_uuid_items={**others, "image": given}))["image"]
    else:
        hashes = hashes_of(inputs)
    keys = list(hashes.get("image", ()))
    sizes: list[tuple[int, int] | None] = [None] * len(images)
    by_name: dict[int, KnownImage] = {}
    shown: list[tuple[str | None, str]] = []
    for index, image in enumerate(data):
        if image is not None:
            shown.append((uuids[index], keys[index]))
            continue
        # As in stock vLLM, a name alone means an image of an earlier request.
        found = None if known is None else known.find(names[index], salt)
        if found is None:
            keys[index] = hashlib.blake2b(b"unknown name " + keys[index].encode(), digest_size=32).hexdigest()
        else:
            by_name[index] = found
            keys[index], sizes[index] = found.key, found.size
            shown.append((uuids[index], found.key))
    _refuse_contradictions(shown)
    # With their encoded bytes, which `get` takes off.
    sent = images.get_all_items_for_hash() if images else ()
    named: list[tuple[str, KnownImage, Any]] = []
    for index, image in enumerate(data):
        if image is None or not isinstance(images, ImageProcessorItems):
            continue  # embeddings have no size, and pass vLLM's caches by
        size = images.get_image_size(index)
        sizes[index] = size.width, size.height
        if uuids[index] is not None:
            image_size = size.width, size.height
            known_image = KnownImage(keys[index], image_size, as_picture(image) is not None)
            named.append((names[index], known_image, sent[index]))
    return RequestImages(hashes, tuple(keys), tuple(sizes), by_name, named)


def _checked_uuids(inputs: ProcessorInputs, num_images: int) -> list[str | None]:
    uuids: list[Any] = list((inputs.mm_uuid_items or {}).get("image") or [None] * num_images)
    for uuid in uuids:
        if uuid is not None and not isinstance(uuid, str):
            raise InvalidCropError("uuid", f"must be a string, got {shorten(uuid)}")
    return uuids


def _refuse_contradictions(shown: Sequence[tuple[str | None, str]]) -> None:
    claimed: dict[str, str] = {}
    for uuid, key in shown:
        if uuid is not None and claimed.setdefault(uuid, key) != key:
            raise InvalidCropError("uuid", f"{shorten(uuid)} stands for two different images")


@dataclass(frozen=True)
class _Encoded:
    """An image's bytes with what turned them into pixels (vllm/multimodal/media/image.py)."""

    original_bytes: bytes
    io_config: Mapping[str, Any] | None

    def decode(self) -> Any:
        # Without a configuration the image had the mode that was asked for.
        options = dict(self.io_config or {"image_mode": None})
        return ImageMediaIO(**options).load_bytes(self.original_bytes)


def _kept(data: Any) -> Any:
    if isinstance(data, MediaWithBytes):
        return _Encoded(data.original_bytes, data.io_config)
    # Offline it is the caller's own, who may draw on it: its key would then stand for another image.
    return data.copy() if isinstance(data, Image.Image) else copy.deepcopy(data)


def _num_bytes(data: Any) -> int:
    if isinstance(data, _Encoded | MediaWithBytes):
        return len(data.original_bytes)
    if isinstance(data, Image.Image):
        return data.width * data.height * len(data.getbands())
    return int(getattr(data, "nbytes", 1))


def _short(name: str, salt: str | None) -> bytes:
    """A key that takes no more room than any other: a name may be a megabyte long."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (salt, name):
        text = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%d:" % (part is None, len(text)))
        digest.update(text)
    return digest.digest()
