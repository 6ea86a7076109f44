# SPDX-License-Identifier: Apache-2.0
"""The engine localizer answering with a LoRA adapter of the served model."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from lab.evaluation.questions import make_test_set
from tests.e2e.conftest import OPTIONS, metric, serve
from tests.tinyvqa import CHECKPOINT, ENGINE, ask, crop_options, found, said_of_thumbnail
from vllm_crop.measuring.server import Server

pytestmark = pytest.mark.e2e

ADAPTER = "locator"
ASKED = [(s, q.text) for s in make_test_set(2, seed=11) for q in s.questions]


def make_adapter(folder: Path) -> Path:
    """Random LoRA weights, wide enough to change what the model says."""
    text, rank = AutoConfig.from_pretrained(CHECKPOINT).text_config, 4
    head = text.hidden_size // text.num_attention_heads
    widths = {"q_proj": text.num_attention_heads * head, "v_proj": text.num_key_value_heads * head}
    torch.manual_seed(0)
    tensors = {}
    for layer in range(text.num_hidden_layers):
        for name, width in widths.items():
            prefix = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, text.hidden_size) / text.hidden_size**0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.6 * torch.randn(width, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": list(widths), "base_model_name_or_path": str(CHECKPOINT)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapter = make_adapter(tmp_path_factory.mktemp("adapter") / ADAPTER)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}")
    crop = crop_options({**ENGINE, "adapter": ADAPTER})
    with serve(str(CHECKPOINT), *crop, *lora, *OPTIONS, log_path=logs / "adapter.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def test_the_region_is_what_the_adapter_says(client: openai.OpenAI, server: Server) -> None:
    differing = 0
    for scene, question in ASKED:
        region, confidence = said_of_thumbnail(client, scene.picture(), question, model=ADAPTER)
        base_region, base_confidence = said_of_thumbnail(client, scene.picture(), question)
        differing += (region, confidence) != (base_region, pytest.approx(base_confidence, abs=1e-2))
        image = found(ask(client, scene.picture(), question))
        assert image["region"] == (
            None if region is None else [pytest.approx(box, abs=1e-4) for box in region.as_lists()]
        )
        assert image["localizer"]["confidence"] == pytest.approx(confidence, abs=2e-4)
    assert differing > len(ASKED) // 2  # the adapter is no copy of the model
    assert metric(server, "crop:localizations_total", outcome="error") == 0


def test_the_answer_is_the_served_models_own(client: openai.OpenAI) -> None:
    """The adapter locates only: with the same region, the answer has the same probability."""
    scene, question = ASKED[0]
    answers = []
    located = ask(client, scene.picture(), question, logprobs=True)
    region = found(located)["region"]
    given = ask(client, scene.picture(), question, {"regions": [region]}, logprobs=True)
    for response in (located, given):
        choice = response.parse().choices[0]
        answers.append((choice.message.content, [token.logprob for token in choice.logprobs.content]))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] == pytest.approx(answers[1][1], abs=1e-4)
