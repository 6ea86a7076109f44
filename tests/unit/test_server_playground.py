# SPDX-License-Identifier: Apache-2.0
"""The playground's routes on a FastAPI app, with a stand-in for what the plugin reads of an engine client."""

import asyncio
import re
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm_crop_server.middleware import CropMiddleware
from vllm_crop_server.playground import NO_ENGINE, NOT_PRUNING, Playground
from vllm_crop_server.playground.pages import STATIC
from vllm_crop_server.playground.plan_route import MAX_BODY_BYTES, PLAN_PATH, SETTINGS_PATH

from vllm_crop.config import CropConfig
from vllm_crop.families.llava import ClipPreprocessing, LlavaGeometry
from vllm_crop.families.llava_next import LLAVA_NEXT as TILES
from vllm_crop.families.llava_next import AnyResolution, LlavaNextGeometry
from vllm_crop.families.qwen_vl import Qwen2_5VLGeometry
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.planner import Planner
from vllm_crop.planning.geometry import Region, TokenGrid
from vllm_crop.planning.plan import make_plan

LLAVA = LlavaGeometry(
    TokenGrid(24, 24),
    ClipPreprocessing.from_settings(
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    ),
    num_layers=8,
)
QWEN = Qwen2_5VLGeometry.from_configs({"num_hidden_layers": 8}, {"min_pixels": 3136, "max_pixels": 1003520})
LLAVA_NEXT = LlavaNextGeometry(AnyResolution.from_settings({}, TILES, 336, 24, None), num_layers=8)
BOX = [0.5, 0.25, 0.75, 0.5]


def client_of(
    geometry: VisionGeometry | None = LLAVA, api_key: list[str] | None = None, **settings: Any
) -> TestClient:
    """An app with the plugin, on a server with these settings; no geometry: one that does not prune."""
    config = CropConfig.from_mapping(settings)
    processor = SimpleNamespace() if geometry is None else SimpleNamespace(planner=Planner(config, geometry))
    return app_with(SimpleNamespace(renderer=SimpleNamespace(mm_processor=processor)), api_key)


def app_with(engine_client: Any, api_key: list[str] | None = None) -> TestClient:
    """The plugin wired as vllm/plugins/endpoint_plugins/interface.py does it, behind our middleware."""
    app, plugin = FastAPI(), Playground()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine_client, app.state, Namespace(api_key=api_key)))
    app.add_middleware(CropMiddleware)
    return TestClient(app)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(eviction_layers=[2], pruning_rate=0.8333)


