# SPDX-License-Identifier: Apache-2.0
"""The servers a benchmark loads: one with the plugin, maybe with a localizer, and stock vLLM."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from vllm_crop.benchmarking import dummy_internvl, dummy_llava_next, dummy_qwen2_5_vl, dummy_qwen3_5
from vllm_crop.benchmarking.dummy_llava import BENCH, make_checkpoint
from vllm_crop.benchmarking.kv import KVCapacity
from vllm_crop.benchmarking.load import Client
from vllm_crop.benchmarking.options import Dummy, Options
from vllm_crop.benchmarking.runs import Mode, Run
from vllm_crop.eviction.grouping import KVGrouping, predict_grouping
from vllm_crop.families.checkpoint import load_geometry
from vllm_crop.families.registry import VisionGeometry
from vllm_crop.localizers.dialects import dialect_with
from vllm_crop.localizers.settings import Kind, LocalizerConfig, suits
from vllm_crop.measuring.metrics import samples
from vllm_crop.measuring.provenance import Machine
from vllm_crop.measuring.server import Server, serve
from vllm_crop.planning.geometry import Region

# A token is a byte to the dummy, and it understands nothing: the dialect's words would only take time.
DUMMY_PROMPT = "where: {question}"
OwnKind = Literal["attention", "engine"]
OWN_MODES: dict[OwnKind, Mode] = {"attention": "attention localizer", "engine": "engine localizer"}
# All images cost the dummy the same; as much less as kind "engine" makes its glance.
DUMMY_GLANCE = {"regions": [Region.whole().as_lists()], "pruning_rate": 1 - 64 / 576, "method": "plc"}


def own_localizer(kind: OwnKind, options: Options) -> dict[str, Any]:
    """`localizer` of the server that asks itself."""
    return {"kind": kind, **_dummy_settings(options), **_suiting(kind, options)}


def remote_localizer(options: Options, server: Server) -> dict[str, Any]:
    """`localizer` of the server that asks another: the one the options name, or else the first `server`.

    That one is a vLLM, which can be held to legal answers.
    """
    if "base_url" in options.localizer_config:
        return {"kind": "openai", **_suiting("openai", options)}
    config = {**_dummy_settings(options), **_suiting("openai", options)}
    dialect = dialect_with(config.get("dialect", LocalizerConfig().dialect), config.get("prompt"))
    extra: dict[str, Any] = {"structured_outputs": {"regex": dialect.regex}}
    extra["crop"] = {"method": "off"} if options.model else DUMMY_GLANCE
    where = {"base_url": f"{server.base_url}/v1", "model": server.model}
    return {"kind": "openai", **where, "extra_body": extra, **config}


def _suiting(kind: Kind, options: Options) -> dict[str, Any]:
    """What of the options' settings means something to a kind: several are measured side by side."""
    return {name: value for name, value in options.localizer_config.items() if suits(name, kind)}


def _dummy_settings(options: Options) -> dict[str, Any]:
    """On a busy CPU a late answer is still one, to be timed; and so is an unsure one of a dummy."""
    return {} if options.model else {"prompt": DUMMY_PROMPT, "timeout_s": 60, "whole_below": 0.0}


def outcomes(metrics: str) -> Counter[str]:
    """Images a server has localized since its start, by outcome, from its `/metrics`."""
    counts: Counter[str] = Counter()
    for labels, value in samples(metrics, "crop:localizations_total"):
        counts[labels["outcome"]] += int(value)
    return counts


def outcomes_by_mode(runs: Sequence[Run]) -> Mapping[str, Counter[str]]:
    """Of all runs that localized."""
    modes: dict[str, Counter[str]] = {}
    for run in runs:
        if run.outcomes:
            modes.setdefault(run.spec.mode, Counter()).update(run.outcomes)
    return modes


# Both are polled several times a second.
QUIET = ("--disable-access-log-for-endpoints", "/health,/metrics")
MAX_MODEL_LEN, ROOM_FOR_TEXT = 2048, 1024
CPU_KV_GIB = 2
PLAIN = ("--dtype", "float32", "--block-size", "32")
# As vLLM's CPU kernels of linear layers want it; a block is as large as a state.
HYBRID = ("--dtype", "bfloat16")
SHARE_OF_ALL = 0.9  # of the device's memory


