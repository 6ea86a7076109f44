# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted one by one: does the default run notice each, and which test does first?

    python -m tests.mutations [WORD ...]    # those whose names have one of the words; all in about an hour

Works on a copy of the checkout. For each mistake quick tests run first, then the engine tests named with it,
all of them part of `make test`. One that none of these notices is printed as SURVIVED, with exit code 1 then.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tests without an engine, by the room of the mistake.
QUICK = {
    "planning": "budget plan geometry plan_arrays token_grids foveation",
    "families": "glm4v_geometry llava_next_geometry smart_resize token_grids vision_geometry",
    "request.py": "request",
    "planner.py": "planner request",
    "models": "compression ahead foveation",
    "eviction": "markers stage_inputs prompt_eviction grouping",
    "localizers": "localizers localization_service",
    "frontend": "localization_service facts_header metrics shadow",
    "compat": "refusals command_check",
    "heat": "heat",
    "calibrating": "calibrating calibrate_report",
    "runners": "stage_inputs",
}
PARITY = "tests/cpu/test_eviction_parity.py::test_all_scenarios_in_one_batch[staged-llava]"
QWEN3 = "tests/cpu/test_eviction_parity.py::test_all_scenarios_in_one_batch[staged-qwen3_vl]"
EVICTION_CACHES = "tests/cpu/test_eviction_caches.py"
KV = "tests/cpu/test_eviction_kv.py"
STATES = "tests/cpu/test_eviction_states.py"
SCHEDULING = "tests/cpu/test_eviction_scheduling.py"
NAMES = "tests/cpu/test_image_names.py"
CACHES = "tests/cpu/test_caches.py"
LOCALIZER = "tests/cpu/test_localizer_offline.py"
HEAT = "tests/cpu/test_heat.py -k llava-evicting"
FOVEATION = "tests/cpu/test_foveation.py -k not larger_part and not localizers_view"
FOVEATED = "tests/cpu/test_foveation.py::test_all_scenarios_in_one_batch"
V2 = "-p tests.v2_runner "


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        file: in vllm_crop/.
        old, new: the text that is replaced, which occurs once.
        tests: engine tests that follow the quick ones.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


