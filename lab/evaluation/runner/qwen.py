# SPDX-License-Identifier: Apache-2.0
"""The runner: answers questions about images under any pruning method, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lab.evaluation.runner.decoder import Away, Decoder, LayerCache
from lab.evaluation.runner.method import Kept, Pruning, Rows, Seen, Sight
from lab.evaluation.runner.prompts import PromptMaker, Prompts
from lab.evaluation.runner.vision import see

UNPRUNED = Pruning()


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        tokens_per_layer: visual tokens that each decoder layer ran with.
        prompt_tokens: of the prompt that the language model received.
        logprobs: `[vocabulary]` of the first token.
        steps: tokens generated, the one that ends the answer included.
    """

    text: str
    tokens_per_layer: tuple[int, ...]
    prompt_tokens: int
    logprobs: Tensor
    steps: int


class QwenRunner:
    """A Qwen2.5-VL checkpoint on transformers."""

    def __init__(self, checkpoint: Path | str) -> None:
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.language = self.model.model.language_model
        self.prompts = PromptMaker(self.model, self.processor)
        self.decoder = Decoder(self.language)
        self.end = set(_as_list(self.model.generation_config.eos_token_id))
        self.num_layers = len(self.language.layers)

    @torch.inference_mode()
    def see(self, image: Image.Image, attention: bool = True) -> Seen:
        """Run the vision tower; its result may be used for many questions."""
        return see(self.model.model.visual, self.processor.image_processor, image, attention)

    @torch.inference_mode()
    def answer(
        self, images: Sequence[Seen], questions: Sequence[str], pruning: Pruning = UNPRUNED, steps: int = 4
    ) -> list[Reply]:
        """Answer greedily, with at most `steps` tokens; pruned is the only image."""
        prompts = self.prompts.make([image.grid for image in images], questions)
        before, away = self._before(images, prompts, pruning)
        text = self._text_rows(prompts)
        states, cache, present = self.decoder.prefill(
            before, prompts.lead, text, prompts.texts, pruning, away
        )
        lengths = prompts.texts.lengths
        logits = self.model.lm_head(states[torch.arange(len(lengths)), lengths - 1])
        taken = [before.hidden.shape[1] + int(length) for length in lengths]
        spoken = self._generate(logits.argmax(-1), cache, prompts, steps)
        logprobs = logits.log_softmax(-1)
        between = int((prompts.prefix[prompts.lead :] != self.prompts.image).sum())  # two images
        visual = tuple(count - between for count in present)
        return [
            Reply(self._text(ids), visual, count, row, self._steps(ids))
            for ids, count, row in zip(spoken, taken, logprobs, strict=True)
        ]

    def _before(self, images: Sequence[Seen], prompts: Prompts, pruning: Pruning) -> tuple[Rows, Away | None]:
        hidden = self.language.embed_tokens(prompts.prefix)
        if images:
            features = torch.cat([image.features for image in images])
            hidden = hidden.index_put((prompts.prefix == self.prompts.image,), features)
        every = self.decoder.rows(hidden[None], prompts.positions[:, None])
        if pruning.before is None:
            return every, None
        (image,), lead = images, prompts.lead
        at = prompts.positions[:, lead:]
        kept = pruning.before(self._sight(image, prompts, at))
        rows = self._kept_rows(kept, hidden[:lead], prompts.positions[:, :lead], at)
        return rows, Away(every, kept.tokens)

    def _kept_rows(self, kept: Kept, leading: Tensor, leading_at: Tensor, at: Tensor) -> Rows:
        batch = len(kept.tokens)
        hidden = torch.cat([leading.expand(batch, -1, -1), kept.features], dim=1)
        positions = torch.cat([leading_at[:, None].expand(-1, batch, -1), at[:, kept.tokens]], dim=2)
        return self.decoder.rows(hidden, positions)

    def _sight(self, image: Seen, prompts: Prompts, at: Tensor) -> Sight:
        texts = prompts.texts
        rows = [ids[:length] for ids, length in zip(texts.ids, texts.lengths, strict=True)]
        words = [ids[chosen] for ids, chosen in zip(texts.ids, texts.words, strict=True)]
        spelled = (self.processor.tokenizer.batch_decode(ids[:, None]) for ids in words)
        return Sight(
            image,
            tuple(map(self.language.embed_tokens, words)),
            tuple(map(tuple, spelled)),
            tuple(map(self.language.embed_tokens, rows)),
            at,
            self.language,
        )

    def _text_rows(self, prompts: Prompts) -> Rows:
        ids = prompts.texts.ids
        positions = prompts.next_position + torch.arange(ids.shape[1])
        return self.decoder.rows(self.language.embed_tokens(ids), positions.expand(3, 1, -1))

    def _generate(
        self, token: Tensor, cache: list[LayerCache], prompts: Prompts, steps: int
    ) -> list[list[int]]:
        spoken = [token]
        lengths, prompt = prompts.texts.lengths, prompts.texts.ids.shape[1]
        ended = self._ends(token)
        while len(spoken) < steps and not ended.all():
            positions = (prompts.next_position + lengths + len(spoken) - 1)[None, :, None].expand(3, -1, -1)
            row = self.decoder.rows(self.language.embed_tokens(token)[:, None], positions)
            states = self.decoder.step(row, cache, lengths, prompt)
            token = self.model.lm_head(states[:, 0]).argmax(-1)
            spoken.append(token)
            ended |= self._ends(token)
        return torch.stack(spoken, dim=1).tolist()

    def _steps(self, ids: Sequence[int]) -> int:
        ends = (index for index, token in enumerate(ids, start=1) if token in self.end)
        return next(ends, len(ids))

    def _ends(self, token: Tensor) -> Tensor:
        return torch.isin(token, torch.tensor(sorted(self.end)))

    def _text(self, ids: Sequence[int]) -> str:
        said = []
        for token in ids:
            if token in self.end:
                break
            said.append(token)
        text = str(self.processor.tokenizer.decode(said, skip_special_tokens=True))
        return text.rstrip("\ufffd").strip()  # half a character: vLLM holds it back too


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
