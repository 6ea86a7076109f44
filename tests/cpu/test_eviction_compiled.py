# SPDX-License-Identifier: Apache-2.0
"""With torch.compile each stage's layers are compiled by themselves, and every step runs in stages."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from tests.conftest import CheckpointOf
from tests.cpu import test_heat as heat
from tests.cpu.conftest import EVICT, Engine, Question, ReferenceFor, ReferenceOf
from tests.cpu.test_eviction_parity import SCENARIOS
from tests.cpu.test_parity import TOLERANCE, difference, each_family
from tests.families import Family
from tests.reference import HfReference
from vllm_crop.eviction.decoder import EvictingDecoder
from vllm_crop.heat.request import read

pytestmark = pytest.mark.vllm_runtime

NAMES = ("ilp: one image", "plc+ilp: two images", "plc: one image", "ilp: image last", "off", "text only")
ASKED = {name: SCENARIOS[name] for name in NAMES}


def check(engine: Engine, reference_for: ReferenceFor) -> None:
    for (name, question), answer in zip(ASKED.items(), engine.ask(*ASKED.values()), strict=True):
        reference = reference_for(question, engine.config)
        assert answer.token_ids == reference.token_ids, name
        assert difference(answer, reference) <= TOLERANCE, name


def num_compiled() -> int:
    """Pieces of code that vLLM has compiled and keeps."""
    cache = Path(os.environ["VLLM_CACHE_ROOT"])
    return len(list(cache.glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model")))


@each_family
def test_compiled_stages(
    checkpoint_of: CheckpointOf,
    reference_of: ReferenceOf,
    hf_of: Callable[..., HfReference],
    family: Family,
) -> None:
    before = num_compiled()
    checkpoint = checkpoint_of(family, family.deep)
    crop = {**EVICT, "localizer": {**heat.LOCALIZER, "layers": list(family.looking)}}
    engine = Engine(checkpoint, crop, family, max_num_batched_tokens=512, enforce_eager=False)
    assert engine.model.eviction.runs_all_steps
    check(engine, reference_of(family, "evicting"))
    assert all(segment.compiled or segment.aot_compiled_fn for segment in engine.model.eviction.segments)
    # vLLM keeps compiled code by the name of `forward`: the stages must not find each other's.
    assert num_compiled() == before + 2
    looked = Question((heat.PICTURE,), heat.OFF)
    cells = heat.cells_of(engine, heat.PICTURE, heat.OFF)
    wanted = heat.expected(hf_of(family, family.deep), engine, looked, cells, family.looking)
    for leaves in (False, True):  # after the last layer that is read, or through all
        left = engine.model.heat.steps_left
        output = engine.llm.generate(
            looked.prompt(engine.image), heat.sampling(cells, leaves=leaves), use_tqdm=False
        )[0]
        assert heat.differs(read(output.outputs[0].logprobs[0], heat.NUM_CELLS), wanted) < heat.TOLERANCE
        assert (engine.model.heat.steps_left > left) is leaves


def test_rows_between_captured_stages(
    deep_checkpoint: Path, deep_reference_for: ReferenceFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA each stage replays piecewise graphs of its own, which must not share what they pass on."""
    crossed: list[int] = []
    run, across = EvictingDecoder.run, EvictingDecoder._across

    def run_with_graphs(self: Any, *args: Any) -> Any:
        get_forward_context().cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        return run(self, *args)

    def overwritten_across(self: Any, boundary: int, hidden: Any, residual: Any, context: Any) -> Any:
        passed = across(self, boundary, hidden, residual, context)
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            crossed.append(boundary)
            hidden.fill_(9.0)  # what the next graph's intermediates would do
            residual.fill_(9.0)
        return passed

    monkeypatch.setattr(EvictingDecoder, "runs_all_steps", True)
    monkeypatch.setattr(EvictingDecoder, "run", run_with_graphs)
    monkeypatch.setattr(EvictingDecoder, "_across", overwritten_across)
    crop = {**EVICT, "eviction_layers": [2, 5]}
    engine = Engine(deep_checkpoint, crop, max_num_batched_tokens=512, enable_prefix_caching=False)
    engine.model.eviction.prepare_for_graphs(512, 64, engine.model.language_model.lm_head.weight.dtype)
    check(engine, deep_reference_for)
    assert set(crossed) == {0, 1}
