# SPDX-License-Identifier: Apache-2.0
"""What decides at start: vLLM's own command line with our options, and the combinations that are refused."""

import argparse
import json
import logging
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CheckpointOf
from tests.cpu.conftest import inspect_models_here
from tests.families import QWEN2_5_VL
from tests.supported_window import NEXT, NIGHTLY, PREVIOUS
from vllm_crop.calibrating.report import write_calibration
from vllm_crop.compat.patches.cli_flags import apply_options
from vllm_crop.compat.supported import SUPPORTED_VERSIONS, UNTESTED
from vllm_crop.config import CropConfig
from vllm_crop.errors import InvalidConfigError, UnsupportedFlagError, UnsupportedVersionError
from vllm_crop.families.model_shape import ModelShape
from vllm_crop.localizers.calibration import Calibration, CalibrationError

pytestmark = pytest.mark.vllm_runtime

MIDDLEWARE = "vllm_crop_server.middleware.CropMiddleware"
OPTIONS = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")


Parse = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    inspect_models_here()


@pytest.fixture
def parse(checkpoint: Path) -> Parse:
    """`vllm serve *args` up to the namespace and the engine's arguments; MODEL is a checkpoint."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tests.upstream import make_arg_parser

    def run(*args: str) -> Any:
        parser = FlexibleArgumentParser()
        make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
        namespace = parser.parse_args(["serve", *(arg.replace("MODEL", str(checkpoint)) for arg in args)])
        namespace.model = namespace.model_tag or namespace.model
        return namespace, AsyncEngineArgs.from_cli_args(namespace)

    return run


@pytest.mark.parametrize(
    "args",
    [
        ("MODEL", "--plugin", "crop", "--crop-config", '{"pruning_rate": 0.5}'),
        ("--crop-config", '{"pruning_rate": 0.5}', "--plugin", "crop", "--model", "MODEL"),
        ("--model=MODEL", "--plugin=crop", '--crop-config={"pruning_rate": 0.5}'),
        ("MODEL", "--crop-config", '{"pruning_rate": 0.5}'),
        ("MODEL", "--additional-config", '{"crop": {"pruning_rate": 0.5}}'),
        ("MODEL", "--additional-config.crop.pruning_rate", "0.5"),
        ("MODEL", "--plugin", "crop", "--additional-config", '{"crop": {"pruning_rate": 0.5}, "other": 1}'),
    ],
)
def test_every_spelling_means_the_same(checkpoint: Path, parse: Parse, args: tuple[str, ...]) -> None:
    namespace, engine_args = parse(*args)
    assert engine_args.model == str(checkpoint)
    assert engine_args.additional_config["crop"] == {"pruning_rate": 0.5}
    assert namespace.middleware == [MIDDLEWARE]
    assert namespace.enable_prompt_tokens_details


def test_config_file(checkpoint: Path, parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    settings = "pruning_rate: 0.5\n  limits:\n    max_boxes_per_image: 3"
    file.write_text(f"model: {checkpoint}\nplugin: crop\ncrop-config:\n  {settings}\n")
    namespace, engine_args = parse("--config", str(file))
    assert engine_args.model == str(checkpoint)
    assert engine_args.additional_config["crop"] == {
        "pruning_rate": 0.5,
        "limits": {"max_boxes_per_image": 3},
    }
    assert namespace.middleware == [MIDDLEWARE]


def test_own_middleware_is_kept_and_nothing_is_added_unasked(parse: Parse) -> None:
    namespace, engine_args = parse("MODEL", "--middleware", "a.B")
    assert namespace.middleware == ["a.B"]
    assert engine_args.additional_config == {}
    namespace, _ = parse("MODEL", "--middleware", "a.B", "--plugin", "crop")
    assert namespace.middleware == ["a.B", MIDDLEWARE]
    assert parse("MODEL")[0].middleware == []  # the default list is not shared


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ('{"pruning_rate": 9}', "additional_config.crop.pruning_rate"),
        ('{"prunning_rate": 0.5}', "additional_config.crop.prunning_rate"),
        ('{"method": "fast"}', "'plc', 'ilp', 'plc+ilp' or 'off'"),
    ],
)
def test_bad_settings_are_argparse_errors(
    parse: Parse, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("MODEL", "--plugin", "crop", "--crop-config", value)
    assert message in capsys.readouterr().err


def test_run_batch_is_refused() -> None:
    args = argparse.Namespace(plugin="crop", crop_config=None, input_file="a", output_file="b")
    with pytest.raises(UnsupportedFlagError, match="run-batch"):
        apply_options(args)


@pytest.mark.parametrize("settings", [True, "plc", [], 7])
def test_settings_of_another_type_are_refused(parse: Parse, settings: Any) -> None:
    with pytest.raises(InvalidConfigError, match="must be an object"):
        parse("MODEL", "--plugin", "crop", "--additional-config", json.dumps({"crop": settings}))


def engine_config(checkpoint: Path, crop: Any, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True}
    args = EngineArgs(model=str(checkpoint), additional_config={"crop": crop}, **{**defaults, **options})
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"model_impl": "transformers"}, "--model-impl"),
        ({"enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        ({"mm_processor_kwargs": {"crop": {}}}, "--mm-processor-kwargs"),
        ({"tokenizer_mode": "mistral"}, "--tokenizer-mode"),
    ],
)
def test_what_does_not_go_together_is_refused(checkpoint: Path, options: Any, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        engine_config(checkpoint, {}, **options)


def test_a_tower_that_sees_whole_tiles_only_is_not_foveated(
    checkpoint: Path, checkpoint_of: CheckpointOf
) -> None:
    foveate = {"compression": "foveate"}
    with pytest.raises(ValueError, match="every image is one tile of a fixed size"):
        engine_config(checkpoint, foveate)
    qwen = checkpoint_of(QWEN2_5_VL, QWEN2_5_VL.shallow)
    engine_config(qwen, foveate)
    with pytest.raises(ValueError, match="--mm-encoder-tp-mode data"):
        engine_config(qwen, foveate, mm_encoder_tp_mode="data")


def test_the_rust_front_end_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        engine_config(checkpoint, {})


def test_a_cpu_that_cannot_compile_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    engine_config(checkpoint, {})
    cpp_compiler_search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt-get install g\+\+"):
        engine_config(checkpoint, {})


def test_original_positions_go_with_the_models_whole_length(checkpoint: Path) -> None:
    engine_config(checkpoint, {"position_ids": "original"}, max_model_len=4096)


def test_what_vllm_keeps_of_a_class_depends_on_its_mixins(tmp_path: Path) -> None:
    """It keeps what a class can do under a hash of where the class is registered."""
    from vllm import ModelRegistry

    import vllm_crop.models

    kept: Any = ModelRegistry.models["CropLlavaForConditionalGeneration"]
    assert kept.load_model_cls().__module__ == "vllm_crop.models.llava"
    files = Path(find_spec(kept.module_name).origin)
    copy = Path(shutil.copytree(files.parent, tmp_path / "models"), files.name)
    before = kept._get_modelinfo_module_hash(copy)
    copy.with_name("base.py").write_text("# another mixin")
    assert kept._get_modelinfo_module_hash(copy) != before
    with pytest.raises(AttributeError, match="no attribute 'LlamaForCausalLM'"):
        vllm_crop.models.LlamaForCausalLM  # noqa: B018


def test_unknown_settings_are_refused_offline(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"additional_config\.crop\.rate"):
        engine_config(checkpoint, {"rate": 0.5})


def edited(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the checkpoint's JSON files with config.json changed."""
    folder.mkdir()
    for file in checkpoint.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_unsupported_models_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    llama = edited(checkpoint, tmp_path / "llama", **{**text_config, "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(
        ValueError, match=r"architectures \['LlamaForCausalLM'\] are not supported; supported: .*'LlavaForC"
    ):
        engine_config(llama, {})
    with_class_token = edited(checkpoint, tmp_path / "full", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full'"):
        engine_config(with_class_token, {})
    vision = {"model_type": "siglip_vision_model", "image_size": 336, "patch_size": 14}
    siglip = edited(checkpoint, tmp_path / "siglip", vision_config=vision)
    with pytest.raises(ValueError, match="siglip_vision_model"):
        engine_config(siglip, {})


def calibrated(path: Path, checkpoint: Path, **other: Any) -> Any:
    """The model's configuration with a calibration of the checkpoint, or of one whose shape is `other`."""
    from vllm.engine.arg_utils import EngineArgs

    shape = ModelShape.of(json.loads((checkpoint / "config.json").read_text())).model_copy(update=other)
    settings = {"layers": [1, 3], "whole_below": 0.3}
    write_calibration(path, Calibration(settings=settings, model_name="M", model=shape))
    localizer = {"kind": "attention", "calibration": str(path), "whole_below": 0.4}
    arguments = EngineArgs(str(checkpoint), additional_config={"crop": {"localizer": localizer}})
    return arguments.create_model_config()


def test_a_calibration_travels_with_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    hf_config = calibrated(tmp_path / "file.json", checkpoint).hf_config
    (tmp_path / "file.json").unlink()
    localizer = CropConfig.from_mapping(hf_config.crop).localizer
    assert (localizer.layers, localizer.whole_below) == ([1, 3], 0.4)


def test_a_calibration_of_another_model_or_none_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(CalibrationError, match=r"file\.json was made for another model, M: .*, not 99"):
        calibrated(tmp_path / "file.json", checkpoint, num_hidden_layers=99)
    crop = {"localizer": {"kind": "attention", "calibration": str(tmp_path / "missing.json")}}
    with pytest.raises(CalibrationError, match="cannot be read"):
        EngineArgs(str(checkpoint), additional_config={"crop": crop}).create_model_config()


@pytest.mark.parametrize("as_callable", [False, True], ids=["dict", "callable"])
def test_the_users_own_overrides_are_kept(checkpoint: Path, as_callable: bool) -> None:
    overrides: Any = {"text_config": {"rms_norm_eps": 0.5}, "my_field": 7}
    config = engine_config(checkpoint, {}, hf_overrides=halve_epsilon if as_callable else overrides)
    hf_config = config.model_config.hf_config
    assert hf_config.architectures == ["CropLlavaForConditionalGeneration"]
    assert hf_config.text_config.rms_norm_eps == 0.5
    assert hf_config.my_field == 7
    assert hf_config.crop["pruning_rate"] == 0.778


def halve_epsilon(hf_config: Any) -> Any:
    """What a user might pass as `hf_overrides`."""
    if not hf_config.model_type.startswith("dummy_"):
        hf_config.text_config.rms_norm_eps = 0.5
        hf_config.my_field = 7
    return hf_config


def test_another_vllm_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", PREVIOUS)
    said = re.escape(f"supports vllm{SUPPORTED_VERSIONS}, installed is {PREVIOUS}")
    with pytest.raises(ValueError, match=said):
        engine_config(checkpoint, {})


@pytest.mark.parametrize("version", [NEXT, NIGHTLY])
def test_a_newer_vllm_starts_where_it_is_tried(
    version: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm
    from vllm.multimodal.processing import BaseMultiModalProcessor

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.delenv(UNTESTED, raising=False)
    said = f"installed is {version}, which is not tested: to try it, set {UNTESTED}"
    with pytest.raises(ValueError, match=re.escape(said)):
        engine_config(checkpoint, {})
    monkeypatch.setenv(UNTESTED, "1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    engine_config(checkpoint, {"eviction_layers": [1]})
    warned = {id(one): one.levelname for one in caplog.records if said.partition(",")[0] in one.getMessage()}
    assert list(warned.values()) == ["WARNING"]  # once, however often it is checked
    monkeypatch.setattr(BaseMultiModalProcessor, "_get_mm_hashes", lambda self, other: None)
    with pytest.raises(ValueError, match=r"_get_mm_hashes takes \('self', 'other'\)"):
        engine_config(checkpoint, {})


def test_a_changed_signature_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor

    monkeypatch.setattr(BaseMultiModalProcessor, "_get_mm_hashes", lambda self, other: None)
    with pytest.raises(ValueError, match=r"_get_mm_hashes takes \('self', 'other'\)"):
        engine_config(checkpoint, {})


@pytest.mark.parametrize("renderers", [{}, {"hf": ("vllm.renderers.hugging_face", "HfRenderer")}])
def test_another_renderer_of_vllms_is_another_vllm(
    renderers: dict[str, tuple[str, str]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY

    monkeypatch.setattr(RENDERER_REGISTRY, "renderers", renderers)
    with pytest.raises(UnsupportedVersionError, match="this vLLM's default renderer is"):
        engine_config(checkpoint, {})


def test_another_renderer_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.renderers.registry import RENDERER_REGISTRY

    monkeypatch.setitem(RENDERER_REGISTRY.renderers, "hf", ("other_plugin", "OtherRenderer"))
    with pytest.raises(ValueError, match=r"replaced vLLM's renderer by other_plugin\.OtherRenderer"):
        engine_config(checkpoint, {})


def test_unasked_the_stock_classes_stay(checkpoint: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(checkpoint), dtype="float32", max_model_len=2048).create_engine_config()
    assert config.model_config.hf_config.architectures == ["LlavaForConditionalGeneration"]
    assert not hasattr(config.model_config.hf_config, "crop")
