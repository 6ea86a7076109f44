# SPDX-License-Identifier: Apache-2.0
"""Choosing our architectures through `hf_overrides`, on real transformers configs."""

import pickle
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig, PretrainedConfig, Qwen2_5_VLConfig, SiglipVisionConfig

from vllm_crop.compat.hf_overrides import apply_overrides, compose_hf_overrides
from vllm_crop.config import CropConfig
from vllm_crop.errors import InvalidConfigError, UnsupportedModelError

CROP = CropConfig(pruning_rate=0.5).model_dump()
SETTLED = {**CROP, "position_ids": "renumbered"}  # as it travels with a LLaVA


def llava(**changes: Any) -> LlavaConfig:
    """A LLaVA config as vLLM has loaded it."""
    return LlavaConfig(**{"architectures": ["LlavaForConditionalGeneration"], **changes})


def qwen() -> Qwen2_5_VLConfig:
    """The same of a Qwen2.5-VL."""
    return Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"])


def test_the_crop_architecture_is_named_and_the_settings_attached() -> None:
    config = compose_hf_overrides(CROP, {})(llava())
    assert config.architectures == ["CropLlavaForConditionalGeneration"]
    assert CropConfig.from_mapping(config.crop) == CropConfig(pruning_rate=0.5, position_ids="renumbered")


def test_settings_reach_the_dictionary_form_of_the_config() -> None:
    assert compose_hf_overrides(CROP, {})(llava()).to_dict()["crop"] == SETTLED


def test_the_overrides_can_be_sent_to_another_process() -> None:
    overrides = pickle.loads(pickle.dumps(compose_hf_overrides(CROP, {"vocab_size": 7})))
    config = overrides(llava())
    assert (config.vocab_size, config.crop) == (7, SETTLED)


def test_later_changes_of_the_settings_do_not_travel() -> None:
    settings = dict(CROP)
    overrides = compose_hf_overrides(settings, {})
    settings["pruning_rate"] = 0.1
    assert overrides(llava()).crop["pruning_rate"] == 0.5


def test_applying_twice_changes_nothing_more() -> None:
    overrides = compose_hf_overrides(CROP, {})
    once = overrides(llava()).to_dict()
    assert overrides(overrides(llava())).to_dict() == once


def test_the_users_dictionary_is_applied_into_nested_configs() -> None:
    user = {"image_seq_length": 9, "text_config": {"max_position_embeddings": 77}, "made_up": {"a": 1}}
    config = compose_hf_overrides(CROP, user)(llava())
    assert config.image_seq_length == 9
    assert config.text_config.max_position_embeddings == 77
    assert config.text_config.num_hidden_layers == LlamaConfig().num_hidden_layers
    assert config.made_up == {"a": 1}


def test_the_users_callable_runs_first() -> None:
    def user(config: PretrainedConfig) -> PretrainedConfig:
        assert config.architectures == ["SomethingElse"]
        return llava(image_seq_length=5)

    config = compose_hf_overrides(CROP, user)(llava(architectures=["SomethingElse"]))
    assert config.architectures == ["CropLlavaForConditionalGeneration"]
    assert config.image_seq_length == 5


@pytest.mark.parametrize(
    ("position_ids", "section"), [(None, None), ("renumbered", None), ("original", [1, 0, 0])]
)
def test_only_original_position_ids_ask_the_model_for_positions(
    position_ids: str, section: list[int] | None
) -> None:
    crop = {**CROP, "position_ids": position_ids}
    config = compose_hf_overrides(crop, {})(llava())
    assert getattr(config, "mrope_section", None) == section
    assert not hasattr(config.text_config, "mrope_section")


@pytest.mark.parametrize("position_ids", [None, "original"])
def test_models_with_mrope_keep_original_position_ids(position_ids: str | None) -> None:
    config = compose_hf_overrides({**CROP, "position_ids": position_ids}, {})(qwen())
    assert config.architectures == ["CropQwen2_5_VLForConditionalGeneration"]
    assert config.crop["position_ids"] == "original"
    assert not hasattr(config, "mrope_section")


def test_models_with_mrope_cannot_be_renumbered() -> None:
    with pytest.raises(InvalidConfigError, match=r"position_ids='renumbered' is not .*leave it out"):
        compose_hf_overrides({**CROP, "position_ids": "renumbered"}, {})(qwen())


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["BertModel"]])
def test_other_architectures_are_refused_naming_the_supported_ones(architectures: list[str] | None) -> None:
    with pytest.raises(UnsupportedModelError, match=r"supported: .*LlavaForConditionalGeneration"):
        apply_overrides(llava(architectures=architectures), CROP, {})


def test_unsupported_variants_are_refused_before_anything_is_changed() -> None:
    config = llava(vision_config=SiglipVisionConfig())
    with pytest.raises(UnsupportedModelError, match="siglip_vision_model"):
        apply_overrides(config, CROP, {})
    assert config.architectures == ["LlavaForConditionalGeneration"]
    assert not hasattr(config, "crop")


def test_the_dummy_config_that_probes_for_a_new_model_type_passes() -> None:
    probe = PretrainedConfig()
    probe.model_type = "dummy_llava"
    assert compose_hf_overrides(CROP, {"model_type": "dummy_other"})(probe).model_type == "dummy_other"
    assert not hasattr(probe, "crop")
