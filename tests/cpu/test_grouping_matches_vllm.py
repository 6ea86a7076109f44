# SPDX-License-Identifier: Apache-2.0
"""The predicted KV cache groups are those that vLLM's own code makes of real specs."""

import random
from collections.abc import Container
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_crop.eviction.grouping import (
    KVGroup,
    KVGrouping,
    layers_per_stage,
    packed_block_sizes,
    predict_grouping,
    predict_packed_grouping,
)

pytestmark = pytest.mark.vllm_runtime

HEADS, HEAD_SIZE = 2, 8
BYTES_PER_LAYER_TOKEN = 2 * HEADS * HEAD_SIZE * 4  # keys and values in float32


def stacks() -> list[tuple[int, tuple[int, ...]]]:
    """All single eviction layers of real depths, and many random sets of two and three."""
    single = [(num_layers, (layer,)) for num_layers in (24, 28, 32, 40, 80) for layer in range(1, num_layers)]
    draw = random.Random(0)
    several = []
    for _ in range(150):
        num_layers = draw.randint(4, 80)
        layers = draw.sample(range(1, num_layers), draw.randint(2, 3))
        several.append((num_layers, tuple(sorted(layers))))
    return [*single, *several]


def layer_specs(
    num_layers: int,
    eviction_layers: tuple[int, ...],
    block_sizes: tuple[int, ...],
    looking: Container[int] | None = None,
) -> dict[str, Any]:
    """Real specs by layer name, in the order of the layers."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    from vllm_crop.eviction.kv_cache import StageAttentionSpec
    from vllm_crop.eviction.state_cache import StageStateSpec

    specs: dict[str, Any] = {}
    for stage, count in enumerate(layers_per_stage(num_layers, eviction_layers)):
        full = FullAttentionSpec(
            block_size=block_sizes[stage], num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32
        )
        name = f"layers.{len(specs)}.attn"
        spec = StageAttentionSpec.from_full(full, stage, name) if stage else full
        state = MambaSpec(
            shapes=((block_sizes[0] * BYTES_PER_LAYER_TOKEN,),), dtypes=(torch.int8,), block_size=4096
        )
        of_stage = StageStateSpec.from_stock(state, stage) if stage else state
        for layer in range(len(specs), len(specs) + count):
            specs[f"layers.{layer}.attn"] = spec if looking is None or layer in looking else of_stage
    return specs


def vllm_groups(specs: dict[str, Any], layout_name: str) -> tuple[tuple[KVGroup, ...], int]:
    """vLLM's groups of the layers, and the bytes behind one block id."""
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from tests.upstream import get_kv_cache_groups, kv_cache_bytes_per_block

    layout = KVCacheLayout[layout_name]
    config: Any = SimpleNamespace(  # what grouping reads of a VllmConfig
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    groups = get_kv_cache_groups(config, specs)
    kinds = [
        {(getattr(specs[name], "stage", 0), isinstance(specs[name], MambaSpec)) for name in group.layer_names}
        for group in groups
    ]
    found = tuple(
        KVGroup(stage, len(group.layer_names), has_state)
        for ((stage, has_state),), group in zip(kinds, groups, strict=True)
    )
    return found, kv_cache_bytes_per_block(groups, layout)


def assert_same(predicted: KVGrouping, layout_name: str) -> None:
    specs = layer_specs(
        predicted.num_layers, predicted.eviction_layers, predicted.block_sizes, predicted.looking
    )
    groups, bytes_per_block = vllm_groups(specs, layout_name)
    assert predicted.groups == groups
    assert predicted.block_layer_tokens * BYTES_PER_LAYER_TOKEN == bytes_per_block


@pytest.mark.parametrize("layout_name", ["LBNHC", "LBHNC"])
def test_usual_layouts(layout_name: str) -> None:
    for num_layers, eviction_layers in stacks():
        assert_same(predict_grouping(num_layers, eviction_layers, 16), layout_name)


@pytest.mark.parametrize("every", [2, 4])
def test_hybrids(every: int) -> None:
    """Every so many layers look; some stages have none of these, or no other."""
    for num_layers, eviction_layers in stacks():
        looking = range(every - 1, num_layers, every)
        assert_same(predict_grouping(num_layers, eviction_layers, 16, looking), "LBNHC")


@pytest.mark.parametrize("layout_name", ["BLNHC", "BLHNC"])
def test_blocks_outermost(layout_name: str) -> None:
    for num_layers, eviction_layers in stacks():
        assert_same(predict_packed_grouping(num_layers, eviction_layers, 16), layout_name)


def test_blocks_outermost_with_equal_block_sizes() -> None:
    """vLLM then groups as usual, which for three unequal stages is not one group each."""
    sizes = (16, 16, 16)
    predicted = predict_packed_grouping(32, (8, 20), 16, sizes)
    assert len(predicted.groups) == 5
    assert_same(predicted, "BLNHC")
    assert packed_block_sizes(32, (8, 20), 16) != sizes
