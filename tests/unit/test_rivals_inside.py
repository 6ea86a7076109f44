# SPDX-License-Identifier: Apache-2.0
"""Rivals inside the language model, on hand-made attentions; budgets and configurations of all of them."""

import pytest
import torch

from lab.evaluation.conditions import Condition
from lab.evaluation.rivals import btp, dart, fastv, ivc_prune, pyramiddrop, sparsevlm, vscan, vtw
from lab.evaluation.rivals.budgets import scaled, stages, stages_from_the_start, two_stages
from lab.evaluation.rivals.registry import RIVALS
from lab.evaluation.runner.method import Rows
from tests.hand_made import NOTHING, image_of, sight_of, view_of
from vllm_crop.planning.budget import BudgetError, retained_per_stage, target_average

TOKENS, LAYERS = 576, 12
RATES = (0.667, 0.778, 0.889)
MOST_CONFIGURATIONS = 20


def test_attention_is_the_softmax_over_all_tokens_in_sight() -> None:
    scores = torch.tensor([[[[0.0, 1.0]], [[2.0, 0.0]]]])  # one question, two heads, one word, two tokens
    attention = view_of(scores, [1]).attention()
    by_head = [torch.tensor([0.0, 1.0, 0.0]).softmax(0), torch.tensor([2.0, 0.0, 0.0]).softmax(0)]
    assert torch.allclose(attention[0, 0], torch.stack(by_head).mean(0)[:2])


def test_fastv_keeps_what_the_last_word_attends_to() -> None:
    scores = torch.zeros(2, 1, 3, 5)
    scores[0, 0, 2] = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.0])  # the last word of a question of three
    scores[0, 0, 0] = torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0])  # the first word does not count
    scores[1, 0, 1] = torch.tensor([3.0, 0.0, 0.0, 0.0, 2.0])  # a question of two words
    scores[1, 0, 2] = torch.tensor([0.0, 9.0, 9.0, 0.0, 0.0])  # padding
    assert fastv.choose(view_of(scores, [3, 2]), 2).tolist() == [[1, 3], [0, 4]]


def test_pyramiddrop_asks_the_layer_to_come() -> None:
    before, coming = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    before[..., 0], coming[..., 2] = 5.0, 5.0
    assert pyramiddrop.choose(view_of(before, [1], coming=coming), 1).tolist() == [[2]]


def test_sparsevlm_asks_text_that_is_close_to_the_image() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.1]])
    close, far = torch.tensor([5.0, 0.0]), torch.tensor([-5.0, 0.0])
    text = torch.stack([far, close])
    assert sparsevlm.closer_than_average(features, text).tolist() == [False, True]
    assert sparsevlm.closer_than_average(features, torch.stack([far, far])).tolist() == [True, True]
    raters = sparsevlm.Raters()
    kept = raters.appoint(sight_of(image_of(features), text))
    assert kept.tokens.tolist() == [[0, 1, 2]]
    scores = torch.zeros(1, 1, 2, 3)
    scores[0, 0, 0, 0], scores[0, 0, 1, 1] = 5.0, 5.0  # the far word looks at 0, the close one at 1
    coming = scores.roll(1, -1)
    assert raters.choose(view_of(scores, [2]), 1).tolist() == [[1]]
    later = sparsevlm.Raters(layer="to come")
    later.appoint(sight_of(image_of(features), text))
    assert later.choose(view_of(scores, [2], coming=coming), 1).tolist() == [[2]]


