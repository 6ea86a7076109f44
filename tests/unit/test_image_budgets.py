# SPDX-License-Identifier: Apache-2.0
"""Who may say what an image costs, and that it costs exactly that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams, InvalidCropError
from vllm_crop.families.llava import ClipPreprocessing, LlavaGeometry
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry, SmartResize
from vllm_crop.families.view_size import MOST_DISTORTED, small_scale
from vllm_crop.frontend.conversation import shown_in
from vllm_crop.planner import ImageDecision, Planner
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.fitting import Claim, NoRoomError, share_room
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.image_budgets import History, Shown
from vllm_crop.request import CropRequest, Found, Room, request_budgets

LLAVA = LlavaGeometry(TokenGrid(24, 24), ClipPreprocessing.from_settings({}), num_layers=32)
QWEN = Qwen2_5VLGeometry(SmartResize(28, 3136, 12845056), 28)
FULL = 576
HERE = [0.25, 0.25, 0.5, 0.5]


@dataclass(frozen=True)
class Case:
    """A request with several images to a server."""

    crop: dict[str, Any]
    config: dict[str, Any]
    shown: tuple[Shown, ...]
    found: tuple[Found, ...] | None
    room: Room | None

    def decide(self, geometry: Any = LLAVA, size: tuple[int, int] = (672, 672)) -> tuple[ImageDecision, ...]:
        params, config = CropParams.parse(self.crop), CropConfig.from_mapping(self.config)
        budgets = request_budgets(params, config, len(self.shown), self.shown)
        asked = CropRequest(params, self.found, budgets=budgets, room=self.room)
        return Planner(config, geometry).plan(asked, [size] * len(self.shown))


TOKENS = st.integers(1, 700)
HISTORY = st.builds(dict, keep=st.integers(1, 3), max_tokens=st.integers(1, 300), stride=st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    number = draw(st.integers(1, 5))
    steps = draw(st.lists(st.integers(0, 1), min_size=number - 1, max_size=number - 1))
    details = draw(st.lists(st.sampled_from(["auto", "low", "high"]), min_size=number, max_size=number))
    messages = [sum(steps[:index]) for index in range(number)]
    shown = tuple(Shown(*one) for one in zip(messages, details, strict=True))
    budget = draw(
        st.one_of(
            st.just({}),
            st.builds(dict, pruning_rate=st.sampled_from([0.0, 0.5, 0.9])),
            st.builds(dict, max_tokens=TOKENS),
            st.builds(dict, max_tokens=st.lists(st.none() | TOKENS, min_size=number, max_size=number)),
        )
    )
    crop = {**budget, **draw(st.sampled_from([{}, {}, {"method": "off"}, {"method": "plc"}]))}
    if draw(st.booleans()):
        regions = st.lists(st.sampled_from([None, HERE]), min_size=number, max_size=number)
        crop["regions"] = draw(regions)
    if draw(st.booleans()):
        crop["history"] = draw(HISTORY)
    config: dict[str, Any] = {"fit_floor": draw(st.integers(1, 40))}
    if draw(st.booleans()):
        config["max_tokens"] = draw(TOKENS)
    if draw(st.booleans()):
        config["history"] = draw(HISTORY)
    found = None
    if "regions" not in crop and draw(st.booleans()):
        looked = st.lists(st.booleans(), min_size=number, max_size=number)
        found = tuple(Found(Region.from_grid_cells(1, 1, 3, 3) if one else None) for one in draw(looked))
    room = None
    if draw(st.booleans()):
        most = draw(st.integers(number, number * FULL))
        room = Room(most, draw(st.integers(number, most)), draw(st.booleans()))
    return Case(crop, config, shown, found, room)


def wanted(case: Case, index: int) -> int:
    """What an image costs before it has to fit, said once more."""
    crop, one, config = case.crop, case.shown[index], CropConfig.from_mapping(case.config)
    if crop.get("method") == "off" or crop.get("pruning_rate") == 0:
        return FULL
    asked = crop.get("max_tokens")
    own = asked[index] if isinstance(asked, list) else asked
    region: Any = (crop.get("regions") or [None] * len(case.shown))[index]
    speaks = region is not None or own is not None or bool({"pruning_rate", "method"} & set(crop))
    if case.found is not None:
        region = case.found[index].region
    bound: float = math.inf
    if own is not None:
        bound = own
    elif one.detail == "low" and not speaks:
        bound = config.detail_low_tokens
    elif one.detail == "high" and not speaks:
        region = None
    elif crop.get("pruning_rate") is None and config.max_tokens is not None:
        bound = config.max_tokens
    history = crop.get("history") or case.config.get("history")
    if history:
        messages = case.shown[-1].message + 1
        old = max(0, messages - history["keep"])
        if one.message < old - old % history["stride"]:
            bound = min(bound, history["max_tokens"])
    if bound is not math.inf:
        return min(int(bound), FULL)
    rate = crop.get("pruning_rate", config.pruning_rate)
    return FULL if region is None else retained_count(FULL, rate)


def got(decision: ImageDecision) -> int:
    return FULL if decision.plan is None else decision.plan.num_embeddings


@given(cases())
def test_the_right_one_wins_and_counts_are_exact(case: Case) -> None:
    before = [wanted(case, index) for index in range(len(case.shown))]
    if case.room is None or sum(before) <= case.room.most:
        assert [got(decision) for decision in case.decide()] == before
        return
    floors = [min(one, case.config["fit_floor"]) for one in before]
    if not case.room.prunes or sum(floors) > case.room.most:
        with pytest.raises(InvalidCropError, match=r"images of the request: together they take"):
            case.decide()
        return
    counts = [got(decision) for decision in case.decide()]
    assert sum(counts) <= max(case.room.aim, sum(floors)), "all that is left is the answer's"
    assert all(low <= less <= one for low, less, one in zip(floors, counts, before, strict=True))


@given(cases(), cases())
def test_caches_never_mix(one: Case, other: Case) -> None:
    """Two images that become different embeddings have different keys; the same, where they are the same."""
    seen: dict[Any, Any] = {}
    for case in (one, other):
        try:
            decisions = case.decide()
        except InvalidCropError:
            continue
        for decision in decisions:
            key = None if decision.compression is None else decision.request.cache_key()
            plan = decision.compression
            made = None if plan is None else (plan.assignment.tobytes(), plan.position.tobytes())
            assert (key is None) == (plan is None)
            assert seen.setdefault(key, made) == made


@given(st.integers(1, 400), st.tuples(st.integers(60, 2000), st.integers(60, 2000)))
def test_what_is_seen_small_costs_at_most_its_bound(bound: int, size: tuple[int, int]) -> None:
    case = Case({"max_tokens": bound}, {}, (Shown(),), None, None)
    (decision,) = case.decide(QWEN, size)
    full = QWEN.grid(*size).num_tokens
    if bound >= full:
        assert decision.plan is None
        return
    assert decision.plan is not None
    count = decision.plan.num_embeddings
    assert 1 <= count <= bound
    if decision.pieces:
        (piece,) = decision.pieces
        assert piece.is_whole
        assert piece.num_tokens == count
    else:
        assert count == bound  # pooled, where the image processor makes nothing so small
    places = decision.plan.position
    assert (places[1:] > places[:-1]).all()
    # Each embedding stands where a token of its own stands.
    assert (decision.plan.assignment[places] == range(count)).all()


def test_images_that_get_few_tokens_are_mostly_seen_small() -> None:
    case = Case({"max_tokens": 64}, {}, (Shown(),), None, None)
    (decision,) = case.decide(QWEN, (1280, 720))
    assert decision.pieces
    (off,) = [Planner(CropConfig(), QWEN, sees_small=False).plan_image(decision.request, 1280, 720)]
    assert not off.pieces
    assert off.tokens.num_embeddings == 64


@pytest.mark.parametrize(
    ("history", "messages", "old"),
    [
        (History(keep=2, max_tokens=9, stride=1), range(1, 6), [0, 0, 1, 2, 3]),
        (History(keep=2, max_tokens=9, stride=3), range(1, 10), [0, 0, 0, 0, 3, 3, 3, 6, 6]),
        (History(keep=1, max_tokens=9), range(1, 7), [0, 0, 0, 0, 4, 4]),
    ],
)
def test_history_grows_old_in_strides(history: History, messages: Sequence[int], old: list[int]) -> None:
    assert [history.num_old(number) for number in messages] == old


def test_where_images_stand_in_a_conversation() -> None:
    def image(detail: str | None = None) -> dict[str, Any]:
        url = {"url": "data:"} if detail is None else {"url": "data:", "detail": detail}
        return {"type": "image_url", "image_url": url}

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image("low"), {"type": "text", "text": "a"}, image()]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:", "detail": "high"}]},
        {"role": "tool", "content": [image("nonsense")]},
        {"role": "assistant", "content": None},
    ]
    shown = [(0, "low"), (0, "auto"), (1, "high"), (2, "auto")]
    assert shown_in(messages) == [Shown(*one) for one in shown]  # type: ignore[arg-type]


CLAIMS = st.lists(
    st.builds(
        lambda tokens, share, old: Claim(tokens, round(share * tokens), old),
        st.integers(1, 500),
        st.floats(0, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(CLAIMS, st.integers(0, 3000), st.integers(1, 50))
def test_room_is_shared_in_order(claims: list[Claim], room: int, floor: int) -> None:
    floors = [min(claim.tokens, floor) for claim in claims]
    if sum(floors) > room:
        with pytest.raises(NoRoomError, match=f"at least {sum(floors)} visual tokens.*room for {room}"):
            share_room(claims, room, floor)
        return
    given_tokens = share_room(claims, room, floor)
    taken = [claim.tokens - tokens for claim, tokens in zip(claims, given_tokens, strict=True)]
    if sum(claim.tokens for claim in claims) <= room:
        assert not any(taken)
        return
    assert all(least <= tokens for least, tokens in zip(floors, given_tokens, strict=True))
    assert room - len(claims) < sum(given_tokens) <= room, "no more is taken than has to be"
    spare = {
        (old, region): [
            tokens > max(least, claim.region if region else 0)
            for claim, tokens, least in zip(claims, given_tokens, floors, strict=True)
            if claim.old == old
        ]
        for old in (True, False)
        for region in (True, False)
    }
    into_region = [tokens < claim.region for claim, tokens in zip(claims, given_tokens, strict=True)]
    from_new = any(one for one, claim in zip(taken, claims, strict=True) if not claim.old)
    assert not (from_new and sum(spare[True, True]) > 1), "old images give way first"
    assert not (any(into_region) and (sum(spare[True, True]) > 1 or sum(spare[False, True]) > 1))
    deepest_new = any(into for into, claim in zip(into_region, claims, strict=True) if not claim.old)
    assert not (deepest_new and sum(spare[True, False]) > 1), "regions of the newest last"


def test_images_of_one_kind_share_alike() -> None:
    claims = [Claim(tokens, old=True) for tokens in (400, 100, 50)]
    assert share_room(claims, 250, 16) == [100, 100, 50]
    assert share_room(claims, 200, 16) == [75, 75, 50]
    assert share_room(claims, 100, 16) == [34, 33, 33]
    assert share_room([*claims, Claim(300)], 400, 16) == [34, 33, 33, 300]
    assert share_room([*claims, Claim(300, 200)], 250, 16) == [16, 16, 16, 202]
    assert share_room([Claim(300, 200, old=True), Claim(300, 200)], 350, 16) == [150, 200]


def test_one_budget_a_request() -> None:
    with pytest.raises(InvalidCropError, match=r"max_tokens and pruning_rate"):
        CropParams.parse({"max_tokens": 5, "pruning_rate": 0.5})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "got -1"),
        (1.5, "got 1.5"),
        (True, "got True"),
        ("5", "got '5'"),
        ([1, -1], "null or a whole number"),
        ([1, True], "got True"),
        ([None] * 2000, "at most 1024 entries"),
        (1 << 40, "whole number"),
    ],
)
def test_wrong_bounds_are_refused(value: Any, said: str) -> None:
    with pytest.raises(InvalidCropError) as refused:
        CropParams.parse({"max_tokens": value})
    assert refused.value.parameter == "crop.max_tokens"
    assert said in str(refused.value)


def test_the_servers_own_bounds_never_fail_a_request() -> None:
    """Embeddings have no pixels: what only the server wants leaves them whole, a client's wish is refused."""
    for crop, shown in (({}, Shown(0, "low")), ({}, Shown())):
        params, config = CropParams.parse(crop), CropConfig.from_mapping({"max_tokens": 8})
        asked = CropRequest(params, budgets=request_budgets(params, config, 1, [shown]))
        (decision,) = Planner(config, LLAVA).plan(asked, [None], embeddings=True)
        assert (decision.plan, decision.whole) == (None, "not_possible")
        assert "embeddings" in decision.reason
    asked = CropRequest(CropParams.parse({"max_tokens": 8}))
    with pytest.raises(InvalidCropError, match="not possible for image embeddings"):
        Planner(CropConfig(), LLAVA).plan(asked, [None], embeddings=True)


