# SPDX-License-Identifier: Apache-2.0
"""The model that a compressor is trained for, frozen: its features, and what it says of compressed ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vllm_crop.errors import UnsupportedModelError
from vllm_crop.families.registry import VisionGeometry, family_of, geometry_from_configs
from vllm_crop.planning.geometry import ImageTokens
from vllm_crop.planning.plan import TokenPlan

# Whose features are the language model's rows, in raster order, and nothing else.
ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)


@dataclass(frozen=True)
class Prompt:
    """A question as token ids, the image one of them.

    Attributes:
        before, after: `[tokens]` ids beside the image; the answer belongs to `after`.
        num_targets: how many of the last ids are to be predicted.
    """

    before: Tensor
    after: Tensor
    num_targets: int


@dataclass(frozen=True)
class Shown:
    """What stands for the image of a prompt: rows `[count, hidden]` at the places of some of its tokens.

    Attributes:
        kept: `[count]` the tokens whose positions they carry.
    """

    rows: Tensor
    kept: Tensor
    grid: ImageTokens

    @classmethod
    def whole(cls, features: Tensor, grid: ImageTokens) -> "Shown":
        """All of it."""
        return cls(features, torch.arange(grid.num_tokens), grid)

    @classmethod
    def planned(cls, rows: Tensor, plan: TokenPlan) -> "Shown":
        """What a plan leaves."""
        return cls(rows, torch.tensor(plan.position).long(), plan.grid)


class FrozenModel:
    """A checkpoint on transformers, none of whose weights change."""

    def __init__(self, checkpoint: str, device: str, dtype: str = "float32") -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UnsupportedModelError("--device cuda: this torch sees no GPU")
        try:
            config = AutoConfig.from_pretrained(checkpoint).to_dict()
        except (OSError, ValueError) as error:
            told = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"the checkpoint {checkpoint} cannot be read: {told}") from None
        if (family := family_of(config)) not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"compressors are trained for {', '.join(ARCHITECTURES)} so far, not for {family}"
            )
        self.device = torch.device(device)
        model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.config = config
        self.image_token = self.model.config.image_token_id
        end = self.model.generation_config.eos_token_id
        self.ends: list[int] = list(end) if isinstance(end, list | tuple) else [end]
        self.geometry: VisionGeometry = geometry_from_configs(
            config, self.processor.image_processor.to_dict()
        )

    @torch.inference_mode()
    def features(self, image: Image.Image) -> Tensor:
        """Visual tokens `[num_tokens, hidden]`."""
        inputs = self.processor.image_processor(images=[image], return_tensors="pt").to(self.device)
        inputs = {
            name: part.to(self.model.dtype) if part.is_floating_point() else part
            for name, part in inputs.items()
        }
        made = self.model.get_image_features(**inputs)
        found: Tensor = getattr(made, "pooler_output", made)[0]
        assert len(found) == self.geometry.grid(*image.size).num_tokens
        return found

    def prompt(self, question: str, answer: Sequence[int]) -> Prompt:
        """By the checkpoint's own chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        place = ids.index(self.image_token)
        after = [*ids[place + 1 :], *answer]
        return Prompt(torch.tensor(ids[:place]), torch.tensor(after), len(answer))

    def answer_ids(self, answer: str) -> list[int]:
        """An answer as the model would say it, with its end."""
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.ends[0]]

    def logits(self, prompts: Sequence[Prompt], shown: Sequence[Shown]) -> list[Tensor]:
        """What the model thinks of each target, `[num_targets, vocabulary]` float32 per prompt."""
        rows = [self._rows(prompt, image) for prompt, image in zip(prompts, shown, strict=True)]
        places = [self._positions(prompt, image) for prompt, image in zip(prompts, shown, strict=True)]
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        # Padded on the right, where no causal attention sees it.
        hidden = torch.stack([_padded(row, longest, 0) for row in rows])
        positions = torch.stack([_padded(place, longest, -1) for place in places], dim=1).to(self.device)
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        states = self.model.model.language_model(
            inputs_embeds=hidden,
            position_ids=positions if self.geometry.uses_mrope else positions[0],
            attention_mask=mask.long().to(self.device),
            use_cache=False,
        ).last_hidden_state
        ends = [
            state[length - 1 - prompt.num_targets : length - 1]
            for state, length, prompt in zip(states, lengths, prompts, strict=True)
        ]
        logits = self.model.lm_head(torch.cat(ends)).float()
        return list(logits.split([prompt.num_targets for prompt in prompts]))

    @torch.inference_mode()
    def say(self, question: str, shown: Shown, most: int) -> list[int]:
        """Answer greedily, `most` tokens at most, the end included."""
        said: list[int] = []
        while len(said) < most:
            # One more target, whatever it is: its logits come from the token before it.
            (logits,) = self.logits([self.prompt(question, [*said, self.ends[0]])], [shown])
            said.append(int(logits[-1].argmax()))
            if said[-1] in self.ends:
                break
        return said

    def _rows(self, prompt: Prompt, shown: Shown) -> Tensor:
        embed = self.model.get_input_embeddings()
        before, after = (embed(ids.to(self.device)) for ids in (prompt.before, prompt.after))
        return torch.cat([before, shown.rows, after])

    def _positions(self, prompt: Prompt, shown: Shown) -> Tensor:
        """`[3, tokens]`: with M-RoPE those of the unpruned prompt; else numbered through."""
        first, behind = len(prompt.before), len(prompt.after)
        if not self.geometry.uses_mrope:
            return torch.arange(first + len(shown.kept) + behind).expand(3, -1)
        (part,) = shown.grid.parts
        row, col = shown.kept // part.grid.cols, shown.kept % part.grid.cols
        image = torch.stack([torch.zeros_like(row), row, col]) + first
        text = torch.arange(behind) + first + max(part.grid.rows, part.grid.cols)
        return torch.cat([torch.arange(first).expand(3, -1), image, text.expand(3, -1)], dim=1)


def _padded(part: Tensor, length: int, dim: int) -> Tensor:
    shape = list(part.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([part, part.new_zeros(shape)], dim=dim)
