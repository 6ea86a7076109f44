# SPDX-License-Identifier: Apache-2.0
"""Adds `--plugin crop` and `--crop-config` to `vllm serve` and every other command with engine options.

Why: vLLM has no way for a plugin to add options (AsyncEngineArgs.add_cli_args loads general plugins just
before it asks EngineArgs for its options, which is what makes this possible).
Replaces: EngineArgs.add_cli_args, EngineArgs.from_cli_args (vllm/engine/arg_utils.py).
Remove when: vLLM lets a plugin add options.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

from vllm_crop.compat.refusals import refuse
from vllm_crop.config import CONFIG_KEY, CropConfig
from vllm_crop.errors import CropError, UnsupportedVersionError

REASON = "adds --plugin crop and --crop-config to the command line"
MIDDLEWARE = "vllm_crop_server.middleware.CropMiddleware"
_MARK = "_vllm_crop_patched"


def patch(
    engine_args: Any, require_hooked: Callable[[], None], note_unhooked: Callable[[str, Exception], None]
) -> None:
    """Wrap the two functions of the class EngineArgs, once.

    Args:
        require_hooked: refuses a vLLM that could not be hooked into, where pruning is asked for.
        note_unhooked: is told what keeps the options from being added; vLLM goes on without them.
    """
    if hasattr(engine_args, _MARK):
        return
    add_cli_args, from_cli_args = engine_args.add_cli_args, engine_args.from_cli_args.__func__
    setattr(engine_args, _MARK, True)

    # The signatures are checked again by every engine of this process.
    @functools.wraps(add_cli_args)
    def add_cli_args_with_crop(parser: Any, *args: Any, **kwargs: Any) -> Any:
        made = add_cli_args(parser, *args, **kwargs)
        try:
            add_options(parser if made is None else made)
        except Exception as error:  # vLLM may have an option of that name one day
            note_unhooked("vllm.engine.arg_utils", error)
        return made

    @functools.wraps(from_cli_args)
    def from_cli_args_with_crop(cls: Any, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        if asks_for_pruning(args):
            require_hooked()
            apply_options(args)
        return from_cli_args(cls, args, *rest, **kwargs)

    engine_args.add_cli_args = staticmethod(add_cli_args_with_crop)
    engine_args.from_cli_args = classmethod(from_cli_args_with_crop)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this plugin."""
    group = parser.add_argument_group("crop", "Question-guided visual token pruning (vllm-crop).")
    group.add_argument(
        "--plugin", choices=["crop"], default=None, help="Serve with visual token pruning: --plugin crop."
    )
    group.add_argument(
        "--crop-config",
        type=parse_config,
        default=None,
        metavar="JSON",
        help="Settings of --plugin crop (which it implies), for example "
        "'{\"pruning_rate\": 0.889}'. `vllm-crop check` lists them all.",
    )


def parse_config(text: str) -> dict[str, Any]:
    """The value of `--crop-config`; an ordinary argparse error says what is wrong with it."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text[:60]!r}")
    try:
        CropConfig.from_mapping(settings)
    except CropError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return settings


def asks_for_pruning(args: argparse.Namespace) -> bool:
    """Whether parsed options do, in any of their spellings."""
    additional = getattr(args, "additional_config", None)
    return (
        getattr(args, "plugin", None) == "crop"
        or getattr(args, "crop_config", None) is not None
        or (isinstance(additional, dict) and additional.get(CONFIG_KEY) is not None)
    )


def apply_options(args: argparse.Namespace) -> None:
    """Turn parsed options into what vLLM carries itself: additional_config, middleware, usage details.

    Raises:
        CropError: settings are wrong, or this command or this vLLM cannot have them.
    """
    if not asks_for_pruning(args):
        return
    additional = getattr(args, "additional_config", None) or {}
    settings = getattr(args, "crop_config", None)
    if additional.get(CONFIG_KEY) is not None:
        CropConfig.from_mapping(additional[CONFIG_KEY])
    if getattr(args, "plugin", None) == "crop" or settings is not None:
        additional = {**additional, CONFIG_KEY: {**(additional.get(CONFIG_KEY) or {}), **(settings or {})}}
        args.additional_config = additional
    if hasattr(args, "input_file") and hasattr(args, "output_file"):
        refuse("vllm run-batch")
    if getattr(args, "enable_scale_out", False) or getattr(args, "tokens_only", False):
        refuse("--enable-scale-out, --tokens-only")
    if getattr(args, "grpc", False):
        refuse("--grpc")
    if not hasattr(args, "middleware") and not (hasattr(args, "host") and hasattr(args, "port")):
        return  # no server
    if lacking := [
        name for name in ("middleware", "enable_prompt_tokens_details") if not hasattr(args, name)
    ]:
        flags = ", ".join(map(_flag, lacking))
        raise UnsupportedVersionError(
            f"this vLLM's server has no option {flags} any more, through which requests say what is pruned"
        )
    if MIDDLEWARE not in args.middleware:
        args.middleware = [*args.middleware, MIDDLEWARE]
    args.enable_prompt_tokens_details = True


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
