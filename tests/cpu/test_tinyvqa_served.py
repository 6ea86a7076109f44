# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tinyvqa's shape are served: other patches, small windows, tied embeddings, many layers."""

from pathlib import Path

import pytest

from tests.cpu.conftest import Engine, Question, ReferenceFor, reference_by
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference
from tests.families import QWEN2_5_VL
from tests.pictures import noise_image
from tests.reference import HfQwen2_5VL
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.planning.geometry import TokenGrid

pytestmark = pytest.mark.vllm_runtime

TEXT = "<|im_start|>{images}what number is on the red circle?<|answer|>"
WIDE, TALL = noise_image(400, 400, 320), noise_image(401, 144, 480)
ONE, TWO = cells(2, 3, 3, 4), cells(5, 1, 6, 3)
ASKED = {
    method: Question((WIDE, TALL), {"regions": [ONE, TWO], "method": method}, TEXT, after_image="")
    for method in ("plc", "ilp", "plc+ilp", "off")
}


@pytest.fixture(scope="module")
def tinyvqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real shape with random weights that make every token count."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from lab.tinyvqa import checkpoint, words
    from vllm_crop.benchmarking.dummy_llava import DummySize, scale_weights

    tokenizer = words.make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(checkpoint.make_config(tokenizer))
    scale_weights(model, DummySize(branch_gain=0.4))
    with torch.no_grad():
        model.get_input_embeddings().weight *= 0.02  # they give the logits too
    folder = tmp_path_factory.mktemp("tinyvqa")
    checkpoint.save(folder, model, checkpoint.make_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def reference_for(tinyvqa: Path) -> ReferenceFor:
    return reference_by(HfQwen2_5VL(tinyvqa))


def test_its_files_tell_the_grid(tinyvqa: Path) -> None:
    geometry = load_geometry(str(tinyvqa))
    assert geometry.num_layers == 12
    assert geometry.grid(*WIDE.size) == TokenGrid(20, 25)


@pytest.mark.parametrize("layers", [[1], [1, 6]], ids=str)
def test_every_method_equals_transformers(
    tinyvqa: Path, reference_for: ReferenceFor, layers: list[int]
) -> None:
    crop = {"method": "plc+ilp", "eviction_layers": layers, "pruning_rate": 8 / 9}
    options = {"max_model_len": 4096, "num_gpu_blocks_override": 2000, "max_num_batched_tokens": 256}
    engine = Engine(tinyvqa, crop, QWEN2_5_VL, **options)
    references = {method: reference_for(question, engine.config) for method, question in ASKED.items()}
    for (method, reference), answer in zip(references.items(), engine.ask(*ASKED.values()), strict=True):
        error = difference(answer, reference)
        control = difference(references["off" if method != "off" else "plc"], reference)
        print(
            f"{method}, layers {layers}: rows per layer {reference.prompt_rows_per_layer}, "
            f"max |delta logprob| {error:.1e}; control {control:.1e}"
        )
        assert answer.num_prompt_tokens == reference.num_prompt_tokens
        assert answer.token_ids == reference.token_ids
        assert error <= TOLERANCE
        assert control > NOTICEABLE
