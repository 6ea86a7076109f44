# SPDX-License-Identifier: Apache-2.0
"""With eviction, the served model computes what transformers' layers compute from the rows left to them."""

from dataclasses import replace

import pytest

from tests.cpu.conftest import EVICT, EngineOf, Question, ReferenceOf
from tests.cpu.test_parity import NOTICEABLE, TOLERANCE, cells, difference, each_family
from tests.families import Family
from tests.pictures import noise_image
from vllm_crop.config import CropConfig

pytestmark = pytest.mark.vllm_runtime

WIDE, TALL, SQUARE = noise_image(101, 500, 400), noise_image(102, 300, 420), noise_image(103)
ONE, TWO = cells(2, 3, 3, 4), cells(5, 1, 6, 3)
TWO_BOXES = [*cells(0, 0, 1, 1), *cells(5, 5, 6, 7)]
METHODS = ("ilp", "plc+ilp", "plc")


def question(*regions: object, method: str, **crop: object) -> Question:
    """About as many images as there are regions."""
    images = (WIDE, TALL, SQUARE)[: len(regions)]
    return Question(images, {"regions": list(regions), "method": method, **crop})


def scenarios() -> dict[str, Question]:
    """Each with every method, and the unpruned ones once."""
    found = {}
    for method in METHODS:
        one_image = question(ONE, method=method)
        found |= {
            f"{method}: one image": one_image,
            f"{method}: region larger than the budget": question(cells(0, 0, 7, 7), method=method),
            f"{method}: two boxes": question(TWO_BOXES, method=method),
            f"{method}: two images": question(ONE, TWO, method=method),
            f"{method}: second of two images": question(None, TWO, method=method),
            f"{method}: another rate": question(ONE, method=method, pruning_rate=0.5),
            f"{method}: image first": replace(one_image, text="{images}What?\nASSISTANT:"),
            f"{method}: image last": replace(one_image, text="USER: What?\n{images}", after_image=""),
            f"{method}: only an image": replace(one_image, text="{images}", after_image=""),
        }
    return found | {
        "no region": question(None, method="ilp"),
        "off": question(ONE, method="off"),
        "out of view": question([0.0, 0.4, 0.05, 0.6], method="ilp"),
        "text only": Question(text="USER: {images}What is the time?\nASSISTANT:"),
    }


SCENARIOS = scenarios()
UNPRUNED = {"no region", "off", "out of view", "text only"}


def control_for(name: str, asked: Question) -> Question:
    """The mistake to be noticed: pruned questions answered unpruned, unpruned ones pruned."""
    if name not in UNPRUNED:
        return replace(asked, crop={"method": "off"})
    return replace(asked, crop={"regions": [TWO for _ in asked.images], "method": "ilp"})


@each_family
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("setting", ["evicting", "staged"])
def test_eviction_equals_transformers(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, setting: str, name: str
) -> None:
    engine, reference_for = engine_of(family, setting), reference_of(family, setting)
    asked = SCENARIOS[name]
    (answer,) = engine.ask(asked)
    reference = reference_for(asked, engine.config)
    error = difference(answer, reference)
    sensitivity = difference(reference_for(control_for(name, asked), engine.config), reference)
    print(
        f"{family}, {setting}, {name}: rows per layer {reference.prompt_rows_per_layer}, "
        f"max |delta logprob| {error:.1e}; control {sensitivity:.1e}"
    )
    assert answer.num_prompt_tokens == reference.num_prompt_tokens
    assert answer.token_ids == reference.token_ids
    assert error <= TOLERANCE
    assert sensitivity > NOTICEABLE or not asked.images


@each_family
@pytest.mark.parametrize("setting", ["evicting", "staged"])
def test_all_scenarios_in_one_batch(
    engine_of: EngineOf, reference_of: ReferenceOf, family: Family, setting: str
) -> None:
    engine = engine_of(family, setting)
    answers = engine.ask(*SCENARIOS.values())
    for (name, asked), answer in zip(SCENARIOS.items(), answers, strict=True):
        reference = reference_of(family, setting)(asked, engine.config)
        assert answer.token_ids == reference.token_ids, name
        assert difference(answer, reference) <= TOLERANCE, name


@each_family
def test_the_layer_of_eviction_matters(reference_of: ReferenceOf, family: Family) -> None:
    """The control: an engine that evicted one layer too early or too late would be noticed."""
    reference_for = reference_of(family, "evicting")
    asked = question(ONE, method="ilp", pruning_rate=0.5)
    answers = [
        reference_for(asked, CropConfig.from_mapping({**EVICT, "eviction_layers": [layer]}))
        for layer in (1, 2, 3)
    ]
    assert difference(answers[0], answers[1]) > NOTICEABLE
    assert difference(answers[1], answers[2]) > NOTICEABLE
