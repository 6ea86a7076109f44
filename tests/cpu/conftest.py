# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on the CPU, in this process; each is started once and shared by all tests."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

# In one process, so that tests can look into the model; the end-to-end tests cover separate processes.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_CROP_DEBUG"] = "1"
# vLLM reads this once in a process. Compiled code of an earlier run would hide what a first start does.
os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="vllm-crop-tests-")

from tests import float32_deltanet
from tests.conftest import STARTS, CheckpointOf
from tests.families import LLAVA, QWEN3_5, Family
from tests.reference import HfReference, Reference
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.request import CropRequest, image_requests

TEXT = "USER: {images}What is the time, and where?\nASSISTANT:"
# Of an answer. Interpreted kernels take 0.3 s a step: the prompt and three answer tokens say what more would.
STEPS = 4 if "TRITON_INTERPRET" in os.environ else 8


@dataclass(frozen=True)
class Question:
    """A prompt with images and the `crop` it is asked with (None: the field is left out).

    Attributes:
        settings: other processor settings of the request.
    """

    images: tuple[Image.Image, ...] = ()
    crop: Mapping[str, Any] | None = None
    text: str = TEXT
    after_image: str = "\n"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, image: str = LLAVA.reference.image) -> dict[str, Any]:
        """As `LLM.generate` takes it; `image` is how the family writes one."""
        images = f"{image}{self.after_image}" * len(self.images)
        prompt: dict[str, Any] = {"prompt": self.text.format(images=images)}
        if self.images:
            prompt["multi_modal_data"] = {"image": list(self.images)}
        crop = {} if self.crop is None else {"crop": dict(self.crop)}
        if crop or self.settings:
            prompt["mm_processor_kwargs"] = {**crop, **self.settings}
        return prompt


@dataclass(frozen=True)
class Answer:
    """Tokens, full-vocabulary logprobs `[steps, vocab]` and prompt counts of one request."""

    token_ids: list[int]
    logprobs: torch.Tensor
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_token_ids: list[int] = field(default_factory=list)


# On top of the defaults below, for another device (tests/gpu_runner.py).
DEVICE_OPTIONS: dict[str, Any] = {}
# An LLM that is collected takes the process groups of all others in its process along.
_KEPT: list[Any] = []
_STATUS: list[int] = []


def pytest_sessionfinish(exitstatus: int) -> None:
    """Keep what `pytest_unconfigure` ends with."""
    _STATUS.append(int(exitstatus))


def pytest_unconfigure() -> None:
    """End at once when all is said: every LLM would be taken apart for seconds, minutes for all of them."""
    if _KEPT and _STATUS:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STATUS[-1])


