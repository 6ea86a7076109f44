# SPDX-License-Identifier: Apache-2.0
"""Pruned images are seen in pieces: the small view, and the region at full size at its place."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import Qwen2VLImageProcessor

from tests.conftest import CheckpointOf
from tests.cpu.conftest import CHUNKED, Engine, Question, ReferenceFor, decided, reference_by
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, TWO_BOXES, cells, difference
from tests.families import (
    GLM4V,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Family,
)
from tests.foveated_reference import foveating
from tests.pictures import noise_image
from tests.sample_picture import draw_sample_picture
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.localizers import thumbnails
from vllm_crop.localizers.thumbnails import Picture, shrink
from vllm_crop.models.piece_pixels import pixels_of
from vllm_crop.models.placed_pieces import metadata_of_pieces
from vllm_crop.models.processor import REQUEST_KEY
from vllm_crop.planning.foveation import Piece, tower_tokens, whole_piece
from vllm_crop.planning.geometry import TokenGrid
from vllm_crop.request import CropRequest

pytestmark = pytest.mark.vllm_runtime
FAMILIES = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, GLM4V)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)

CROP: dict[str, Any] = {
    **{"compression": "foveate", "pruning_rate": 0.8, "method": "plc+ilp", "eviction_layers": [2]},
    "foveation": {"view_tokens": 24, "halo": 1, "rim_size": "half"},
}
LOCATING: dict[str, Any] = {
    **{"compression": "foveate", "pruning_rate": 0.8},
    "localizer": {"kind": "attention", "prompt": "{question}", "whole_below": 0, "thumbnail_tokens": 64},
}
HERE, THERE = cells(2, 3, 3, 4), cells(5, 1, 6, 2)
FIRST, SECOND, ODD = noise_image(600, 560, 448), noise_image(601, 512, 576), noise_image(602, 601, 397)
SCENARIOS = {
    "region": Question((FIRST,), {"regions": [HERE]}),
    "without a rim": Question((FIRST,), {"regions": [HERE], "rim": 0}),
    "at the border": Question((FIRST,), {"regions": [cells(6, 6, 7, 7)], "rim": 0.05}),
    "two boxes": Question((SECOND,), {"regions": [TWO_BOXES], "rim": 0}),
    "two images": Question((FIRST, SECOND), {"regions": [HERE, THERE]}),
    "one of two images": Question((FIRST, SECOND), {"regions": [None, THERE]}),
    "same image, two regions": Question((FIRST, FIRST), {"regions": [HERE, THERE]}),
    # The one's crop is where the other's half-size rim is, each in tokens of its own scale.
    "same window, two scales": Question((FIRST, FIRST), {"regions": [cells(0, 0, 0, 0), cells(0, 0, 1, 1)]}),
    "of no whole tokens": Question((ODD,), {"regions": [HERE], "method": "plc"}),
    "larger than the budget": Question((FIRST,), {"regions": [cells(1, 1, 4, 5)], "rim": 0}),
    "seen whole": Question((FIRST,), {"regions": [cells(0, 0, 7, 7)]}),
    "off": Question((FIRST,), {"regions": [HERE], "method": "off"}),
}
SEEN_WHOLE = {"seen whole", "off"}


@pytest.fixture(scope="module")
def engine_of(checkpoint_of: CheckpointOf) -> Callable[[Family], Engine]:
    return cache(
        lambda family: Engine(checkpoint_of(family, family.deep), crop_of(family), family, **CHUNKED)
    )


@pytest.fixture(scope="module")
def reference_of(checkpoint_of: CheckpointOf) -> Callable[[Family], ReferenceFor]:
    def make(family: Family) -> ReferenceFor:
        config = CropConfig.from_mapping(crop_of(family))
        return reference_by(foveating(family.reference, checkpoint_of(family, family.deep), config))

    return cache(make)


TILED = (LLAVA_NEXT, LLAVA_ONEVISION)
TILED_SCENARIOS = {
    "region": Question((noise_image(620, 500, 400),), {"regions": [cells(0, 0, 1, 1)]}),
    "two tiles and a rim": Question((noise_image(621, 300, 420),), {"regions": [cells(2, 1, 5, 1)]}),
    "two images": Question(
        (noise_image(622, 500, 400), noise_image(623, 700, 200)),
        {"regions": [cells(6, 6, 7, 7), cells(0, 0, 0, 7)]},
    ),
    "one of two images": Question(
        (noise_image(624, 500, 400), noise_image(625, 420, 300)), {"regions": [None, cells(0, 0, 1, 1)]}
    ),
    "same image, two regions": Question(
        (noise_image(626, 400, 400),) * 2, {"regions": [cells(0, 0, 1, 1), cells(6, 6, 7, 7)]}
    ),
    "seen whole": Question((noise_image(627, 500, 400),), {"regions": [cells(0, 0, 7, 7)]}),
    "off": Question((noise_image(628, 500, 400),), {"regions": [HERE], "method": "off"}),
}


def crop_of(family: Family) -> dict[str, Any]:
    """Tiles have no halo, and the view is one of them."""
    return {**CROP, "foveation": {"rim_size": "half"}} if family in TILED else CROP


def pieces_of(engine: Engine, image: Image.Image, crop: Any) -> Any:
    return decided(engine.processor, image, crop).pieces


@pytest.mark.parametrize("family", [*FAMILIES, *TILED], ids=str)
def test_all_scenarios_in_one_batch(
    engine_of: Callable[[Family], Engine], reference_of: Callable[[Family], ReferenceFor], family: Family
) -> None:
    engine, reference_for = engine_of(family), reference_of(family)
    pooled = CropConfig.from_mapping({**crop_of(family), "compression": "pool", "foveation": {}})
    scenarios = TILED_SCENARIOS if family in TILED else SCENARIOS
    answers = engine.ask(*scenarios.values())
    for (name, question), answer in zip(scenarios.items(), answers, strict=True):
        reference = reference_for(question, engine.config)
        control = reference_for(question, pooled)
        error, change = difference(answer, reference), difference(control, reference)
        print(f"{family}, {name}: {error:.1e}; all of the picture at full size: {change:.1e}")
        assert answer.num_prompt_tokens == control.num_prompt_tokens, name
        assert error <= TOLERANCE, name
        assert (change <= TOLERANCE) if name in SEEN_WHOLE else (change > NOTICEABLE), name


def test_unseen_tiles_can_be_left_out(checkpoint_of: CheckpointOf) -> None:
    """Where what is seen is less than the budget, the image takes no more."""
    crop = {**CROP, "pruning_rate": 0.3, "foveation": {"unseen_tiles": "left_out"}}
    checkpoint = checkpoint_of(LLAVA_NEXT, LLAVA_NEXT.deep)
    engine = Engine(checkpoint, crop, LLAVA_NEXT, **CHUNKED)
    of_plans, used_up = (
        reference_by(foveating(LLAVA_NEXT.reference, checkpoint, config))
        for config in (engine.config, CropConfig.from_mapping({**crop, "foveation": {}}))
    )
    answers = engine.ask(*TILED_SCENARIOS.values())
    for (name, question), answer in zip(TILED_SCENARIOS.items(), answers, strict=True):
        reference, control = of_plans(question, engine.config), used_up(question, engine.config)
        print(f"{name}: {difference(answer, reference):.1e}; {difference(answer, control):.1e}")
        assert difference(answer, reference) <= TOLERANCE, name
        assert (difference(answer, control) <= TOLERANCE) == (name in SEEN_WHOLE), name
        fewer = answer.num_prompt_tokens < control.num_prompt_tokens
        assert fewer == (name not in SEEN_WHOLE), name


class Overview(Question):
    """As a localizer asks."""

    def prompt(self, image: str = "") -> dict[str, Any]:
        asked = CropRequest(CropParams.parse(dict(self.crop or {})), limited=False, overview=True)
        return {**super().prompt(image), "mm_processor_kwargs": {REQUEST_KEY: asked}}


@pytest.mark.parametrize("family", TILED, ids=str)
def test_an_overview_is_the_tile_of_the_whole_image(checkpoint_of: CheckpointOf, family: Family) -> None:
    """Localizers see it alone, and the vision tower encodes it once for them and for the image."""
    crop = {**LOCATING, "localizer": {**LOCATING["localizer"], "thumbnail_tokens": 20}}
    checkpoint = checkpoint_of(family, family.deep)
    engine = Engine(checkpoint, crop, family)
    encoder, image = engine.model.crop_encoder, noise_image(640, 500, 400)
    tile = engine.processor.geometry.tiling.tile_tokens**2
    asked = Overview((image,), {"regions": [[0, 0, 1, 1]], "pruning_rate": 0.8, "method": "plc"})
    (answer,) = engine.ask(asked)
    assert encoder.tokens_encoded == tile
    reference = reference_by(foveating(family.reference, checkpoint, engine.config, overview=True))
    control = reference_by(foveating(family.reference, checkpoint, engine.config))
    error = difference(answer, reference(asked, engine.config))
    change = difference(answer, control(asked, engine.config))
    print(f"{family}: {error:.1e}; with all tiles {change:.1e}")
    assert error <= TOLERANCE
    assert change > NOTICEABLE
    (here,) = decided(engine.processor, image, {"regions": [cells(0, 0, 1, 1)]}).pieces[1:]
    engine.ask(Question((image,), {"regions": [cells(0, 0, 1, 1)]}))
    assert encoder.tokens_encoded == tile + here.num_tokens
    locate = engine.llm.llm_engine.renderer._localizing.localizer
    other = noise_image(641, 500, 400)
    before = encoder.tokens_encoded
    found = locate.locate_now(Picture(lambda: other), "Where?")
    assert encoder.tokens_encoded == before + tile
    assert found.heat.values.size > 1
    engine.ask(Question((other,), {"regions": [found.region.as_lists()]}))
    seen = decided(engine.processor, other, {"regions": [found.region.as_lists()]})
    assert encoder.tokens_encoded == before + tower_tokens(seen.pieces)


@each_family
def test_pieces_that_are_whole_have_the_places_of_the_picture(
    engine_of: Callable[[Family], Engine], family: Family
) -> None:
    """A piece of all the picture but its first row of windows is where these rows are."""
    tower = engine_of(family).model.visual
    merge, scale = tower.spatial_merge_size, TokenGrid(10, 14)
    stock = tower.prepare_encoder_metadata([[1, scale.rows * merge, scale.cols * merge]])
    whole = whole_piece(scale)
    later = replace(whole, window=(4, 10, 0, 14))
    with_whole = metadata_of_pieces(tower, [later, whole])
    patches = later.num_tokens * merge**2
    for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds"):
        if name in stock:
            torch.testing.assert_close(with_whole[name][patches:], stock[name])
            torch.testing.assert_close(with_whole[name][:patches], stock[name][-patches:])
            assert (with_whole[name][:patches] - stock[name][:patches]).abs().max() > NOTICEABLE
    assert metadata_of_pieces(tower, [whole])["cu_seqlens"].tolist() == stock["cu_seqlens"].tolist()


def test_another_question_encodes_only_its_crop(engine_of: Callable[[Family], Engine]) -> None:
    engine = engine_of(QWEN3_VL)
    encoder, image = engine.model.crop_encoder, noise_image(610, 640, 512)

    def encoded(crop: Any) -> tuple[int, int]:
        before = encoder.num_encoded, encoder.tokens_encoded
        engine.ask(Question((image,), crop))
        return encoder.num_encoded - before[0], encoder.tokens_encoded - before[1]

    first, inside = {"regions": [cells(2, 2, 4, 4)], "rim": 0}, {"regions": [cells(3, 3, 3, 3)], "rim": 0}
    elsewhere = {"regions": [cells(6, 6, 7, 7)], "rim": 0}
    assert encoded(first) == (2, tower_tokens(pieces_of(engine, image, first)))
    assert encoded(first) == (0, 0)
    _, crop = pieces_of(engine, image, inside)
    assert encoded(inside) == (1, crop.num_tokens)
    _, crop = pieces_of(engine, image, elsewhere)
    assert encoded(elsewhere) == (1, crop.num_tokens)
    # The view is an image like others: sent by itself, it is known.
    seen = engine.processor._view_of(Picture(lambda: image), decided(engine.processor, image, inside))
    before = encoder.num_encoded
    engine.ask(Question((seen,), {"method": "off"}))
    assert encoder.num_encoded == before


def test_other_pixels_are_another_picture(engine_of: Callable[[Family], Engine]) -> None:
    """Of the same size and region, and of the same view."""
    engine = engine_of(QWEN3_VL)
    image = noise_image(611, 640, 512)
    other = image.copy()
    other.putpixel((200, 200), (255, 0, 255))
    crop = {"regions": [cells(2, 2, 3, 3)], "rim": 0}
    one, another = engine.ask(Question((image,), crop), Question((other,), crop))
    assert float((one.logprobs - another.logprobs).abs().max()) > 0


def test_the_localizers_view_is_the_images(checkpoint_of: CheckpointOf) -> None:
    """What the tower has made of the view for the localizer, it does not make again."""
    engine = Engine(checkpoint_of(QWEN3_VL, QWEN3_VL.deep), LOCATING, QWEN3_VL)
    encoder, image = engine.model.crop_encoder, noise_image(630, 640, 512)
    locate = engine.llm.llm_engine.renderer._localizing.localizer
    region = locate.locate_now(Picture(lambda: image), "Where?").region
    asked = {"regions": [region.as_lists()]}
    view, *crops = pieces_of(engine, image, asked)
    assert encoder.tokens_encoded == view.num_tokens
    engine.ask(Question((image,), asked))
    assert encoder.tokens_encoded == view.num_tokens + tower_tokens(crops)


def test_the_localizers_view_is_made_once(
    checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each image of a request, and anew for a picture that has been changed since."""
    engine = Engine(checkpoint_of(QWEN3_VL, QWEN3_VL.deep), LOCATING, QWEN3_VL)
    made: list[Image.Image] = []
    monkeypatch.setattr(thumbnails, "shrink", lambda *args: made.append(shrink(*args)) or made[-1])
    pictures = noise_image(631, 640, 512), noise_image(632, 512, 640)
    asked = Question(pictures, {"question": "Where?"})
    (before,) = engine.ask(asked)
    assert len(made) == len(pictures)
    pictures[0].paste(noise_image(633, 640, 512))
    made.clear()
    (after,) = engine.ask(asked)
    assert len(made) == 1  # the other picture's features and region are known
    assert float((after.logprobs - before.logprobs).abs().max()) > NOTICEABLE


