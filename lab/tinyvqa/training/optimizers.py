# SPDX-License-Identifier: Apache-2.0
"""What changes the weights: Muon for the matrices of layers, AdamW for all else.

With AdamW alone the model needs several times as many questions before it connects names to places.
"""

from typing import Any

import torch
from torch import Tensor

WEIGHT_DECAY = 0.02
LARGEST_NORM = 1.0  # of AdamW's gradients; Muon's updates are of one size


class Optimizers:
    """Muon and AdamW as one."""

    def __init__(self, model: Any, heads: Any) -> None:
        layers = [*model.model.language_model.layers.parameters(), *model.model.visual.blocks.parameters()]
        matrices = [parameter for parameter in layers if parameter.ndim == 2]
        known = {id(parameter) for parameter in matrices}
        self.others: list[Tensor] = [
            parameter
            for parameter in [*model.parameters(), *heads.parameters()]
            if id(parameter) not in known
        ]
        self.muon = torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(self.others, betas=(0.9, 0.98), weight_decay=0.0)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of both: Muon's updates are scaled to the size of AdamW's."""
        for group in self.muon.param_groups + self.adamw.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        """Take a step along the gradients, and forget them."""
        torch.nn.utils.clip_grad_norm_(self.others, LARGEST_NORM)
        for optimizer in (self.muon, self.adamw):
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the state of both."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
