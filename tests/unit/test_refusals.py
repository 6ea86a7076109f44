# SPDX-License-Identifier: Apache-2.0
"""Options that cannot be used together with pruning are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig

from vllm_crop.compat import supported
from vllm_crop.compat.refusals import (
    REFUSED,
    refuse_flags,
    refuse_localizer,
    refuse_model,
    refuse_shadow,
    served_geometry,
)
from vllm_crop.config import CropConfig, ShadowConfig
from vllm_crop.errors import InvalidConfigError, UnsupportedFlagError
from vllm_crop.localizers.settings import LocalizerConfig


def engine_args(**changes: Any) -> SimpleNamespace:
    """vLLM's defaults of the options that are looked at."""
    defaults = {
        "video_pruning_rate": None,
        "model_impl": "auto",
        "enable_tower_connector_lora": False,
        "mm_processor_kwargs": None,
        "compilation_config": SimpleNamespace(cudagraph_mm_encoder=False),
    }
    return SimpleNamespace(**{**defaults, **changes})


def model_config(max_model_len: int = 2048, max_positions: int = 4096, **changes: Any) -> SimpleNamespace:
    """A finished model config of a LLaVA with 576 tokens per image."""
    hf_config = LlavaConfig(architectures=["CropLlavaForConditionalGeneration"])
    text_config = SimpleNamespace(max_position_embeddings=max_positions)
    return SimpleNamespace(
        **{
            "tokenizer_mode": "auto",
            "hf_config": hf_config,
            "hf_text_config": text_config,
            "max_model_len": max_model_len,
            **changes,
        }
    )


@pytest.fixture(autouse=True)
def _no_rust_frontend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_impl": "vllm"}, {"mm_processor_kwargs": {"do_pad": True}}, {"video_pruning_rate": 0.0}],
)
def test_ordinary_options_pass(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flags(engine_args(**changes))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    refuse_flags(engine_args(**changes))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"model_impl": "transformers"}, "--model-impl"),
        ({"model_impl": "terratorch"}, "--model-impl"),
        ({"enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        ({"mm_processor_kwargs": {"crop": {}}}, "--mm-processor-kwargs"),
        (
            {"compilation_config": SimpleNamespace(cudagraph_mm_encoder=True)},
            "--compilation-config cudagraph_mm_encoder",
        ),
    ],
)
def test_options_that_pruning_would_break_are_refused_by_name(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UnsupportedFlagError, match=f"^{flag}.*cannot be used with --plugin crop: .+"):
        refuse_flags(engine_args(**changes))


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedFlagError, match="VLLM_USE_RUST_FRONTEND"):
        refuse_flags(engine_args())


@pytest.mark.parametrize("tokenizer_mode", ["mistral", "custom"])
def test_tokenizers_with_renderers_of_their_own_are_refused(tokenizer_mode: str) -> None:
    with pytest.raises(UnsupportedFlagError, match="--tokenizer-mode"):
        refuse_model(model_config(tokenizer_mode=tokenizer_mode), CropConfig())


@pytest.mark.parametrize("tokenizer_mode", ["auto", "hf", "slow"])
def test_tokenizers_of_transformers_pass(tokenizer_mode: str) -> None:
    refuse_model(model_config(tokenizer_mode=tokenizer_mode), CropConfig())


def test_layers_that_the_model_does_not_have_are_refused_before_it_is_loaded() -> None:
    def reading(*layers: int) -> CropConfig:
        return CropConfig(localizer=LocalizerConfig(kind="attention", layers=list(layers)))

    refuse_model(model_config(), reading(3, 31))
    with pytest.raises(InvalidConfigError, match=r"localizer.layers \[3, 32\]: .* layers are 0 to 31"):
        refuse_model(model_config(), reading(32, 3))


def test_renumbered_positions_need_no_room() -> None:
    refuse_model(model_config(max_model_len=4096), CropConfig())


def test_every_refusal_gives_its_reason() -> None:
    assert all(len(reason.split()) > 3 for reason in REFUSED.values())


@pytest.mark.parametrize("layers", [None, [2], [2, 18]])
def test_late_pruning_needs_a_late_layer(layers: list[int] | None) -> None:
    def config(layers: list[int] | None) -> CropConfig:
        localizer = LocalizerConfig(kind="attention", when_unsure="late")
        return CropConfig(localizer=localizer, eviction_layers=layers, pruning_rate=0.5)

    with pytest.raises(InvalidConfigError, match=r"when_unsure 'late' needs .* at least 19 for this model"):
        refuse_model(model_config(), config(layers))
    refuse_model(model_config(), config([2, 19]))