@pytest.mark.parametrize("kind", ["transparent", "transparent palette", "lying"])
def test_pictures_that_vllm_converts_are_located_as_it_shows_them(
    checkpoint_of: CheckpointOf, kind: str
) -> None:
    """Offline they come as Pillow has them: not yet upright, not yet flat."""
    checkpoint = checkpoint_of(QWEN3_VL, QWEN3_VL.deep)
    engine, other = Engine(checkpoint, LOCATING, QWEN3_VL), Engine(checkpoint, LOCATING, QWEN3_VL)
    picture, file = noise_image(950, 640, 512), io.BytesIO()
    if kind == "transparent":
        picture = picture.convert("RGBA")
        picture.putalpha(40)
    elif kind == "lying":
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6
        picture.save(file, "PNG", exif=turned)
        picture = Image.open(file)
    else:
        picture.quantize(64).save(file, "PNG", transparency=bytes([0] * 32 + [255] * 32))
        picture = Image.open(file)
    (answer,) = engine.ask(Question((picture,), {"question": "Where?"}))
    shown = other.processor.info.parse_mm_data({"image": [picture]})["image"].get(0)
    locate = other.llm.llm_engine.renderer._localizing.localizer
    found = locate.locate_now(Picture(lambda: shown), "Where?")
    (expected,) = other.ask(Question((shown,), {"regions": [found.region.as_lists()]}))
    assert answer.num_prompt_tokens == expected.num_prompt_tokens
    assert float((answer.logprobs - expected.logprobs).abs().max()) <= TOLERANCE


