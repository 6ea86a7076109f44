# SPDX-License-Identifier: Apache-2.0
"""The compressor by itself: against its definition written out, and its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from typer.testing import CliRunner

from tests.resampler_reference import (
    naive_resample,
    random_resampler,
    weights_of,
    write_random_resampler,
)
from tests.tinyvqa import CHECKPOINT
from vllm_crop.commands.app import app
from vllm_crop.compat.diagnosis import judge_settings
from vllm_crop.compression.files import (
    find_weights,
    fingerprint_of,
    read_card,
    read_files,
    require_fingerprint,
    with_compressor,
)
from vllm_crop.compression.pooling import compress
from vllm_crop.compression.reading import plan_reading
from vllm_crop.compression.resampler import Resampler
from vllm_crop.compression.served import worst_case
from vllm_crop.compression.settings import ResamplerCard, ResamplerConfig, ResamplerError, ResamplerShape
from vllm_crop.compression.weights import load_resampler, read_resampler, write_resampler
from vllm_crop.config import CropConfig
from vllm_crop.errors import InvalidConfigError
from vllm_crop.families.checkpoint import load_model_config
from vllm_crop.models.plan_fields import assignment, places
from vllm_crop.planning import plan as planning
from vllm_crop.planning.geometry import Box, GridPart, ImageTokens, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import TokenPlan, even_plan, make_plan, small_plan

GRID = TokenGrid(12, 10)
REGION = Region.from_grid_cells(1, 2, 3, 4)
MODEL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "vision_config": {"spatial_merge_size": 2},
}


def with_newlines() -> ImageTokens:
    """Two grids, one with newlines, as LLaVA-NeXT has them."""
    first = GridPart(TokenGrid(4, 4))
    return TokenGrids((first, GridPart(TokenGrid(8, 7), first=16, newlines=True)))


def planned(grid: ImageTokens, rate: float, region: Region = REGION, rim: float = 0.125) -> TokenPlan:
    around = region.widened(rim) if rim else None
    return make_plan(grid, region, rate, "resampler", around=around)


PLANS = {
    "anchors, rim and rest": planned(GRID, 0.7),
    "no rim": planned(GRID, 0.7, rim=0.0),
    "a region larger than the budget": planned(GRID, 0.9, Region.whole()),
    "evenly": even_plan(GRID, 9, "resampler"),
    "one embedding": even_plan(GRID, 1, "resampler"),
    # All that is outside the region is one group, of the rim and of what is far away.
    "one embedding beside the region": planned(GRID, 1 - (int(GRID.mask(REGION).sum()) + 1) / 120),
    "tiles and newlines": planned(with_newlines(), 0.7),
}


def features_of(plan: TokenPlan, columns: int = 24) -> torch.Tensor:
    return torch.randn(plan.grid.num_tokens, columns, generator=torch.Generator().manual_seed(1))


def resampled(resampler: Resampler, features: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    with torch.inference_mode():
        return resampler(features, assignment(plan), places(plan))


@pytest.mark.parametrize("name", PLANS)
def test_equals_its_definition(name: str) -> None:
    plan, resampler = PLANS[name], random_resampler(24)
    features = features_of(plan)
    found, wanted = (
        resampled(resampler, features, plan),
        naive_resample(features, plan, weights_of(resampler)),
    )
    pooled = compress(features, assignment(plan))
    print(f"{name}: {(found - wanted).abs().max():.1e}; pooling is {(pooled - wanted).abs().max():.1e} away")
    assert (found - wanted).abs().max() < 1e-5
    assert (pooled - wanted).abs().max() > 0.1


@pytest.mark.parametrize("name", PLANS)
def test_untrained_is_pooling_to_the_bit(name: str) -> None:
    plan = PLANS[name]
    untrained = Resampler(ResamplerShape.suited_to(24))
    features = features_of(plan)
    assert torch.equal(resampled(untrained, features, plan), compress(features, assignment(plan)))


@pytest.mark.parametrize("compiled", [False, True])
def test_plans_are_those_of_pooling(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if compiled:
        planning.use_compiled()
    else:
        monkeypatch.setattr(planning, "_compiled", None)
    for rate in (0.3, 0.6, 0.9, 0.97, 1 - 5 / 120, 1 - 7 / 120):
        region = Region.from_grid_cells(0, 0, 1, 1 + int(10 * rate) % 3)
        ours, pool = (
            make_plan(GRID, region, rate, name, around=region.widened(0.1)) for name in ("resampler", "pool")
        )
        assert np.array_equal(ours.assignment, pool.assignment)
        assert np.array_equal(ours.position, pool.position)
        assert pool.zone is None
        assert ours.zone is not None
        assert ours != pool  # a cache must not take one for the other
        assert np.array_equal(ours.zone == 1, GRID.mask(region))
        for tokens in ours.members():
            assert len({int(ours.zone[token]) for token in tokens}) == 1
    assert small_plan(GRID, TokenGrid(3, 3)).zone is None


def test_anchors_stay_as_they_are_and_others_are_read() -> None:
    plan = PLANS["anchors, rim and rest"]
    features, resampler = features_of(plan), random_resampler(24)
    found = resampled(resampler, features, plan)
    anchors = [
        index
        for index, (size, token) in enumerate(zip(plan.sizes, plan.position, strict=True))
        if size == 1 and plan.zone is not None and plan.zone[token] == 1
    ]
    assert len(anchors) == int(GRID.mask(REGION).sum())
    assert torch.equal(found[anchors], features[plan.position[anchors].tolist()])
    reading = plan_reading(assignment(plan), places(plan))
    assert sorted(torch.cat([group.queries for group in reading.groups]).tolist()) == [
        index for index in range(plan.num_embeddings) if plan.sizes[index] > 1
    ]
    # What one token shows reaches every query of its zone, and of no other.
    far = int(np.flatnonzero(plan.zone == 0)[0])
    changed = features.clone()
    changed[far] = changed[far].flip(0)
    moved = (resampled(resampler, changed, plan) - found).abs().amax(1) > 1e-6
    of_far = torch.tensor([bool(plan.zone[token] == 0) for token in plan.position.tolist()])
    assert torch.equal(moved, of_far)


def test_queries_read_what_a_large_region_loses() -> None:
    plan = PLANS["a region larger than the budget"]
    features, resampler = features_of(plan), random_resampler(24)
    gone = int(np.flatnonzero(plan.assignment < 0)[0])
    changed = features.clone()
    changed[gone] = changed[gone].flip(0)
    before, after = (resampled(resampler, rows, plan) for rows in (features, changed))
    assert (before != after).any(1).all()
    assert torch.equal(*(compress(rows, assignment(plan)) for rows in (features, changed)))


def test_an_image_is_read_the_same_whatever_dtype_its_places_come_in() -> None:
    plan = PLANS["anchors, rim and rest"]
    assert places(plan).dtype == torch.int16
    resampler = random_resampler(24)
    with torch.inference_mode():
        wide = resampler(features_of(plan), assignment(plan), places(plan).long())
    assert torch.equal(wide, resampled(resampler, features_of(plan), plan))


def test_half_precision_stays_near() -> None:
    plan = PLANS["anchors, rim and rest"]
    resampler, features = random_resampler(24), features_of(plan)
    exact = resampled(resampler, features, plan)
    half = resampled(random_resampler(24).to(torch.bfloat16), features.to(torch.bfloat16), plan)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 0.98), st.integers(0, 10**6), st.booleans())
def test_any_plan_equals_its_definition(rows: int, cols: int, rate: float, seed: int, even: bool) -> None:
    grid, chance = TokenGrid(rows, cols), np.random.default_rng(seed)
    if even:
        plan = even_plan(grid, int(chance.integers(1, grid.num_tokens + 1)), "resampler")
    else:
        x0, y0 = chance.uniform(0, 0.7, 2)
        region = Region((Box(x0, y0, x0 + 0.3, y0 + 0.25),))
        plan = make_plan(grid, region, rate, "resampler", around=region.widened(0.1))
    resampler, features = random_resampler(8), features_of(plan, 8)
    wanted = naive_resample(features, plan, weights_of(resampler))
    assert (resampled(resampler, features, plan) - wanted).abs().max() < 2e-5


# The folder.


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    plan = PLANS["anchors, rim and rest"]
    features = features_of(plan)
    assert torch.equal(
        resampled(read_resampler(folder), features, plan), resampled(random_resampler(24), features, plan)
    )
    card = read_card(folder)
    assert (card.base.architecture, card.spatial_merge_size) == (MODEL["architectures"][0], 2)
    card.require_fit("weights", {**MODEL, "architectures": ["CropQwen2_5_VLForConditionalGeneration"]})


def test_refuses_another_model(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    other = {
        **MODEL,
        "text_config": {**MODEL["text_config"], "hidden_size": 32, "num_hidden_layers": 3},
        "vision_config": {"spatial_merge_size": 2, "deepstack_visual_indexes": [0]},
    }
    with pytest.raises(ResamplerError) as refused:
        read_card(folder).require_fit("my/weights", other)
    told = str(refused.value)
    assert "my/weights" in told
    assert "num_hidden_layers 3, not 2" in told
    assert "features of 64 columns, not 24" in told
    with pytest.raises(ResamplerError, match="spatial_merge_size 3, not 2"):
        read_card(folder).require_fit("w", {**MODEL, "vision_config": {"spatial_merge_size": 3}})


def test_check_says_whether_weights_fit(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 128, load_model_config(str(CHECKPOINT)))
    crop = {"compression": "resampler", "resampler": {"weights": str(folder)}}
    found = judge_settings(json.dumps(crop), str(CHECKPOINT))["compressor"]
    assert found["fingerprint"] == fingerprint_of(*read_files(folder))
    assert found["fits"].startswith("yes")
    assert found["trained"] == "nobody says how"
    write_random_resampler(folder, 24, MODEL)
    with pytest.raises(ResamplerError, match="trained for another model"):
        judge_settings(json.dumps(crop), str(CHECKPOINT))


def test_refuses_changed_weights(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    settings_found, _ = with_compressor({"resampler": {"weights": str(folder)}})
    pinned = ResamplerConfig.model_validate(settings_found["resampler"])
    assert pinned.fingerprint == fingerprint_of(*read_files(folder))
    load_resampler(pinned, torch.float32)
    write_random_resampler(folder, 24, MODEL, seed=1)
    with pytest.raises(ResamplerError, match="have changed"):
        load_resampler(pinned, torch.float32)
    with pytest.raises(ResamplerError, match="have changed"):
        with_compressor(settings_found)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "no compressor"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no compressor"),
        (lambda folder: _set(folder, version=2), "of this version"),
        (lambda folder: _set(folder, shape={"feature_size": 24, "width": 30, "num_heads": 2, "mlp_size": 4}),
         "must be a multiple of 4 x 2 heads"),
        (lambda folder: _set(folder, shape={"feature_size": 24, "width": 64, "num_heads": 2, "mlp_size": 48}),
         "does not fit its config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "cannot be read"),
        (lambda folder: _spoil(folder, float("nan")), "key.weight has numbers that are none"),
        (lambda folder: _spoil(folder, 1e5), "key.weight has numbers that are none in torch.float16"),
        (lambda folder: _quantize(folder), "key.weight is of torch.int8, and must be"),
        (lambda folder: (folder / "config.json").write_text("[" * 200_000), "cannot be read"),
        (lambda folder: _replace_by_folder(folder / "model.safetensors"), "has no model.safetensors"),
        (lambda folder: _set(folder, shape={"feature_size": 1 << 20, "width": 1 << 16, "num_heads": 1024,
                                            "mlp_size": 1 << 20}), "does not fit its config.json"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_a_folder(tmp_path: Path, spoil: Any, told: str) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    spoil(folder)

    def start() -> None:
        with_compressor({"resampler": {"weights": str(folder)}})
        load_resampler(ResamplerConfig(weights=str(folder)), torch.float16)

    with pytest.raises(ResamplerError, match=told):
        start()


def _spoil(folder: Path, value: float) -> None:
    resampler = read_resampler(folder)
    resampler.key.weight[0, 0] = value
    write_resampler(folder, resampler, read_card(folder), "")


def _quantize(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load(path.read_bytes())
    path.write_bytes(save({**weights, "key.weight": weights["key.weight"].to(torch.int8)}))


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _set(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no/such/folder/anywhere", "neither a directory nor a name on the Hub"),
        ("nobody/has-this", "the Hub"),
        ("x" * 300, "cannot be read"),
        ("~nobody-of-this-name/x", "cannot be read"),
    ],
)
def test_says_where_weights_are_not(monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResamplerError, match=told):
        find_weights(ResamplerConfig(weights=name))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    with pytest.raises(ResamplerError, match=r"revision 'v1' is of a repository on the Hub"):
        with_compressor({"resampler": {"weights": str(folder), "revision": "v1"}})


def test_workers_are_told_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_resampler(tmp_path / "weights", 24, MODEL)
    monkeypatch.chdir(tmp_path)
    found, _ = with_compressor({"resampler": {"weights": "weights"}})
    monkeypatch.chdir("/")
    load_resampler(ResamplerConfig.model_validate(found["resampler"]), torch.float32)


def test_the_worst_case_is_one() -> None:
    """All but one of the tokens read all of them."""
    reading = plan_reading(*worst_case(50))
    (group,) = reading.groups
    assert (len(group.queries), len(group.tokens)) == (49, 50)


def test_plans_are_printed_without_weights() -> None:
    plans = [
        CliRunner().invoke(
            app,
            [
                *("plan", "--model", str(CHECKPOINT), "--image-size", "640x480", "--json"),
                *("--region", "0.5,0.2,0.8,0.4", "--compression", name),
            ],
        )
        for name in ("pool", "resampler")
    ]
    assert [ran.exit_code for ran in plans] == [0, 0], plans[1].output
    assert plans[0].output == plans[1].output


def test_a_header_is_checked_before_any_worker_starts(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    assert read_card(folder).shape.tensors() == {
        name: list(part.shape) for name, part in read_resampler(folder).state_dict().items()
    }
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for spoilt in (whole[:-100], whole + b"0", whole[:4], b"\xff" * 100, whole[:200]):
        path.write_bytes(spoilt)
        with pytest.raises(ResamplerError, match="cannot be read"):
            with_compressor({"resampler": {"weights": str(folder)}})


def test_a_fingerprint_may_be_asked_for(tmp_path: Path) -> None:
    folder = write_random_resampler(tmp_path / "weights", 24, MODEL)
    wrong = ResamplerConfig(weights=str(folder), fingerprint="0" * 64)
    with pytest.raises(ResamplerError, match="0000 is asked for"):
        require_fingerprint(wrong, read_files(folder))


@pytest.mark.parametrize(
    ("crop", "told"),
    [
        ({"compression": "resampler"}, "needs resampler.weights"),
        ({"resampler": {"weights": "x"}}, "resampler.weights belongs to compression 'resampler'"),
        ({"compression": "resampler", "resampler": {"weight": "x"}}, "did you mean 'weights'"),
        ({"resampler": {"revision": "x"}}, "resampler.revision belongs to"),
        ({"compression": "resampler", "resampler": {"weights": "x", "fingerprint": "y"}}, "fingerprint"),
    ],
)
def test_settings_that_do_not_go_together(crop: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfigError, match=told):
        CropConfig.from_mapping(crop)


def test_sizes_that_suit_published_models() -> None:
    sizes = {3584: (1024, 16), 4096: (1024, 16), 2048: (512, 8), 128: (32, 1), 24: (16, 1)}
    for features, wanted in sizes.items():
        shape = ResamplerShape.suited_to(features)
        assert (shape.width, shape.num_heads) == wanted
    card = ResamplerCard.untrained(ResamplerShape.suited_to(24), "some/model", MODEL)
    assert card.base_model == "some/model"
