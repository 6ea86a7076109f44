# SPDX-License-Identifier: Apache-2.0
"""Pictures in pieces in half precision, through the FlashAttention of the vision tower and of the decoder.

Rounding is measured on the same engine, with the same pictures unpruned; pieces may be off by little more.
float32 at 1e-5 is tests/cpu/test_foveation.py with `-p tests.gpu_runner`. Needs a CUDA device.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cpu.conftest import CHUNKED, Engine, Question, reference_by
from tests.cpu.test_foveation import CROP, SCENARIOS, SEEN_WHOLE, TILED, TILED_SCENARIOS, crop_of
from tests.families import LLAVA_NEXT, QWEN2_5_VL, QWEN3_VL, Family
from tests.foveated_reference import foveating
from tests.gpu.test_flash_attention import DEVICE, assert_little_beside, error, with_rounded_weights
from vllm_crop.config import CropConfig

pytestmark = [
    pytest.mark.vllm_runtime,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", [QWEN3_VL, QWEN2_5_VL, LLAVA_NEXT], ids=str)
def test_pieces_add_little_to_the_error_of_rounding(family: Family, tmp_path: Path) -> None:
    checkpoint = with_rounded_weights(family.make_checkpoint(tmp_path, family.deep), torch.float16)
    engine = Engine(checkpoint, crop_of(family), family, **{**CHUNKED, **DEVICE, "enforce_eager": True})
    reference_for = reference_by(foveating(family.reference, checkpoint, engine.config))
    pooled = CropConfig.from_mapping({**CROP, "foveation": {}, "compression": "pool"})
    scenarios = TILED_SCENARIOS if family in TILED else SCENARIOS
    pieces = [question for name, question in scenarios.items() if name not in SEEN_WHOLE]

    def errors(questions: list[Question]) -> list[float]:
        answers = zip(questions, engine.ask(*questions), strict=True)
        return [error(answer, reference_for(one, engine.config)) for one, answer in answers]

    rounding = errors([replace(one, crop={"method": "off"}) for one in pieces])
    found = errors(pieces)
    controls = [
        float(
            (reference_for(one, pooled).logprobs[0] - reference_for(one, engine.config).logprobs[0])
            .abs()
            .max()
        )
        for one in pieces
    ]
    assert_little_beside(rounding, found, controls)
