# SPDX-License-Identifier: Apache-2.0
"""The parts of `vllm-crop bench` that need no vLLM, and the server's process handling with a stand-in."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_crop.benchmarking import kv
from vllm_crop.benchmarking.decode import DecodeOutcome, StepTimes, ViewTimes, time_views
from vllm_crop.benchmarking.decode_report import decode_json, print_decode, summarize_steps
from vllm_crop.benchmarking.kv import KVCapacity, KVSampler, KVUsage
from vllm_crop.benchmarking.load import bench_arguments
from vllm_crop.benchmarking.options import Options
from vllm_crop.benchmarking.prefill import ModelShape, ideals, prefill_flops
from vllm_crop.benchmarking.report import ideal_table, print_report, table, write_report
from vllm_crop.benchmarking.runs import Mode, Run, RunError, RunSpec, schedule
from vllm_crop.benchmarking.session import Outcome
from vllm_crop.benchmarking.summary import Ratio, mean_prompt_tokens, summarize
from vllm_crop.benchmarking.targets import outcomes, own_localizer, remote_localizer
from vllm_crop.commands.app import app
from vllm_crop.config import CropConfig
from vllm_crop.errors import CropError
from vllm_crop.eviction.grouping import predict_grouping
from vllm_crop.eviction.stage_inputs import RunningEvictions, StageInputs
from vllm_crop.families.registry import VisionGeometry, geometry_from_configs
from vllm_crop.measuring.metrics import metric_sum
from vllm_crop.measuring.provenance import Machine, git_revision, provenance
from vllm_crop.measuring.server import Server, ServerError, get_text, log_tail, serve
from vllm_crop.planning.geometry import Box, Region

METRICS = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m{1}"} 0.25
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 32.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 1.5e+02
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.79e+09
vllm:cache_config_info{block_size="32",cache_dtype="auto",kv_sharing="False",num_gpu_blocks="101"} 1.0
process_open_fds 12.0
"""

