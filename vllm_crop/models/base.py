# SPDX-License-Identifier: Apache-2.0
"""What every family's model does with plans: compress, number the tokens that are left, run in stages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_crop.errors import UnsupportedVersionError
from vllm_crop.eviction.decoder import EvictingDecoder, EvictingStep, start_eviction
from vllm_crop.eviction.layers import attention_of
from vllm_crop.eviction.markers import EvictionSettings, embed_indices
from vllm_crop.families.text_layers import full_attention_layers
from vllm_crop.heat.step import HeatStep
from vllm_crop.heat.taps import start_heat
from vllm_crop.models.encoder import CompressingEncoder, Encode, SeenImage
from vllm_crop.models.plan_fields import ASSIGNMENT, PLACES, PLAN_FIELDS, POSITIONS


class CropModelMixin(nn.Module):
    """Mixed in front of a vision-language model of vLLM that has `language_model.model`, the decoder.

    Attributes:
        pixels: what its images come as, a keyword of `embed_multimodal`.
    """

    pixels: ClassVar[str] = "pixel_values"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.crop_encoder = CompressingEncoder(vllm_config)
        self.eviction = start_eviction(self, vllm_config)
        stages = EvictionSettings.from_hf_config(vllm_config.model_config.hf_config).stages
        self.heat = start_heat(self, vllm_config, stages)
        # Set by the part of ours in the model runner (runners/), once it is there.
        self.runner_is_ours = False
        if self.eviction is not None or self.heat is not None:
            # vLLM asks a model for its ModelState if it has this method, and decides itself if not.
            self.get_model_state_cls = partial(_model_state_cls, vllm_config.model_config.is_hybrid)
            self._require_our_runner_before_kv_cache()

    def _require_our_runner_before_kv_cache(self) -> None:
        """Have the first layer that looks check it.

        It is asked for its KV cache after loading and before serving. A stock runner would run stock steps
        where the scheduler has blocks for kept tokens only.
        """
        model: Any = self
        layers = model.language_model.model.layers
        first = full_attention_layers(model.config.to_dict(), len(layers))[0]
        attention = attention_of(layers[first])
        stock = attention.get_kv_cache_spec

        def get_kv_cache_spec(*args: Any, **kwargs: Any) -> Any:
            if not self.runner_is_ours:
                raise UnsupportedVersionError(
                    "this vLLM's model runner knows nothing of evictions and heat maps: it no longer asks "
                    "the model for get_model_state_cls (vllm/v1/worker/gpu/model_states), or has another "
                    "worker. Use method 'plc' without localizer kind 'attention'"
                )
            return stock(*args, **kwargs)

        attention.get_kv_cache_spec = get_kv_cache_spec

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of a batch of images or videos, one `[num_embeddings, hidden]` tensor each."""
        if kwargs.get(self.pixels) is None:  # videos, and image embeddings from the client
            embeddings = self.embed_stock(**kwargs)
            self.crop_encoder.rehearse()
            return embeddings
        images, encode = self.images_of(kwargs)
        plan = {name: kwargs[name] for name in PLAN_FIELDS}
        return self.crop_encoder(images, encode, **plan, crop_places=kwargs.get(PLACES))

    def embed_stock(self, **kwargs: Any) -> Any:
        """vLLM's own `embed_multimodal`: vision tower and projector."""
        stock: Any = super()
        return stock.embed_multimodal(**kwargs)

    def images_of(self, kwargs: Mapping[str, Any]) -> tuple[Sequence[SeenImage], Encode]:
        """How a family's images are encoded.

        Args:
            kwargs: of `embed_multimodal`, with `pixels`.

        Returns:
            What is seen of each image; and what takes the indices of some of their parts, counted through all
            images, to features, `[num_tokens, hidden]` each.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        evicting: EvictingStep | None = None,
        heat: HeatStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream; in stages if rows go, watched if somebody asks for a heat map."""
        with nullcontext() if self.heat is None else self.heat.watching(heat):
            return self._forward(input_ids, positions, *args, evicting=evicting, **kwargs)
        # Left half way: all rows are of requests whose logits a map replaces.
        embeds: torch.Tensor = kwargs["inputs_embeds"]
        self.forget_step(len(embeds))
        return torch.zeros_like(embeds)

    def _forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        evicting: EvictingStep | None,
        **kwargs: Any,
    ) -> Any:
        embeds = kwargs.get("inputs_embeds")
        in_stages = self.eviction is not None and (evicting is not None or self.eviction.runs_all_steps)
        if evicting is not None and (embeds is None or self.eviction is None):
            # All rows would run with attention metadata of fewer.
            raise RuntimeError("a step that evicts visual tokens came without its embeddings")
        if not in_stages or embeds is None:  # no embeddings where the server takes no images
            stock: Any = super()
            return stock.forward(input_ids, positions, *args, **kwargs)
        assert self.eviction is not None
        return self.run_in_stages(self.eviction, evicting, embeds, positions)

    def forget_step(self, num_tokens: int) -> None:
        """Clean up after a forward pass that was left half way, for families that keep something of it.

        Args:
            num_tokens: with padding.
        """

    def run_in_stages(
        self,
        eviction: EvictingDecoder,
        evicting: EvictingStep | None,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> Any:
        """A forward pass in stages; for families whose layers take more than embeddings."""
        return eviction.run(evicting, inputs_embeds, positions)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """As upstream; heat maps in the place of logits of who asked for one."""
        stock: Any = super()
        logits: torch.Tensor | None = stock.compute_logits(hidden_states, *args, **kwargs)
        return logits if self.heat is None else self.heat.write_into(logits)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As upstream; cached features belong to the old weights."""
        self.crop_encoder.start_anew()
        stock: Any = super()
        loaded: set[str] = stock.load_weights(weights)
        return loaded


def _model_state_cls(is_hybrid: bool) -> type[Any]:
    from vllm_crop.runners.v2 import CropHybridModelState, CropModelState  # they need Triton, V1 does not

    return CropHybridModelState if is_hybrid else CropModelState


MRopePositions = Callable[[list[int], list[Any]], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class UnprunedPrompt:
    """What a compressed prompt would have been.

    Attributes:
        num_tokens: its length.
        survivors: `[tokens of the compressed prompt]`, where in it each of them is.
        features: vLLM's MultiModalFeatureSpec list with placeholders of full length.
    """

    num_tokens: int
    survivors: torch.Tensor
    features: list[Any]


def unpruned_prompt(num_tokens: int, mm_features: Sequence[Any]) -> UnprunedPrompt:
    """Undo the compression of a prompt with `num_tokens` tokens; `mm_features` come in any order."""
    survivors: list[torch.Tensor] = []
    features: list[Any] = []
    start, shift = 0, 0
    for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
        place = feature.mm_position
        survivors.append(torch.arange(start, place.offset) + shift)
        within, full_length = _within_image(feature)
        survivors.append(within + place.offset + shift)
        is_embed = place.is_embed if full_length == place.length else None  # it is of the pruned length
        full = replace(place, offset=place.offset + shift, length=full_length, is_embed=is_embed)
        features.append(replace(feature, mm_position=full))
        start = place.offset + place.length
        shift += full_length - place.length
    survivors.append(torch.arange(start, num_tokens) + shift)
    return UnprunedPrompt(num_tokens + shift, torch.cat(survivors), features)


def _within_image(feature: Any) -> tuple[torch.Tensor, int]:
    """The tokens of an image (or video) that are left, and how many there were, with what frames them."""
    length = feature.mm_position.length
    if POSITIONS not in feature.data or not len(feature.data[POSITIONS].data):
        return torch.arange(length), length
    left, num_tokens = feature.data[POSITIONS].data.long(), len(feature.data[ASSIGNMENT].data)
    before = int(embed_indices(feature.mm_position)[0]) - feature.mm_position.offset
    after = length - before - len(left)
    within = [torch.arange(before), before + left, before + num_tokens + torch.arange(after)]
    return torch.cat(within), before + num_tokens + after


def original_positions(num_tokens: int, mm_features: Sequence[Any]) -> tuple[torch.Tensor, int]:
    """What a model with 1-D RoPE would number the tokens that are left.

    Returns:
        `[3, num_tokens]` with equal rows, and how far the next position is beyond `num_tokens`.
    """
    unpruned = unpruned_prompt(num_tokens, mm_features)
    return unpruned.survivors.expand(3, -1).clone(), unpruned.num_tokens - num_tokens


def original_mrope_positions(
    input_tokens: list[int], mm_features: Sequence[Any], unpruned_positions: MRopePositions
) -> tuple[torch.Tensor, int]:
    """What a model with M-RoPE would number the tokens that are left.

    Args:
        input_tokens: the compressed prompt; answered tokens may follow it.
        unpruned_positions: the family's own numbering.

    Returns:
        `[3, num_tokens]`, and how far the next position is beyond `num_tokens`.
    """
    unpruned = unpruned_prompt(len(input_tokens), mm_features)
    tokens = [0] * unpruned.num_tokens
    for index, token in zip(unpruned.survivors.tolist(), input_tokens, strict=True):
        tokens[index] = token
    positions, beyond = unpruned_positions(tokens, unpruned.features)
    return positions[:, unpruned.survivors], beyond + unpruned.num_tokens - len(input_tokens)


class PlainRopeMixin(CropModelMixin):
    """CropModelMixin for plain RoPE; the model class has SupportsMRoPE as its last base.

    M-RoPE is how vLLM lets a model choose position ids: used with `position_ids: "original"` only, when
    compat/hf_overrides.py switches it on. The language model keeps its plain RoPE.
    """

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> Any:
        """Position ids of the unpruned prompt, `[3, num_tokens]` with equal rows, and their excess."""
        return original_positions(len(input_tokens), mm_features)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with one row of M-RoPE positions where there are three."""
        positions = positions if positions.ndim == 1 else positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)
