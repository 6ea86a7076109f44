# SPDX-License-Identifier: Apache-2.0
"""Trains the module as the paper does: to foretell a deep layer's attention, then by the answers themselves.

In the second stage what the module thinks little of is hidden softly: the questions' attention to a token is
multiplied by a gate that is a half at the score of the last token kept. The model itself stays as it is.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from lab.evaluation.covipal.module import PruningModule, write_module
from lab.tinyvqa import words
from lab.tinyvqa.training.batches import Batch, BatchMaker, Task
from lab.tinyvqa.training.forward import PREFIX, Probes, image_patches, language_states, vision_features
from lab.tinyvqa.training.language import answer_loss, layout_of

DEEP_LAYER = 7
SEED = 20261128
RATES = (0.667, 0.778, 0.889, 0.926)
SHARPNESS = 4.0  # of gates, per unit of score
ALIKE = {"read": 1.0, "relation": 1.0, "compare": 1.0, "search": 0.5, "count": 0.5}
TASK = Task(8, (8, 12), scenes=2, questions=12, weights=ALIKE)
WARMUP = 50  # steps


@dataclass(frozen=True)
class Stage:
    """Steps at a learning rate that falls to a tenth."""

    name: str
    steps: int
    learning_rate: float


class Training:
    """One training from the first step to the weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        torch.manual_seed(SEED)
        self.model = model.requires_grad_(False).eval()
        self.maker = BatchMaker(tokenizer)
        self.prefix = torch.tensor(tokenizer.convert_tokens_to_ids([words.START, words.VISION_START]))
        self.module = PruningModule(model.config.get_text_config().hidden_size)
        self._seed = SEED

    def run(self, stages: tuple[Stage, ...], out: Path) -> None:
        """Train, and write weights and log to a folder."""
        out.mkdir(parents=True, exist_ok=True)
        log, began = (out / "log.jsonl").open("w"), time.monotonic()
        with log:
            for stage in stages:
                for step, loss, right in self._steps(stage):
                    line = {
                        "stage": stage.name,
                        "step": step,
                        "loss": round(loss, 4),
                        "right": round(right, 3),
                    }
                    log.write(
                        json.dumps(line | {"minutes": round((time.monotonic() - began) / 60, 2)}) + "\n"
                    )
                    log.flush()
        write_module(self.module, out / "model.safetensors")

    def _steps(self, stage: Stage) -> Iterator[tuple[int, float, float]]:
        # Muon for the matrices of layers: it connects names to places after far fewer questions.
        matrices = [part for part in self.module.blocks.parameters() if part.ndim == 2]
        known = set(map(id, matrices))
        others = [part for part in self.module.parameters() if id(part) not in known]
        optimizers = (
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0),
        )
        window: list[tuple[float, float]] = []
        for step in track(range(1, stage.steps + 1), description=stage.name):
            self._seed += 1
            batch = self.maker.make(TASK, self._seed)
            foretell = stage.name == "attention"
            loss, right = self.foretelling(batch) if foretell else self.answering(batch, step)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            rate = stage.learning_rate * min(1.0, step / WARMUP) * _falling(step / stage.steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
            window.append((float(loss.detach()), right))
            if step % 25 == 0 or step == stage.steps:
                losses, rights = zip(*window, strict=True)
                window.clear()
                yield step, sum(losses) / len(losses), sum(rights) / len(rights)

    def foretelling(self, batch: Batch) -> tuple[Tensor, float]:
        """Cross entropy of scores against attention, and how much of it the best ninth of tokens gets."""
        features, scores = self._scores(batch)
        side = TASK.num_tokens
        probes = Probes((DEEP_LAYER,), batch.answering)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layout = layout_of(side, TASK.questions, TASK.length, torch.device("cpu"))
            language = self.model.model.language_model
            states = language_states(language, self.prefix, features, batch.questions, layout, probes)
        paid = states.looked[0].float().exp()[..., PREFIX:].sum(1)
        paid = paid / paid.sum(-1, keepdim=True)
        loss = -(paid * scores.log_softmax(-1)).sum(-1).mean()
        best = scores.topk(side**2 // 9, dim=-1).indices
        return loss, float(paid.gather(-1, best).sum(-1).mean())

    def answering(self, batch: Batch, step: int) -> tuple[Tensor, float]:
        """Cross entropy of answers behind gates, and how many are right."""
        features, scores = self._scores(batch)
        side = TASK.num_tokens
        count = round(side**2 * (1 - RATES[step % len(RATES)]))
        last = scores.topk(count, dim=-1).values[..., -1:]
        gates = functional.logsigmoid(SHARPNESS * (scores - last))
        layout = layout_of(side, TASK.questions, TASK.length, torch.device("cpu"))
        probes = Probes((), batch.answering)
        with torch.autocast("cpu", torch.bfloat16):
            language = self.model.model.language_model
            states = language_states(
                language, self.prefix, features, batch.questions, layout, probes, gates=gates
            )
            logits = self.model.lm_head(states.last).float()
        known = batch.targets >= 0
        right = ((logits.argmax(-1) == batch.targets) | ~known).all(-1).float().mean()
        return answer_loss(logits, batch), float(right)

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings `[scenes, tokens, hidden]`, and scores `[scenes, questions, tokens]`."""
        side = TASK.num_tokens
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = vision_features(self.model.model.visual, image_patches(batch.images), side, side)
        features = features.float()
        asked = batch.questions[:, :, 1:]  # behind the image's end
        place = torch.arange(asked.shape[-1]) + 1
        padding = (place >= batch.answering[..., None]).flatten(0, 1)
        embedded = self.model.model.language_model.embed_tokens(asked).flatten(0, 1)
        repeated = features.repeat_interleave(TASK.questions, dim=0)
        scores = self.module(repeated, side, embedded, padding)
        return features, scores.view(len(features), TASK.questions, -1)


def _falling(done: float) -> float:
    """From one to a tenth along a cosine."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
