# SPDX-License-Identifier: Apache-2.0
"""A calibration: what `vllm-crop calibrate` learned of a model, as a file that `localizer.calibration` names.

A server reads it once, while its configuration is made: the settings in it then travel with the configuration
to every worker. Settings that the operator gives beside it win.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_crop.errors import CropError
from vllm_crop.families.model_shape import ModelShape
from vllm_crop.localizers.settings import LocalizerConfig

# What may be learned, and what it was learned with: all that a map, its region and its confidence depend on.
SETTINGS = (
    *("layers", "weights", "thumbnail_tokens", "prompt", "chat_template_kwargs"),
    *("window", "max_windows", "further_window", "whole_below"),
)
_LEAST = "whole_below"
AGAIN = "run `vllm-crop calibrate --model M` for it, or leave localizer.calibration out"


class CalibrationError(CropError):
    """A calibration cannot be used; the message names the file and what to do."""


class Calibration(BaseModel):
    """The file.

    Attributes:
        settings: of LocalizerConfig, some of SETTINGS.
        model_name: of the checkpoint it was learned on.
        provenance: versions, date, data and how many; scores as `calibrate` printed them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    version: Literal[1] = 1
    settings: dict[str, Any]
    model_name: str
    model: ModelShape
    provenance: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            CalibrationError: there is none, or it is no calibration.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise CalibrationError(
                f"localizer.calibration {path} cannot be read ({reason}): {AGAIN}"
            ) from None
        except ValueError as error:
            raise CalibrationError(f"localizer.calibration {path} is no JSON ({error}): {AGAIN}") from None
        try:
            calibration = cls.model_validate(found)
            calibration.localizer()
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, wrong["loc"]))
            raise CalibrationError(
                f"localizer.calibration {path} is no calibration of this version "
                f"({place or 'content'}: {wrong['msg']}): {AGAIN}"
            ) from None
        if strays := sorted(set(calibration.settings).difference(SETTINGS)) or (
            [] if calibration.settings.get("layers") else ["no layers"]
        ):
            raise CalibrationError(
                f"localizer.calibration {path} is no calibration of this version (settings: "
                f"{', '.join(strays)}): {AGAIN}"
            )
        return calibration

    def localizer(self) -> LocalizerConfig:
        """The localizer with its settings."""
        return LocalizerConfig.model_validate({"kind": "attention", **self.settings})

    def require_fit(self, path: str, model: Mapping[str, Any]) -> None:
        """Refuse another model than the one it was learned on.

        Args:
            path: of the file, for the message.
            model: config.json, or the `to_dict()` of a loaded configuration.

        Raises:
            CalibrationError: the models differ in shape.
        """
        if differences := self.model.differences(ModelShape.of(model)):
            raise CalibrationError(
                f"localizer.calibration {path} was made for another model, {self.model_name}: this one has "
                f"{'; '.join(differences)}. {AGAIN[0].upper()}{AGAIN[1:]}"
            )


def with_calibration(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Calibration | None]:
    """The settings of a server with those of the file that they name; and what the file says.

    Args:
        settings: of CropConfig, as an operator gives them; checked.

    Raises:
        CalibrationError: the file cannot be used.
    """
    localizer = settings.get("localizer") or {}
    if localizer.get("calibration") is None:
        return dict(settings), None
    calibration = Calibration.read(Path(localizer["calibration"]))
    learned = dict(calibration.settings)
    if localizer.get("layers") is not None:
        learned.pop("weights", None)  # they are of the file's layers
    if any(
        localizer.get(name, value) != value for name, value in calibration.settings.items() if name != _LEAST
    ):
        learned.pop(_LEAST, None)  # learned with the file's own settings: another map has other confidences
    return {**settings, "localizer": {**learned, **localizer}}, calibration