def test_limits_hold_for_clients() -> None:
    config = CropConfig.from_mapping({"limits": {"min_tokens": 16}})
    for crop in ({"max_tokens": 15}, {"max_tokens": [None, 15]}, {"history": {"keep": 1, "max_tokens": 15}}):
        with pytest.raises(InvalidCropError, match="no less than 16, got 15"):
            CropRequest(CropParams.parse(crop)).images(config, 2)


def test_an_unknown_key_of_history_is_named() -> None:
    with pytest.raises(
        InvalidCropError, match=r"history\.of: unknown key, allowed are keep, max_tokens, stride"
    ):
        CropParams.parse({"history": {"keep": 1, "max_tokens": 1, "of": 2}})


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 900))
def test_small_images_use_their_tokens_up(rows: int, cols: int, most: int) -> None:
    """As many as of any grid of about the same aspect."""
    found = small_scale(TokenGrid(rows, cols), most)
    assert found.rows <= rows
    assert found.cols <= cols
    assert found.num_tokens <= most
    others = [
        (r, c)
        for r in range(1, rows + 1)
        for c in range(1, cols + 1)
        if r * c <= most and max(r * cols, c * rows) <= MOST_DISTORTED * min(r * cols, c * rows)
    ]
    assert found.num_tokens >= max((r * c for r, c in others), default=1)
    assert (found.rows, found.cols) in others or not others


