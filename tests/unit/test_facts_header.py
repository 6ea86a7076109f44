# SPDX-License-Identifier: Apache-2.0
"""The `x-crop-facts` header: totals always, images as far as they fit."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import regions

from vllm_crop.config import FoveationConfig
from vllm_crop.frontend.request_context import MAX_HEADER_BYTES, ImageFacts, Source, facts_header
from vllm_crop.localizers.decision import Localization
from vllm_crop.planning.foveation import Piece, whole_piece
from vllm_crop.planning.geometry import Box, Region, TokenGrid
from vllm_crop.request import ImageRequest

SOURCES: list[Source] = ["request", "none", "off", "out_of_view"]
PRUNED = ImageFacts(576, 128, 128.0, Region((Box(0.1, 0.2, 0.3, 0.4),)), "request")
WHOLE = ImageFacts(576, 576, 576.0, None, "none")

images = st.builds(
    ImageFacts,
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.floats(0, 5000),
    st.none() | regions(16),
    st.sampled_from(SOURCES),
)


def test_header_tells_totals_and_each_image() -> None:
    assert json.loads(facts_header([PRUNED, WHOLE])) == {
        "tokens": 1152,
        "tokens_after_plc": 704,
        "tokens_avg": 704.0,
        "localizer_ms": None,
        "images": [
            {
                "tokens": 576,
                "tokens_after_plc": 128,
                "tokens_avg": 128.0,
                "region": [[0.1, 0.2, 0.3, 0.4]],
                "source": "request",
            },
            {
                "tokens": 576,
                "tokens_after_plc": 576,
                "tokens_avg": 576.0,
                "region": None,
                "source": "none",
            },
        ],
    }


def test_what_the_vision_tower_sees_is_said_where_it_is_not_all() -> None:
    scale = TokenGrid(24, 24)
    view, crop = whole_piece(TokenGrid(6, 6)), Piece(scale, (0, 8, 4, 12), (2, 6, 6, 10))
    header = json.loads(facts_header([replace(PRUNED, pieces=(view, crop)), WHOLE]))
    assert header["tower_tokens"] == 36 + 64 + 576
    seen, whole = header["images"]
    assert seen["tower_tokens"] == 100
    assert [Piece.from_json(piece) for piece in seen["pieces"]] == [view, crop]
    assert "tower_tokens" not in whole


def test_settings_of_foveation_are_said_where_they_are_not_the_defaults() -> None:
    asked = ImageRequest(PRUNED.region, 0.5, "foveate")
    for settings in (FoveationConfig(), FoveationConfig(unseen_tiles="left_out", rim_size="half")):
        image = replace(PRUNED, request=asked, foveation=settings)
        header = json.loads(facts_header([image, WHOLE]))
        assert FoveationConfig(**header.get("foveation", {})) == settings
        assert ("foveation" in header) == (settings != FoveationConfig())


def test_totals_say_who_bounded_how_many() -> None:
    asked = ImageRequest(None, 0.5, "pool", max_tokens=16)
    fitted = [replace(PRUNED, request=replace(asked, by="fit"))] * 80
    told = json.loads(facts_header([*fitted, replace(PRUNED, request=replace(asked, by="detail")), WHOLE]))
    assert told["num_images"] == 82
    assert told["by"] == {"fit": 80, "detail": 1}


def test_averages_are_rounded_to_hundredths() -> None:
    facts = [ImageFacts(3, 2, 1.23456, None, "request")] * 3
    header = json.loads(facts_header(facts))
    assert header["tokens_avg"] == 3.7
    assert header["images"][0]["tokens_avg"] == 1.23


@given(st.lists(images, max_size=60))
def test_header_always_fits_is_plain_ascii_and_keeps_the_totals(facts: list[ImageFacts]) -> None:
    header = facts_header(facts)
    assert len(header.encode()) <= MAX_HEADER_BYTES
    assert header.isascii()
    assert header.isprintable()
    told = json.loads(header)
    assert told["tokens"] == sum(image.tokens for image in facts)
    assert told["tokens_after_plc"] == sum(image.tokens_after_plc for image in facts)
    assert len(told["images"]) == len(facts) if "images" in told else told["num_images"] == len(facts)


@pytest.mark.parametrize(
    ("num_images", "num_boxes", "kept"),
    [(1, 1, "regions"), (10, 1, "regions"), (10, 16, "images"), (40, 1, "images"), (500, 1, "totals")],
)
def test_boxes_go_first_and_images_second_when_room_runs_out(
    num_images: int, num_boxes: int, kept: str
) -> None:
    region = Region((Box(0.123456789, 0.123456789, 0.987654321, 0.987654321),) * num_boxes)
    told = json.loads(facts_header([ImageFacts(576, 128, 128.0, region, "request")] * num_images))
    assert ("images" in told) == (kept != "totals")
    assert ("num_images" in told) == (kept == "totals")
    for image in told.get("images", []):
        assert ("region" in image) == (kept == "regions")


def test_a_header_of_exactly_the_limit_is_sent_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    full = facts_header([PRUNED])
    monkeypatch.setattr("vllm_crop.frontend.request_context.MAX_HEADER_BYTES", len(full))
    assert facts_header([PRUNED]) == full
    monkeypatch.setattr("vllm_crop.frontend.request_context.MAX_HEADER_BYTES", len(full) - 1)
    assert "region" not in facts_header([PRUNED])


@pytest.mark.parametrize(("tokens_avg", "pruned"), [(575.5, True), (576.0, False), (1.0, True)])
def test_an_image_is_pruned_if_layers_run_with_fewer_tokens(tokens_avg: float, pruned: bool) -> None:
    assert ImageFacts(576, 576, tokens_avg, None, "request").pruned is pruned


def test_the_localizer_is_reported_with_the_slowest_images_time() -> None:
    region = Region.from_grid_cells(2, 3, 3, 5)
    found = Localization(region, "region", "engine", 0.98765, 0.0421)
    failed = Localization(None, "timeout", "engine", None, 5.00004)
    images = [
        ImageFacts(576, 64, 64.0, region, "engine", found),
        ImageFacts(576, 576, 576.0, None, "engine", failed),
    ]
    header = json.loads(facts_header(images))
    assert header["localizer_ms"] == 5000.0
    assert [image["localizer"] for image in header["images"]] == [
        {"outcome": "region", "confidence": 0.9877, "ms": 42.1, "cached": False},
        {"outcome": "timeout", "confidence": None, "ms": 5000.0, "cached": False},
    ]
