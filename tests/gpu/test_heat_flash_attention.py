# SPDX-License-Identifier: Apache-2.0
"""Heat maps in half precision with FlashAttention, eager and with compiled layers and captured graphs.

Compared with transformers' attention in float32 over the same rounded weights; float32 at 1e-5 is
tests/cpu/test_heat.py with `-p tests.gpu_runner`. Needs a CUDA device.
"""

from pathlib import Path

import pytest
import torch

from tests.cpu.conftest import Engine, Question
from tests.cpu.test_heat import (
    COMPRESSED,
    EVICTED,
    EVICTING,
    OFF,
    OTHER,
    OTHER_TEXT,
    PICTURE,
    PLAIN,
    ask,
    cells_of,
    differs,
    expected,
)
from tests.families import LLAVA, QWEN3_VL, Family
from tests.gpu.test_flash_attention import DEVICE, with_rounded_weights

pytestmark = [
    pytest.mark.vllm_runtime,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING = 0.05  # of the hottest cell; another question moves it by more than three times that


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("evicts", [True, False], ids=["evicting", "plain"])
@pytest.mark.parametrize("family", [LLAVA, QWEN3_VL], ids=str)
def test_a_map_differs_by_rounding_only(family: Family, evicts: bool, graphs: bool, tmp_path: Path) -> None:
    checkpoint = with_rounded_weights(family.make_checkpoint(tmp_path, family.deep), torch.float16)
    crop = EVICTING if evicts else PLAIN
    engine = Engine(
        checkpoint, crop, family, **{**DEVICE, "enforce_eager": not graphs, "max_num_batched_tokens": 256}
    )
    hf = family.reference(checkpoint)
    questions = [
        Question((PICTURE,), OFF),
        Question((OTHER,), COMPRESSED, OTHER_TEXT),
        Question((PICTURE,), OFF, OTHER_TEXT),
    ]
    cells = [cells_of(engine, question.images[0], question.crop) for question in questions]
    other = Question((OTHER,), EVICTED if evicts else COMPRESSED)
    batch = [(other, None), *zip(questions, cells, strict=True)]
    wanted = [expected(hf, engine, *one) for one in zip(questions, cells, strict=True)]
    together = ask(engine, *batch)[1:]
    alone = [ask(engine, one)[0] for one in zip(questions, cells, strict=True)]
    errors = [differs(got, want) for got, want in zip((*together, *alone), (*wanted, *wanted), strict=True)]
    noticeable = differs(wanted[2], wanted[0])
    print(f"{family}: errors {', '.join(f'{error:.1e}' for error in errors)}; question {noticeable:.1e}")
    assert max(errors) < ROUNDING
    assert noticeable > 3 * ROUNDING
