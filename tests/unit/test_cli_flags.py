# SPDX-License-Identifier: Apache-2.0
"""`--plugin crop` and `--crop-config`, on a stand-in for vLLM's EngineArgs."""

import argparse
import json
import pkgutil
from contextlib import nullcontext
from typing import Any

import pytest

from vllm_crop.compat.patches import cli_flags
from vllm_crop.compat.patches.cli_flags import MIDDLEWARE, add_options, apply_options, parse_config, patch
from vllm_crop.errors import UnsupportedFlagError, UnsupportedVersionError


def fake_engine_args() -> Any:
    """A new class with the two functions that are replaced, as vLLM declares them."""

    class EngineArgs:
        def __init__(self, args: argparse.Namespace) -> None:
            self.additional_config = args.additional_config

        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--additional-config", type=json.loads, default={})
            return parser

        @classmethod
        def from_cli_args(cls, args: argparse.Namespace) -> Any:
            return cls(args)

    return EngineArgs


def serve_parser() -> argparse.ArgumentParser:
    """What `vllm serve` adds that our options touch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--additional-config", type=json.loads, default={})
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    add_options(parser)
    return parser


def served(*command_line: str) -> argparse.Namespace:
    """The options of a `vllm serve` command line after ours have been applied."""
    args = serve_parser().parse_args(command_line)
    apply_options(args)
    return args


def test_without_our_options_nothing_changes() -> None:
    args = served("--additional-config", '{"other": 1}')
    assert args.additional_config == {"other": 1}
    assert args.middleware == []
    assert args.enable_prompt_tokens_details is False
    assert (args.plugin, args.crop_config) == (None, None)


@pytest.mark.parametrize(
    ("command_line", "crop"),
    [
        (["--plugin", "crop"], {}),
        (["--crop-config", "{}"], {}),
        (["--crop-config", '{"pruning_rate": 0.889}'], {"pruning_rate": 0.889}),
        (["--plugin", "crop", "--crop-config", '{"method": "off"}'], {"method": "off"}),
        (["--additional-config", '{"crop": {"method": "off"}}'], {"method": "off"}),
        (["--plugin", "crop", "--additional-config", '{"crop": {"method": "off"}}'], {"method": "off"}),
    ],
)
def test_each_way_of_asking_sets_config_middleware_and_usage_details(
    command_line: list[str], crop: dict[str, Any]
) -> None:
    args = served(*command_line)
    assert args.additional_config == {"crop": crop}
    assert args.middleware == [MIDDLEWARE]
    assert args.enable_prompt_tokens_details is True


def test_crop_config_wins_over_additional_config_key_by_key() -> None:
    args = served(
        "--additional-config",
        '{"crop": {"method": "off", "pruning_rate": 0.1}, "other": 1}',
        "--crop-config",
        '{"pruning_rate": 0.2}',
    )
    assert args.additional_config == {"crop": {"method": "off", "pruning_rate": 0.2}, "other": 1}


@pytest.mark.parametrize(
    ("command_line", "additional_config", "middleware"),
    [([], {"crop": None}, []), (["--plugin", "crop"], {"crop": {}}, [MIDDLEWARE])],
)
def test_a_crop_of_null_in_additional_config_asks_for_nothing(
    command_line: list[str], additional_config: dict[str, Any], middleware: list[str]
) -> None:
    args = served("--additional-config", '{"crop": null}', *command_line)
    assert (args.additional_config, args.middleware) == (additional_config, middleware)


def test_the_dictionaries_given_are_not_changed() -> None:
    crop: dict[str, Any] = {"method": "off"}
    additional = {"crop": crop}
    args = argparse.Namespace(additional_config=additional, crop_config={"pruning_rate": 0.5})
    apply_options(args)
    assert (additional, crop) == ({"crop": {"method": "off"}}, {"method": "off"})


def test_the_middleware_is_added_once_and_after_the_users() -> None:
    args = served("--plugin", "crop", "--middleware", "mine.Own")
    apply_options(args)
    assert args.middleware == ["mine.Own", MIDDLEWARE]
    assert served("--plugin", "crop", "--middleware", MIDDLEWARE).middleware == [MIDDLEWARE]


@pytest.mark.parametrize("flag", ["--grpc", "--enable-scale-out", "--tokens-only"])
def test_servers_that_requests_reach_past_ours_are_refused(flag: str) -> None:
    """By vLLM's own parser: a flag that it calls otherwise would not be seen."""
    parsers = pytest.importorskip("vllm.utils.argparse_utils")
    from tests.upstream import make_arg_parser

    parser = make_arg_parser(parsers.FlexibleArgumentParser())
    if "--plugin" not in parser._option_string_actions:  # where nothing has registered the plugin before
        add_options(parser)
    with pytest.raises(UnsupportedFlagError, match=rf"{flag}.* cannot be used with --plugin crop"):
        apply_options(parser.parse_args(["--plugin", "crop", flag]))
    apply_options(parser.parse_args([flag]))


def test_the_parsers_default_lists_stay_empty() -> None:
    parser = serve_parser()
    apply_options(parser.parse_args(["--plugin", "crop"]))
    again = parser.parse_args([])
    assert (again.middleware, again.additional_config) == ([], {})


def test_commands_without_a_server_get_the_config_alone() -> None:
    args = argparse.Namespace(additional_config=None, plugin="crop", crop_config=None)
    apply_options(args)
    assert vars(args) == {"additional_config": {"crop": {}}, "plugin": "crop", "crop_config": None}


