# SPDX-License-Identifier: Apache-2.0
"""Entry point `lmms_eval.models: crop`. Only lmms-eval loads it: nothing else here needs lmms-eval."""

from lmms_eval.models.registry_v2 import ModelManifest

ORACLE = ModelManifest("crop_oracle", chat_class_path="vllm_crop.lmms_eval.oracle.CropOracle")
