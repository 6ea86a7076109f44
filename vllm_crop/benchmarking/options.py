# SPDX-License-Identifier: Apache-2.0
"""What the command line of `vllm-crop bench` decides, and what follows from it for server and requests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_crop.benchmarking.runs import LOCALIZED_MODES, LocalizedMode, Mode
from vllm_crop.config import CropConfig
from vllm_crop.crop_params import InvalidCropError
from vllm_crop.families.registry import VisionGeometry, check_layers_that_evict
from vllm_crop.planner import Planner
from vllm_crop.planning.budget import BudgetError, Method, method_evicts
from vllm_crop.planning.geometry import Region
from vllm_crop.planning.plan import Compression, TokenPlan
from vllm_crop.request import ImageRequest

Dummy = Literal["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_5"]
IMAGE_SIDE = 336  # LLaVA-1.5's own, for what times the dummy model only


@dataclass(frozen=True)
class Options:
    """What the command line decides; `model` None is the dummy model.

    Attributes:
        image_side: pixels, of the square random images.
        dummy: which family's dummy model, without `model`.
        compression: what "plc" does.
        resampler: folder of a compressor; None for an untrained one, which takes as long.
        localizers: modes in which the server finds regions, for the first of the methods.
        localizer_config: more settings of their localizers.
    """

    model: str | None
    region: Region
    pruning_rate: float
    methods: tuple[Method, ...]
    eviction_layers: tuple[int, ...]
    concurrencies: tuple[int, ...]
    num_prompts: int
    repeats: int
    output_len: int
    seed: int
    stock: bool
    serve_args: tuple[str, ...]
    folder: Path
    image_side: int = IMAGE_SIDE
    dummy: Dummy = "llava"
    compression: Compression = "pool"
    resampler: str | None = None
    localizers: tuple[LocalizedMode, ...] = ()
    localizer_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[int, ...]:
        """The eviction layers the server prepares for; none if no method evicts."""
        return self.eviction_layers if any(map(method_evicts, self.methods)) else ()

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What is compared, the references first."""
        stock: tuple[Mode, ...] = ("stock",) if self.stock else ()
        return (*stock, "off", *self.methods, *self.localizers)

    def crop_arguments(
        self, localizer: Mapping[str, Any] | None, more: Mapping[str, Any] | None = None
    ) -> tuple[str, ...]:
        """What asks for the plugin on the command line of `vllm serve`.

        Args:
            more: settings that are known only once there is a model.
        """
        settings: dict[str, Any] = {"eviction_layers": self.stages, "compression": self.compression}
        settings |= more or {}
        if localizer is not None:
            settings["localizer"] = localizer
        return ("--plugin", "crop", "--crop-config", json.dumps(settings))

    def extra_body(self, mode: Mode) -> dict[str, Any]:
        """What a request of this mode carries besides prompt and image."""
        if mode == "stock":
            return {}
        if mode == "off":
            return {"crop": {"method": "off"}}
        if mode in LOCALIZED_MODES:
            return {"crop": {"method": self.methods[0], "pruning_rate": self.pruning_rate}}
        regions = [self.region.as_lists()]
        return {"crop": {"method": mode, "regions": regions, "pruning_rate": self.pruning_rate}}

    def plan(self, mode: Mode, geometry: VisionGeometry) -> TokenPlan:
        """What becomes of the image of such a request; with the client's region where the server finds one.

        Raises:
            BudgetError: the model cannot evict at these layers, or they leave too little of the budget.
        """
        method = self._method(mode)
        region = None if method == "off" else self.region
        stages = self.stages if method_evicts(method) else ()
        if stages:
            check_layers_that_evict(geometry, stages)
        request = ImageRequest(region, self.pruning_rate, self.compression, method, stages, CropConfig().rim)
        try:
            planner, side = Planner(CropConfig(), geometry), self.image_side
            return planner.plan_image(request, side, side).tokens
        except InvalidCropError as error:
            raise BudgetError(error.reason) from None

    def _method(self, mode: Mode) -> Method:
        if mode == "attention localizer" or mode == "engine localizer" or mode == "remote localizer":
            return self.methods[0]
        return "off" if mode == "stock" else mode