def test_no_image_becomes_a_line_that_is_none() -> None:
    """A prime number of tokens has no other grid, and fewer tokens of the right aspect say more."""
    for full, most, wanted in (
        ((24, 24), 17, (4, 4)),
        ((30, 40), 16, (3, 5)),
        ((30, 40), 29, (4, 6)),
        ((40, 30), 4, (2, 2)),
        ((30, 40), 2, (1, 1)),
        ((100, 2), 16, (16, 1)),
        ((1, 40), 7, (1, 7)),
    ):
        found = small_scale(TokenGrid(*full), most)
        assert (found.rows, found.cols) == wanted, (full, most)


def test_a_servers_bound_survives_being_written_down() -> None:
    """As settings travel in the HF config."""
    for limits in ({}, {"max_pruning_rate": 0.5}):
        config = CropConfig.from_mapping({"max_tokens": 512, "limits": limits})
        assert CropConfig.from_mapping(config.model_dump()) == config


@pytest.mark.parametrize("method", ["ilp", "plc+ilp"])
def test_with_eviction_history_is_still_about_the_prompt(method: str) -> None:
    """A smaller bound on the average does not make the prompt shorter."""
    crop = {"method": method, "max_tokens": 50, "history": {"keep": 1, "max_tokens": 64, "stride": 1}}
    params, config = CropParams.parse(crop), CropConfig.from_mapping({"eviction_layers": [1]})
    budgets = request_budgets(params, config, 2, [Shown(0), Shown(1)])
    regions = tuple(Found(Region.from_grid_cells(1, 1, 1, 1)) for _ in budgets)
    asked = CropRequest(params, regions, budgets=budgets)
    old, new = Planner(config, LLAVA).plan(asked, [(672, 672)] * 2)
    assert old.request.by == "history"
    assert got(old) == 50
    assert old.plan is not None
    assert not old.plan.evicts
    assert new.plan is not None
    assert new.plan.evicts
    fitted = CropRequest(params, regions, budgets=budgets, room=Room(130, 130, True))
    for decision in Planner(config, LLAVA).plan(fitted, [(672, 672)] * 2):
        assert decision.plan is not None
        assert decision.plan.tokens_avg(32) <= 50.5