def test_sparsevlms_raters_may_be_no_words_of_the_question() -> None:
    """The chat's own tokens behind the question rate, unless only words may."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    word, suffix = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0], [9.0, 0.0]])
    sight = sight_of(image_of(features), suffix)
    sight = type(sight)(sight.image, (word,), ((" red",),), (suffix,), NOTHING, None)
    scores = torch.zeros(1, 1, 2, 2)
    scores[0, 0, 0, 0], scores[0, 0, 1, 1] = 5.0, 5.0
    for among, expected in (("text", 1), ("words", 0)):
        raters = sparsevlm.Raters(among)
        raters.appoint(sight)
        view = view_of(scores, [2])
        view.words[0, 1] = False
        assert raters.choose(view, 1).tolist() == [[expected]]


def test_sparsevlms_second_version_drops_heads_and_what_rotation_gives() -> None:
    text = torch.tensor([[1.0, 0.0]])
    scores = torch.zeros(1, 2, 1, 2)
    scores[0, 0, 0] = torch.tensor([6.0, 5.9])  # attends to the image, and hardly prefers 0
    scores[0, 1, 0] = torch.tensor([-9.0, 2.0])  # attends less, but to 1 alone
    every = sparsevlm.Raters()
    every.appoint(sight_of(image_of(torch.eye(2)), text))
    assert every.choose(view_of(scores, [1], others=3.0), 1).tolist() == [[1]]
    half = sparsevlm.Raters(half=True)
    half.appoint(sight_of(image_of(torch.eye(2)), text))
    assert half.choose(view_of(scores, [1], others=3.0), 1).tolist() == [[0]]
    # Rotations alone prefer token 0: what is left of a slight preference for it prefers 1.
    turn = torch.tensor([[0.0], [2.0]])
    image_rows = Rows(NOTHING, turn.cos()[None].repeat(1, 1, 2), turn.sin()[None].repeat(1, 1, 2))
    text_rows = Rows(NOTHING, torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    alone = sparsevlm.rotation_alone(text_rows, image_rows)
    # Ones turned by an angle keep sqrt(2) cos(angle) of their product.
    assert torch.allclose(alone[0, 0], (2 * turn[:, 0].cos() / 2**0.5).softmax(0), atol=1e-6)
    slight = torch.tensor([[[[0.5, 0.0]]]])
    for level, expected in ((False, 0), (True, 1)):
        raters = sparsevlm.Raters(level=level)
        raters.appoint(sight_of(image_of(torch.eye(2)), text))
        view = view_of(slight, [1], image_rows=image_rows, text_rows=text_rows)
        assert raters.choose(view, 1).tolist() == [[expected]]


def test_vtw_withdraws_everything_where_its_layer_meets_the_rate() -> None:
    assert vtw.choose(view_of(torch.zeros(2, 1, 1, 3), [1, 1]), 0).shape == (2, 0)
    assert vtw.vtw(TOKENS, LAYERS, 0.5).stages == {6: 0}  # half of the depth
    assert vtw.vtw(TOKENS, LAYERS, 0.667, 3).stages == {3: 0}
    with pytest.raises(BudgetError, match=r"at layer 7 of 12, which is a pruning_rate of at most 0\.417"):
        vtw.vtw(TOKENS, LAYERS, 0.667, 7)
    with pytest.raises(BudgetError, match="none is left"):
        vtw.vtw(TOKENS, LAYERS, 0.1, 12)


def test_vtws_layer_is_the_smallest_whose_predictions_hardly_move() -> None:
    full, moved = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert vtw.divergence(full.log(), moved.log()) == pytest.approx(float(expected))
    assert vtw.divergence(full.log(), moved.log()) != pytest.approx(vtw.divergence(moved.log(), full.log()))
    assert vtw.smallest_below({5: 0.1, 6: 0.001, 7: 0.01, 8: 0.0}, 0.003) == 6
    assert vtw.smallest_below({5: 0.1}, 0.003) is None


def test_ivc_prune_inside_reads_the_values_behind_the_second_token() -> None:
    chooser = ivc_prune.Chooser(lambda count: 0)
    chooser.cosines = chooser.sines = torch.zeros(3, 1)
    image = torch.tensor([[[[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]]])
    text = torch.tensor([[[[9.0, 0.0], [9.0, 0.0], [0.0, 1.0], [9.0, 0.0]]]])  # two rate not; padding
    view = view_of(torch.zeros(1, 1, 4, 3), [3], image_values=image, text_values=text)
    assert chooser.inside(view, 1).tolist() == [[1]]


def test_ivc_prune_leaves_room_for_seeds() -> None:
    chooser = ivc_prune.Chooser(lambda count: 64)
    angles = torch.rand(576, 1)
    chooser.cosines, chooser.sines = angles, -angles
    assert len(chooser._fixed(64)) == 58  # the seeds are six
    assert len(chooser._fixed(200)) == 64


def test_dart_looks_at_keys_and_states() -> None:
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.1]])
    said = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [-5.0, 5.0]]])
    text_keys = torch.tensor([[[[1.0], [2.0], [9.0]]]])  # the third is padding
    view = view_of(
        torch.zeros(1, 1, 3, 4),
        [2],
        text_keys=text_keys,
        image_rows=Rows(states[None], NOTHING, NOTHING),
        text_rows=Rows(said, NOTHING, NOTHING),
    )
    # Keys are alike, so the first token is the image's pivot; with that of the text it brings 3, then 2.
    assert dart.choose(view, 3, 1).tolist() == [[0, 2, 3]]


def test_vscan_inside_may_do_without_rotation() -> None:
    rotated, unrotated = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    rotated[..., 0], unrotated[..., 2] = 5.0, 5.0
    view = view_of(torch.zeros(1, 1, 1, 3), [1], coming=rotated, unrotated=unrotated)
    assert vscan.choose(view, 1, rotated=True).tolist() == [[0]]
    assert vscan.choose(view, 1, rotated=False).tolist() == [[2]]


def test_btp_takes_attended_tokens_then_the_farthest_from_them() -> None:
    attention = torch.tensor([0.0, 0.1, 0.2, 0.9])
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 0.1]])
    assert btp.balance(attention, states, 2, 1.0, 0.0).tolist() == [2, 3]
    assert btp.balance(attention, states, 2, 0.5, 0.0).tolist() == [1, 3]  # 1 is unlike what is attended
    assert btp.balance(attention, states, 2, 0.5, 2.0).tolist() == [
        0,
        1,
    ]  # of three attended the earliest, then 0
    assert btp.balance(attention, states, 2, 0.0, 0.0).tolist() == [0, 1]
    assert sorted(btp.balance(attention, states, 4, 0.5, 0.0).tolist()) == [0, 1, 2, 3]
    scores = torch.zeros(1, 1, 1, 4)
    scores[..., 3] = 9.0
    pruning = btp.btp(TOKENS, LAYERS, 0.778, [1, 4], [0.0, 1.0], spare=0.0)
    assert pruning.choose is not None
    rows = Rows(states[None], NOTHING, NOTHING)
    assert pruning.choose(view_of(scores, [1], image_rows=rows, layer=4), 1).tolist() == [[3]]
    assert pruning.choose(view_of(scores, [1], image_rows=rows, layer=1), 1).tolist() == [[1]]


def per_layer(name: str, rate: float, configuration: str | None = None) -> list[int]:
    """Visual tokens of every layer, as a method says."""
    pruning = RIVALS[name](TOKENS, LAYERS, rate, configuration)
    left, counts = TOKENS, []
    for layer in range(LAYERS):
        left = pruning.stages.get(layer, left)
        counts.append(left)
    return counts


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "dart", "ivc-prune", "btp", "ptp"])
def test_inner_rivals_meet_the_budget_on_average(name: str, rate: float) -> None:
    possible = 0
    for configuration in RIVALS[name].configurations:
        try:
            pruning = RIVALS[name](TOKENS, LAYERS, rate, configuration)
        except BudgetError:
            continue
        possible += 1
        if pruning.stages and not configuration.startswith("before"):  # of these only the runner knows
            counts = per_layer(name, rate, configuration)
            assert abs(sum(counts) / LAYERS - target_average(TOKENS, rate)) <= 0.5, configuration
            assert counts[0] == TOKENS
            assert sorted(counts, reverse=True) == counts
    assert possible >= 1


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm"])
def test_a_budget_smaller_than_one_full_layer_is_refused(name: str) -> None:
    with pytest.raises(BudgetError):
        RIVALS[name](TOKENS, LAYERS, 0.926)


@pytest.mark.parametrize("rate", [0.0, *RATES, 0.926])
def test_two_stages_meet_the_budget(rate: float) -> None:
    for layer, ratio in ((6, 1 / 3), (8, 0.4), (4, 1.0)):
        first, later = two_stages(TOKENS, rate, LAYERS, layer, ratio)
        average = (first * layer + later[layer] * (LAYERS - layer)) / LAYERS
        assert abs(average - target_average(TOKENS, rate)) <= 0.5
        assert later[layer] <= first <= TOKENS
    assert two_stages(TOKENS, 0.889, LAYERS, 8, 0.4) == (80, {8: 32})


@pytest.mark.parametrize("rate", [0.0, *RATES, 0.926])
def test_stages_from_the_start_meet_the_budget(rate: float) -> None:
    for ratios in ((), (0.5,), (0.5, 0.5), (0.75, 0.75)):
        layers = [4, 8][: len(ratios)]
        first, later = stages_from_the_start(TOKENS, rate, LAYERS, layers, ratios)
        counts = [first] * LAYERS
        for layer, count in later.items():
            counts[layer:] = [count] * (LAYERS - layer)
        assert sorted(counts, reverse=True) == counts
        # Nobody has more tokens than there are.
        assert first == TOKENS or abs(sum(counts) / LAYERS - target_average(TOKENS, rate)) <= 0.5


def test_the_first_of_the_configurations_is_the_first_that_meets_the_rate() -> None:
    assert [RIVALS["fastv"].first_possible(TOKENS, LAYERS, rate) for rate in RATES] == ["K=2", "K=2", "K=1"]
    assert RIVALS["fastv"].first_possible(TOKENS, LAYERS, 0.926) is None
    assert RIVALS["pyramiddrop"].first_possible(TOKENS, LAYERS, 0.889) == "1, 5, 8, ratio 0.5"
    assert RIVALS["ivc-prune"].first_possible(TOKENS, LAYERS, 0.889) == "before the first layer"


def test_stages_are_the_papers_scaled_to_the_budget() -> None:
    assert stages(TOKENS, 0.667, LAYERS, (3, 6, 9)) == dict(
        zip((3, 6, 9), retained_per_stage(TOKENS, 0.667, "ilp", LAYERS, (3, 6, 9))[1:], strict=True)
    )
    assert RIVALS["pyramiddrop"](TOKENS, LAYERS, 0.889).stages == {1: 29, 5: 15, 8: 7}
    assert RIVALS["sparsevlm"](TOKENS, LAYERS, 0.889).stages == {1: 39, 3: 18, 6: 10}
    # Proportions hold as long as nobody has more tokens than there are.
    left = scaled(TOKENS, 0.667, LAYERS, (1, 3, 6), (300, 200, 110))
    assert left[1] / left[3] == pytest.approx(1.5, rel=0.02)
    assert scaled(TOKENS, 0.0, LAYERS, (1, 3, 6), (300, 200, 110)) == {1: 576, 3: 576, 6: 576}


def test_configurations_are_few_and_told_apart() -> None:
    for name, rival in RIVALS.items():
        names = list(rival.configurations)
        assert 1 <= len(names) <= MOST_CONFIGURATIONS or name == "vtw", name  # whose layer is not tuned
        slugs = {Condition(name, None, 0.889, configuration).slug for configuration in names}
        assert len(slugs) == len(names), name
        made = [str(sorted(arguments.items())) for arguments in rival.configurations.values()]
        assert len(set(made)) == len(made), name