# Stands in for Python running vLLM: `$0 -m vllm.entrypoints.cli.main serve MODEL --host H --port P`.
STAND_IN = """\
#!{python}
import http.server, os, signal, subprocess, sys, time
print("arguments:", *sys.argv[1:], os.environ.get("MARK"), flush=True)
if "--fail" in sys.argv:
    sys.exit("cannot serve [this]")
if "--hang" in sys.argv:
    time.sleep(60)
child = subprocess.Popen([{python!r}, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
print("child:", child.pid, flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"fine")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def make_run(mode: Mode, concurrency: int = 1, repeat: int = 0, **numbers: Any) -> Run:
    values: dict[str, Any] = dict(
        requests=16,
        duration_s=10.0,
        requests_per_s=1.0,
        output_tokens_per_s=8.0,
        ttft_p50_ms=900.0,
        ttft_p99_ms=1000.0,
        tpot_p50_ms=40.0,
        prompt_tokens=600.0,
        output_tokens=8.0,
        kv_peak_blocks=20,
        kv_peak_tokens=640.0,
        kv_samples=50,
        prefix_hit_tokens=0.0,
        image_hits=0.0,
        ttfts_ms=(900.0, 1000.0),
    )
    return Run(spec=RunSpec(mode, concurrency, repeat, seed=0), **{**values, **numbers})


def make_options(tmp_path: Path, **settings: Any) -> Options:
    values: dict[str, Any] = dict(
        model=None,
        region=Region((Box(0.25, 0.25, 0.5, 0.5),)),
        pruning_rate=0.75,
        methods=("plc", "ilp"),
        eviction_layers=(2,),
        concurrencies=(1, 4),
        num_prompts=16,
        repeats=3,
        output_len=8,
        seed=0,
        stock=True,
        serve_args=(),
        folder=tmp_path,
    )
    return Options(**{**values, **settings})


def llava_of(layers: int) -> VisionGeometry:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"image_size": 336, "patch_size": 14},
        "text_config": {"num_hidden_layers": layers},
    }
    return geometry_from_configs(
        config, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    )


def make_outcome(*runs: Run) -> Outcome:
    machine, shape = Machine("a CPU", True, 2, 0.5), ModelShape(4, 4, 8)
    crop, stock = KVCapacity(200, 32, 16.0), KVCapacity(100, 32, 32.0)
    capacities: dict[Mode, KVCapacity] = {"stock": stock, "off": crop, "plc": crop, "ilp": crop}
    tokens: dict[Mode, list[int]] = {"stock": [576] * 4, "off": [576] * 4, "plc": [144] * 4}
    paper = ideals(shape, {**tokens, "ilp": [576, 576, 10, 10]}, text_tokens=24)
    return Outcome(machine, shape, capacities, paper, (("vllm", "serve"),), runs)


class TestSchedule:
    def test_pairs_are_neighbours_and_their_order_alternates_within_each_concurrency(self) -> None:
        for concurrencies in ((1,), (1, 4), (1, 4, 8)):
            specs = schedule(("off", "plc"), concurrencies, repeats=4, seed=10)
            for first, second in zip(specs[::2], specs[1::2], strict=True):
                assert (first.concurrency, first.repeat) == (second.concurrency, second.repeat)
            for concurrency in concurrencies:
                firsts = [spec.mode for spec in specs[::2] if spec.concurrency == concurrency]
                assert firsts in (["off", "plc"] * 2, ["plc", "off"] * 2)

    def test_no_seed_is_used_twice(self) -> None:
        specs = schedule(("off", "plc"), (1, 4, 8), repeats=3, seed=5)
        assert [spec.seed for spec in specs] == list(range(5, 5 + 18))


class TestLoad:
    SERVER = Server("m", "http://127.0.0.1:1", 1, ("vllm",), Path("log"), 1.0)

    def test_arguments(self, tmp_path: Path) -> None:
        spec = RunSpec("plc", 4, 0, seed=7)
        body = make_options(tmp_path).extra_body("plc")
        arguments = bench_arguments(spec, self.SERVER, 16, 8, 1024, body)
        pairs = dict(zip(arguments[:-2:2], arguments[1:-2:2], strict=True))
        assert json.loads(pairs["--extra-body"]) == {
            "crop": {"method": "plc", "regions": [[[0.25, 0.25, 0.5, 0.5]]], "pruning_rate": 0.75}
        }
        assert (pairs["--seed"], pairs["--max-concurrency"], pairs["--num-prompts"]) == ("7", "4", "16")
        # Both would put the first request into the caches before it is measured.
        assert (pairs["--ready-check-timeout-sec"], pairs["--num-warmups"]) == ("0", "0")

    def test_bodies_of_the_other_modes(self, tmp_path: Path) -> None:
        options = make_options(tmp_path)
        assert options.extra_body("off") == {"crop": {"method": "off"}}
        assert options.extra_body("stock") == {}
        assert options.extra_body("ilp")["crop"]["method"] == "ilp"


class TestOptions:
    def test_modes_and_what_the_server_prepares_for(self, tmp_path: Path) -> None:
        options = make_options(tmp_path)
        assert options.modes == ("stock", "off", "plc", "ilp")
        pool = {"compression": "pool"}
        assert json.loads(options.crop_arguments(None)[-1]) == {"eviction_layers": [2], **pool}
        alone = make_options(tmp_path, methods=("plc",), stock=False)
        assert alone.modes == ("off", "plc")
        assert json.loads(alone.crop_arguments(None)[-1]) == {"eviction_layers": [], **pool}
        foveated = replace(options, compression="foveate")
        assert json.loads(foveated.crop_arguments(None)[-1])["compression"] == "foveate"

    def test_plans_meet_one_budget_by_different_layers(self, tmp_path: Path) -> None:
        options, geometry = make_options(tmp_path, methods=("plc", "ilp", "plc+ilp")), llava_of(12)
        per_layer = {mode: options.plan(mode, geometry).tokens_per_layer(12) for mode in options.modes}
        assert per_layer["stock"] == per_layer["off"] == [576] * 12
        assert per_layer["plc"] == [144] * 12
        assert per_layer["ilp"][:3] == [576, 576, 58]
        assert 144 < per_layer["plc+ilp"][0] < 576
        for mode in options.methods:
            assert sum(per_layer[mode]) / 12 == pytest.approx(144, abs=0.5)

    def test_layers_that_cannot_meet_the_budget(self, tmp_path: Path) -> None:
        options = make_options(tmp_path, eviction_layers=(11,))
        with pytest.raises(CropError, match=r"0\.75"):
            options.plan("ilp", llava_of(12))
        with pytest.raises(CropError, match="6 decoder layers"):
            options.plan("ilp", llava_of(6))


class TestLocalizers:
    BOTH: ClassVar = {"localizers": ("engine localizer", "remote localizer")}
    SERVER = Server("m", "http://127.0.0.1:1", 1, ("vllm",), Path("log"), 1.0)
    METRICS = (
        'crop:localizations_total{localizer="engine",model_name="m",outcome="region"} 3.0\n'
        'crop:localizations_created{localizer="engine",model_name="m",outcome="region"} 1.7e+09\n'
        'crop:localizations_total{localizer="engine",model_name="m",outcome="whole"} 1.0\n'
        'crop:localizations_total{localizer="openai",model_name="m",outcome="region"} 2.0\n'
    )

    def test_requests_carry_no_region(self, tmp_path: Path) -> None:
        options = make_options(tmp_path, methods=("ilp",), **self.BOTH)
        assert options.modes == ("stock", "off", "ilp", "engine localizer", "remote localizer")
        for mode in options.localizers:
            assert options.extra_body(mode) == {"crop": {"method": "ilp", "pruning_rate": 0.75}}

    def test_servers_are_told_what_they_accept(self, tmp_path: Path) -> None:
        for options in (make_options(tmp_path, **self.BOTH), make_options(tmp_path, model="M", **self.BOTH)):
            for settings in (own_localizer("engine", options), remote_localizer(options, self.SERVER)):
                told = json.loads(options.crop_arguments(settings)[-1])
                assert told["eviction_layers"] == [2]
                assert CropConfig.from_mapping(told).localizer.localizes

    def test_the_remote_one_is_held_to_legal_answers(self, tmp_path: Path) -> None:
        dummy = remote_localizer(make_options(tmp_path, **self.BOTH), self.SERVER)
        assert dummy["base_url"] == "http://127.0.0.1:1/v1"
        assert re.fullmatch(dummy["extra_body"]["structured_outputs"]["regex"], "2335")
        assert dummy["extra_body"]["crop"]["regions"] == [[[0.0, 0.0, 1.0, 1.0]]]
        assert dummy["prompt"] == "where: {question}"
        pixels = make_options(tmp_path, model="M", localizer_config={"dialect": "pixels"}, **self.BOTH)
        settings = remote_localizer(pixels, self.SERVER)
        assert re.fullmatch(settings["extra_body"]["structured_outputs"]["regex"], "[]")
        assert settings["extra_body"]["crop"] == {"method": "off"}
        assert "prompt" not in settings

    def test_a_server_of_the_users_is_told_nothing_of_vllm(self, tmp_path: Path) -> None:
        theirs = {"base_url": "http://other/v1", "model": "big"}
        options = make_options(tmp_path, localizer_config=theirs, **self.BOTH)
        assert remote_localizer(options, self.SERVER) == {"kind": "openai", **theirs}

    @pytest.mark.parametrize(
        "given",
        [
            {"base_url": "http://other/v1", "model": "big"},
            {"dialect": "pixels"},
            {"layers": [3], "window": 0.3},
            {"priority": -1, "max_retries": 0},
        ],
        ids=str,
    )
    def test_each_localizer_gets_what_means_something_to_it(
        self, tmp_path: Path, given: dict[str, Any]
    ) -> None:
        options = make_options(tmp_path, localizer_config=given, **self.BOTH)
        told = [own_localizer("attention", options), own_localizer("engine", options)]
        told.append(remote_localizer(options, self.SERVER))
        for one in told:
            CropConfig.from_mapping({"localizer": one})
        assert all(any(one.get(name) == value for one in told) for name, value in given.items())

    def test_outcomes_are_summed_and_reported(self, tmp_path: Path) -> None:
        assert outcomes(self.METRICS) == {"region": 5, "whole": 1}
        options = make_options(tmp_path, **self.BOTH)
        runs = [make_run("stock"), make_run("off"), make_run("plc"), make_run("ilp")]
        runs += [make_run("engine localizer", outcomes={"region": 15, "whole": 1})]
        runs += [make_run("remote localizer", ttft_p50_ms=450.0, outcomes={"failed": 16})]
        outcome = make_outcome(*runs)
        kv = {mode: outcome.capacities["plc"] for mode in options.localizers}
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
        print_report(
            console, options, replace(outcome, capacities={**outcome.capacities, **kv}), provenance()
        )
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 80
        text = " ".join(" ".join(lines).split())
        assert "remote localizer / stock" in text
        assert "images: 15 region, 1 whole; all but regions" in text
        assert "images: 16 failed" in text


class TestRun:
    RESULT: ClassVar = {
        "completed": 4,
        "failed": 0,
        "duration": 2.0,
        "request_throughput": 2.0,
        "output_throughput": 16.0,
        "median_ttft_ms": 250.0,
        "p99_ttft_ms": 300.0,
        "median_tpot_ms": 40.0,
        "total_input_tokens": 2504,
        "total_output_tokens": 32,
        "ttfts": [0.25, 0.3, 0.2, 0.24],
        "errors": ["", "", "", ""],
    }

    def test_reads_what_vllm_saves(self) -> None:
        run = Run.from_result(RunSpec("off", 1, 0, 0), self.RESULT, KVUsage(20, 640.0, 9), 32.0, 1.0)
        assert (run.requests, run.prompt_tokens, run.output_tokens) == (4, 626.0, 8.0)
        assert (run.requests_per_s, run.ttft_p50_ms, run.ttft_p99_ms) == (2.0, 250.0, 300.0)
        assert (run.kv_peak_blocks, run.kv_peak_tokens, run.kv_samples) == (20, 640.0, 9)
        assert (run.prefix_hit_tokens, run.image_hits) == (32.0, 1.0)
        assert run.ttfts_ms == (250.0, 300.0, 200.0, 240.0)

    def test_outcomes_become_plain_values(self) -> None:
        usage = KVUsage(20, 640.0, 9)
        run = Run.from_result(
            RunSpec("engine localizer", 1, 0, 0), self.RESULT, usage, 0.0, 0.0, Counter({"region": 4})
        )
        assert asdict(run)["outcomes"] == {"region": 4}

    def test_failed_requests_are_an_error_with_the_first_reason(self) -> None:
        result = {**self.RESULT, "failed": 1, "errors": ["", "Bad Request: crop.regions"]}
        with pytest.raises(RunError, match=r"concurrency 4, plc, repeat 1: 1 requests failed.*crop\.regions"):
            Run.from_result(RunSpec("plc", 4, 0, 0), result, KVUsage(0, 0.0, 0))


class TestKV:
    def test_metric_sum_takes_exact_names_and_all_labels(self) -> None:
        assert metric_sum(METRICS, "vllm:kv_cache_usage_perc") == 0.25
        assert metric_sum(METRICS, "vllm:prefix_cache_hits_total") == 182.0
        assert metric_sum(METRICS, "process_open_fds") == 12.0
        assert metric_sum(METRICS, "vllm:absent") == 0.0

    def test_capacity_leaves_out_the_null_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv, "get_text", lambda url: METRICS)
        assert KVCapacity.of_server("http://x") == KVCapacity(100, 32, 32)
        monkeypatch.setattr(kv, "get_text", lambda url: "")
        with pytest.raises(ServerError, match="cache_config_info"):
            KVCapacity.of_server("http://x")

    def test_blocks_of_some_layers_hold_fewer_tokens(self) -> None:
        grouping = predict_grouping(12, (2,), 32)  # six groups of two layers
        assert KVCapacity(100, 32, 32).of_grouping(grouping) == KVCapacity(100, 32, 32 / 6)

    def test_sampler_keeps_the_peak_and_survives_a_missed_answer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        enough = threading.Event()
        answers = iter(["0.1", None, "0.5", "0.2"])

        def fake_get(url: str) -> str:
            answer = next(answers, "stop")
            if answer is None:
                raise ConnectionResetError
            if answer == "stop":
                enough.set()
                answer = "0.0"
            return f"vllm:kv_cache_usage_perc{{}} {answer}\n"

        monkeypatch.setattr(kv, "get_text", fake_get)
        monkeypatch.setattr(kv, "SAMPLE_INTERVAL_S", 0.001)
        with KVSampler("http://x", KVCapacity(40, 32, 8.0)) as sampler:
            assert enough.wait(10)
        assert (sampler.usage().peak_blocks, sampler.usage().peak_tokens) == (20, 160.0)
        assert sampler.usage().samples >= 4


class TestPrefill:
    def test_formula(self) -> None:
        # 2 layers, n=3, d=4, m=8: 4*3*16 + 2*9*4 + 3*3*4*8 = 192 + 72 + 288.
        assert prefill_flops(ModelShape(2, 4, 8), [3, 3]) == 2 * 552

    def test_attention_makes_it_grow_faster_than_the_prompt(self) -> None:
        shape = ModelShape(32, 4096, 11008)
        assert 5.0 < prefill_flops(shape, [640] * 32) / prefill_flops(shape, [128] * 32) < 5.3

    def test_layers_count_one_by_one(self) -> None:
        shape = ModelShape(2, 4, 8)
        each = prefill_flops(shape, [7]) + prefill_flops(shape, [3])
        assert prefill_flops(shape, [7, 3]) == each != prefill_flops(shape, [5, 5])

    def test_ideals_are_shares_of_the_unpruned_prompt(self) -> None:
        found = ideals(ModelShape(2, 4, 8), {"off": [90, 90], "ilp": [90, 0]}, text_tokens=10)
        assert (found["off"].prefill_flops, found["off"].kv_tokens) == (1.0, 1.0)
        assert found["ilp"].kv_tokens == pytest.approx(0.55)
        shape = ModelShape(2, 4, 8)
        share = prefill_flops(shape, [100, 10]) / prefill_flops(shape, [100, 100])
        assert found["ilp"].prefill_flops == pytest.approx(share)


class TestSummary:
    def test_medians_and_paired_ratios(self) -> None:
        runs = [make_run("off", 1, repeat, requests_per_s=1.0 + repeat) for repeat in range(3)]
        runs += [make_run("plc", 1, repeat, requests_per_s=4.0 + 2 * repeat) for repeat in range(3)]
        (summary,) = summarize(runs)
        assert list(summary.medians) == ["off", "plc"]
        assert summary.medians["off"]["requests_per_s"] == 2.0
        # Pair by pair: 4/1, 6/2, 8/3.
        assert summary.reference == "off"
        assert summary.ratios["plc"]["requests_per_s"] == Ratio(3.0, 8 / 3, 4.0)

    def test_nothing_to_divide_by(self) -> None:
        (summary,) = summarize([make_run("off", kv_peak_tokens=0.0), make_run("plc")])
        assert summary.ratios["plc"]["kv_peak_tokens"] is None
        assert summary.ratios["plc"]["requests_per_s"] == Ratio(1.0, 1.0, 1.0)

    def test_stock_is_the_reference_of_all_where_it_was_measured(self) -> None:
        modes: tuple[Mode, ...] = ("plc+ilp", "off", "plc", "stock", "ilp")
        (summary,) = summarize([make_run(mode) for mode in modes])
        assert summary.reference == "stock"
        assert list(summary.medians) == ["stock", "off", "plc", "ilp", "plc+ilp"]
        assert list(summary.ratios) == ["off", "plc", "ilp", "plc+ilp"]

    def test_mean_prompt_tokens_weighs_by_requests(self) -> None:
        runs = [
            make_run("off", prompt_tokens=600.0, requests=1),
            make_run("off", prompt_tokens=630.0, requests=2),
        ]
        assert mean_prompt_tokens(runs) == {"off": 620.0}


class TestReport:
    RUNS = (
        make_run("stock", 8, 0),
        make_run("off", 8, 0),
        make_run("plc", 8, 0, requests_per_s=2.345, prompt_tokens=168.0),
        make_run("ilp", 8, 0, requests_per_s=2.5, ttft_p50_ms=300.0),
        make_run("stock", 8, 1),
        make_run("off", 8, 1, requests_per_s=0.9),
        make_run("plc", 8, 1, requests_per_s=3.0, prompt_tokens=168.0),
        make_run("ilp", 8, 1, requests_per_s=2.5, ttft_p50_ms=270.0),
    )

    def test_tables_fit_a_terminal_of_80_columns(self, tmp_path: Path) -> None:
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
        (summary,) = summarize(self.RUNS)
        both = make_run("plc+ilp", 8, 0), make_run("plc+ilp", 8, 1, ttft_p50_ms=1.0)
        console.print(table(summarize([*self.RUNS, *both]), prepared=True))
        console.print(ideal_table(summary, make_outcome().ideals, prepared=True))
        text = console.export_text()
        for part in ("plc / stock", "plc+ilp / stock", "off, prepared", "2.67x", "2.35-3.00"):
            assert part in text
        assert "…" not in text

    def test_paper_stands_beside_what_was_measured(self, tmp_path: Path) -> None:
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
        (summary,) = summarize(self.RUNS)
        console.print(ideal_table(summary, make_outcome().ideals, prepared=True))
        (line,) = [line for line in console.export_text().splitlines() if line.startswith("ilp")]
        # TTFT 300 and 270 of 900 ms; 600, 600, 34 and 34 of 600 tokens by layer.
        for part in ("2 x 576, 2 x 10", "0.32x", "0.53x"):
            assert part in line

    def test_unprepared_servers_are_not_called_prepared(self, tmp_path: Path) -> None:
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
        console.print(table(summarize(self.RUNS), prepared=False))
        assert "prepared" not in console.export_text()

    def test_printed_report_names_the_setting(self, tmp_path: Path) -> None:
        console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
        print_report(console, make_options(tmp_path), make_outcome(*self.RUNS), provenance())
        text = " ".join(console.export_text().split())
        for part in ("4 layers of 4", "a CPU, 2 CPU cores", "600 off, 168 plc", "eviction layers [2]"):
            assert part in text
        assert "100 blocks of 32 such tokens and 200 blocks of 16 such tokens" in text
        assert "Caches answered" not in text

    def test_cache_hits_are_told(self, tmp_path: Path) -> None:
        console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
        outcome = make_outcome(*self.RUNS, make_run("plc", 1, 2, prefix_hit_tokens=32.0))
        print_report(console, make_options(tmp_path), outcome, provenance())
        assert "Caches answered" in console.export_text()

    def test_json_holds_every_run_and_where_it_comes_from(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "result.json"
        outcome = make_outcome(*self.RUNS)
        write_report(path, make_options(tmp_path), outcome, provenance())
        report = json.loads(path.read_text())
        assert len(report["runs"]) == 8
        assert report["runs"][2]["spec"] == {"mode": "plc", "concurrency": 8, "repeat": 0, "seed": 0}
        assert report["runs"][0]["ttfts_ms"] == [900.0, 1000.0]
        assert report["summary"][0]["reference"] == "stock"
        assert report["summary"][0]["ratios"]["plc"]["requests_per_s"]["high"] == 3.0
        assert report["ideals"]["ilp"]["kv_tokens"] == outcome.ideals["ilp"].kv_tokens
        assert report["kv"]["off"]["tokens_per_block"] == 16.0
        assert report["provenance"]["versions"]["python"]
        assert report["machine"]["device"] == "a CPU"
        assert [name.name for name in path.parent.iterdir()] == ["result.json"]

    def test_revision_of_a_checkout_only(self, tmp_path: Path) -> None:
        assert git_revision(tmp_path / "package") is None
        package = tmp_path / "package"
        package.mkdir()
        assert git_revision(package) is None
        git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
        revision = git_revision(package)
        assert revision is not None
        assert len(revision) == 40
        (package / "file").touch()
        assert git_revision(package) == f"{revision}+changes"
        nested = package / "site-packages" / "vllm_crop"
        nested.mkdir(parents=True)
        assert git_revision(nested) is None

    def test_the_command_is_as_one_types_it(self, tmp_path: Path) -> None:
        """Where a program lies is nobody's business."""
        said = "import json\nfrom vllm_crop.measuring.provenance import provenance\n"
        said += "print(json.dumps(provenance()['command']))\n"
        (tmp_path / "prog").mkdir()
        for name in ("prog/__main__.py", "prog/part.py", "script"):
            (tmp_path / name).write_text(said)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        for given, shown in (
            (["-m", "prog"], ["python", "-m", "prog"]),
            (["-m", "prog.part"], ["python", "-m", "prog.part"]),
            ([str(tmp_path / "script")], ["script"]),
        ):
            run = subprocess.run(
                [sys.executable, *given, "-n", "1"], env=env, capture_output=True, text=True, check=True
            )
            assert json.loads(run.stdout) == [*shown, "-n", "1"]