def test_a_check_of_the_servers_own_keeps_budgets() -> None:
    """Limits do not hold for it; what was asked for does."""
    config = CropConfig.from_mapping({"limits": {"min_tokens": 16}})
    params = CropParams.parse({"max_tokens": 1})
    asked = CropRequest(params, limited=False, budgets=request_budgets(params, config, 1, [Shown()]))
    (request,) = asked.images(config, 1)
    assert request.max_tokens == 1
    (view,) = CropRequest(CropParams(), limited=False).images(CropConfig(max_tokens=5), 1)
    assert view.max_tokens is None


def test_where_no_answer_fits_as_long_as_hoped_it_gets_what_the_floors_leave() -> None:
    case = Case({}, {"fit_floor": 16}, (Shown(), Shown()), None, Room(40, 31, True))
    assert [got(one) for one in case.decide()] == [16, 16]


def test_what_does_not_fit_names_the_setting_and_what_to_send() -> None:
    images = (Shown(), Shown())
    with pytest.raises(InvalidCropError) as refused:
        Case({}, {}, images, None, Room(500, 500, False)).decide()
    assert str(refused.value) == (
        f"images of the request: together they take {2 * FULL} visual tokens, and there is room for 500 "
        '(limits.max_tokens_per_request): send "fit": "prune" in crop'
    )
    with pytest.raises(InvalidCropError, match=r"at least 32 visual tokens, with 16 for each.*max-model-len"):
        Case({}, {}, images, None, Room(20, 20, True, "--max-model-len")).decide()


