# SPDX-License-Identifier: Apache-2.0
"""The rivals by name."""

from collections.abc import Callable

from vllm_crop.evaluation.rivals.cdpruner import cdpruner
from vllm_crop.evaluation.rivals.divprune import divprune
from vllm_crop.evaluation.rivals.fastv import fastv
from vllm_crop.evaluation.rivals.ivc_prune import ivc_prune
from vllm_crop.evaluation.rivals.novelty import novelty
from vllm_crop.evaluation.rivals.pyramiddrop import pyramiddrop
from vllm_crop.evaluation.rivals.sparsevlm import sparsevlm
from vllm_crop.evaluation.rivals.visionzip import visionzip
from vllm_crop.evaluation.rivals.vtw import vtw
from vllm_crop.evaluation.runner.seam import Pruning

# From visual tokens, decoder layers and pruning rate to what a method does; BudgetError if it cannot.
RIVALS: dict[str, Callable[[int, int, float], Pruning]] = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "vtw": vtw,
    "sparsevlm": sparsevlm,
    "visionzip": visionzip,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "ivc-prune": ivc_prune,
    "novelty": novelty,
}
