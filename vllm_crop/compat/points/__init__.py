# SPDX-License-Identifier: Apache-2.0
"""Every private point of vLLM we build on: a row each, with the reason; checked at start (supported.py)."""

from vllm_crop.compat.points.cpu_runner import CPU_RUNNER_POINTS as CPU_RUNNER_POINTS
from vllm_crop.compat.points.eviction import EVICTION_POINTS as EVICTION_POINTS
from vllm_crop.compat.points.heat import HEAT_POINTS as HEAT_POINTS
from vllm_crop.compat.points.models import MODEL_POINTS
from vllm_crop.compat.points.point import UpstreamPoint as UpstreamPoint
from vllm_crop.compat.points.server import SERVER_POINTS

UPSTREAM_POINTS = (*SERVER_POINTS, *MODEL_POINTS)
