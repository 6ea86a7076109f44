# SPDX-License-Identifier: Apache-2.0
"""Reads a server's /metrics, the Prometheus text format."""

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Labels and value of each sample of exactly this name.

    Only its own lines are parsed: a server has thousands, and is asked several times a second.
    """
    own = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    for family in text_string_to_metric_families("\n".join(own) + "\n"):
        for sample in family.samples:
            yield sample.labels, sample.value


def metric_sum(text: str, name: str, **labels: str) -> float:
    """The sum of a metric over all samples with these labels; 0 if there are none."""
    wanted = labels.items()
    return sum(value for found, value in samples(text, name) if wanted <= found.items())
