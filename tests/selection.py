# SPDX-License-Identifier: Apache-2.0
"""Which families the parametrized engine tests run for; `--all-families` runs the whole product.

A scenario runs alone for a family with plain RoPE and for one with M-RoPE and deepstack, and for one more, in
turn, where an engine of it runs anyway. All of them run in one batch for every family, on an engine that
compresses and evicts at two layers: whatever a family does of its own, it does there. On the slow runner that
engine answers for the one that evicts at one layer, too, and a family whose model class has no line of its
own is left to the other runner, or altogether to the whole product. Over HTTP one family answers: for LLaVA,
test_eviction.py's server does.
"""

from collections.abc import Iterable
from typing import Any

ALONE = ("llava", "qwen3_vl")
SELECTED = (
    "test_parity",
    "test_eviction_parity",
    "test_plan_contract",
    "test_eviction_compiled",
    "test_heat",
)
SELECTED_SERVERS, SERVED = ("test_odd_images", "test_families"), "qwen3_vl"
BATCHES = (
    "test_all_scenarios_in_one_batch",
    "test_vision_tower_batches_hold_no_more_tokens_than_profiled",
)
# Parameters left out: what another one has too. By module, for both runners and for the slow one.
LEFT_OUT = {
    "test_soak": {"one stage"},
    "test_eviction_compiled": {"llava", "glm4v"},
    "test_foveation": {"qwen3_vl_moe", "qwen3_5"},  # their vision tower is Qwen3-VL's
    "test_budgets": {"glm4v"},
    "test_localizer_offline": {"glm4v"},
    # What is read is any family's features: a plain one, one with deepstack, tiles with newlines, and states.
    "test_resampler": {
        *("llava_onevision", "llava_siglip", "llava_next_siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"),
        *("glm4v", "internvl_hf", "internvl_chat", "mistral3"),
    },
}
# Families of the whole product only: every line of theirs another one runs.
WHOLE_PRODUCT = {"glm4v_moe", "qwen3_5_moe"}
# Another vision tower in a class that another family tests: all scenarios in one batch say enough.
OTHER_TOWERS = {"llava_siglip", "llava_next_siglip"}
LEFT_OUT_INTERPRETED = {
    "test_parity": {"qwen3_5_moe"},  # its class has no line of its own either
    # Qwen2.5-VL's, Qwen3-VL's and InternVL's mixins make all of the classes.
    "test_eviction_parity": {"evicting", "qwen2_vl", "qwen3_vl_moe", "internvl_chat"},
    "test_eviction_scheduling": {"evicting_engine"},
    "test_eviction_caches": {"evicting_engine"},
    "test_heat": {"False"},  # without eviction
    "test_soak": {"no prefix caching"},
    "test_resampler": {"llava", "llava_next", "qwen3_5"},
}
# The settings of engines (tests/cpu/conftest.py) that run for every family: on the slow runner, only the one
# that compresses and evicts.
EVERYWHERE, EVERYWHERE_INTERPRETED = ("pool", "staged"), ("staged",)
# Families whose prefixes are cached only where nothing is evicted: both run on both.
CACHED_WITHOUT_EVICTION = {"qwen3_5"}
# Families that a module's tests run for besides: few of its layers look.
BESIDES = {"test_heat": ("qwen3_5",)}


def left_out(items: Iterable[Any], interpreted: bool) -> list[Any]:
    """The items that only the whole product has.

    Args:
        interpreted: kernels run in Triton's interpreter, where a step takes 0.3 s.
    """
    items = list(items)
    scenarios = sorted({name for item in items if (name := _parameter(item, "name")) is not None}, key=str)
    families = {family for item in items if (family := _family(item))}
    others = sorted(families.difference(ALONE, WHOLE_PRODUCT, OTHER_TOWERS))
    return [item for item in items if not _is_selected(item, scenarios, others, interpreted)]


def _is_selected(item: Any, scenarios: list[Any], others: list[str], interpreted: bool) -> bool:
    family, module = _family(item), item.path.stem
    if family in WHOLE_PRODUCT and module != "test_published_sizes":
        return False
    if family in OTHER_TOWERS and module != "test_published_sizes":
        return item.originalname == BATCHES[0] and not interpreted and _setting(item) in EVERYWHERE
    if _is_left_out(item, LEFT_OUT) or (interpreted and _is_left_out(item, LEFT_OUT_INTERPRETED)):
        return False
    if module not in (*SELECTED, *SELECTED_SERVERS) or family is None:
        return True
    if module in SELECTED_SERVERS:
        return family == SERVED
    if family in ALONE:
        return not interpreted or _is_alone_interpreted(item)
    if family in BESIDES.get(module, ()):
        return not interpreted
    if _setting(item) not in _everywhere(item, interpreted):
        return False
    name = _parameter(item, "name")
    if interpreted and item.originalname == BATCHES[1]:
        return False  # the tower's batches are the same on both
    if item.originalname in BATCHES or (module == "test_plan_contract" and not interpreted):
        return True
    return name is not None and not interpreted and others[scenarios.index(name) % len(others)] == family


def _everywhere(item: Any, interpreted: bool) -> tuple[str, ...]:
    """The settings of engines that run for a family on a runner."""
    slowly = interpreted and _family(item) not in CACHED_WITHOUT_EVICTION
    return EVERYWHERE_INTERPRETED if slowly else EVERYWHERE


def _is_left_out(item: Any, parameters: dict[str, set[str]]) -> bool:
    left_out = parameters.get(item.path.stem)
    if left_out is None or not hasattr(item, "callspec"):
        return False
    return any(str(value) in left_out for value in item.callspec.params.values())


def _is_alone_interpreted(item: Any) -> bool:
    """On the slow runner, one family's scenarios each for pooled and for sampled tokens."""
    if item.path.stem != "test_parity" or item.originalname == BATCHES[0]:
        return True
    sampled = item.originalname in (
        "test_sampling_with_original_positions_equals_transformers",
        "test_original_positions_change_the_answer",
    )
    return _family(item) == ALONE[1 if sampled else 0]


def _setting(item: Any) -> str | None:
    """Of the engine that a test asks."""
    if item.path.stem != "test_parity":
        found: str | None = _parameter(item, "setting")
        return found
    return "pool" if item.originalname in (*BATCHES, "test_pooling_equals_transformers") else None


def _parameter(item: Any, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def _family(item: Any) -> str | None:
    family = _parameter(item, "family")
    return None if family is None else str(family)