class TestDecode:
    STEPS = tuple(
        StepTimes(case, running, repeat, 60, milliseconds + repeat, 9.0)
        for repeat in (0, 1)
        for running in (1, 64)
        for case, milliseconds in (("stock", 4.0), ("prepared", 5.0), ("evicting", 6.0))
    )

    def test_each_repeat_is_compared_with_stock_of_its_own(self) -> None:
        summaries = summarize_steps(self.STEPS)
        assert [(one.running, one.case) for one in summaries[:4]] == [
            (1, "stock"),
            (1, "prepared"),
            (1, "evicting"),
            (64, "stock"),
        ]
        # 6/4 and 7/5.
        assert summaries[2].ratio == Ratio(pytest.approx(1.45), 1.4, 1.5)
        assert summaries[2].added_ms == 2.0

    def test_report_names_the_setting(self, tmp_path: Path) -> None:
        console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
        views = (ViewTimes(64, 15.2, 14.0, 20.0),)
        outcome = DecodeOutcome(Machine("a CPU", True, 2, 0.5), 4, (130, 130, 40), 100, self.STEPS, views)
        print_decode(console, outcome)
        text = " ".join(console.export_text().split())
        for part in ("2 x 130, 1 x 40", "4 KV cache groups", "100 text tokens", "64 running: 15 us (14-20)"):
            assert part in text
        assert "1.45x" in text
        report = decode_json(outcome, provenance())
        assert len(report["steps"]) == 12
        assert json.loads(json.dumps(report))["summary"][2]["added_ms"] == 2.0

    def test_views_are_timed_past_the_evicted_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, list[StageInputs]]] = []
        real = RunningEvictions.views

        def views(self: RunningEvictions, slots: Any, computed: Any, scheduled: Any) -> list[StageInputs]:
            found = real(self, slots, computed, scheduled)
            seen.append((int(computed[0]), found))
            return found

        monkeypatch.setattr(RunningEvictions, "views", views)
        (times,) = time_views([3], num_stages=2)
        assert times.running == 3
        assert 0 < times.p10_us <= times.median_us <= times.p90_us
        computed, (first, second) = seen[0]
        assert list(first.seq_lens) == [computed + 1 - 250] * 3
        assert list(second.seq_lens) == [computed + 1 - 500] * 3
        assert not first.evicts_rows


