# SPDX-License-Identifier: Apache-2.0
"""Options that cannot be used together with pruning are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig

from vllm_crop.config import CropConfig
from vllm_crop.errors import UnsupportedFlagError
from vllm_crop.frontend.refusals import REFUSED, refuse_flags, refuse_localizer, refuse_model
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


def test_original_positions_need_room_for_an_unpruned_image() -> None:
    original = CropConfig(position_ids="original")
    refuse_model(model_config(max_model_len=4096 - 576), original)
    with pytest.raises(UnsupportedFlagError, match=r"--max-model-len must be at most 3520.*got 3521"):
        refuse_model(model_config(max_model_len=4096 - 575), original)


def test_renumbered_positions_need_no_room() -> None:
    refuse_model(model_config(max_model_len=4096), CropConfig())


def test_every_refusal_gives_its_reason() -> None:
    assert all(len(reason.split()) > 3 for reason in REFUSED.values())


def test_a_localizer_that_could_never_answer_is_refused() -> None:
    adapter = LocalizerConfig(kind="engine", adapter="locate")
    with pytest.raises(UnsupportedFlagError, match="--enable-lora"):
        refuse_localizer(SimpleNamespace(enable_lora=False), adapter)
    refuse_localizer(SimpleNamespace(enable_lora=True), adapter)
    refuse_localizer(SimpleNamespace(enable_lora=False), LocalizerConfig(kind="engine"))