MUTATIONS = (
    # planning
    Mutation(
        "a token too few", "planning/budget.py", "return round(target_average(", "return int(target_average("
    ),
    Mutation(
        "context before region",
        "planning/plan.py",
        "    within = zones.inside[tokens]",
        "    within = ~zones.inside[tokens]",
    ),
    Mutation(
        "region a row short",
        "planning/geometry.py",
        "touched[row0:row1, col0:col1] = True\n        return",
        "touched[row0 : row1 - 1, col0:col1] = True\n        return",
    ),
    Mutation(
        "middle: the last of equals (compiled)",
        "planning/compiled_plan.py",
        "distance == best and token < nearest",
        "distance == best and token > nearest",
    ),
    Mutation(
        "middle: the last of equals (numpy)",
        "planning/groups.py",
        "np.minimum.reduceat(np.where(nearest, tokens, len(places.row)), starts)",
        "np.maximum.reduceat(np.where(nearest, tokens, -1), starts)",
    ),
    Mutation(
        "plans are kept without the compression",
        "planning/plan.py",
        "(np.packbits(zone).tobytes() for zone in zones), *rest)",
        "(np.packbits(zone).tobytes() for zone in zones), rest[0], *rest[2:])",
    ),
    Mutation(
        "evicted from the layer after",
        "planning/plan.py",
        "        leaves_at[left] = layer\n",
        "        leaves_at[left] = layer + 1\n",
        (PARITY,),
    ),
    # what one request asks, and the planner
    Mutation(
        "cache key without the region",
        "request.py",
        "self.method, boxes, *numbers",
        "self.method, *numbers",
        (CACHES,),
    ),
    Mutation(
        "cache key without the compression",
        "request.py",
        "settings = self.compression, self",
        "settings = self",
    ),
    Mutation(
        "limits hold for the localizer too",
        "request.py",
        "    if limited:\n        _check",
        "    if True:\n        _check",
        (LOCALIZER,),
    ),
    Mutation(
        "positions beyond the model's are not counted",
        "models/processor.py",
        "LengthBound(self.positions - excess,",
        "LengthBound(self.positions,",
        ("tests/cpu/test_qwen3_vl.py -k positions_of_the_model",),
    ),
    Mutation(
        "a found region fails a request",
        "planner.py",
        'return request.by == "max_tokens" or (asked.found is None and',
        'return request.by == "max_tokens" or (',
        (LOCALIZER,),
    ),
    # families
    Mutation(
        "newlines are not counted",
        "families/llava_next.py",
        "Box(x[0], y[0], x[1], y[1]), first, newlines=True)",
        "Box(x[0], y[0], x[1], y[1]), first, newlines=False)",
        ("tests/cpu/test_llava_next.py",),
    ),
    Mutation(
        "a picture counts as one frame",
        "families/glm4v.py",
        'frames=settings.get("temporal_patch_size", _DEFAULT_FRAMES)',
        "frames=1",
        ("tests/cpu/test_published_sizes.py -k glm4v",),
    ),
    # models
    Mutation(
        "positions shifted by one after an image",
        "models/base.py",
        "shift += full_length - place.length",
        "shift += full_length - place.length + 1",
        ("tests/cpu/test_parity.py -k sampling and llava",),
    ),
    Mutation(
        "hash without the image",
        "models/image_keys.py",
        "key = repr((image_hash, request_key, settings, seen))",
        "key = repr((request_key, settings, seen))",
        (CACHES,),
    ),
    Mutation(
        "all images share their features",
        "models/image_keys.py",
        "hashlib.blake2b(image_hash.encode(), digest_size=16)",
        "hashlib.blake2b(b'', digest_size=16)",
        (CACHES,),
    ),
    Mutation(
        "features of the other images",
        "models/encoder.py",
        "for first, features in zip(batch, encode(batch), strict=True):",
        "for first, features in zip(batch, reversed(list(encode(batch))), strict=True):",
        ("tests/cpu/test_parity.py -k vision_tower and qwen3_vl and not moe",),
    ),
    Mutation(
        "a name is known to every salt",
        "models/known_images.py",
        "for scope in (salt, _SAME_FOR_ALL):",
        "for scope in (_SAME_FOR_ALL,):",
        (NAMES,),
    ),
    Mutation(
        "the client's name is the key",
        "models/known_images.py",
        "trusted = [uuid if image is None else None for",
        "trusted = [uuid for",
        (NAMES,),
    ),
    Mutation(
        "no deepstack in steps that evict",
        "models/qwen3_vl.py",
        "eviction.run(evicting, inputs_embeds, positions, added)",
        "eviction.run(evicting, inputs_embeds, positions, added if evicting is None else None)",
        (QWEN3,),
    ),
    # what the vision tower sees
    Mutation(
        "learned embeddings are stretched over a piece",
        "models/placed_pieces.py",
        "shape = [1, piece.scale.rows * merge, piece.scale.cols * merge]",
        "shape = [1, piece.rows * merge, piece.cols * merge]",
        ("tests/cpu/test_foveation.py -k one_batch and glm4v",),
    ),
    Mutation(
        "a middle is taken for the corner",
        "planning/foveation.py",
        "places = (2 * tokens + 1) * scale",
        "places = 2 * tokens * scale",
        (FOVEATED,),
    ),
    Mutation(
        "halos are used",
        "planning/foveation.py",
        "_middles(grid.rows, piece.scale.rows, inner[0], inner[1])",
        "_middles(grid.rows, piece.scale.rows, *piece.window[:2])",
        (FOVEATED,),
    ),
    Mutation(
        "a crop is where a picture begins",
        "models/placed_pieces.py",
        "row0, row1, col0, col1 = (side * merge for side in piece.window)",
        "row0, row1, col0, col1 = 0, piece.rows * merge, 0, piece.cols * merge",
        (FOVEATED,),
    ),
    Mutation(
        "windows in the order of the picture",
        "models/placed_pieces.py",
        "    if WINDOW_INDEX in metadata:",
        "    if False:",
        (FOVEATED,),
    ),
    Mutation(
        "a table of embeddings stretched over a crop",
        "models/placed_pieces.py",
        "own if piece.is_whole else _learned",
        "own if True else _learned",
        (FOVEATED,),
    ),
    Mutation(
        "InternVL's small tile comes first",
        "families/internvl.py",
        "windows.append(Box(0.0, 0.0, 1.0, 1.0))",
        "windows.insert(0, Box(0.0, 0.0, 1.0, 1.0))",
        ("tests/cpu/test_internvl.py",),
    ),
    Mutation(
        "breaks come one place too early",
        "models/mistral3.py",
        "return ended.flatten(0, 1)[:-1], None",
        "return ended.flatten(0, 1)[1:], None",
        ("tests/cpu/test_mistral3.py",),
    ),
    Mutation(
        "an image with breaks as embeddings has the key of one with breaks as text",
        "models/image_keys.py",
        "    if not plan.compresses:  # all tokens, and not as stock vLLM has them",
        "    if not plan.compresses:\n        return image_hash\n    if False:",
        ("tests/cpu/test_mistral3.py",),
    ),
    Mutation(
        "a video's frames lose their places",
        "models/base.py",
        "is_embed = place.is_embed if full_length == place.length else None",
        "is_embed = None",
        ("tests/cpu/test_glm4v.py",),
    ),
    Mutation(
        "layers without attention are asked to look",
        "localizers/settings.py",
        "in_the_middle = [layer for layer in looking if first <= layer < max(first + 1, last)]",
        "in_the_middle = list(range(first, max(first + 1, last)))",
        ("tests/cpu/test_qwen3_5.py",),
    ),
    Mutation(
        "crops of a picture share a key",
        "models/encoder.py",
        "else (*words, *part.piece.window)",
        "else (*words, part.num_tokens)",
        (FOVEATION,),
    ),
    Mutation(
        "a picture has one key at every scale",
        "models/image_keys.py",
        'f"{image_hash} at {piece.scale.rows} x {piece.scale.cols}"',
        "image_hash",
        (FOVEATION,),
    ),
    Mutation(
        "the tile beside",
        "models/tiled.py",
        "1 + row * in_row + col for",
        "1 + col * in_row + row for",
        (FOVEATED,),
    ),
    Mutation(
        "filters see no further than the cut",
        "models/piece_pixels.py",
        "reach = _SUPPORT * max(1.0, scale / token_side) + 1",
        "reach = 0",
    ),
    # eviction
    Mutation(
        "marker of another stage",
        "eviction/markers.py",
        "np.asarray(marker_ids)[stages[leaving] - 1]",
        "np.asarray(marker_ids)[len(marker_ids) - stages[leaving]]",
        (PARITY,),
    ),
    Mutation(
        "the last token can be marked",
        "eviction/markers.py",
        "leaving = (stages > 0) & (indices != last)",
        "leaving = stages > 0",
    ),
    Mutation(
        "the last token can be evicted",
        "eviction/prompt_eviction.py",
        "last = len(prompt_token_ids) - 1  #",
        "last = len(prompt_token_ids)  #",
    ),
    Mutation(
        "blocks for all tokens",
        "eviction/kv_cache.py",
        "return num_tokens if eviction is None else eviction.num_kept(self.stage, num_tokens)",
        "return num_tokens",
        (KV,),
    ),
    Mutation(
        "states of later stages in one group with the first's",
        "eviction/layers.py",
        "    if not stage:\n        return\n    # The class",
        "    if True:\n        return\n    # The class",
        (STATES,),
    ),
    Mutation(
        "blocks of later stages keep what a state has left there",
        "runners/v1.py",
        "layers[name].kv_cache[block_ids] = 0",
        "pass",
        ("tests/cpu/test_qwen3_5.py",),
    ),
    Mutation(
        "an evicted token enters its request's state in a captured graph",
        "eviction/kept_states.py",
        "        if len(evicted):",
        "        if False:",
        (f"{V2}{STATES}",),
    ),
    Mutation(
        "a state goes on with what its block held, in a captured graph",
        "eviction/kept_states.py",
        "        if len(beginning):",
        "        if False:",
        (f"{V2}{STATES}",),
    ),
    Mutation(
        "tails under the key of full blocks",
        "eviction/prefix_cache.py",
        "return BlockHash(self.block_hashes[index - 1] + _TAIL)",
        "return self.block_hashes[index - 1]",
        ("tests/cpu/test_prefix_cache_keys.py", EVICTION_CACHES),
    ),
    Mutation(
        "a hit of one token too many",
        "eviction/prefix_cache.py",
        "limit = min(max_length, hashes.token_index((len(full) + 1) * hashes.block_size - 1))",
        "limit = min(max_length, hashes.token_index((len(full) + 1) * hashes.block_size - 1) + alignment)",
        ("tests/cpu/test_prefix_cache_keys.py", EVICTION_CACHES),
    ),
    Mutation(
        "KV of a row one further",
        "eviction/stage_inputs.py",
        "        kv_indices = step.token_indices - token_evicted_before\n",
        "        kv_indices = step.token_indices - np.roll(token_evicted_before, 1)\n",
        (PARITY,),
    ),
    Mutation(
        "length of a sequence with its evicted tokens",
        "eviction/stage_inputs.py",
        "seq_lens = (step.computed + step.scheduled - evicted_after)",
        "seq_lens = (step.computed + step.scheduled)",
        (PARITY,),
    ),
    Mutation(
        "an evicted row in a graph writes KV",
        "runners/v2.py",
        "        if (view.kv_indices < 0).any():\n",
        "        if False:\n",
        (V2 + "tests/cpu/test_eviction_graphs.py",),
    ),
    Mutation(
        "stages one layer late",
        "eviction/decoder.py",
        "        bounds = [0, *settings.stages, len(layers)]",
        "        bounds = [0, *(stage + 1 for stage in settings.stages), len(layers)]",
        (PARITY,),
    ),
    Mutation(
        "positions of rows that are gone",
        "eviction/decoder.py",
        "                    positions = _gather_positions(positions, rows.gather)\n",
        "                    positions = _gather_positions(positions, rows.gather * 0)\n",
        (PARITY,),
    ),
    Mutation(
        "an old request's eviction",
        "eviction/scheduler.py",
        "        self.evictions.pop(request.request_id, None)\n",
        "",
        (SCHEDULING + " -k id_used_again",),
    ),
    # localizers and front end
    Mutation(
        "answers are kept without the question",
        "frontend/localization.py",
        'return picture.key(), digest, self.localizer.version, sought.salt or ""',
        'return picture.key(), "", self.localizer.version, sought.salt or ""',
    ),
    Mutation(
        "answers are kept without the salt",
        "frontend/localization.py",
        'self.localizer.version, sought.salt or ""',
        'self.localizer.version, ""',
    ),
    Mutation(
        "a map of the layers' mean",
        "heat/taps.py",
        "heat = shares.amax(0) if",
        "heat = shares.mean(0) if",
    ),
    Mutation(
        "weights are those of the layers backwards",
        "heat/taps.py",
        "shares.new_tensor(weights) @",
        "shares.new_tensor(weights[::-1]) @",
    ),
    Mutation(
        "a request's map is made of other layers too",
        "heat/step.py",
        "return self.layers is None or layer in self.layers",
        "return True",
    ),
    Mutation(
        "a calibration wins over what the operator sets",
        "localizers/calibration.py",
        "{**learned, **localizer}",
        "{**localizer, **learned}",
        ("tests/unit/test_calibration_file.py",),
    ),
    Mutation(
        "a calibration of another model is taken",
        "compat/patches/model_config.py",
        "if calibration is not None:",
        "if calibration is None:",
        ("tests/cpu/test_start.py -k calibration",),
    ),
    Mutation(
        "layers that never change are taken for those that look",
        "calibrating/rule.py",
        "1 - cosines, 0.0)",
        "cosines, 0.0)",
    ),
    Mutation(
        "a map normalised over newlines too",
        "heat/taps.py",
        "sums[:, shows].sum(-1, keepdim=True)",
        "sums.sum(-1, keepdim=True)",
    ),
    Mutation(
        "a map is that of the row before",
        "heat/taps.py",
        "attention_sums(query[stop - 1], keys, scale)",
        "attention_sums(query[stop - 2], keys, scale)",
        (HEAT,),
    ),
    Mutation(
        "keys of an earlier chunk are forgotten",
        "heat/taps.py",
        "keys = torch.cat([*kept.pop(number, ()), key[start:stop]])",
        "keys = torch.cat([*kept.pop(number, ())[1:], key[start:stop]])",
        (HEAT,),
    ),
    Mutation(
        "rows that others left do not move a map's",
        "heat/step.py",
        "later = [starts if left is None else np.searchsorted(left, starts).tolist() for left in token_rows]",
        "later = [starts for left in token_rows]",
    ),
    Mutation(
        "a map goes into another request's logits",
        "heat/taps.py",
        "row = logits[rows.batch_row]",
        "row = logits[rows.batch_row - 1]",
        (HEAT,),
    ),
    Mutation(
        "the rim gets what is far away",
        "planning/plan.py",
        "parts = even_groups(places, next_to, of_rim), even_groups(places, far, count - of_rim)",
        "of_rim = min(len(next_to), count - of_rim)\n"
        "    parts = even_groups(places, next_to, of_rim), even_groups(places, far, count - of_rim)",
    ),
    Mutation(
        "a cache key without the rim",
        "request.py",
        "repr(self.pruning_rate), repr(self.rim), warm",
        "repr(self.pruning_rate), warm",
    ),
    Mutation(
        "late pruning begins early",
        "planner.py",
        "layer = self.config.stages[-1] if",
        "layer = self.config.stages[0] if",
    ),
    Mutation(
        "what was processed ahead is of any images",
        "models/ahead.py",
        "all(a is b for a, b in zip(images, ours, strict=True))",
        "True",
    ),
    Mutation(
        "a step with others ends at the last layer that is read",
        "heat/step.py",
        "all_leave = len(rows) == len(requests) and all(",
        "all_leave = all(",
    ),
    Mutation(
        "deepstack rows of a step that was left half way stay",
        "models/qwen3_vl.py",
        "upstream: Any = super()\n        upstream._clear_deepstack_input_embeds(num_tokens)\n\n\n",
        "pass\n\n\n",
        ("tests/cpu/test_heat.py -k alone_ends and qwen3_vl and not moe",),
    ),
    Mutation(
        "views share their blocks with clients",
        "frontend/attention_localizer.py",
        'return self._apart + (salt or "")',
        'return salt or ""',
        (LOCALIZER + " -k what_a_view_is_asked",),
    ),
    Mutation(
        "a map of an ordinary request takes others' log-probabilities",
        "runners/v1.py",
        "        if heat is None:\n            return super()._sample",
        "        if True:\n            return super()._sample",
        (HEAT,),
    ),
    Mutation(
        "box with x and y exchanged",
        "localizers/dialects.py",
        "    return Box(x0, y0, x1, y1)\n\n\n_CELLS",
        "    return Box(y0, x0, y1, x1)\n\n\n_CELLS",
    ),
    Mutation(
        "a place in the view is taken for one in the image",
        "frontend/engine_localizer.py",
        "in_image = glance.shows.unproject(region)",
        "in_image = region",
        (LOCALIZER,),
    ),
    Mutation(
        "an unsure answer is used",
        "localizers/decision.py",
        "if confidence < config.least_confidence:",
        "if confidence < 0:",
    ),
    Mutation(
        "facts say what was asked for",
        "frontend/renderer.py",
        "tokens_after_plc=num_placeholders,",
        "tokens_after_plc=plan.grid.num_tokens if plan else num_placeholders,",
        ("tests/cpu/test_caches.py", "tests/e2e/test_serve.py"),
    ),
    Mutation(
        "a refused request leaves its image in the cache",
        "compat/patches/input_processor.py",
        "                    cache.invalidate(mm_hash)\n",
        "                    pass\n",
        (NAMES, "tests/cpu/test_eviction_scheduling.py", "tests/cpu/test_soak.py"),
    ),
    Mutation(
        "a check's blocks are for all tenants",
        "frontend/shadow.py",
        "limited=False, salt=shadow.asked.salt)",
        "limited=False)",
    ),
    Mutation(
        "a check says an image's name again",
        "frontend/shadow.py",
        'if name != "multi_modal_uuids"',
        'if name != "uuids"',
    ),
    Mutation(
        "a client that went away is checked",
        "frontend/shadow.py",
        "if not answered:",
        "if False:",
    ),
    Mutation(
        "what is checked is never let go",
        "frontend/shadow.py",
        "        self._tasks.discard(task)\n        self._held -= 1\n",
        "        self._tasks.discard(task)\n",
    ),
)


