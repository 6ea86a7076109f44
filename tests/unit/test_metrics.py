# SPDX-License-Identifier: Apache-2.0
"""Counters, read back from prometheus_client's registry."""

import pytest
from prometheus_client import REGISTRY, generate_latest

from vllm_crop.frontend.metrics import crop_metrics
from vllm_crop.frontend.request_context import ImageFacts, Source
from vllm_crop.localizers.decision import Localization
from vllm_crop.planning.geometry import Region


def value(counter: str, **labels: str) -> float:
    """A counter's current value; 0 before its first use."""
    return REGISTRY.get_sample_value(f"crop:{counter}_total", labels) or 0.0


def facts(tokens_avg: float, source: Source = "request") -> ImageFacts:
    """One LLaVA image that costs `tokens_avg` tokens."""
    return ImageFacts(576, round(tokens_avg), tokens_avg, Region.whole(), source)


def test_tokens_and_images_are_counted_per_model_and_source() -> None:
    crop_metrics().record("count-a", [facts(128), facts(64.5), facts(576, "none")])
    crop_metrics().record("count-a", [facts(576, "out_of_view")])
    crop_metrics().record("count-b", [facts(576, "off")])

    assert value("visual_tokens", model_name="count-a") == 4 * 576
    assert value("visual_tokens_retained", model_name="count-a") == 128 + 64.5 + 2 * 576
    for source, count in {"request": 2, "none": 1, "out_of_view": 1, "off": 0}.items():
        assert value("images", model_name="count-a", source=source) == count
    assert value("visual_tokens", model_name="count-b") == 576
    assert value("images", model_name="count-b", source="off") == 1


@pytest.mark.parametrize(
    ("costs", "outcome"),
    [([128.0], "pruned"), ([576.0, 128.0], "pruned"), ([576.0], "whole"), ([576.0, 576.0], "whole")],
)
def test_a_request_counts_once_as_pruned_if_any_image_is(costs: list[float], outcome: str) -> None:
    before = {name: value("requests", model_name="outcomes", outcome=name) for name in ("pruned", "whole")}
    crop_metrics().record("outcomes", [facts(cost) for cost in costs])
    after = {name: value("requests", model_name="outcomes", outcome=name) for name in before}
    assert after == {**before, outcome: before[outcome] + 1}


def test_there_is_one_set_of_counters_per_process() -> None:
    assert crop_metrics() is crop_metrics()


def test_counters_are_exposed_under_the_documented_names() -> None:
    crop_metrics().record("exposed", [facts(128)])
    exposed = generate_latest(REGISTRY).decode()
    for name in ("visual_tokens", "visual_tokens_retained", "images", "requests"):
        assert f'\ncrop:{name}_total{{model_name="exposed"' in exposed


def test_localizations_are_counted_by_outcome_and_timed_unless_known() -> None:
    metrics = crop_metrics()
    labels = {"model_name": "localized", "localizer": "engine"}
    metrics.record_localization("localized", Localization(Region.whole(), "region", "engine", 0.95, 0.03))
    metrics.record_localization("localized", Localization(None, "timeout", "engine", None, 5.0))
    metrics.record_localization("localized", Localization(None, "global", "engine", 0.7, 0.0, cached=True))
    for outcome, count in {"region": 1, "timeout": 1, "global": 1, "error": 0}.items():
        assert value("localizations", **labels, outcome=outcome) == count
    assert value("localizer_cache_hits", **labels) == 1
    assert REGISTRY.get_sample_value("crop:localizer_seconds_sum", labels) == pytest.approx(5.03)
    assert REGISTRY.get_sample_value("crop:localizer_seconds_count", labels) == 2
    assert REGISTRY.get_sample_value("crop:localizer_confidence_bucket", {**labels, "le": "0.9"}) == 1
    assert REGISTRY.get_sample_value("crop:localizer_confidence_count", labels) == 2


def test_agreement_is_counted_and_what_pruning_gives_is_no_loss() -> None:
    metrics, labels = crop_metrics(), {"model_name": "shadowed"}
    for same, lost in ((True, 0.02), (True, -0.5), (False, 3.0)):
        metrics.record_agreement("shadowed", same, lost)
    metrics.record_shadow_check("shadowed", "dropped")
    assert value("shadow_first_tokens", **labels, agreement="same") == 2
    assert value("shadow_first_tokens", **labels, agreement="different") == 1
    assert value("shadow_checks", **labels, outcome="dropped") == 1
    assert value("shadow_checks", **labels, outcome="compared") == 0

    def up_to(nats: str) -> float | None:
        return REGISTRY.get_sample_value("crop:shadow_logprob_lost_nats_bucket", {**labels, "le": nats})

    assert [up_to(nats) for nats in ("0.001", "0.01", "0.05", "2.0", "4.0")] == [1, 1, 2, 2, 3]
    total = REGISTRY.get_sample_value("crop:shadow_logprob_lost_nats_sum", labels)
    assert total == pytest.approx(3.02)
