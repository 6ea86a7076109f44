# SPDX-License-Identifier: Apache-2.0
"""deploy/ray: what replicas are told, as far as it can be told without Ray."""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from vllm_crop.config import CropConfig

CONFIG: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml").read_text()
)
(LLM,) = CONFIG["applications"][0]["args"]["llm_configs"]


def test_its_settings_are_ours() -> None:
    assert CropConfig.from_mapping(LLM["engine_kwargs"]["additional_config"]["crop"]).pruning_rate == 0.778


def test_nobody_from_elsewhere_gets_in_unasked() -> None:
    assert CONFIG["http_options"]["host"] == "127.0.0.1"


def test_the_middleware_is_there() -> None:
    """Without it the field `crop` is read too late for facts to be returned."""
    for path in LLM["engine_kwargs"]["middleware"]:
        module, _, name = path.rpartition(".")
        assert callable(getattr(import_module(module), name))


def test_the_plugin_is_among_those_named() -> None:
    assert "crop" in LLM["runtime_env"]["env_vars"]["VLLM_PLUGINS"].split(",")