def inspect_models_here() -> None:
    """Have vLLM look at model classes in this process.

    It takes another for each class, to keep CUDA out of this one. Models run here anyway, and each of those
    processes imports all of vLLM for some seconds.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


class Engine:
    """A vLLM `LLM` with helpers to ask it and to look into its model."""

    def __init__(
        self, checkpoint: Path, crop: Mapping[str, Any] | None, family: Family = LLAVA, **options: Any
    ) -> None:
        from vllm import LLM
        from vllm.distributed import parallel_state

        inspect_models_here()
        if family.module == QWEN3_5.module and not torch.cuda.is_available():
            float32_deltanet.install()
        self.image = family.reference.image
        self.config = CropConfig.from_mapping(crop or {})
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 2048,
            "enforce_eager": True,
            "max_logprobs": -1,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 16},
            "num_gpu_blocks_override": 1000,  # else a gigabyte for each engine, and all stay
            "seed": 0,
            "additional_config": {} if crop is None else {"crop": dict(crop)},
        }
        of_family = {**family.options, **(family.evicting_options if self.config.stages else {})}
        self.llm = LLM(model=str(checkpoint), **(defaults | DEVICE_OPTIONS | of_family | options))
        _KEPT.append(self.llm)
        STARTS["engines"] += 1
        # The first engine of a process makes the process groups of all, but one for experts only if it has
        # some: any group of one process will do.
        parallel_state._EP = parallel_state._EP or parallel_state._TP

    def ask(self, *questions: Question, steps: int = STEPS) -> list[Answer]:
        """Answer all at once, greedily."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=steps, logprobs=-1, ignore_eos=True)
        outputs = self.llm.generate(
            [question.prompt(self.image) for question in questions], sampling, use_tqdm=False
        )
        return [_answer(output) for output in outputs]

    def add(self, request_id: str, question: Question, steps: int = STEPS, **options: Any) -> str:
        """Queue a question without running a step; the id that the scheduler knows it by."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        defaults: dict[str, Any] = {"temperature": 0, "max_tokens": steps, "logprobs": -1, "ignore_eos": True}
        sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **(defaults | options))
        prompt = self.llm._preprocess_cmpl_one(question.prompt(self.image))
        return self.llm.llm_engine.add_request(request_id, prompt, sampling)

    def step(self) -> dict[str, Answer]:
        """Run one step; the answers it has finished, by the id they were added with."""
        return {output.request_id: _answer(output) for output in self.llm.llm_engine.step()}

    def finish(self) -> dict[str, Answer]:
        """Run until nothing is left to do, in the worker either."""
        answers: dict[str, Answer] = {}
        while self.llm.llm_engine.has_unfinished_requests() or self.scheduler.has_requests():
            answers |= self.step()
        return answers

    @property
    def model(self) -> Any:
        """The model in the (only) worker."""
        return self.llm.apply_model(lambda model: model)[0]

    @property
    def processor(self) -> Any:
        """The multimodal processor of the front end."""
        return self.llm.llm_engine.renderer.mm_processor

    @property
    def scheduler(self) -> Any:
        """The scheduler, which runs in this process too."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def block_pool(self) -> Any:
        """The pool that all KV cache groups take their blocks from."""
        return self.scheduler.kv_cache_manager.block_pool


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    rows = []
    for step in completion.logprobs:
        row = torch.empty(len(step), dtype=torch.float64)
        for token, entry in step.items():
            row[token] = entry.logprob
        rows.append(row)
    return Answer(
        list(completion.token_ids),
        torch.stack(rows),
        len(output.prompt_token_ids),
        output.num_cached_tokens or 0,
        list(output.prompt_token_ids),
    )


def decided(processor: Any, image: Any, crop: Any) -> Any:
    """What the front end decides about one image."""
    items = processor.info.parse_mm_data({"image": image})
    size = items["image"].get_image_size(0)
    asked = CropRequest(CropParams.parse(crop))
    (decision,) = processor.planner.plan(asked, [(size.width, size.height)])
    return decision


@pytest.fixture(scope="session", autouse=True)
def remove_cache() -> Iterator[None]:
    """What vLLM has kept of compiled code."""
    yield
    shutil.rmtree(os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)


EVICTION_LAYERS = [2]
EVICT: dict[str, Any] = {"method": "ilp", "eviction_layers": EVICTION_LAYERS, "pruning_rate": 2 / 3}
# Prompts are prefilled in chunks that begin and end anywhere, within evicted tokens too.
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 256}
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 2048}


@dataclass(frozen=True)
class Setting:
    """How an engine is started: `crop` None is stock vLLM with the plugin installed."""

    crop: Mapping[str, Any] | None
    options: Mapping[str, Any]
    deep: bool = False


# Eviction at layer 2 of 8 makes four KV cache groups of two layers each; at 2 and 5 five, two of them padded.
SETTINGS = {
    "stock": Setting(None, CHUNKED),
    "pool": Setting({"pruning_rate": 5 / 6}, CHUNKED),
    "original": Setting({"pruning_rate": 0.778, "compression": "prune", "position_ids": "original"}, WHOLE),
    "evicting": Setting(EVICT, CHUNKED, deep=True),
    "staged": Setting(
        {
            **EVICT,
            "method": "plc+ilp",
            "eviction_layers": [2, 5],
            "compression": "prune",
            "position_ids": "original",
        },
        WHOLE,
        deep=True,
    ),
}
EngineOf = Callable[[Family, str], Engine]
ReferenceFor = Callable[..., Reference]
ReferenceOf = Callable[[Family, str], ReferenceFor]


