# SPDX-License-Identifier: Apache-2.0
"""The rivals by name."""

from collections.abc import Callable

from lab.evaluation.rivals.cdpruner import cdpruner
from lab.evaluation.rivals.divprune import divprune
from lab.evaluation.rivals.fastv import fastv
from lab.evaluation.rivals.ivc_prune import ivc_prune
from lab.evaluation.rivals.novelty import novelty
from lab.evaluation.rivals.pyramiddrop import pyramiddrop
from lab.evaluation.rivals.sparsevlm import sparsevlm
from lab.evaluation.rivals.visionzip import visionzip
from lab.evaluation.rivals.vtw import vtw
from lab.evaluation.runner.method import Pruning

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