@dataclass(frozen=True)
class ToServe:
    """What both servers have in common.

    Attributes:
        crop: settings of the plugin that depend on the model.
    """

    model: str
    args: tuple[str, ...]
    env: dict[str, str]
    crop: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A running server and its KV cache."""

    server: Server
    capacity: KVCapacity


def what_to_serve(options: Options, machine: Machine, client: Client) -> ToServe:
    """The user's model as it is, or the dummy model with settings that show its prefill."""
    # All servers are up at once, so that their runs can take turns; an idle one takes memory only.
    own = sum(mode in options.localizers for mode in OWN_MODES.values())
    servers = max(1, own) + options.stock + ("remote localizer" in options.localizers)
    share = ("--gpu-memory-utilization", f"{SHARE_OF_ALL / servers:.2f}") if servers > 1 else ()
    if options.model is not None:
        crop = _compressor(options, options.model, client)
        return ToServe(options.model, (*QUIET, *share, *options.serve_args), {}, crop)
    # vLLM's dummy weights give the same answer to all: no localizer may be made of them.
    scaled = bool(options.localizers)
    model = str(client.call(_make_dummy, options.folder / "model", options.dummy, scaled))
    crop = _compressor(options, model, client)
    longest = load_geometry(model).grid(options.image_side, options.image_side).num_tokens + ROOM_FOR_TEXT
    args = [*QUIET, "--max-model-len", str(max(MAX_MODEL_LEN, longest))]
    args += [] if scaled else ["--load-format", "dummy"]
    # The dummy's vocabulary is so small that random questions begin alike now and then. The prefix cache
    # would answer those beginnings, a larger share of the pruned prompts.
    args.append("--no-enable-prefix-caching")
    if not machine.is_cpu:
        return ToServe(model, (*args, *share, *options.serve_args), {}, crop)
    # Compiling takes a minute longer and gains 5 percent; blocks as small as the CPU allows show KV use
    # most exactly.
    args += ["--enforce-eager", *(HYBRID if options.dummy == "qwen3_5" else PLAIN)]
    env = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_GIB))}
    return ToServe(model, (*args, *options.serve_args), env, crop)


def _compressor(options: Options, model: str, client: Client) -> dict[str, Any]:
    """The setting that names a compressor's weights: the options' own, or untrained ones."""
    if options.compression != "resampler":
        return {}
    weights = options.resampler or str(client.call(_make_untrained, options.folder / "resampler", model))
    return {"resampler": {"weights": weights}}


def _make_untrained(folder: Path, model: str) -> Path:
    """Write a compressor that does what pooling does, with all the work. Called where torch is loaded."""
    from vllm_crop.compression.weights import write_untrained
    from vllm_crop.families.checkpoint import load_model_config

    return write_untrained(folder, model, load_model_config(model))


def _make_dummy(folder: Path, dummy: Dummy, weights: bool) -> Path:
    """Write a dummy of a family. Called where transformers is loaded."""
    if dummy == "qwen2_5_vl":
        return dummy_qwen2_5_vl.make_bench_checkpoint(folder, weights)
    if dummy == "qwen3_5":
        return dummy_qwen3_5.make_bench_checkpoint(folder, weights)
    if dummy == "internvl":
        return dummy_internvl.make_bench_checkpoint(folder, weights)
    if dummy == "llava_next":
        return dummy_llava_next.make_bench_checkpoint(folder, weights)
    return make_checkpoint(folder, BENCH, weights=weights)


@contextmanager
def started(
    options: Options, to_serve: ToServe, geometry: VisionGeometry, client: Client, console: Console
) -> Iterator[dict[Mode, Target]]:
    """Serve until the block ends; per mode the server that its requests go to."""

    def crop_arguments(localizer: Mapping[str, Any] | None) -> tuple[str, ...]:
        return options.crop_arguments(localizer, to_serve.crop)

    def serve_with(plugin: tuple[str, ...], log_path: Path) -> Server:
        args = (*plugin, *to_serve.args)
        return stack.enter_context(
            serve(to_serve.model, *args, log_path=log_path, env=to_serve.env, console=console)
        )

    with ExitStack() as stack:
        own = [kind for kind, mode in OWN_MODES.items() if mode in options.localizers]
        localizer = own_localizer(own[0], options) if own else None
        server = serve_with(crop_arguments(localizer), options.folder / "server.log")
        capacity = KVCapacity.of_server(server.base_url)
        layers = geometry.num_layers, tuple(geometry.looking_layers)
        grouping = client.call(_grouping, *layers, options.stages, capacity.block_size)
        capacity = capacity.of_grouping(grouping)
        targets = dict.fromkeys(options.modes, Target(server, capacity))
        for kind in own[1:]:  # a server finds regions in one way
            arguments = crop_arguments(own_localizer(kind, options))
            another = serve_with(arguments, options.folder / f"{kind}_server.log")
            targets[OWN_MODES[kind]] = Target(another, capacity)
        if "remote localizer" in options.localizers:
            arguments = crop_arguments(remote_localizer(options, server))
            asking = serve_with(arguments, options.folder / "asking_server.log")
            targets["remote localizer"] = Target(asking, capacity)
        if options.stock:
            server = serve_with((), options.folder / "stock_server.log")
            targets["stock"] = Target(
                server, KVCapacity.of_server(server.base_url).of_grouping(grouping.plain)
            )
        yield targets


def _grouping(
    num_layers: int, looking: tuple[int, ...], stages: tuple[int, ...], block_size: int
) -> KVGrouping:
    """How the server has grouped the layers; it would not start otherwise. Called where vLLM is loaded."""
    from vllm_crop.eviction.report import expected_grouping

    if not stages:
        return predict_grouping(num_layers, (), block_size, looking)
    return expected_grouping(num_layers, stages, block_size, looking)