@pytest.mark.parametrize("region", [None, [HERE]])
def test_the_servers_bound_holds_where_a_clients_method_cannot_meet_it(region: Any) -> None:
    config = {"max_tokens": 20, "eviction_layers": [2]}
    (decision,) = Case({"method": "ilp", "regions": region}, config, (Shown(),), None, None).decide()
    assert (got(decision), decision.request.by, decision.request.method) == (20, "server", "plc")


def test_who_asks_for_less_of_embeddings_is_told_and_who_only_gets_it_is_not() -> None:
    history = {"keep": 1, "max_tokens": 4, "stride": 1}
    shown, sizes = [Shown(0), Shown(1)], (None, None)
    for crop, config in (({"history": history}, {}), ({}, {"history": history})):
        params, settings = CropParams.parse(crop), CropConfig.from_mapping(config)
        asked = CropRequest(params, budgets=request_budgets(params, settings, 2, shown))
        if crop:
            with pytest.raises(InvalidCropError, match=r"crop\.history: not possible for image embeddings"):
                Planner(settings, LLAVA).plan(asked, sizes, embeddings=True)
        else:
            old, new = Planner(settings, LLAVA).plan(asked, sizes, embeddings=True)
            assert (old.whole, old.plan, new.reason) == ("not_possible", None, "")
            assert "embeddings" in old.reason


def test_null_in_a_list_says_nothing_of_an_image() -> None:
    shown = (Shown(detail="low"), Shown(detail="high"), Shown())
    case = Case({"max_tokens": [None, None, 9]}, {"max_tokens": 100}, shown, None, None)
    assert [got(one) for one in case.decide()] == [85, FULL, 9]


def test_too_few_for_eviction_says_how_many_it_needs() -> None:
    config = {"method": "ilp", "eviction_layers": [2]}
    with pytest.raises(InvalidCropError, match=r"20 of 576 .* 'ilp', which needs (\d+) ") as refused:
        Case({"max_tokens": 20}, config, (Shown(),), None, None).decide()
    least = int(str(refused.value).split("which needs ")[1].split()[0])
    (decision,) = Case({"max_tokens": least}, config, (Shown(),), None, None).decide()
    assert decision.plan is not None
    with pytest.raises(InvalidCropError):
        Case({"max_tokens": least - 1}, config, (Shown(),), None, None).decide()