class TestCommand:
    def test_unknown_method(self) -> None:
        result = CliRunner().invoke(app, ["bench", "--method", "fast"])
        assert result.exit_code == 2
        assert "fast: not of" in result.output

    def test_wrong_localizers(self) -> None:
        for wrong, words in (
            (["--localizer", "far"], "far: not of"),
            (["--localizer-config", "[]"], "object"),
            (["--localizer-config", '{"layers": [3]}'], "means nothing"),
            (["--localizer", "engine", "--localizer-config", '{"window": 0.3}'], "(engine)"),
        ):
            result = CliRunner().invoke(app, ["bench", *wrong])
            assert result.exit_code == 2
            assert words in result.output

    def test_fewer_requests_than_in_flight(self) -> None:
        result = CliRunner().invoke(app, ["bench", "--num-prompts", "4"])
        assert result.exit_code == 2
        assert "4 requests cannot keep 8 in flight" in result.output

    def test_loads_no_vllm(self) -> None:
        code = "import sys, vllm_crop.commands.bench; sys.exit(bool({'torch', 'vllm'} & sys.modules.keys()))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the Python that would run vLLM; returns the log's path."""
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "logs" / "server.log"


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class TestServe:
    def test_serves_and_takes_the_whole_group_down(self, stand_in: Path) -> None:
        with serve("m", "--max-num-seqs", "2", log_path=stand_in, env={"MARK": "here"}) as running:
            assert get_text(f"{running.base_url}/health") == "fine"
            log = stand_in.read_text()
            child = int(log.rpartition("child: ")[2].split()[0])
            assert is_running(running.process_id)
            assert is_running(child)
            assert os.getpgid(running.process_id) != os.getpgid(0)
        assert not is_running(running.process_id)
        assert not is_running(child)
        assert "serve m --host 127.0.0.1 --port" in log
        assert "--max-num-seqs 2 here" in log

    def test_death_at_start_shows_the_log(self, stand_in: Path) -> None:
        expected = pytest.raises(ServerError, match=r"exit code 1(.|\n)*cannot serve \[this\]")
        with expected, serve("m", "--fail", log_path=stand_in):
            pytest.fail("not reached")

    def test_timeout_stops_it(self, stand_in: Path) -> None:
        expected = pytest.raises(ServerError, match=r"not ready after 3 s(.|\n)*arguments:")
        with expected, serve("m", "--hang", log_path=stand_in, ready_timeout_s=3.0):
            pytest.fail("not reached")

    def test_sigterm_stops_it_too(self, stand_in: Path) -> None:
        seen: list[int] = []

        def serve_until_told() -> None:
            with serve("m", log_path=stand_in) as running:
                seen.append(running.process_id)
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()

        with pytest.raises(SystemExit) as ended:
            serve_until_told()
        assert ended.value.code == 128 + signal.SIGTERM
        assert not is_running(seen[0])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_log_tail(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        assert log_tail(path) == "    (the log is empty)"
        path.write_text("\n".join(str(line) for line in range(100)))
        assert log_tail(path, 2) == "    98\n    99"

    def test_log_tail_shows_the_cause_first(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        prefix = "(Worker pid=1) ERROR 11-21 08:56:39 [worker.py:953] "
        log = [
            f"{prefix}Traceback (most recent call last):",
            f"{prefix}ValueError: too little memory",
            f"{prefix}ValueError: too little memory",
            "could cause `OSError: [Errno 24]`",
            *map(str, range(50)),
            "vllm.errors.EngineError: see above",
        ]
        path.write_text("\n".join(log))
        assert log_tail(path, 2).split("\n    ") == [
            "    ValueError: too little memory",
            "...",
            "49",
            "vllm.errors.EngineError: see above",
        ]
