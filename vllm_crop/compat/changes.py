# SPDX-License-Identifier: Apache-2.0
"""What is different in a vLLM with this plugin: every patch, class and table entry of ours, and when.

`vllm-crop check` prints it. A change belongs here before it belongs anywhere else.
"""

from dataclasses import dataclass
from typing import Literal

from vllm_crop.compat.patches import (
    cli_flags,
    engine,
    input_processor,
    model_config,
    online_renderer,
    other_apis,
)

When = Literal[
    "always",
    "--plugin crop",
    "eviction",
    "localizer attention",
    "eviction, localizer attention",
    "the same, on a CPU without Triton",
]
Kind = Literal["patch", "class", "entry", "context variable"]


@dataclass(frozen=True)
class Change:
    """One thing that is not as vLLM has it.

    Attributes:
        kind: a method that is wrapped, a class in the place of one of vLLM's, an entry in one of its tables,
            or a variable that code far apart shares.
        where: its name, vLLM's where vLLM has one.
        why: what it is for.
        when: where it makes a difference. A patch is in place always, and does nothing otherwise.
    """

    kind: Kind
    where: str
    why: str
    when: When = "--plugin crop"


CHANGES = (
    Change("patch", "EngineArgs.add_cli_args, EngineArgs.from_cli_args", cli_flags.REASON, "always"),
    Change("patch", "EngineArgs.create_model_config", model_config.REASON),
    Change("patch", "OnlineRenderer.preprocess_chat, OnlineRenderer.preprocess_cmpl", online_renderer.REASON),
    Change(
        "patch",
        f"{other_apis.METHOD} of {len(other_apis.CONVERSIONS)} APIs (compat/patches/other_apis.py)",
        other_apis.REASON,
    ),
    Change(
        "entry",
        f"extra=allow of {sum(map(len, other_apis.MODELS.values()))} models of requests (the same)",
        other_apis.REASON,
        "always",
    ),
    Change("patch", "InputProcessor.process_inputs", input_processor.REASON),
    Change("patch", "AsyncLLM.__init__, LLMEngine.__init__", engine.REASON),
    Change(
        "patch",
        "LLMEngine.step, LLMEngine.has_unfinished_requests, of one engine (frontend/own_request.py)",
        "keeps what other requests answer while the offline localizer's runs",
    ),
    Change(
        "patch",
        "_get_image_patches of transformers' image processors with tiles (models/seen_tiles.py)",
        "leaves out tiles that a foveated image does not show",
    ),
    Change("entry", "sys.meta_path: a finder", "patches vLLM's modules once they are imported", "always"),
    Change(
        "entry", "endpoint plugin Playground", "adds the page's routes where VLLM_PLUGINS says so", "always"
    ),
    Change("entry", "--enable-prompt-tokens-details", "is switched on: usage says what was pruned"),
    Change(
        "entry",
        "KVCacheSpecRegistry: StageAttentionSpec, StageStateSpec",
        "lets vLLM group layers by stage",
        "eviction",
    ),
    Change("class", "Request.block_hashes: PlannedBlockHashes", "tells the lookup of evictions", "eviction"),
    Change(
        "entry", "ModelRegistry: Crop<architecture>", "names our model classes, which nobody else asks for"
    ),
    Change(
        "entry",
        "MODELS_CONFIG_MAP: Crop<architecture>",
        "prepares the engine's configuration",
        "eviction, localizer attention",
    ),
    Change("entry", "--middleware CropMiddleware", "reads the body field `crop`, writes `x-crop-facts`"),
    Change("class", "HfRenderer: CropRenderer", "finds regions before a prompt is expanded"),
    Change("class", "<architecture>: Crop model and processor", "plans, compresses, keeps positions"),
    Change(
        "class", "Scheduler: EvictionScheduler", "tells the KV cache what each request evicts", "eviction"
    ),
    Change(
        "class", "Attention: StagedAttention", "gives layers a KV cache without evicted tokens", "eviction"
    ),
    Change(
        "class", "FullAttentionManager: StageKVCacheManager", "allocates blocks of kept tokens", "eviction"
    ),
    Change(
        "patch",
        "MambaBase.get_kv_cache_spec of later layers with a state",
        "gives states a group of their stage",
        "eviction",
    ),
    Change(
        "class",
        "DefaultModelState: CropModelState",
        "makes the attention metadata of later layers, knows whose heat maps a step makes",
        "eviction, localizer attention",
    ),
    Change(
        "class",
        "MambaHybridModelState: CropHybridModelState",
        "the same for models with states",
        "eviction, localizer attention",
    ),
    Change(
        "class",
        "CPUWorker, CPUModelRunner: CropCPUWorker, CropCPUModelRunner",
        "the same for the V1 runner",
        "the same, on a CPU without Triton",
    ),
    Change(
        "patch",
        "AttentionImpl.forward of the layers that are watched",
        "sees queries and keys",
        "localizer attention",
    ),
    Change(
        "context variable",
        "vllm_crop_request",
        "joins what the HTTP layer read and what the renderer reports, of one request",
    ),
)
