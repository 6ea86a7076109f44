# SPDX-License-Identifier: Apache-2.0
"""The state of a layer that runs without evicted tokens: of the usual size, in a group of its stage.

A state is one block per request, whoever is evicted, so vLLM's own manager allocates it. With prefix caching
there would be one for every few tokens of the prompt, which later layers count otherwise: that is refused
(refusals.py).
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class StageStateSpec(MambaSpec):
    """The state of a layer from the `stage`-th eviction layer on."""

    stage: int

    @classmethod
    def from_stock(cls, spec: Any, stage: int) -> "StageStateSpec":
        """The stock spec of a layer, for a stage.

        Raises:
            ValueError: the layer has another kind of state, or one for every few tokens.
        """
        if type(spec) is not MambaSpec or spec.mamba_cache_mode != "none":
            raise ValueError(f"eviction needs one plain state per request, but a layer has {spec}")
        return replace_as(spec, cls, stage=stage)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Stages never share a group."""
        return super().is_uniform_with_collection(kv_cache_specs) and all(
            getattr(spec, "stage", 0) == self.stage for spec in kv_cache_specs.values()
        )


def register() -> None:
    """Tell vLLM of the spec, after the built-in ones (see kv_cache.py)."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(StageStateSpec, MambaManager)


register()
