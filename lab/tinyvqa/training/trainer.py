# SPDX-License-Identifier: Apache-2.0
"""The training loop: phase by phase, step by step, each step with a seed of its own."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from lab.tinyvqa import checkpoint, words
from lab.tinyvqa.training.batches import Batch, BatchMaker, Task, moved
from lab.tinyvqa.training.forward import States
from lab.tinyvqa.training.language import (
    PlaceHeads,
    answer_loss,
    answer_states,
    count_loss,
    digit_loss,
    look_loss,
    place_loss,
    right_answers,
)
from lab.tinyvqa.training.optimizers import Optimizers
from lab.tinyvqa.training.phases import PHASES, Phase
from lab.tinyvqa.training.tower import TokenHeads, labelled_scenes, tower_loss

SEED = 20261121
WARMUP = 50  # steps
REPORT_EVERY = 50  # steps
SAVE_EVERY = 120.0  # seconds


class Trainer:
    """Holds the model, the optimizer and where the training stands; `out/state.pt` keeps them."""

    def __init__(self, out: Path, device: str) -> None:
        torch.manual_seed(SEED)
        self.out, self.device = out, torch.device(device)
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = words.make_tokenizer()
        self.model: Any = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(self.tokenizer))
        self.model.to(self.device)
        hidden = self.model.config.text_config.hidden_size
        heads = {"token": TokenHeads(hidden), "place": PlaceHeads(hidden)}
        self.heads: Any = torch.nn.ModuleDict(heads).to(self.device)
        self.batches = BatchMaker(self.tokenizer)
        self.phase, self.step = 0, 0
        self.optimizer = Optimizers(self.model, self.heads)
        self._window: dict[str, list[float]] = defaultdict(list)
        if (out / "state.pt").exists():
            self._load()

    def start_from(self, weights: Path, phase: str) -> None:
        """Begin a phase with the weights of a checkpoint; a training that has been saved goes on instead."""
        if not (self.out / "state.pt").exists():
            self.model.load_state_dict(
                Qwen2_5_VLForConditionalGeneration.from_pretrained(weights, dtype="float32").state_dict()
            )
            self.phase = [each.name for each in PHASES].index(phase)

    def run(self, minutes: float) -> None:
        """Train until done or so many minutes have passed, then save state and checkpoint."""
        end, saved = time.monotonic() + 60 * minutes, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            bars = [
                progress.add_task(phase.name, total=phase.steps, completed=phase.steps * (index < self.phase))
                for index, phase in enumerate(PHASES)
            ]
            while self.phase < len(PHASES) and time.monotonic() < end:
                bar = bars[self.phase]
                self.train_step()
                progress.update(bar, completed=self.step or PHASES[self.phase - 1].steps)
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()
        checkpoint.save(self.out / "checkpoint", self.model, checkpoint.make_processor(self.tokenizer))

    def train_step(self) -> None:
        """One step; the last one of a phase begins the next."""
        phase = PHASES[self.phase]
        falling = 0.5 * (1 + math.cos(math.pi * self.step / phase.steps))
        rate = phase.final_rate + (1 - phase.final_rate) * falling
        self.optimizer.set_rate(phase.learning_rate * rate * min(1.0, (self.step + 1) / WARMUP))
        seed = SEED + 1_000_003 * self.phase + self.step
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self._language_step(phase, seed) if phase.tasks else self._tower_step(seed)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        if self.step % REPORT_EVERY == 0:
            self._report(phase)
        if self.step >= phase.steps:
            self.phase, self.step = self.phase + 1, 0
            self.optimizer = Optimizers(self.model, self.heads)

    def _tower_step(self, seed: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for kind in ("full", "thumbnail"):
            labelled = moved(labelled_scenes(kind, seed), self.device)
            loss, right = tower_loss(self.model.model.visual, self.heads["token"], labelled)
            total = total + loss
            self._note(f"{kind} loss", float(loss.detach()))
            for name, share in right.items():
                self._note(f"{kind} {name}", share)
        return total

    def _language_step(self, phase: Phase, seed: int) -> Tensor:
        task = phase.tasks[self.step % len(phase.tasks)]
        batch = moved(self.batches.make(task, seed), self.device)
        states = answer_states(self.model, self.tokenizer, batch, task, phase.train_vision)
        logits = self.model.lm_head(states.last)
        loss = answer_loss(logits, batch)
        kind = f"{'locate' if task.locate else 'answer'} {task.side}"
        kind += f" -{task.pruning_rate:g}" if task.pruning_rate else ""
        self._note(f"{kind} loss", float(loss.detach()))
        for family, (right, asked) in right_answers(logits, batch).items():
            self._note(f"{kind} {family}", right / asked)
        if task.pruning_rate:  # hints speak of all tokens
            return loss
        fading = phase.look_weight * (1 - self.step / phase.steps)
        return loss + fading * self._hints(kind, states, batch, task)

    def _hints(self, kind: str, states: States, batch: Batch, task: Task) -> Tensor:
        """What the model is told beside answers: where to look, and what it sees there."""
        place, target = place_loss(self.heads["place"], states, batch, task)
        hints = {
            "look": look_loss(states.looked, batch),
            "place": place,
            "target": target,
            "digit": digit_loss(self.heads["place"], states, batch),
            "sharing": count_loss(states, batch),
        }
        for name, hint in hints.items():
            self._note(f"{kind} {name}", float(hint.detach()))
        return torch.stack(list(hints.values())).sum()

    def _note(self, name: str, value: float) -> None:
        self._window[name].append(value)

    def _report(self, phase: Phase) -> None:
        means = {name: round(sum(values) / len(values), 4) for name, values in sorted(self._window.items())}
        self._window.clear()
        line = {"phase": phase.name, "step": self.step, "time": round(time.time()), **means}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state, so that a run can go on."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "phase": self.phase, "step": self.step}
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").replace(self.out / "state.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.phase, self.step = state["phase"], state["step"]
