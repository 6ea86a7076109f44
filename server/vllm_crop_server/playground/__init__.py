# SPDX-License-Identifier: Apache-2.0
"""The playground: a page that asks a question about an image with CROP and without, side by side.

A vLLM endpoint plugin (vllm/plugins/endpoint_plugins/interface.py), loaded where `VLLM_PLUGINS` names `crop`.
The page under `/plugins/crop/` is static and public; what it calls lies under `/v1`, where vLLM asks for the
API key.
"""

import os
from argparse import Namespace
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import State

from vllm_crop_server.playground.pages import PAGE_PATH, Pages, access
from vllm_crop_server.playground.plan_route import PLAN_PATH, SETTINGS_PATH, plan, settings
from vllm_crop_server.playground.plans import Page

NO_ENGINE = "this server has no engine: it renders prompts and answers no questions"
NOT_PRUNING = "this server does not prune: start it with `vllm serve MODEL --plugin crop`"


class Playground:
    """What `vllm.endpoint_plugins: crop` resolves to."""

    name = "crop"
    required_tasks = ("generate",)

    def attach_router(self, app: Starlette) -> None:
        """Add the page and the two routes it needs beside vLLM's own."""
        app.add_route(PLAN_PATH, plan, methods=["POST"])
        app.add_route(SETTINGS_PATH, settings, methods=["GET"])
        app.add_route(f"{PAGE_PATH}/access.json", access, methods=["GET"])
        app.mount(PAGE_PATH, Pages(), name="crop-playground")

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Note how this server plans images; instead of a planner, why there is none.

        Args:
            engine_client: the engine whose processor plans; None on vLLM's render-only server.
            state: of the app.
            args: of `vllm serve`.
        """
        # As vllm/entrypoints/serve/middleware/register.py decides whether to ask for a key.
        state.crop_key_needed = any(args.api_key or [os.environ.get("VLLM_API_KEY")])
        if engine_client is None:
            state.crop_page = NO_ENGINE
        else:
            state.crop_page = Page.of_processor(engine_client.renderer.mm_processor) or NOT_PRUNING