def test_a_localizer_that_could_never_answer_is_refused() -> None:
    adapter = LocalizerConfig(kind="engine", adapter="locate")
    with pytest.raises(UnsupportedFlagError, match="--enable-lora"):
        refuse_localizer(localizing(enable_lora=False), adapter)
    refuse_localizer(localizing(enable_lora=True), adapter)
    refuse_localizer(localizing(enable_lora=False), LocalizerConfig(kind="engine"))


def localizing(enable_lora: bool = False, kv_role: str | None = None) -> SimpleNamespace:
    transfer = kv_role and SimpleNamespace(kv_role=kv_role)
    return SimpleNamespace(enable_lora=enable_lora, kv_transfer_config=transfer)


@pytest.mark.parametrize("kv_role", ["kv_producer", "kv_consumer", "kv_both", None])
def test_two_servers_of_one_request_may_not_both_look_for_its_region(kv_role: str | None) -> None:
    refuse_localizer(localizing(kv_role=kv_role), LocalizerConfig())
    if kv_role in (None, "kv_both"):  # a cache of one server
        refuse_localizer(localizing(kv_role=kv_role), LocalizerConfig(kind="attention"))
    else:
        with pytest.raises(UnsupportedFlagError, match="--kv-transfer-config"):
            refuse_localizer(localizing(kv_role=kv_role), LocalizerConfig(kind="attention"))


def test_image_sizes_are_the_checkpoints_and_not_a_librarys_default() -> None:
    """Published Qwen2.5-VL allows 16,384 tokens; transformers' default is 1,280."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": 28,
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
    }
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    served = SimpleNamespace(
        hf_config=SimpleNamespace(to_dict=lambda: config),
        hf_image_processor_config=published,
        multimodal_config=SimpleNamespace(mm_processor_kwargs=None),
    )
    assert served_geometry(served).max_tokens == 16384
    served.multimodal_config.mm_processor_kwargs = {"max_pixels": 1003520}
    assert served_geometry(served).max_tokens == 1280


def test_a_server_needs_nothing_of_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA starts where Qwen3-VL's file of vLLM cannot be imported, and the other way round."""
    looked_at: list[str] = []
    monkeypatch.setattr(supported, "find_problem", lambda point: looked_at.append(point.module))
    config = CropConfig.from_mapping({"method": "ilp"})
    needed = {
        ("Llava", "llama"): {"llava", "llama"},
        ("LlavaNext", "mistral"): {"llava_next", "llama", "mistral"},
        ("LlavaOnevision", "qwen2"): {"llava_onevision", "qwen2"},
        ("Qwen2_5_VL", "qwen2_5_vl_text"): {"qwen2_5_vl", "qwen2"},
        ("Qwen3VL", "qwen3_vl_text"): {"qwen3_vl", "qwen3"},
    }
    for (model, text), expected in needed.items():
        looked_at.clear()
        hf_config = SimpleNamespace(
            to_dict=lambda model=model: {"architectures": [f"Crop{model}ForConditionalGeneration"]},
            get_text_config=lambda text=text: SimpleNamespace(model_type=text),
        )
        supported.require_supported_for(config, None)
        assert not any(module.startswith("vllm.model_executor.models.qwen") for module in looked_at)
        supported.require_supported_for(config, hf_config)
        files = {module.rpartition(".")[2] for module in looked_at if ".model_executor.models." in module}
        assert files - {"config", "interfaces", "registry"} == expected


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_logprobs": 0}, "--max-logprobs 0"),
        ({"logprobs_mode": "raw_logits"}, "--logprobs-mode"),
        ({"logprobs_mode": "processed_logits"}, "--logprobs-mode"),
    ],
)
def test_shadow_checks_that_compare_nothing_are_refused(changes: dict[str, Any], flag: str) -> None:
    options = engine_args(**{"max_logprobs": 20, "logprobs_mode": "raw_logprobs", **changes})
    refuse_shadow(options, ShadowConfig())
    with pytest.raises(UnsupportedFlagError, match=f"shadow.rate with {flag}"):
        refuse_shadow(options, ShadowConfig(rate=0.01))


@pytest.mark.parametrize("changes", [{}, {"max_logprobs": -1}, {"logprobs_mode": "processed_logprobs"}])
def test_shadow_checks_that_compare_are_not(changes: dict[str, Any]) -> None:
    options = engine_args(**{"max_logprobs": 1, "logprobs_mode": "raw_logprobs", **changes})
    refuse_shadow(options, ShadowConfig(rate=1.0))