def plan_of(client: TestClient, **body: Any) -> Any:
    response = client.post(PLAN_PATH, json={"image_size": [336, 336], **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_every_file_of_the_page_is_served_with_strict_headers(client: TestClient) -> None:
    for path in ["", *(file.name for file in STATIC.iterdir())]:
        response = client.get(f"/plugins/crop/{path}")
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"


def test_the_page_has_types_a_browser_runs(client: TestClient) -> None:
    assert "text/html" in client.get("/plugins/crop/").headers["content-type"]
    assert "javascript" in client.get("/plugins/crop/main.js").headers["content-type"]
    assert "text/css" in client.get("/plugins/crop/style.css").headers["content-type"]
    redirect = client.get("/plugins/crop", follow_redirects=False)
    assert redirect.headers["location"].endswith("/plugins/crop/")


def test_the_page_names_no_other_origin() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|\s//\w", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)), file


@pytest.mark.parametrize(
    "path",
    [
        "../__init__.py",
        "..%2f__init__.py",
        "%2e%2e/pages.py",
        "..\\pages.py",
        "//etc/passwd",
        "%00",
        "nothing.js",
    ],
)
def test_nothing_outside_the_folder_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/plugins/crop/{path}").status_code in (400, 404)


def test_nothing_is_written(client: TestClient) -> None:
    assert client.post("/plugins/crop/index.html").status_code == 405
    assert client.get(PLAN_PATH).status_code == 405


def test_the_plan_is_the_servers(client: TestClient) -> None:
    for method in ("plc", "ilp", "plc+ilp"):
        plan = plan_of(client, region=BOX, method=method, pruning_rate=0.6)
        layers = () if method == "plc" else (2,)
        sent = Region.from_grid_cells(4, 2, 5, 3)
        region, around = (LLAVA.view(336, 336).project(one) for one in (sent, sent.widened(0.125)))
        assert region is not None
        expected = make_plan(LLAVA.token_grid, region, 0.6, "pool", method, 8, layers, around).to_json(8)  # type: ignore[arg-type]
        assert {key: plan[key] for key in expected} == expected
        assert plan["method"] == method
        assert plan["region_in_view"] is True
    bounded = plan_of(client, max_tokens=40, method="plc")
    assert (len(bounded["embeddings"]), bounded["region_in_view"]) == (40, False)


def test_what_is_left_out_the_server_decides(client: TestClient) -> None:
    plan = plan_of(client, region=BOX)
    assert plan["tokens_per_layer"] == [96] * 8
    assert plan_of(client)["tokens_per_layer"] == [576] * 8
    assert plan_of(client, region=BOX, method="off")["tokens_per_layer"] == [576] * 8


def test_the_view_is_what_the_model_sees(client: TestClient) -> None:
    plan = plan_of(client, image_size=[672, 336], region=[0.0, 0.0, 0.1, 1.0])
    assert plan["window"] == pytest.approx([0.25, 0.0, 0.75, 1.0], abs=0.01)
    assert plan["region_in_view"] is False
    assert plan["tokens_per_layer"] == [576] * 8


def test_grids_of_any_size() -> None:
    plan = plan_of(client_of(QWEN), image_size=[560, 280], region=[BOX, [0.0, 0.0, 0.1, 0.1]])
    assert plan["grid"] == [10, 20]
    assert plan["window"] == [0, 0, 1, 1]


def test_an_image_in_several_grids() -> None:
    plan = plan_of(client_of(LLAVA_NEXT), image_size=[640, 480], region=BOX)
    assert [grid["grid"] for grid in plan["grids"]] == [[24, 24], [36, 48]]
    assert plan["window"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "image_size", "Field required"),
        ({"image_size": [336]}, "image_size", "required"),
        ({"image_size": [336, 0]}, "image_size", "greater than or equal to 1"),
        ({"image_size": [336, 10**9]}, "image_size", "65535"),
        ({"image_size": [336, 33.5]}, "image_size", "integer"),
        ({"image_size": "336x336"}, "image_size", "array"),
        ({"region": [0.5, 0.5, 0.4, 0.6]}, "region", "x0 < x1"),
        ({"region": [0, 0, 2, 1]}, "region", "fractions"),
        ({"region": [[0.0, 0.0, 0.1, 0.1]] * 17}, "region", "at most 16 boxes"),
        ({"region": []}, "region", "must be null, a box"),
        ({"pruning_rate": 1}, "pruning_rate", "less than 1"),
        ({"pruning_rate": 0.995}, "pruning_rate", "at most 0.99"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "pruning_rate": 0.5}, "max_tokens", "not both"),
        ({"pruning_rate": "much"}, "pruning_rate", "number"),
        ({"method": "magic"}, "method", "plc"),
        ({"method": "ilp", "region": BOX, "pruning_rate": 0.95}, "pruning_rate", "takes at least"),
        ({"unknown": 1}, "unknown", "unknown key"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(client: TestClient, body: Any, field: str, words: str) -> None:
    full = {"image_size": [336, 336], **body} if body else {}
    response = client.post(PLAN_PATH, json=full)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert error["param"] == field
    assert words in error["message"]
    assert field in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"image_size": [NaN, 1]}']
)
def test_a_body_that_is_none_is_a_400(client: TestClient, body: bytes) -> None:
    response = client.post(PLAN_PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("body", "image_size")


def test_a_body_too_large_is_a_400(client: TestClient) -> None:
    response = client.post(PLAN_PATH, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 400
    assert "larger than" in response.json()["error"]["message"]


def test_an_image_the_processor_would_refuse_is_a_400() -> None:
    response = client_of(QWEN).post(PLAN_PATH, json={"image_size": [10, 10000]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image_size"


def test_a_servers_limit_holds_for_plans() -> None:
    limits = {"max_tokens_per_request": 100}
    fitted = client_of(limits=limits, fit="prune")
    assert plan_of(fitted)["tokens_per_layer"] == [100] * 8
    assert plan_of(fitted, max_tokens=50)["tokens_per_layer"] == [50] * 8
    refused = client_of(limits=limits).post(PLAN_PATH, json={"image_size": [9, 9]})
    assert refused.status_code == 400
    assert "room for 100 (limits.max_tokens_per_request)" in refused.json()["error"]["message"]


def test_a_method_the_server_is_not_prepared_for_is_a_400() -> None:
    response = client_of().post(PLAN_PATH, json={"image_size": [9, 9], "method": "ilp"})
    assert response.json()["error"]["param"] == "method"
    assert "eviction_layers" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("settings", "methods", "default"),
    [
        ({}, ["plc"], "plc"),
        ({"eviction_layers": [2]}, ["plc", "ilp", "plc+ilp"], "plc"),
        ({"method": "ilp"}, ["plc", "ilp", "plc+ilp"], "ilp"),
        ({"method": "off"}, ["plc"], "plc"),
    ],
)
def test_the_settings_offer_what_the_server_is_prepared_for(
    settings: Any, methods: Any, default: str
) -> None:
    offered = client_of(**settings).get(SETTINGS_PATH).json()
    assert offered["methods"] == methods
    assert offered["method"] == default
    assert offered["localizer"] == "request"
    assert offered["pruning_rate"] == 0.778
    assert offered["max_pruning_rate"] == 0.99


def test_the_slider_begins_within_the_limits() -> None:
    offered = client_of(limits={"max_pruning_rate": 0.5}).get(SETTINGS_PATH).json()
    assert offered["pruning_rate"] == offered["max_pruning_rate"] == 0.5


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (app_with(None), NO_ENGINE),
        (client_of(None), NOT_PRUNING),
        (app_with(SimpleNamespace(renderer=SimpleNamespace(mm_processor=None))), NOT_PRUNING),
    ],
)
def test_a_server_that_cannot_plan_says_why(client: TestClient, reason: str) -> None:
    for response in (client.post(PLAN_PATH, json={}), client.get(SETTINGS_PATH)):
        assert response.status_code == 501
        assert response.json()["error"]["message"] == reason
    assert client.get("/plugins/crop/").status_code == 200


def test_the_page_learns_whether_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(api_key: list[str] | None) -> bool:
        return client_of(api_key=api_key).get("/plugins/crop/access.json").json() == {"key_needed": True}

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert not needed(None)
    assert needed(["secret"])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert needed(None)


def test_scripts_are_short() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in STATIC.glob("*.js")}
    assert max(lengths.values()) <= 150, lengths
