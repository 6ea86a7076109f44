# SPDX-License-Identifier: Apache-2.0
"""The server's settings: defaults, refusals that say what is wrong, and short error messages."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from vllm_crop.compression.settings import ResamplerConfig
from vllm_crop.config import CropConfig, CropLimits, FoveationConfig, ShadowConfig, shorten
from vllm_crop.errors import InvalidConfigError
from vllm_crop.localizers.settings import LocalizerConfig
from vllm_crop.planning.image_budgets import History

ALLOWED: dict[str, list[Any]] = {
    "method": ["plc", "ilp", "plc+ilp", "off"],
    "pruning_rate": [0, 0.0, 0.5, 0.99],
    "eviction_layers": [None, [], [1], [2, 16], [1, 2, 3, 1000]],
    "compression": ["pool", "prune", "foveate", "resampler"],
    "resampler": [
        {},
        {"weights": "folder"},
        {"weights": "org/name", "revision": "v1", "fingerprint": "0" * 64},
    ],
    "foveation": [{}, {"halo": 0}, {"view_tokens": 64, "halo": 4, "rim_size": "half"}],
    "rim": [0, 0.0, 0.125, 0.5],
    "max_tokens": [None, 1, 256],
    "detail_low_tokens": [1, 85],
    "history": [None, {"keep": 1, "max_tokens": 0}, {"keep": 2, "max_tokens": 64, "stride": 8}],
    "fit": ["refuse", "prune"],
    "fit_floor": [1, 16],
    "position_ids": ["renumbered", "original"],
    "vit_cache_mib": [0, 1, 4096],
    "limits": [
        {},
        {"max_pruning_rate": 0.0},
        {"max_pruning_rate": 0.9, "max_boxes_per_image": 1},
        {"min_tokens": 16, "max_tokens_per_request": 4096},
        CropLimits(max_boxes_per_image=3),
    ],
    "localizer": [
        {},
        {"kind": "engine", "prompt": "where:{question}", "thumbnail_tokens": 4},
        {"kind": "openai", "base_url": "http://host/v1", "model": "m", "extra_body": {"a": 1}},
    ],
    "shadow": [{}, {"rate": 0}, {"rate": 0.01}, {"rate": 1, "max_running": 2, "max_held": 1, "timeout_s": 5}],
}
NESTED: dict[str, Any] = {
    "foveation": FoveationConfig,
    "history": History,
    "limits": CropLimits,
    "localizer": LocalizerConfig,
    "resampler": ResamplerConfig,
    "shadow": ShadowConfig,
}
# Settings, then what the message must say: the key, what is allowed, the value.
REFUSED: list[tuple[dict[Any, Any], list[str]]] = [
    ({"pruning_rate": 9}, [".pruning_rate:", "less than 1", "got 9"]),
    ({"pruning_rate": 1}, [".pruning_rate:", "less than 1", "got 1"]),
    ({"pruning_rate": -0.1}, [".pruning_rate:", "greater than or equal to 0", "got -0.1"]),
    ({"pruning_rate": math.nan}, [".pruning_rate:", "got nan"]),
    ({"pruning_rate": math.inf}, [".pruning_rate:", "got inf"]),
    ({"pruning_rate": "0.5"}, [".pruning_rate:", "number", "got '0.5'"]),
    ({"pruning_rate": True}, [".pruning_rate:", "number", "got True"]),
    ({"pruning_rate": None}, [".pruning_rate:", "number", "got None"]),
    ({"pruning_rate": 10**400}, [".pruning_rate:", "got 1000", "..."]),
    ({"method": "ilp+plc"}, [".method:", "'plc', 'ilp', 'plc+ilp' or 'off'", "got 'ilp+plc'"]),
    ({"method": ["plc"]}, [".method:", "'plc', 'ilp', 'plc+ilp' or 'off'", "got ['plc']"]),
    ({"method": "x", "eviction_layers": []}, [".method:", "got 'x'"]),
    ({"rim": -0.1}, [".rim:", "greater than or equal to 0", "got -0.1"]),
    ({"rim": 0.6}, [".rim:", "less than or equal to 0.5", "got 0.6"]),
    ({"rim": math.nan}, [".rim:", "got nan"]),
    ({"max_tokens": 0}, [".max_tokens:", "greater than or equal to 1", "got 0"]),
    ({"max_tokens": 1.5}, [".max_tokens:", "integer", "got 1.5"]),
    ({"max_tokens": 64, "pruning_rate": 0.5}, ["max_tokens and pruning_rate", "leave one out"]),
    ({"detail_low_tokens": 0}, [".detail_low_tokens:", "greater than or equal to 1", "got 0"]),
    ({"history": {"keep": 0, "max_tokens": 1}}, [".history.keep:", "greater than or equal to 1", "got 0"]),
    ({"history": {"keep": 1}}, [".history.max_tokens:", "required"]),
    (
        {"history": {"keep": 1, "max_tokens": 1, "last": 2}},
        [".history.last:", "allowed are keep, max_tokens"],
    ),
    ({"fit": "yes"}, [".fit:", "'refuse' or 'prune'", "got 'yes'"]),
    ({"limits": {"min_tokens": -1}}, [".limits.min_tokens:", "greater than or equal to 0", "got -1"]),
    ({"eviction_layers": 2}, [".eviction_layers:", "list", "got 2"]),
    ({"eviction_layers": "2"}, [".eviction_layers:", "list", "got '2'"]),
    ({"eviction_layers": True}, [".eviction_layers:", "list", "got True"]),
    ({"eviction_layers": [True]}, [".eviction_layers[0]:", "integer", "got True"]),
    ({"eviction_layers": [2.0]}, [".eviction_layers[0]:", "integer", "got 2.0"]),
    ({"eviction_layers": [2, "16"]}, [".eviction_layers[1]:", "integer", "got '16'"]),
    ({"eviction_layers": [0, 2]}, [".eviction_layers[0]:", "greater than or equal to 1", "got 0"]),
    ({"eviction_layers": [2, 2]}, [".eviction_layers:", "strictly ascending", "got [2, 2]"]),
    ({"eviction_layers": [16, 2]}, [".eviction_layers:", "strictly ascending", "got [16, 2]"]),
    ({"eviction_layers": [1, 2, 3, 4, 5]}, [".eviction_layers:", "at most 4", "got [1, 2, 3, 4, 5]"]),
    ({"method": "ilp", "eviction_layers": []}, [".eviction_layers:", "'ilp' needs at least one", "got []"]),
    ({"method": "plc+ilp", "eviction_layers": []}, [".eviction_layers:", "'plc+ilp' needs at least one"]),
    ({"compression": "mean"}, [".compression:", "'pool', 'prune', 'foveate' or 'resampler'", "got 'mean'"]),
    ({"position_ids": "mrope"}, [".position_ids:", "'renumbered' or 'original'", "got 'mrope'"]),
    ({"vit_cache_mib": -1}, [".vit_cache_mib:", "greater than or equal to 0", "got -1"]),
    ({"vit_cache_mib": 1.5}, [".vit_cache_mib:", "integer", "got 1.5"]),
    ({"vit_cache_mib": "256"}, [".vit_cache_mib:", "integer", "got '256'"]),
    ({"limits": 3}, [".limits:", "got 3"]),
    ({"limits": {"max_pruning_rate": 1}}, [".limits.max_pruning_rate:", "less than 1", "got 1"]),
    ({"limits": {"max_pruning_rate": math.nan}}, [".limits.max_pruning_rate:", "got nan"]),
    ({"limits": {"max_pruning_rate": "0.5"}}, [".limits.max_pruning_rate:", "number", "got '0.5'"]),
    ({"limits": {"max_boxes_per_image": True}}, [".limits.max_boxes_per_image:", "integer", "got True"]),
    ({"limits": {"max_boxes_per_image": 0}}, [".limits.max_boxes_per_image:", "or equal to 1", "got 0"]),
    ({"limits": {"max_boxes": 2}}, [".limits.max_boxes:", "unknown key", "got 2"]),
    ({"localizer": {"kind": "psychic"}}, [".localizer.kind:", "'engine'", "got 'psychic'"]),
    ({"localizer": {"kind": "openai"}}, [".localizer:", "localizer.base_url", "localizer.model"]),
    ({"localizer": {"prompt": "Where?"}}, [".localizer:", "{question}"]),
    (
        {"localizer": {"layers": [3]}},
        [".localizer:", "localizer.layers belongs to", "'attention'", "'request'"],
    ),
    ({"localizer": {"timeout_s": 3}}, ["timeout_s belongs to", "'attention' or 'engine' or 'openai'"]),
    ({"localizer": {"kind": "engine", "layers": [3]}}, ["localizer.layers belongs to", "is 'engine'"]),
    (
        {"localizer": {"kind": "attention", "dialect": "pixels"}},
        ["dialect belongs to", "'engine' or 'openai'"],
    ),
    ({"localizer": {"thumbnail_tokens": 64}}, ["thumbnail_tokens belongs to", "compression 'foveate'"]),
    ({"localizer": {"kind": "engine", "widen_by": 0.2}}, ["widen_by needs localizer.widen_below"]),
    ({"foveation": {"halo": 2}}, ["foveation.halo belongs to compression 'foveate'", "'pool'"]),
    ({"localizer": {"timeout_s": 0}}, [".localizer.timeout_s:", "greater than 0", "got 0"]),
    ({"localizer": {"margins": 1}}, [".localizer.margins:", "unknown key"]),
    ({"shadow": {"rate": 1.1}}, [".shadow.rate:", "or equal to 1", "got 1.1"]),
    ({"shadow": {"rate": math.nan}}, [".shadow.rate:", "got nan"]),
    ({"shadow": 0.01}, [".shadow:", "got 0.01"]),
    ({"shadow": {"max_held": 0}}, [".shadow.max_held:", "or equal to 1", "got 0"]),
    ({"shadow": {"timeout_s": 0}}, [".shadow.timeout_s:", "greater than 0", "got 0"]),
    ({"shadow": {"share": 0.1}}, [".shadow.share:", "unknown key", "allowed are rate"]),
    ({"pruning_rate": 0.999}, [".limits:", "at most", "own pruning_rate is 0.999"]),
    ({"pruning_rate": 0.9, "limits": {"max_pruning_rate": 0.8}}, [".limits:", "0.8", "0.9"]),
    ({"prunning_rate": 0.5}, [".prunning_rate:", "unknown key", "got 0.5"]),
    ({1: 2}, ["[1]:", "strings", "got 1"]),
]


def test_settings_that_are_the_defaults_belong_anywhere() -> None:
    """As of a whole configuration that was written out."""
    assert CropConfig.from_mapping(CropConfig().model_dump()) == CropConfig()
    foveating = {"compression": "foveate", "foveation": {"halo": 2}, "localizer": {"thumbnail_tokens": 100}}
    assert CropConfig.from_mapping(foveating).foveation.halo == 2


def test_the_default_rate_keeps_within_the_limit_for_clients() -> None:
    assert CropConfig.from_mapping({"limits": {"max_pruning_rate": 0.5}}).pruning_rate == 0.5
    assert CropConfig.from_mapping({"limits": {"max_pruning_rate": 0.9}}).pruning_rate == 0.778


def test_defaults_are_plc_at_128_llava_tokens() -> None:
    config = CropConfig.from_mapping({})
    assert config == CropConfig()
    assert config.model_dump() == {
        "method": "plc",
        "pruning_rate": 0.778,
        "eviction_layers": None,
        "compression": "pool",
        "rim": 0.125,
        "max_tokens": None,
        "detail_low_tokens": 85,
        "history": None,
        "fit": "refuse",
        "fit_floor": 16,
        "position_ids": None,
        "vit_cache_mib": 256,
        "foveation": {
            **{"view_tokens": None, "rim_size": "full", "reuse": "same"},
            **{"unseen_tiles": "from_whole", "halo": 0},
        },
        "limits": {
            **{"max_pruning_rate": 0.99, "max_boxes_per_image": 16, "named_images_mib": 128},
            **{"min_tokens": 0, "max_tokens_per_request": None},
        },
        "resampler": {"weights": None, "revision": None, "fingerprint": None},
        "localizer": LocalizerConfig().model_dump(),
        "shadow": {"rate": 0.0, "max_running": 1, "max_held": 16, "timeout_s": 30.0},
    }
    assert not config.localizer.localizes


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in ALLOWED for value in ALLOWED[key]])
def test_allowed_values_are_taken_over(key: str, value: Any) -> None:
    # Or it would belong to nothing, or lack what it needs.
    beside: dict[str, Any] = {"foveation": {"compression": "foveate"}}.get(key, {})
    if key == "resampler" and value:
        beside = {"compression": "resampler"}
    if (key, value) == ("compression", "resampler"):
        beside = {"resampler": {"weights": "folder"}}
    taken = getattr(CropConfig.from_mapping({key: value, **beside}), key)
    assert taken == (NESTED[key](**value) if isinstance(value, dict) else value)


def test_every_field_is_among_the_allowed_examples() -> None:
    assert set(ALLOWED) == set(CropConfig.model_fields)


@pytest.mark.parametrize(("given_settings", "said"), REFUSED, ids=str)
def test_wrong_settings_are_refused_with_place_allowed_and_given_value(
    given_settings: dict[Any, Any], said: list[str]
) -> None:
    with pytest.raises(InvalidConfigError) as refused:
        CropConfig.from_mapping(given_settings)
    message = str(refused.value)
    assert message.startswith("additional_config.crop")
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert len(message) < 500


def test_several_wrong_settings_are_named_together_up_to_five() -> None:
    with pytest.raises(InvalidConfigError) as refused:
        CropConfig.from_mapping({"pruning_rate": 9, "method": "x"})
    assert str(refused.value).count("additional_config.crop.") == 2
    with pytest.raises(InvalidConfigError) as refused:
        CropConfig.from_mapping({f"unknown{index}": 1 for index in range(50)})
    assert str(refused.value).count("additional_config.crop.") == 5


@pytest.mark.parametrize("value", [True, "plc", 0.5, [1], []])
def test_settings_that_are_no_object_are_refused_like_other_wrong_settings(value: Any) -> None:
    with pytest.raises(InvalidConfigError, match=r"additional_config\.crop"):
        CropConfig.from_mapping(value)


@pytest.mark.parametrize(
    ("given_settings", "stages"),
    [
        ({}, ()),
        ({"method": "off"}, ()),
        ({"method": "ilp"}, (2,)),
        ({"method": "plc+ilp"}, (2,)),
        ({"method": "plc+ilp", "eviction_layers": None}, (2,)),
        ({"method": "ilp", "eviction_layers": [3, 7]}, (3, 7)),
        ({"method": "plc", "eviction_layers": [2]}, (2,)),
        ({"method": "off", "eviction_layers": [2, 16]}, (2, 16)),
        ({"method": "plc", "eviction_layers": []}, ()),
    ],
)
def test_stages_a_server_prepares_for(given_settings: dict[str, Any], stages: tuple[int, ...]) -> None:
    assert CropConfig.from_mapping(json.loads(json.dumps(given_settings))).stages == stages


def test_settings_survive_the_way_through_the_model_config() -> None:
    limits = CropLimits(max_boxes_per_image=2)
    config = CropConfig(pruning_rate=0.5, eviction_layers=[2, 16], limits=limits, vit_cache_mib=0)
    assert CropConfig.from_mapping(config.model_dump()) == config


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CropConfig().pruning_rate = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        CropConfig().limits.max_pruning_rate = 0.1  # type: ignore[misc]


@pytest.mark.parametrize("model", [CropConfig, CropLimits, ShadowConfig])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    assert all(field.description for field in model.model_fields.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=100) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(json_values)
def test_shortened_values_fit_and_small_ones_are_written_out(value: Any) -> None:
    text = shorten(value)
    assert len(text) <= 60
    if len(repr(value)) <= 60:
        assert text == repr(value)


def test_long_values_are_shortened_by_kind() -> None:
    assert shorten("x" * 10_000) == "'" + "x" * 56 + "..."
    assert shorten([0] * 61) == "list of 61"
    assert shorten({number: 0 for number in range(100)}) == "dict of 100"
    assert shorten("abcdefgh", length=6) == "'ab..."


def test_deeply_nested_values_are_named_not_written_out() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "deeply nested list"
