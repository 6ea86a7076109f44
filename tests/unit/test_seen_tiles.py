# SPDX-License-Identifier: Apache-2.0
"""Image processors of transformers that are kept from finishing tiles."""

import copy
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

from tests.pictures import noise_image
from vllm_crop.models.seen_tiles import only_tiles

torch = pytest.importorskip("torch")
PINPOINTS = [[64, 128], [128, 64], [128, 128], [192, 128]]
PICTURES = (noise_image(1, 90, 140), noise_image(2, 150, 160), noise_image(3, 130, 190))


def llava_next() -> Any:
    from transformers import LlavaNextImageProcessor

    sides = {"shortest_edge": 64}
    return LlavaNextImageProcessor(size=sides, crop_size=64, image_grid_pinpoints=PINPOINTS)


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionImageProcessor

    return LlavaOnevisionImageProcessor(size={"height": 64, "width": 64}, image_grid_pinpoints=PINPOINTS)


@pytest.fixture(params=[llava_next, llava_onevision])
def image_processor(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    return make()


def tiles_of(image_processor: Any) -> list[Any]:
    """Of all pictures, `[tiles, 3, side, side]` each, padded where others have more."""
    # As vLLM calls it: each picture is one of a prompt.
    called = [[picture] for picture in PICTURES]
    return list(image_processor(called, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("wanted", [[[0, 2], None, [0]], [[0], [0, 4, 1], [0, 6]], [None, None, None]])
def test_what_is_made_is_what_was_picked(image_processor: Any, wanted: list[list[int] | None]) -> None:
    every = tiles_of(image_processor)
    with only_tiles(image_processor, wanted) as seen:
        some = tiles_of(image_processor)
    assert seen.cut == len(PICTURES)
    for all_tiles, tiles, places in zip(every, some, wanted, strict=True):
        kept = range(len(tiles)) if places is None else places
        assert torch.equal(tiles[: len(kept)], all_tiles[list(kept)])
    assert [one.shape for one in tiles_of(image_processor)] == [one.shape for one in every], "asked no more"


def test_nothing_else_is_normalised(image_processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    stock = image_processor.rescale_and_normalize

    def count(tiles: Any, *rest: Any) -> Any:
        made.append(len(tiles))
        return stock(tiles, *rest)

    monkeypatch.setattr(image_processor, "rescale_and_normalize", count)
    with only_tiles(image_processor, [[0, 1], [0], [0, 3, 2]]):
        tiles_of(image_processor)
    assert sum(made) == 6


def test_it_is_printed_saved_and_copied_as_before(image_processor: Any) -> None:
    before = image_processor.to_dict()
    with only_tiles(image_processor, [[0], [0], [0]]):
        tiles_of(image_processor)
    assert image_processor.to_dict() == before
    assert repr(image_processor)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(image_processor)))
    for _ in range(2):  # wrapped once, whoever asks
        with only_tiles(copied, [[0, 1], [0], [0]]) as seen:
            assert [len(one) for one in tiles_of(copied)] == [2, 2, 2]
        assert seen.cut == 3


def test_another_thread_asks_for_itself(image_processor: Any) -> None:
    found = []
    with only_tiles(image_processor, [[0], [0], [0]]):
        thread = Thread(target=lambda: found.extend(tiles_of(image_processor)))
        thread.start()
        thread.join()
        assert [len(one) for one in tiles_of(image_processor)] == [1, 1, 1]
    assert min(len(one) for one in found) > 1


def test_one_that_cuts_in_another_way_is_left_alone() -> None:
    other = object()
    with only_tiles(other, [[0]]) as seen:
        pass
    assert seen.cut == 0