def main() -> None:
    """Plant the mistakes, print who notices."""
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    for mutation in chosen:  # before an hour is spent on the others
        places = (ROOT / "vllm_crop" / mutation.file).read_text().count(mutation.old)
        assert places == 1, f"{mutation.name}: {places} places to plant it"
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, mutation in enumerate(chosen, start=1):
            start = time.monotonic()
            noticed = try_out(copy, mutation)
            survived += noticed is None
            seconds = time.monotonic() - start
            said = f"{mutation.name}: {noticed or 'SURVIVED'} ({seconds:.0f} s)"
            print(f"{number:2}/{len(chosen)} {said}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} noticed")
    raise SystemExit(survived > 0)


def try_out(copy: Path, mutation: Mutation) -> str | None:
    """The first test that fails with this mistake, None if all pass."""
    path = copy / "vllm_crop" / mutation.file
    right = path.read_text()
    path.write_text(right.replace(mutation.old, mutation.new))
    try:
        quick = " ".join(f"tests/unit/test_{name}.py" for name in QUICK[mutation.file.split("/")[0]].split())
        for arguments in (quick, *mutation.tests):
            if (failed := first_failure(copy, arguments)) is not None:
                return failed
    finally:
        path.write_text(right)
    return None


def first_failure(copy: Path, arguments: str) -> str | None:
    """Run tests in the copy until one fails."""
    tests, _, words = arguments.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    command += [*tests.split(), *(["-k", words] if words else [])]
    env = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'server'}", "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", finished.stdout, re.MULTILINE)
    # Anything else, such as a file that cannot be imported, says nothing about the mistake.
    assert found is not None, finished.stdout[-2000:]
    return found[1]


if __name__ == "__main__":
    main()