def test_a_larger_part_may_answer_where_the_server_says_so(engine_of: Callable[[Family], Engine]) -> None:
    engine = engine_of(QWEN3_VL)
    encoder, image = engine.model.crop_encoder, noise_image(612, 640, 512)
    large = Question((image,), {"regions": [cells(1, 1, 5, 5)], "rim": 0})
    small = Question((image,), {"regions": [cells(2, 2, 2, 2)], "rim": 0})
    engine.ask(large)
    encoder.reuses_larger = True
    try:
        before = encoder.num_encoded
        (answer,) = engine.ask(small)
        assert encoder.num_encoded == before
    finally:
        encoder.reuses_larger = False
    (own,) = engine.ask(Question((image,), {**(small.crop or {}), "pruning_rate": 0.79}))
    assert encoder.num_encoded == before + 1
    assert answer.num_prompt_tokens <= own.num_prompt_tokens


def test_many_small_boxes_in_a_large_part_bring_it_along_once(engine_of: Callable[[Family], Engine]) -> None:
    """What is put together for an image is never more than its pieces have."""
    engine = engine_of(QWEN3_VL)
    encoder, image = engine.model.crop_encoder, noise_image(613, 800, 768)
    engine.ask(Question((image,), {"regions": [[0.02, 0.02, 0.85, 0.85]], "rim": 0}))
    boxes = [[x / 4, y / 4, x / 4 + 0.01, y / 4 + 0.01] for x in range(4) for y in range(4)]
    encoder.reuses_larger, rows = True, []
    stock = encoder._features
    encoder._features = lambda *args: rows.append(stock(*args)) or rows[-1]
    try:
        engine.ask(Question((image,), {"regions": [boxes], "rim": 0}))
    finally:
        encoder.reuses_larger, encoder._features = False, stock
    (seen,) = rows
    pieces = pieces_of(engine, image, {"regions": [boxes], "rim": 0})
    assert len(pieces) > 2
    assert [len(features) for features in seen] == [piece.num_tokens for piece in pieces]


