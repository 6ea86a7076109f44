# SPDX-License-Identifier: Apache-2.0
"""The rivals and the controls that choose tokens, by name, each with its configurations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.evaluation.rivals import (
    btp,
    cdpruner,
    chance,
    covipal,
    dart,
    divprune,
    even_grid,
    fastv,
    fopru,
    holov,
    ivc_prune,
    lvlm_csp,
    mmtok,
    novelty,
    ptp,
    pyramiddrop,
    scope,
    sparsevlm,
    vflowopt,
    visionzip,
    vispruner,
    vscan,
    vtw,
)
from lab.evaluation.rivals.names import ONLY
from lab.evaluation.runner.method import Pruning
from vllm_crop.planning.budget import BudgetError


@dataclass(frozen=True)
class Rival:
    """One method.

    Attributes:
        make: from visual tokens, decoder layers, pruning rate and a configuration to what it does;
            BudgetError if it cannot.
        configurations: arguments by name; what was published comes first.
    """

    make: Callable[..., Pruning]
    configurations: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {ONLY: {}})

    def __call__(
        self, num_tokens: int, num_layers: int, rate: float, configuration: str | None = None
    ) -> Pruning:
        """The method in a configuration; None: in the first one that can meet the rate.

        Raises:
            BudgetError: the configuration cannot meet the rate, or none can.
        """
        if configuration is not None:
            return self.make(num_tokens, num_layers, rate, **self.configurations[configuration])
        name = self.first_possible(num_tokens, num_layers, rate)
        return self(num_tokens, num_layers, rate, name or next(iter(self.configurations)))

    def first_possible(self, num_tokens: int, num_layers: int, rate: float) -> str | None:
        """The first configuration that can meet a rate; None if none can."""
        for name in self.configurations:
            try:
                self(num_tokens, num_layers, rate, name)
            except BudgetError:
                continue
            return name
        return None


def arguments_of(method: str, configuration: str | None) -> dict[str, Any]:
    """What a configuration means, by its name; of all configurations, where the first that can is meant."""
    every = {name: dict(arguments) for name, arguments in RIVALS[method].configurations.items()}
    return every if configuration is None else {configuration: every[configuration]}


RIVALS: dict[str, Rival] = {
    "random": Rival(chance.random),
    "stride": Rival(even_grid.stride),
    "fastv": Rival(fastv.fastv, fastv.CONFIGURATIONS),
    "pyramiddrop": Rival(pyramiddrop.pyramiddrop, pyramiddrop.CONFIGURATIONS),
    "vtw": Rival(vtw.vtw, vtw.CONFIGURATIONS),
    "sparsevlm": Rival(sparsevlm.sparsevlm, sparsevlm.CONFIGURATIONS),
    "visionzip": Rival(visionzip.visionzip, visionzip.CONFIGURATIONS),
    "divprune": Rival(divprune.divprune),
    "cdpruner": Rival(cdpruner.cdpruner, cdpruner.CONFIGURATIONS),
    "ivc-prune": Rival(ivc_prune.ivc_prune, ivc_prune.CONFIGURATIONS),
    "vscan": Rival(vscan.vscan, vscan.CONFIGURATIONS),
    "mmtok": Rival(mmtok.mmtok, mmtok.CONFIGURATIONS),
    "dart": Rival(dart.dart, dart.CONFIGURATIONS),
    "vispruner": Rival(vispruner.vispruner, vispruner.CONFIGURATIONS),
    "holov": Rival(holov.holov, holov.CONFIGURATIONS),
    "scope": Rival(scope.scope, scope.CONFIGURATIONS),
    "fopru": Rival(fopru.fopru, fopru.CONFIGURATIONS),
    "vflowopt": Rival(vflowopt.vflowopt, vflowopt.CONFIGURATIONS),
    "btp": Rival(btp.btp, btp.CONFIGURATIONS),
    "ptp": Rival(ptp.ptp, ptp.CONFIGURATIONS),
    "lvlm-csp": Rival(lvlm_csp.lvlm_csp, lvlm_csp.CONFIGURATIONS),
    "covipal": Rival(covipal.covipal),
    "divprune-attention": Rival(divprune.divprune_attention, divprune.ATTENTION_CONFIGURATIONS),
    "novelty": Rival(novelty.novelty),
}