def test_options_of_commands_that_know_nothing_of_ours_stay() -> None:
    args = argparse.Namespace(model="llava")
    apply_options(args)
    assert vars(args) == {"model": "llava"}


def test_the_middleware_named_is_the_servers() -> None:
    from vllm_crop_server.middleware import CropMiddleware

    assert pkgutil.resolve_name(MIDDLEWARE) is CropMiddleware


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("pruning_rate=0.5", "no JSON"),
        ("[]", "must be a JSON object, got '[]'"),
        ("null", "must be a JSON object, got 'null'"),
        ("0.5", "must be a JSON object, got '0.5'"),
        ('{"pruning_rate": 9}', "pruning_rate: Input should be less than 1, got 9"),
        ('{"prunning_rate": 0.5}', "prunning_rate: unknown key"),
        ('{"limits": {"max_boxes": 1}}', "limits.max_boxes: unknown key"),
    ],
)
def test_a_wrong_crop_config_ends_with_an_ordinary_argparse_error(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_parser().parse_args(["--crop-config", text])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "argument --crop-config: " in printed
    assert said in printed


def test_other_plugins_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_parser().parse_args(["--plugin", "corp"])
    assert "--plugin" in capsys.readouterr().err


def test_parsed_settings_are_what_was_written_without_defaults() -> None:
    assert parse_config('{"limits": {}, "pruning_rate": 0}') == {"limits": {}, "pruning_rate": 0}


def test_the_help_explains_both_options() -> None:
    text = " ".join(serve_parser().format_help().split())
    assert "--plugin {crop}" in text
    assert (
        '--crop-config JSON Settings of --plugin crop (which it implies), for example \'{"pruning_rate"'
        in text
    )


def test_patched_engine_args_offer_and_apply_the_options() -> None:
    engine_args = fake_engine_args()
    patch(engine_args, lambda: None, print)
    parser = engine_args.add_cli_args(argparse.ArgumentParser())
    made = engine_args.from_cli_args(parser.parse_args(["--plugin", "crop"]))
    assert type(made) is engine_args
    assert made.additional_config == {"crop": {}}


def test_subclasses_of_patched_engine_args_are_still_made_as_themselves() -> None:
    engine_args = fake_engine_args()
    patch(engine_args, lambda: None, print)
    subclass: Any = type("AsyncEngineArgs", (engine_args,), {})
    parser = subclass.add_cli_args(argparse.ArgumentParser())
    made = subclass.from_cli_args(parser.parse_args(["--crop-config", '{"method": "off"}']))
    assert type(made) is subclass
    assert made.additional_config == {"crop": {"method": "off"}}


def test_patching_twice_adds_the_options_once() -> None:
    engine_args = fake_engine_args()
    patch(engine_args, lambda: None, print)
    patched = engine_args.add_cli_args
    patch(engine_args, lambda: None, print)
    assert engine_args.add_cli_args is patched
    engine_args.add_cli_args(argparse.ArgumentParser())


def test_a_vllm_with_such_an_option_of_its_own_goes_on_without_ours() -> None:
    noted: list[str] = []
    engine_args = fake_engine_args()
    patch(engine_args, lambda: None, lambda module, error: noted.append(f"{module}: {error}"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugin", choices=["theirs"])
    assert engine_args.add_cli_args(parser).parse_args(["--plugin", "theirs"]).plugin == "theirs"
    assert noted[0].startswith("vllm.engine.arg_utils: argument --plugin: conflicting option string")


def test_a_parser_that_is_filled_in_place_is_ours_too() -> None:
    engine_args = fake_engine_args()
    engine_args.add_cli_args = staticmethod(lambda parser: None)
    patch(engine_args, lambda: None, print)
    parser = argparse.ArgumentParser()
    assert engine_args.add_cli_args(parser) is None
    assert parser.parse_args(["--plugin", "crop"]).plugin == "crop"


@pytest.mark.parametrize("given", [[], ["--plugin", "crop"]])
def test_who_asks_is_told_of_what_could_not_be_hooked_into(given: list[str]) -> None:
    def refuse() -> None:
        raise UnsupportedVersionError("cannot hook into x")

    engine_args = fake_engine_args()
    patch(engine_args, refuse, print)
    parsed = engine_args.add_cli_args(argparse.ArgumentParser()).parse_args(given)
    with pytest.raises(UnsupportedVersionError) if given else nullcontext():
        engine_args.from_cli_args(parsed)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, "a string", ["a list"], object()])
def test_who_asks_for_nothing_is_left_alone(additional: object) -> None:
    args = argparse.Namespace(additional_config=additional, middleware=[])
    apply_options(args)
    assert vars(args) == {"additional_config": additional, "middleware": []}


@pytest.mark.parametrize("missing", ["middleware", "enable_prompt_tokens_details"])
def test_a_server_without_an_option_that_is_needed_is_refused(missing: str) -> None:
    """The field `crop` would be ignored, and nobody told."""
    known = {"host": None, "port": 8000, "middleware": [], "enable_prompt_tokens_details": False}
    del known[missing]
    with pytest.raises(UnsupportedVersionError, match=f"no option --{missing.replace('_', '-')} any more"):
        apply_options(argparse.Namespace(plugin="crop", **known))


def test_the_reason_for_the_patch_is_stated() -> None:
    assert "--plugin crop" in cli_flags.REASON
    assert cli_flags.__doc__ is not None
    assert all(word in cli_flags.__doc__ for word in ("Why:", "Replaces:", "Remove when:"))
