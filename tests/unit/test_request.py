# SPDX-License-Identifier: Apache-2.0
"""One request's `crop`: parsing, error places, and what the server's configuration makes of it."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from strategies import regions

from vllm_crop.config import CropConfig, CropLimits
from vllm_crop.crop_params import MAX_BOXES, MAX_IMAGES, CropParams, InvalidCropError, parse_region
from vllm_crop.families.llava import ClipPreprocessing, LlavaGeometry
from vllm_crop.planner import Planner
from vllm_crop.planning.budget import Method
from vllm_crop.planning.geometry import Box, Region, TokenGrid
from vllm_crop.planning.plan import Compression
from vllm_crop.request import ImageRequest, image_requests

BOX = [0.1, 0.2, 0.3, 0.4]
REGION = Region((Box(0.1, 0.2, 0.3, 0.4),))


def nested_list(depth: int) -> list[Any]:
    """A list in a list in a list, too deep to be written out."""
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


DEEP = nested_list(100_000)
REFUSED: list[tuple[Any, str, str]] = [
    (None, "crop", "must be an object, got None"),
    (True, "crop", "must be an object, got True"),
    ("plc", "crop", "must be an object, got 'plc'"),
    ([], "crop", "must be an object, got []"),
    (DEEP, "crop", "deeply nested list"),
    ({"region": [BOX]}, "crop.region", "unknown key"),
    ({"x": DEEP}, "crop.x", "deeply nested list"),
    ({"pruning_rate": 1}, "crop.pruning_rate", "less than 1, got 1"),
    ({"pruning_rate": -0.5}, "crop.pruning_rate", "greater than or equal to 0, got -0.5"),
    ({"pruning_rate": math.nan}, "crop.pruning_rate", "finite number, got nan"),
    ({"pruning_rate": -math.inf}, "crop.pruning_rate", "got -inf"),
    ({"pruning_rate": "0.5"}, "crop.pruning_rate", "valid number, got '0.5'"),
    ({"pruning_rate": False}, "crop.pruning_rate", "valid number, got False"),
    ({"pruning_rate": 10**400}, "crop.pruning_rate", "got 1000"),
    ({"pruning_rate": DEEP}, "crop.pruning_rate", "deeply nested list"),
    ({"method": "fast"}, "crop.method", "'plc', 'ilp', 'plc+ilp' or 'off', got 'fast'"),
    ({"eviction_layers": [2]}, "crop.eviction_layers", "unknown key"),
    ({"method": 1}, "crop.method", "got 1"),
    ({"method": "\ud800"}, "crop.method", r"got '\ud800'"),
    ({"regions": {}}, "crop.regions", "valid list, got {}"),
    ({"regions": "all"}, "crop.regions", "valid list, got 'all'"),
    (
        {"regions": BOX},
        "crop.regions",
        f"one entry for each image needed: did you mean [{BOX}]?",
    ),
    ({"region": [BOX]}, "crop.region", "unknown key, did you mean 'regions'?"),
    ({"regions": [[]]}, "crop.regions", "a list of boxes, got []"),
    ({"regions": [None, 3]}, "crop.regions", "crop.regions[1]: must be null, a box"),
    ({"regions": [[0, 0, 1]]}, "crop.regions", "four fractions"),
    ({"regions": [[0, 0, 1, 1, 1]]}, "crop.regions", "four fractions"),
    ({"regions": [[[0, 0, 1]]]}, "crop.regions", "four fractions"),
    ({"regions": [[BOX, None]]}, "crop.regions", "four fractions"),
    ({"regions": [[BOX, []]]}, "crop.regions", "four fractions"),
    ({"regions": [[None, BOX]]}, "crop.regions", "four fractions"),
    ({"regions": [[[BOX]]]}, "crop.regions", "four fractions"),
    ({"regions": [DEEP]}, "crop.regions", "deeply nested list"),
    ({"regions": [{"x0": 0}]}, "crop.regions", "must be null, a box"),
    ({"regions": [[0, 0, 1, 1.01]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[-0.1, 0, 1, 1]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0, 0, 672, 336]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0, 0, 10**400, 1]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0, 0, math.nan, 1]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0, 0, True, 1]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0, 0, "1", 1]]}, "crop.regions", "in [0, 1]"),
    ({"regions": [[0.5, 0, 0.5, 1]]}, "crop.regions", "x0 < x1"),
    ({"regions": [[0, 0.7, 1, 0.6]]}, "crop.regions", "y0 < y1"),
    ({"regions": [[BOX, [0.5, 0, 0.4, 1]]]}, "crop.regions", "x0 < x1"),
    ({"regions": [[BOX] * (MAX_BOXES + 1)]}, "crop.regions", f"at most {MAX_BOXES} boxes"),
    ({"regions": [None] * (MAX_IMAGES + 1)}, "crop.regions", f"at most {MAX_IMAGES} items"),
]


@pytest.mark.parametrize(
    ("value", "parameter", "said"),
    REFUSED,
    ids=[f"{index}-{parameter}" for index, (_, parameter, _) in enumerate(REFUSED)],
)
def test_wrong_requests_are_refused_naming_the_field(value: Any, parameter: str, said: str) -> None:
    with pytest.raises(InvalidCropError) as refused:
        CropParams.parse(value)
    message = str(refused.value)
    assert refused.value.parameter == parameter
    assert message.startswith(parameter)
    assert said in message
    assert len(message) < 500


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(InvalidCropError) as refused:
        CropParams.parse({"regions": ["x"], "pruning_rate": 2, "method": "z"})
    message = str(refused.value)
    assert all(place in message for place in ("crop.regions[0]:", "crop.pruning_rate:", "crop.method:"))


def test_the_message_about_a_long_key_is_short() -> None:
    with pytest.raises(InvalidCropError) as refused:
        CropParams.parse({"k" * 100_000: 1})
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("value", "region"),
    [
        (None, None),
        (BOX, REGION),
        ([BOX], REGION),
        ([BOX, [0, 0, 1, 1]], Region((*REGION.boxes, Box(0.0, 0.0, 1.0, 1.0)))),
        ([0, 0, 1, 1], Region.whole()),
        (REGION, REGION),
    ],
)
def test_null_one_box_and_several_boxes_are_regions(value: Any, region: Region | None) -> None:
    assert parse_region(value) == region


def test_coordinates_become_floats() -> None:
    region = parse_region([0, 0, 1, 1])
    assert region is not None
    assert all(isinstance(edge, float) for edge in region.boxes[0].as_list())


@given(st.lists(st.none() | regions(), max_size=4))
def test_regions_written_as_json_are_read_back(written: list[Region | None]) -> None:
    params = CropParams.parse({"regions": [region and region.as_lists() for region in written]})
    assert params.regions == written


def test_an_empty_request_and_explicit_nulls_leave_everything_to_the_server() -> None:
    nothing = CropParams.parse({})
    assert nothing == CropParams.parse({"regions": None, "pruning_rate": None, "method": None})
    assert (nothing.regions, nothing.pruning_rate, nothing.method) == (None, None, None)


def test_parsed_requests_pass_through_and_cannot_be_changed() -> None:
    params = CropParams.parse({"pruning_rate": 0})
    assert CropParams.parse(params) is params
    assert isinstance(params.pruning_rate, float)
    with pytest.raises(ValidationError, match="frozen"):
        params.pruning_rate = 0.5  # type: ignore[misc]


def test_every_field_is_described() -> None:
    assert all(field.description for field in CropParams.model_fields.values())


def requests(crop: dict[str, Any], num_images: int = 1, **config: Any) -> list[ImageRequest]:
    """What a server of this configuration makes of a `crop` field."""
    return image_requests(CropParams.parse(crop), CropConfig(**config), num_images)


def test_what_a_request_leaves_out_comes_from_the_server() -> None:
    asked = requests({"regions": [BOX]}, pruning_rate=0.6, compression="prune")
    assert asked == [ImageRequest(REGION, 0.6, "prune", rim=0.125)]


def test_a_request_overrides_the_servers_pruning_rate() -> None:
    assert requests({"regions": [BOX], "pruning_rate": 0.5}) == [ImageRequest(REGION, 0.5, "pool", rim=0.125)]


def test_images_without_a_region_are_served_whole() -> None:
    assert requests({}, num_images=2) == [ImageRequest(None, 0.778, "pool", rim=0.125)] * 2
    assert [r.region for r in requests({"regions": [None, BOX]}, num_images=2)] == [None, REGION]
    assert requests({}, num_images=0) == requests({"regions": []}, num_images=0) == []


@pytest.mark.parametrize(
    ("crop", "config"),
    [
        ({"method": "off"}, {}),
        ({}, {"method": "off"}),
        ({"pruning_rate": 0}, {}),
        ({}, {"pruning_rate": 0.0}),
        ({"pruning_rate": 0.5}, {"method": "off"}),
    ],
)
def test_off_and_pruning_rate_zero_serve_images_whole(crop: dict[str, Any], config: dict[str, Any]) -> None:
    assert [r.region for r in requests({"regions": [BOX], **crop}, **config)] == [None]


def test_a_request_can_switch_pruning_on_where_the_server_has_it_off() -> None:
    assert requests({"regions": [BOX], "method": "plc"}, method="off")[0].region == REGION


@pytest.mark.parametrize(("num_regions", "num_images"), [(0, 1), (1, 0), (1, 2), (3, 2)])
@pytest.mark.parametrize("method", ["plc", "off"])
def test_the_number_of_regions_must_be_the_number_of_images(
    num_regions: int, num_images: int, method: str
) -> None:
    with pytest.raises(InvalidCropError, match=rf"got {num_regions} for {num_images} image") as refused:
        requests({"regions": [BOX] * num_regions, "method": method}, num_images)
    assert refused.value.parameter == "crop.regions"


def test_the_servers_limit_of_the_pruning_rate_binds_requests() -> None:
    limits = CropLimits(max_pruning_rate=0.5)
    assert requests({"regions": [BOX], "pruning_rate": 0.5}, limits=limits, pruning_rate=0.4)[0]
    assert requests({"regions": [BOX]}, limits=limits, pruning_rate=0.5)[0].pruning_rate == 0.5
    with pytest.raises(InvalidCropError, match=r"at most 0\.5, got 0\.6") as refused:
        requests({"regions": [BOX], "pruning_rate": 0.6}, limits=limits, pruning_rate=0.4)
    assert refused.value.parameter == "crop.pruning_rate"


def test_the_servers_limit_of_boxes_counts_per_image() -> None:
    limits = CropLimits(max_boxes_per_image=2)
    assert len(requests({"regions": [[BOX] * 2, [BOX] * 2]}, 2, limits=limits)) == 2
    with pytest.raises(InvalidCropError, match=r"regions\[1\].*at most 2 boxes.*got 3") as refused:
        requests({"regions": [BOX, [BOX] * 3]}, 2, limits=limits)
    assert refused.value.parameter == "crop.regions"


@pytest.mark.parametrize(
    ("crop", "config", "method", "eviction_layers"),
    [
        ({}, {}, "plc", ()),
        ({}, {"method": "ilp"}, "ilp", (2,)),
        ({}, {"method": "plc+ilp", "eviction_layers": [3, 9]}, "plc+ilp", (3, 9)),
        ({"method": "ilp"}, {"eviction_layers": [2]}, "ilp", (2,)),
        ({"method": "plc+ilp"}, {"method": "ilp"}, "plc+ilp", (2,)),
        ({"method": "plc"}, {"method": "ilp"}, "plc", ()),
    ],
)
def test_the_requests_method_comes_before_the_servers(
    crop: dict[str, Any], config: dict[str, Any], method: Method, eviction_layers: tuple[int, ...]
) -> None:
    asked = requests({"regions": [BOX], **crop}, **config)
    assert asked == [ImageRequest(REGION, 0.778, "pool", method, eviction_layers, 0.125)]


def test_off_is_told_from_a_missing_region() -> None:
    assert requests({}, method="ilp") == [ImageRequest(None, 0.778, "pool", "ilp", (2,), 0.125)]
    off = requests({"regions": [BOX], "method": "off"}, method="ilp")
    assert off == [ImageRequest(None, 0.778, "pool", "off", (), 0.125, off=True)]


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
@pytest.mark.parametrize("config", [{}, {"method": "off"}, {"eviction_layers": []}])
def test_a_server_that_is_not_prepared_to_evict_says_what_it_needs(
    method: str, config: dict[str, Any]
) -> None:
    with pytest.raises(InvalidCropError) as refused:
        requests({"regions": [BOX], "method": method}, **config)
    assert refused.value.parameter == "crop.method"
    message = str(refused.value)
    assert message.startswith(f"crop.method: '{method}' needs a server")
    assert """--crop-config '{"eviction_layers": [2]}'""" in message


def test_cache_keys_differ_where_the_embeddings_could() -> None:
    compressions: tuple[Compression, ...] = ("pool", "prune")
    methods: list[tuple[Method, tuple[int, ...]]] = [
        ("plc", ()),
        ("plc+ilp", (2,)),
        ("plc+ilp", (3,)),
        ("plc+ilp", (2, 3)),
    ]
    asked = [
        ImageRequest(region, pruning_rate, compression, method, layers, rim)
        for region, pruning_rate, compression, (method, layers), rim in itertools.product(
            [
                REGION,
                Region.whole(),
                Region((*REGION.boxes, *REGION.boxes)),
                Region((Box(0.1, 0.2, 0.3, math.nextafter(0.4, 1)),)),
            ],
            [0.5, math.nextafter(0.5, 1)],
            compressions,
            methods,
            [0.0, 0.125, math.nextafter(0.125, 1)],
        )
    ]
    keys = {request.cache_key() for request in asked}
    assert None not in keys
    assert len(keys) == len(asked)


def test_whole_embeddings_need_no_cache_key() -> None:
    for crop, config in (
        ({}, {}),
        ({}, {"method": "plc+ilp"}),
        ({"regions": [BOX], "method": "off"}, {}),
        ({"regions": [BOX], "pruning_rate": 0}, {"method": "plc+ilp"}),
        ({"regions": [BOX]}, {"method": "ilp"}),
    ):
        assert requests(crop, **config)[0].cache_key() is None


GEOMETRY = LlavaGeometry(TokenGrid(24, 24), ClipPreprocessing.from_settings({}), num_layers=32)
PLANNER = Planner(CropConfig(), GEOMETRY)


def test_an_image_is_planned_by_its_requests_method() -> None:
    planned = {}
    for method in ("plc", "ilp", "plc+ilp", "off"):
        asked = requests({"regions": [BOX], "method": method}, eviction_layers=[2])[0]
        planned[method] = PLANNER.plan_image(asked, 672, 672)
    facts = {
        method: (plan.prunes, plan.tokens.compresses, plan.tokens.evicts) for method, plan in planned.items()
    }
    assert facts == {
        "plc": (True, True, False),
        "ilp": (True, False, True),
        "plc+ilp": (True, True, True),
        "off": (False, False, False),
    }
    assert planned["ilp"].tokens.tokens_per_layer(32) == [576] * 2 + [98] * 30


def test_a_budget_that_cannot_be_met_is_the_requests_fault() -> None:
    asked = requests({"regions": [BOX], "pruning_rate": 0.95}, method="ilp", eviction_layers=[8])[0]
    with pytest.raises(InvalidCropError) as refused:
        PLANNER.plan_image(asked, 672, 672)
    assert refused.value.parameter == "crop.pruning_rate"
    assert str(refused.value).startswith("crop.pruning_rate: 0.95 leaves 28.8 of 576 tokens per layer")


def test_cache_keys_of_equal_requests_are_equal() -> None:
    one, other = (requests({"regions": [BOX], "pruning_rate": 0.5})[0] for _ in range(2))
    assert one.cache_key() == other.cache_key()
    hash(one.cache_key())