@pytest.mark.parametrize("size", [(1281, 957), (1003, 777), (2500, 1900)])
def test_cut_pixels_are_those_of_the_image_processor(size: tuple[int, int]) -> None:
    """To one level of 255, on a picture with writing."""
    picture, side = draw_sample_picture(size=size), 28
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    made = processor(picture, return_tensors="pt", do_normalize=False, do_rescale=False)
    _, rows, cols = (made["image_grid_thw"][0] // 2).tolist()
    # Tokens by row and column, patches in them likewise, channels, frames, pixels.
    whole = made["pixel_values"].view(rows, cols, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    whole = whole.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, cols * side, 3)
    piece = Piece(TokenGrid(rows, cols), (2, rows - 2, 3, cols - 1), (2, 3, 3, 4))
    cut = torch.tensor(np.asarray(pixels_of(picture, piece, side, Image.Resampling.BICUBIC)))
    expected = whole[2 * side : (rows - 2) * side, 3 * side : (cols - 1) * side]
    assert (cut.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("family", TILED, ids=str)
def test_tiles_that_are_not_seen_are_not_normalised(
    family: Family, engine_of: Callable[[Family], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, made = engine_of(family), []
    image_processor = engine.processor.info.get_hf_processor().image_processor
    stock = image_processor.rescale_and_normalize

    def count(tiles: torch.Tensor, *rest: Any) -> Any:
        made.append(len(tiles))
        return stock(tiles, *rest)

    monkeypatch.setattr(image_processor, "rescale_and_normalize", count)
    image, crop = noise_image(640, 500, 400), {"regions": [cells(0, 0, 1, 1)]}
    engine.ask(Question((image,), crop), steps=1)
    assert sum(made) == len(pieces_of(engine, image, crop)) == 2
    made.clear()
    engine.ask(Question((noise_image(641, 500, 400),), None), steps=1)
    assert sum(made) > 2