@pytest.fixture(scope="session")
def engine_of(checkpoint_of: CheckpointOf) -> EngineOf:
    """The engine of a family with one of SETTINGS."""

    @cache
    def start(family: Family, name: str) -> Engine:
        setting = SETTINGS[name]
        checkpoint = checkpoint_of(family, family.deep if setting.deep else family.shallow)
        return Engine(checkpoint, setting.crop, family, **setting.options)

    return start


@pytest.fixture(scope="session")
def hf_of(checkpoint_of: CheckpointOf) -> Callable[..., HfReference]:
    """The exact reference of a family and size."""
    return cache(lambda family, size: family.reference(checkpoint_of(family, size)))


@pytest.fixture(scope="session")
def reference_of(hf_of: Callable[..., HfReference]) -> ReferenceOf:
    """Reference answers for the engine of a family with one of SETTINGS."""
    by_size = cache(lambda family, size: reference_by(hf_of(family, size)))
    return lambda family, name: by_size(family, family.deep if SETTINGS[name].deep else family.shallow)


@pytest.fixture(scope="session")
def pool_engine(engine_of: EngineOf) -> Engine:
    """Pooling, renumbered positions; 256 tokens a step, so every unpruned image is prefilled in chunks."""
    return engine_of(LLAVA, "pool")


@pytest.fixture(scope="session")
def original_engine(engine_of: EngineOf) -> Engine:
    """Sampling instead of pooling, original position ids, whole prompts in one step."""
    return engine_of(LLAVA, "original")


@pytest.fixture(scope="session")
def stock_engine(engine_of: EngineOf) -> Engine:
    """The plugin is installed, nobody asked for it."""
    return engine_of(LLAVA, "stock")


@pytest.fixture(scope="session")
def evicting_engine(engine_of: EngineOf) -> Engine:
    """Evicts at layer 2 of 8. 256 tokens a step."""
    return engine_of(LLAVA, "evicting")


@pytest.fixture(scope="session")
def staged_engine(engine_of: EngineOf) -> Engine:
    """Evicts at layers 2 and 5, also after compression."""
    return engine_of(LLAVA, "staged")


@pytest.fixture(scope="session")
def reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    """The reference answer to a question, as an engine with this configuration must give it."""
    return reference_of(LLAVA, "pool")


@pytest.fixture(scope="session")
def deep_hf(hf_of: Callable[..., HfReference]) -> HfReference:
    """The exact reference for engines that evict."""
    return hf_of(LLAVA, LLAVA.deep)


@pytest.fixture(scope="session")
def deep_reference_for(reference_of: ReferenceOf) -> ReferenceFor:
    """The same for engines that evict."""
    return reference_of(LLAVA, "staged")


def reference_by(hf: HfReference) -> ReferenceFor:
    """Answers questions with transformers; every answer is computed once."""
    known: dict[Any, Reference] = {}

    def answer(
        question: Question,
        config: CropConfig,
        original_positions: bool | None = None,
        steps: int = STEPS,
    ) -> Reference:
        requests = image_requests(
            CropParams.parse(question.crop or {}), config, num_images=len(question.images)
        )
        if original_positions is None and config.position_ids == "original":
            original_positions = True
        pictures = tuple((image.size, image.tobytes()) for image in question.images)
        text = question.prompt(hf.image)["prompt"]
        key = (text, pictures, tuple(requests), original_positions, steps)
        if key not in known:
            plans = [
                hf.plan(
                    image,
                    request.region,
                    request.pruning_rate,
                    request.compression,
                    request.method,
                    request.eviction_layers,
                    request.rim,
                )
                for image, request in zip(question.images, requests, strict=True)
            ]
            prompt_ids = hf.processor.tokenizer.encode(text, add_special_tokens=False)
            known[key] = hf.generate(prompt_ids, question.images, plans, steps, original_positions)
        return known[key]

    return answer
