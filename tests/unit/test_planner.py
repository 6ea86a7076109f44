# SPDX-License-Identifier: Apache-2.0
"""One request's images to plans: what a client asks is done or refused, what the server found never fails."""

import pytest

from vllm_crop.config import CropConfig
from vllm_crop.crop_params import CropParams
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry
from vllm_crop.planner import ImageDecision, Planner
from vllm_crop.planning.geometry import Region
from vllm_crop.request import CropRequest, Found

BOX = [0.25, 0.25, 0.5, 0.5]
REGION = Region.from_grid_cells(2, 2, 3, 3)
GEOMETRY = Qwen2_5VLGeometry.from_configs(
    {"num_hidden_layers": 28}, {"min_pixels": 3136, "max_pixels": 12845056}
)
PLANNER = Planner(CropConfig(pruning_rate=0.8), GEOMETRY)
SIZE = (640, 480)


def asked(*regions: object, **crop: object) -> CropRequest:
    """What a client asks for."""
    return CropRequest(CropParams.parse({"regions": list(regions), **crop}))


def found(*regions: Region | None) -> CropRequest:
    """What the server found itself."""
    return CropRequest(CropParams.parse({}), found=tuple(map(Found, regions)))


def whole(decisions: tuple[ImageDecision, ...]) -> list[str | None]:
    """Why each image is served whole, None where it is pruned."""
    return [decision.whole if decision.plan is None else None for decision in decisions]


def test_each_image_has_its_own_plan() -> None:
    decisions = PLANNER.plan(asked(BOX, None), [SIZE, SIZE])
    assert whole(decisions) == [None, "no_region"]
    assert decisions[0].plan is not None
    assert decisions[0].plan.num_embeddings == round(0.2 * decisions[0].plan.grid.num_tokens)
    assert PLANNER.plan_image(decisions[0].request, *SIZE).tokens == decisions[0].plan


@pytest.mark.parametrize("request_of", [asked, found], ids=["asked", "found"])
@pytest.mark.parametrize("impossible", ["settings", "embeddings", "a line"])
def test_what_a_client_asks_is_refused_and_what_the_server_found_is_left_out(
    request_of: object, impossible: str
) -> None:
    region = BOX if request_of is asked else REGION
    sizes = [(20000, 10) if impossible == "a line" else SIZE]
    others = ("max_pixels",) if impossible == "settings" else ()
    embeddings = impossible == "embeddings"
    if request_of is asked:
        with pytest.raises(ValueError, match=r"not possible|aspect"):
            PLANNER.plan(asked(region), sizes, embeddings, others)
    else:
        assert whole(PLANNER.plan(found(REGION), sizes, embeddings, others)) == ["not_possible"]


def test_a_found_region_that_cannot_be_used_takes_no_other_along() -> None:
    decisions = PLANNER.plan(found(REGION, REGION, None), [SIZE, (20000, 10), SIZE])
    assert whole(decisions) == [None, "not_possible", "no_region"]


def test_images_that_vllm_has_taken_apart_are_whole() -> None:
    """Embeddings of several images arrive as one item, and the localizer has looked at none of them."""
    assert whole(PLANNER.plan(found(None), [None, None], embeddings=True)) == ["no_region", "no_region"]


def test_a_size_that_nobody_knows_is_vllms_to_complain_of() -> None:
    (decision,) = PLANNER.plan(asked(BOX), [None])
    assert decision.plan is None
    assert decision.request.region is None


def test_a_region_out_of_view_leaves_the_image_whole() -> None:
    from vllm_crop.families.llava import ClipPreprocessing, LlavaGeometry
    from vllm_crop.planning.geometry import TokenGrid

    geometry = LlavaGeometry(TokenGrid(24, 24), ClipPreprocessing.from_settings({}), num_layers=32)
    decisions = Planner(PLANNER.config, geometry).plan(asked([0.0, 0.4, 0.05, 0.6]), [(1000, 500)])
    assert whole(decisions) == ["out_of_view"]


class TestLate:
    """Where nobody knows where to look, all of an image is pruned alike, in late layers alone."""

    PLANNER = Planner(CropConfig(pruning_rate=0.8, eviction_layers=[2, 16]), GEOMETRY)

    def decide(self, planner: Planner, **crop: object) -> ImageDecision:
        (decision,) = planner.plan(CropRequest(CropParams.parse(crop), found=(Found(late=True),)), [SIZE])
        return decision

    @pytest.mark.parametrize("crop", [{}, {"method": "ilp"}, {"pruning_rate": 0.9}])
    def test_all_layers_before_see_everything(self, crop: dict[str, object]) -> None:
        plan = self.decide(self.PLANNER, **crop).plan
        assert plan is not None
        assert not plan.compresses
        tokens = plan.grid.num_tokens
        assert plan.tokens_per_layer(28) == [tokens] * 16 + [round(0.1 * tokens)] * 12

    def test_a_smaller_rate_of_the_client_stays_its_own(self) -> None:
        plan = self.decide(self.PLANNER, pruning_rate=0.1).plan
        assert plan is not None
        assert plan.tokens_avg(28) == pytest.approx(0.9 * plan.grid.num_tokens, abs=0.5)

    @pytest.mark.parametrize("crop", [{"method": "plc"}, {"method": "off"}, {"pruning_rate": 0}])
    def test_who_wants_no_eviction_gets_none(self, crop: dict[str, object]) -> None:
        assert self.decide(self.PLANNER, **crop).plan is None

    @pytest.mark.parametrize("layers", [None, [2], [2, 15]])
    def test_a_server_without_a_late_layer_leaves_images_whole(self, layers: list[int] | None) -> None:
        planner = Planner(CropConfig(pruning_rate=0.8, eviction_layers=layers), GEOMETRY)
        assert self.decide(planner).plan is None


def test_warm_places_are_kept_as_the_rim_is() -> None:
    warm = Region.from_grid_cells(6, 6, 7, 7)
    plans, keys = [], set()
    for one in (None, warm):
        (decision,) = PLANNER.plan(CropRequest(CropParams(), found=(Found(REGION, one),)), [SIZE])
        assert decision.plan is not None
        plans.append(decision.plan)
        keys.add(decision.request.cache_key())
    plain, warmer = plans
    assert plain.num_embeddings == warmer.num_embeddings
    there = warmer.grid.mask(warm)
    sizes = [plan.sizes[plan.assignment[there]].mean() for plan in plans]
    assert sizes[1] < sizes[0] / 2
    assert len(keys) == 2
