# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics `crop:*`, in the API server's process beside vLLM's own on /metrics."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Literal, TypeVar, get_args

from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from vllm_crop.frontend.request_context import ImageFacts
from vllm_crop.localizers.decision import FALLBACKS, OUTCOMES, Localization

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_NATS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
ShadowOutcome = Literal["compared", "dropped", "timeout", "too_long", "failed"]
_Metric = TypeVar("_Metric", bound=MetricWrapperBase)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class CropMetrics:
    """The counters; one instance per process, as prometheus_client allows each name once."""

    def __init__(self) -> None:
        self.visual_tokens = Counter(
            "crop:visual_tokens", "Visual tokens of served images, unpruned.", ["model_name"]
        )
        self.visual_tokens_retained = Counter(
            "crop:visual_tokens_retained",
            "Visual tokens of served images after pruning, averaged over layers.",
            ["model_name"],
        )
        self.tower_tokens = Counter(
            "crop:tower_tokens",
            "Visual tokens that the vision tower makes of what it sees of served images, cached ones too.",
            ["model_name"],
        )
        self.visual_tokens_saved = Counter(
            "crop:visual_tokens_saved",
            "Visual tokens that served images cost less, averaged over layers, by what they cost less for: "
            "region, max_tokens, detail, server, history, fit.",
            ["model_name", "reason"],
        )
        self.images = Counter(
            "crop:images",
            "Served images by where their region came from: request, engine, openai, none, off, out_of_view.",
            ["model_name", "source"],
        )
        self.requests = Counter(
            "crop:requests", "Requests with images by outcome: pruned, whole.", ["model_name", "outcome"]
        )

        labels = ["model_name", "localizer"]
        self.localizations = Counter(
            "crop:localizations",
            f"Images localized by the server, by outcome; fallbacks to the whole: {', '.join(FALLBACKS)}.",
            [*labels, "outcome"],
        )
        self.localizer_cache_hits = Counter(
            "crop:localizer_cache_hits", "Localized images whose region was known.", labels
        )
        self.localizer_suspensions = Counter(
            "crop:localizer_suspensions", "How often a localizer that did not answer was left alone.", labels
        )
        self.localizer_seconds = Histogram(
            "crop:localizer_seconds",
            "Seconds that images waited for their region; known ones apart.",
            labels,
            buckets=_SECONDS,
        )
        self.localizer_confidence = Histogram(
            "crop:localizer_confidence",
            "Probability the localizer gave its own answer.",
            labels,
            buckets=_CONFIDENCE,
        )

        self.shadow_checks = Counter(
            "crop:shadow_checks",
            f"Pruned requests drawn for a shadow check, by outcome: {', '.join(get_args(ShadowOutcome))}.",
            ["model_name", "outcome"],
        )
        self.shadow_first_tokens = Counter(
            "crop:shadow_first_tokens",
            "Shadow checks by whether the likeliest first token is the same with pruning as without: same, "
            "different.",
            ["model_name", "agreement"],
        )
        self.shadow_logprob_lost = Histogram(
            "crop:shadow_logprob_lost_nats",
            "Log-probability that pruning takes from the unpruned model's likeliest first token; 0 where it "
            "gives some.",
            ["model_name"],
            buckets=_NATS,
        )

    def begin_localizations(self, model_name: str, localizer: str) -> None:
        """Show zeros: without them the first failure, or the first suspension, would be no increase."""
        labels = model_name, localizer
        for outcome in (*OUTCOMES, *FALLBACKS):
            self.localizations.labels(*labels, outcome)
        self.localizer_cache_hits.labels(*labels)
        self.localizer_suspensions.labels(*labels)
        self.localizer_seconds.labels(*labels)

    def begin_shadow_checks(self, model_name: str) -> None:
        """Show zeros: a rate needs a counter's value before its first event."""
        for outcome in get_args(ShadowOutcome):
            _labelled(self.shadow_checks, model_name, outcome)
        for agreement in ("same", "different"):
            _labelled(self.shadow_first_tokens, model_name, agreement)
        _labelled(self.shadow_logprob_lost, model_name)

    def record_shadow_check(self, model_name: str, outcome: ShadowOutcome) -> None:
        """Count what became of a request that was drawn."""
        _labelled(self.shadow_checks, model_name, outcome).inc()

    def record_agreement(self, model_name: str, same: bool, lost: float) -> None:
        """Count one comparison; `lost` in nats."""
        _labelled(self.shadow_first_tokens, model_name, "same" if same else "different").inc()
        _labelled(self.shadow_logprob_lost, model_name).observe(max(0.0, lost))

    def record_localization(self, model_name: str, localization: Localization) -> None:
        """Count one image that the server has localized, whatever becomes of the request."""
        labels = model_name, localization.localizer
        self.localizations.labels(*labels, localization.outcome).inc()
        if localization.cached:
            self.localizer_cache_hits.labels(*labels).inc()
        else:
            self.localizer_seconds.labels(*labels).observe(localization.seconds)
        if localization.confidence is not None:
            self.localizer_confidence.labels(*labels).observe(localization.confidence)

    def record_suspension(self, model_name: str, localizer: str) -> None:
        """Count a localizer that is left alone from now on."""
        self.localizer_suspensions.labels(model_name, localizer).inc()

    def record(self, model_name: str, images: Sequence[ImageFacts]) -> None:
        """Count one request's images."""
        for image in images:
            _labelled(self.visual_tokens, model_name).inc(image.tokens)
            _labelled(self.visual_tokens_retained, model_name).inc(image.tokens_avg)
            _labelled(self.tower_tokens, model_name).inc(image.tower_tokens)
            if image.pruned:
                saved = image.tokens - image.tokens_avg
                _labelled(self.visual_tokens_saved, model_name, image.saved_by).inc(saved)
            _labelled(self.images, model_name, image.source).inc()
        outcome = "pruned" if any(image.pruned for image in images) else "whole"
        _labelled(self.requests, model_name, outcome).inc()


@cache  # every request asks for the same few, none of which a client can name
def _labelled(metric: _Metric, *labels: str) -> _Metric:
    return metric.labels(*labels)


@lru_cache(maxsize=1)
def crop_metrics() -> CropMetrics:
    """The process's metrics, made on first use: PROMETHEUS_MULTIPROC_DIR must be set by then."""
    return CropMetrics()
