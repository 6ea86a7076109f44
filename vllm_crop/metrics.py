# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics `crop:*`, in the API server's process beside vLLM's own on /metrics."""

from collections.abc import Sequence
from functools import lru_cache

from prometheus_client import Counter

from vllm_crop.facts import ImageFacts


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
        self.images = Counter(
            "crop:images",
            "Served images by where their region came from: request, none, off, out_of_view.",
            ["model_name", "source"],
        )
        self.requests = Counter(
            "crop:requests", "Requests with images by outcome: pruned, whole.", ["model_name", "outcome"]
        )

    def record(self, model_name: str, images: Sequence[ImageFacts]) -> None:
        """Count one request's images."""
        for image in images:
            self.visual_tokens.labels(model_name).inc(image.tokens)
            self.visual_tokens_retained.labels(model_name).inc(image.tokens_avg)
            self.images.labels(model_name, image.source).inc()
        outcome = "pruned" if any(image.pruned for image in images) else "whole"
        self.requests.labels(model_name, outcome).inc()


@lru_cache(maxsize=1)
def crop_metrics() -> CropMetrics:
    """The process's metrics, made on first use: PROMETHEUS_MULTIPROC_DIR must be set by then."""
    return CropMetrics()
