# SPDX-License-Identifier: Apache-2.0
"""`vllm-crop plan`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from checkpoint_json import write_json, write_llava, write_llava_next, write_qwen2_5_vl, write_qwen3_vl
from typer.testing import CliRunner

from vllm_crop.commands.plan import plan
from vllm_crop.config import CropConfig
from vllm_crop.planning.budget import retained_count
from vllm_crop.planning.geometry import Box, GridPart, Region, TokenGrid, TokenGrids
from vllm_crop.planning.plan import make_plan, whole_image_plan

GRID = TokenGrid(24, 24)
RIM = 0.125  # the default
SQUARE = "672x672"  # seen whole: fractions of the image are fractions of the view

app = typer.Typer()
app.command()(plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_llava(tmp_path_factory.mktemp("llava"))


def run(*options: str) -> Any:
    return CliRunner().invoke(app, options, env={"COLUMNS": "200"})


def plan_json(*options: str) -> dict[str, Any]:
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_line(*options: str) -> str:
    result = run(*options)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_json_is_the_plan_of_the_library(model: str) -> None:
    printed = plan_json(
        *("--model", model, "--image-size", SQUARE, "--region", "0.25,0.25,0.5,0.5"),
        *("--pruning-rate", "0.8", "--compression", "prune"),
    )
    region = Region((Box(0.25, 0.25, 0.5, 0.5),))
    assert printed == make_plan(GRID, region, 0.8, "prune", around=region.widened(RIM)).to_json(num_layers=40)
    assert set(printed) == {"grid", "pruning_rate", "pruning_rate_got", "embeddings", "tokens_per_layer"}


def test_budgets_are_a_requests(model: str) -> None:
    asked = ("--model", model, "--image-size", SQUARE, "--max-tokens", "64")
    assert plan_json(*asked)["tokens_per_layer"] == [64] * 40
    assert plan_json(*asked, "--method", "off")["tokens_per_layer"] == [576] * 40
    assert "give one of them" in error_line(*asked, "--pruning-rate", "0.5")


def test_defaults_are_the_servers(model: str) -> None:
    printed = plan_json("--model", model, "--image-size", SQUARE, "--region", "0,0,0.2,0.2")
    rate = CropConfig().pruning_rate
    assert printed["pruning_rate"] == rate
    assert printed["tokens_per_layer"] == [retained_count(576, rate)] * 40
    assert any(len(embedding["tokens"]) > 1 for embedding in printed["embeddings"])


def test_boxes_and_cells_add_up(model: str) -> None:
    options = ("--model", model, "--image-size", SQUARE)
    both = plan_json(*options, "--region", "0,0,0.25,0.25", "--cells", "4,4,5,5")
    boxes = plan_json(*options, "--region", "0,0,0.25,0.25", "--region", "0.5,0.5,0.75,0.75")
    assert both == boxes


def test_the_centre_crop_is_followed(model: str) -> None:
    # Of 640 pixels the model sees the middle 480: this box is the left half of them.
    wide = plan_json("--model", model, "--image-size", "640x480", "--region", "0.125,0,0.5,1")
    square = plan_json("--model", model, "--image-size", SQUARE, "--region", "0,0,0.5,1")
    assert wide == square


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "no region is given"),
        (("--region", "0,0,0.1,1"), "the model sees nothing of the region"),
        (("--region", "0,0,1,1", "--method", "off"), "the method is off"),
        (("--region", "0,0,1,1", "--pruning-rate", "0"), "the pruning rate is 0"),
    ],
)
def test_images_served_whole(model: str, options: tuple[str, ...], reason: str) -> None:
    options = ("--model", model, "--image-size", "640x480", *options)
    asked = 0.0 if "--pruning-rate" in options else CropConfig().pruning_rate
    assert plan_json(*options) == whole_image_plan(GRID, asked).to_json(num_layers=40)
    assert f"Served whole: {reason}." in run(*options).stdout


def test_summary_counts_and_draws(model: str) -> None:
    lines = run(
        *("--model", model, "--image-size", SQUARE, "--cells", "3,3,4,4", "--pruning-rate", "0.8333")
    ).stdout.splitlines()
    assert any("576 -> 96" in line and "-83.3 %" in line for line in lines)
    assert any("36 of 36 tokens kept" in line for line in lines)
    assert any("60 embeddings pooled from 540 tokens" in line for line in lines)
    # Two characters a token: 6 x 6 tokens of the region, and the one in the legend.
    assert sum(line.count("##") for line in lines) == 36 + 1
    assert sum(len(line) == 48 and not set(line) - set("#+-=~:") for line in lines) == 24


def test_eviction_is_the_plan_of_the_library(model: str) -> None:
    options = ("--model", model, "--image-size", SQUARE, "--region", "0.25,0.25,0.5,0.5")
    region = Region((Box(0.25, 0.25, 0.5, 0.5),))
    printed = plan_json(*options, "--method", "plc+ilp", "--eviction-layers", "2, 16")
    assert printed == make_plan(
        GRID, region, 0.778, "pool", "plc+ilp", 40, (2, 16), region.widened(RIM)
    ).to_json(num_layers=40)
    printed = plan_json(*options, "--method", "ilp")
    assert printed == make_plan(GRID, region, 0.778, "pool", "ilp", 40, (2,), region.widened(RIM)).to_json(
        num_layers=40
    )
    printed = plan_json(*options, "--eviction-layers", "2")
    assert printed == make_plan(GRID, region, 0.778, "pool", around=region.widened(RIM)).to_json(
        num_layers=40
    )


def test_summary_counts_and_draws_what_is_evicted(model: str) -> None:
    output = run(
        *("--model", model, "--image-size", SQUARE, "--cells", "3,3,4,4", "--pruning-rate", "0.8333"),
        *("--method", "ilp", "--eviction-layers", "2,20"),
    ).stdout
    region = Region.from_grid_cells(3, 3, 4, 4)
    plan = make_plan(GRID, region, 0.8333, "pool", "ilp", 40, (2, 20), region.widened(RIM))
    counts = [plan.tokens_per_layer(40)[layer] for layer in (2, 20)]
    lines = output.splitlines()
    assert any("576 -> 95.8 tokens per layer  (-83.4 %)" in line for line in lines)
    evicted = f"{576 - counts[0]} from layer 2 on, {counts[0] - counts[1]} from layer 20 on"
    assert any(evicted in line for line in lines)
    runs = f"layers 0-1: 576, layers 2-19: {counts[0]}, layers 20-39: {counts[1]}"
    assert any(runs in line for line in lines)
    drawn = "".join(line for line in lines if len(line) == 48 and not set(line) - set("12#o"))
    assert (drawn.count("1") // 2, drawn.count("2") // 2) == (576 - counts[0], counts[0] - counts[1])
    assert "11 evicted from layer 2" in output
    assert "22 evicted from layer 20" in output


def test_pruned_tokens_are_drawn_as_left_out(model: str) -> None:
    output = run(
        *("--model", model, "--image-size", SQUARE, "--region", "0,0,0.1,0.1", "--compression", "prune")
    ).stdout
    drawn = "".join(line for line in output.splitlines() if len(line) == 48 and not set(line) - set("#o."))
    assert drawn.count("..") == 576 - 128
    assert "left out" in output
    assert "pooled, one" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "fast"), "'fast' is not one of 'plc', 'ilp', 'plc+ilp', 'off'"),
        (("--eviction-layers", "a"), "--eviction-layers: layer numbers such as 2 or 2,16 needed, got 'a'"),
        (("--eviction-layers", ""), "--eviction-layers: layer numbers such as 2 or 2,16 needed, got ''"),
        (("--eviction-layers", "2,"), "--eviction-layers: layer numbers"),
        (("--eviction-layers", "-1"), "--eviction-layers: layer numbers"),
        (("--eviction-layers", "16,2"), "--eviction-layers: layers must be strictly ascending, got [16, 2]"),
        (("--eviction-layers", "0"), "--eviction-layers: Input should be greater than or equal to 1, got 0"),
        (("--eviction-layers", "1,2,3,4,5"), "--eviction-layers: List should have at most 4 items"),
        (
            ("--region", "0,0,1,1", "--method", "ilp", "--eviction-layers", "2,40"),
            "--eviction-layers: eviction_layers must be ascending layers from 1 to 39",
        ),
        (
            ("--region", "0,0,1,1", "--method", "ilp", "--eviction-layers", "20"),
            "--pruning-rate: 0.778 leaves 127.9 of 576 tokens per layer",
        ),
        (("--region", "0,0,1"), "--region: a box must be four fractions"),
        (("--region", "a,b,c,d"), "--region: four fractions x0,y0,x1,y1 needed, got 'a,b,c,d'"),
        (("--region", "0,0,2,2"), "--region: a box must be four fractions"),
        (("--region", "nan,0,1,1"), "--region: a box must be four fractions"),
        (("--region", "0.5,0,0.5,1"), "--region: box must have x0 < x1"),
        (("--cells", "0,0,8,8"), "--cells: cells must be 0..7"),
        (("--cells", "0,0,1.5,2"), "--cells: four cell numbers"),
        (("--pruning-rate", "1"), "--pruning-rate: Input should be less than 1, got 1.0"),
        (("--pruning-rate", "-1"), "--pruning-rate: Input should be greater than or equal to 0"),
        (("--pruning-rate", "nan"), "--pruning-rate:"),
        (("--compression", "zip"), "--compression"),
        (("--image-size", "640"), "--image-size: width and height in pixels needed"),
        (("--image-size", "0x480"), "--image-size:"),
        (("--model", "/no/such/place"), "--model: '/no/such/place' is neither a directory"),
    ],
)
def test_wrong_options_end_with_one_clear_line(model: str, options: tuple[str, ...], message: str) -> None:
    said = error_line("--model", model, "--image-size", SQUARE, *options)
    assert message in said.replace("'--", "--").replace("':", ":")


def test_an_unsupported_model_is_refused(tmp_path: Path) -> None:
    model = write_json(tmp_path, config={"architectures": ["LlamaForCausalLM"]})
    said = error_line("--model", model, "--image-size", SQUARE)
    assert "LlamaForCausalLM" in said


@pytest.mark.parametrize(("size", "grid"), [("640x480", (17, 23)), ("480x640", (23, 17)), ("28x28", (2, 2))])
def test_qwen_has_the_grid_that_the_images_size_asks_for(
    tmp_path: Path, size: str, grid: tuple[int, int]
) -> None:
    model = write_qwen2_5_vl(tmp_path)
    printed = plan_json("--model", model, "--image-size", size, "--region", "0,0,0.25,0.25")
    region = Region((Box(0, 0, 0.25, 0.25),))
    assert printed == make_plan(TokenGrid(*grid), region, 0.778, "pool", around=region.widened(RIM)).to_json(
        num_layers=28
    )


def test_an_image_that_the_model_does_not_take_is_an_error(tmp_path: Path) -> None:
    line = error_line("--model", write_qwen2_5_vl(tmp_path), "--image-size", "4000x10")
    assert "absolute aspect ratio must be smaller than 200, got 400" in line


def test_llava_next_has_two_grids_and_newlines(tmp_path: Path) -> None:
    options = ("--model", write_llava_next(tmp_path), "--image-size", "640x400")
    asked = ("--region", "0.25,0.25,0.5,0.5")
    region = Region((Box(0.25, 0.25, 0.5, 0.5),))
    printed = plan_json(*options, *asked)
    tiles = GridPart(TokenGrid(30, 48), first=576, newlines=True)
    grid = TokenGrids((GridPart(TokenGrid(24, 24)), tiles))
    expected = make_plan(grid, region, 0.778, "pool", around=region.widened(RIM)).to_json(num_layers=32)
    assert printed == expected
    drawn = run(*options, *asked).output
    assert "24 x 24 and 30 x 48 with newlines, 32 decoder layers" in drawn
    rows = [line for line in drawn.splitlines() if re.fullmatch(r"(?:(.)\1)+", line)]
    assert sorted({len(row) for row in rows}) == [2 * 24, 2 * 49]
    assert [row.endswith("##") for row in rows[24:]] == [7 <= row < 15 for row in range(30)]


def test_a_grid_wider_than_the_terminal_has_a_character_per_token(tmp_path: Path) -> None:
    options = ("--model", write_llava_next(tmp_path), "--image-size", "640x400", "--region", "0,0,1,1")
    drawn = CliRunner().invoke(app, options, env={"COLUMNS": "80"}).output
    assert [len(line) for line in drawn.splitlines()].count(49) == 30


def test_qwen3_evicts_after_its_deepstack_layers_only(tmp_path: Path) -> None:
    options = ("--model", write_qwen3_vl(tmp_path), "--image-size", "640x480", "--region", "0,0,0.25,0.25")
    options = (*options, "--method", "ilp")
    printed = plan_json(*options, "--eviction-layers", "3")
    region = Region((Box(0, 0, 0.25, 0.25),))
    assert printed == make_plan(
        TokenGrid(15, 20), region, 0.778, "pool", "ilp", 36, (3,), region.widened(RIM)
    ).to_json(num_layers=36)
    line = error_line(*options, "--eviction-layers", "2,16")
    assert "from 3 to 35" in line
    assert "adds visual features after each of the first 3" in line
    assert "got [2, 16]" in line


def test_a_foveated_plan_says_what_the_vision_tower_sees(tmp_path: Path, model: str) -> None:
    qwen = write_qwen2_5_vl(tmp_path)
    options = ("--model", qwen, "--image-size", "1792x1792", "--region", "0.25,0.25,0.5,0.5")
    foveate = (*options, "--compression", "foveate", "--rim-size", "half", "--halo", "2")
    pooled, foveated = plan_json(*options), plan_json(*foveate)
    pieces, tower = foveated.pop("pieces"), foveated.pop("tower_tokens")
    assert foveated == pooled
    assert tower == sum(piece["tokens"] for piece in pieces) < 0.5 * 64 * 64
    view, between, crop = pieces
    assert (view["tokens"] <= 300, between["scale"], crop["scale"]) == (True, [32, 32], [64, 64])
    assert crop["inner"] == [16, 32, 16, 32]
    smaller = plan_json(*options, "--compression", "foveate", "--view-tokens", "64", "--rim-size", "half")
    assert smaller["tower_tokens"] < tower
    shown = run(*foveate).stdout
    assert re.search(rf"vision tower +{tower} tokens: all of it as", shown), shown
    assert "every image is one tile of a fixed size" in error_line(
        "--model", model, "--image-size", SQUARE, "--compression", "foveate"
    )


def test_a_bound_in_place_of_a_rate(model: str) -> None:
    asked = ("--model", model, "--image-size", SQUARE, "--max-tokens", "40")
    assert len(plan_json(*asked)["embeddings"]) == 40
    assert len(plan_json(*asked, "--region", "0,0,0.1,0.1")["embeddings"]) == 40
    printed = run(*asked).output
    assert "at most 40 tokens asked" in printed
    assert "40 embeddings pooled from 576 tokens" in printed
    whole = run(*asked[:-1], "4000").output
    assert "Served whole: it has no more tokens than that." in whole
