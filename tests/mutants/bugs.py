"""The bugs of the table: small ones, with an effect, that nothing noticed once; each with the tests that must notice it.

A bug is a file, a piece of its text, what stands there instead, and the tests that are to fail. The piece is a regular expression
only if ``regex`` is set. One whose piece is not found any more is reported as gone: the code moved, and the entry should follow.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes
    ----------
    what : str
        In words.
    file : str
        Relative to the repository.
    old, new : str
        Text that must occur exactly once, and its replacement.
    tests : tuple of str
        Node ids below ``tests/``, without parameters.
    regex : bool
        Whether ``old`` is a regular expression (``new`` may refer to its groups).
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    regex: bool = False


SPEED, RUN, WORKER, STATS = "eval/speed.py", "eval/run.py", "eval/worker.py", "eval/stats.py"
RESULTS, SCORES = "eval/results.py", "eval/scores.py"
TOWER, ENCODER, TEXT, LISTEN = "vtc/engine/tower.py", "vtc/engine/encoder.py", "vtc/engine/text.py", "vtc/engine/listen.py"
CHOOSE, CACHE, UNDO, UPSTREAM = "vtc/engine/choose.py", "vtc/engine/cache.py", "vtc/engine/undo.py", "vtc/engine/upstream.py"
CORE, SIGNALS = "vtc/core.py", "vtc/signals.py"

TALK = ("test_turns.py::test_a_conversation_equals_all_of_it_at_once",)
COLUMNS = ("test_turns.py::test_signals_behind_a_prefix_count_the_tokens_of_the_cache",)
WARM_UP = ("test_timing.py::test_warm_up_is_no_part_of_the_result",)
PARTS = ("test_timing.py::test_every_part_of_a_run_has_its_two_moments",)
PAIRS = ("test_timing.py::test_a_speed_up_is_the_median_of_pairs_that_take_turns",)
BYTES = ("test_timing.py::test_a_cache_is_as_large_as_the_memory_it_holds_on_to",)
COUNTS = ("test_eval_runner.py::test_every_cell_is_done_skipped_or_failed_and_counted_once",)
HOST = ("test_eval_runner.py::test_timings_of_another_machine_are_measured_again",)
SHARED = ("test_eval_runner.py::test_features_are_shared_by_the_pictures_themselves",)
RIGHT = ("test_eval_runner.py::test_what_a_right_answer_is",)
MATCHED = ("test_eval_runner.py::test_a_budget_is_matched_only_within_one_per_cent",)
BOUND = ("test_eval_runner.py::test_the_bound_is_the_lowest_candidate_that_was_ruled_out",)
ACCURACY = ("test_eval_numbers.py::test_accuracies_and_their_intervals",)
DIFFERENCES = ("test_eval_numbers.py::test_differences_shares_and_corrected_p_values",)
COSTS = ("test_eval_numbers.py::test_tokens_and_costs",)
DRAWS = ("test_eval_stats.py::test_a_draw_is_of_the_questions_that_its_images_have",)
WHOLE = ("test_corners.py::test_pictures_of_a_row_with_several_stay_whole",)
RAGGED = ("test_signals.py::test_signals_of_a_tower_whose_views_hold_different_numbers",)
EAGER = ("test_signals.py::test_signals_are_those_of_eager_attention",)
TOKENS = ("test_core.py::test_tokens_of_a_budget", "test_core.py::test_an_average_pays_for_the_layers_before_the_cut")
ISOLATED = ("test_ties.py::test_most_isolated", "test_ties.py::test_the_most_isolated_of_equals_far_behind")

TABLE = (
    # ------------------------------------------------------------------------------------------------------------- speed
    Mutant("warm-up pairs are part of the result", SPEED, "            if i >= warmup:\n", "            if i >= 0:\n", WARM_UP),
    Mutant("one warm-up pair is", SPEED, "            if i >= warmup:\n", "            if i >= warmup - 1:\n", WARM_UP),
    Mutant("decode time is the sum of the steps", SPEED, "spread(steps).value", "sum(steps)", PARTS),
    Mutant("decode time is the mean of the steps", SPEED, "spread(steps).value", "sum(steps) / len(steps)", PARTS),
    Mutant("time to the first token from the tower on", SPEED, "1e3 * (end - start)", '1e3 * (end - seen["vision"])', PARTS),
    Mutant(
        "prefill from the tower's end on", SPEED, 'seen["logits"] - seen["prefill"]', 'seen["logits"] - seen["encoded"]', PARTS
    ),
    Mutant("speed-up upside down", SPEED, "p.times[part] / r.times[part]", "r.times[part] / p.times[part]", PAIRS),
    Mutant("the unreduced run always goes first", SPEED, "            if i % 2:", "            if False:", PAIRS),
    Mutant("peak memory of the last run", SPEED, "max((r.peak_bytes for r in runs", "min((r.peak_bytes for r in runs", PAIRS),
    Mutant(
        "bytes of views",
        SPEED,
        "storages[storage.data_ptr()] = storage.nbytes()",
        "storages[id(tensor)] = tensor.nbytes",
        BYTES,
    ),
    Mutant(
        "shared storage counted for every view",
        SPEED,
        "storages[storage.data_ptr()] = storage.nbytes()",
        "storages[id(tensor)] = storage.nbytes()",
        BYTES,
    ),
    Mutant(
        "the first timed answer is that of the warm-up",
        "vtc/trial.py",
        "inputs, after, max_new_tokens, counted=n > 0",
        "inputs, after, max_new_tokens, counted=True",
        ("test_timing.py::test_a_trial_times_one_token_and_the_whole_answer_and_drops_the_first_pair",),
    ),
    Mutant(
        "spans of a clock replace each other",
        "vtc/stats.py",
        "self._seconds += time.perf_counter() - begin",
        "self._seconds = time.perf_counter() - begin",
        ("test_timing.py::test_spans_of_a_clock_add_up",),
    ),
    Mutant(
        "the bench's overhead of the warm-up, too",
        "eval/bench/model.py",
        "            if i >= WARMUP:\n                ideal",
        "            if i >= 1:\n                ideal",
        ("test_timing.py::test_what_the_bench_times",),
    ),
    # ------------------------------------------------------------------------------------------------- runner and worker
    Mutant("another machine's timings count as there", RUN, '(self.anywhere or timed["host"] == host())', "True", HOST),
    Mutant(
        "a cluster's timings never do", RUN, '(self.anywhere or timed["host"] == host())', '(timed["host"] == host())', HOST
    ),
    Mutant(
        "failed cells are also skipped",
        RUN,
        "len(items) - len(touched | set(errors))",
        "len(items) - len(touched - set(errors))",
        COUNTS,
    ),
    Mutant(
        "cells that failed in the speed pass are done",
        RUN,
        "Summary(len(touched - set(errors)),",
        "Summary(len(touched),",
        COUNTS,
    ),
    Mutant(
        "features keyed without the pixels' values",
        WORKER,
        "            total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())\n",
        "",
        SHARED,
    ),
    Mutant(
        "features keyed by the pixels' sum",
        WORKER,
        "value.detach().cpu().contiguous().view(torch.uint8).numpy()",
        "value.detach().cpu().double().sum().reshape(1).view(torch.uint8).numpy()",
        SHARED,
    ),
    Mutant(
        "every budget is called matched",
        WORKER,
        "matched = abs(achieved / cell.flops - 1) <= MATCHED",
        "matched = True",
        MATCHED,
    ),
    Mutant("matched within two per cent", WORKER, "MATCHED = 0.01", "MATCHED = 0.02", MATCHED),
    Mutant(
        "the bound one step low",
        "eval/betting.py",
        "self.means[min(kept[-1] + 1, len(self.means) - 1)]",
        "self.means[kept[-1]]",
        BOUND,
    ),
    Mutant("the bound one step high", "eval/betting.py", "min(kept[-1] + 1,", "min(kept[-1] + 2,", BOUND),
    # ------------------------------------------------------------------------------------------------ scores and statistics
    Mutant(
        "the case of an answer matters",
        "eval/questions.py",
        "answer.strip().lower() == gold.strip().lower()",
        "answer.strip() == gold.strip()",
        RIGHT,
    ),
    Mutant("of own data, too", "eval/questions.py", '.rstrip(".!").strip().lower()', '.rstrip(".!").strip()', RIGHT),
    Mutant(
        "every draw divided by a constant number of questions",
        STATS,
        "self._weigh(self.sums(marks)) / self.totals",
        "self._weigh(self.sums(marks)) / self.totals.mean()",
        DRAWS,
    ),
    Mutant(
        "images weigh alike, whatever they have",
        STATS,
        "self._weigh(self.sums(marks)) / self.totals",
        "self._weigh(self.sums(marks) / self.counts) / len(self.counts)",
        DRAWS,
    ),
    Mutant(
        "one stream of draws for all tasks",
        SCORES,
        "stream = seed if self.number == 0 else (seed, self.number)",
        "stream = seed",
        ACCURACY,
    ),
    Mutant(
        "graded answers are right or wrong",
        SCORES,
        'sample["score"] if sample.get("score") is not None else sample.get("correct")',
        'sample.get("correct") if sample.get("correct") is not None else sample["score"]',
        ACCURACY,
    ),
    Mutant(
        "the first seed only",
        SCORES,
        "np.mean([s for _, s in parts], axis=0) if len(parts) > 1 else parts[0][1]",
        "parts[0][1]",
        ACCURACY,
    ),
    Mutant(
        "another seed of the reference",
        RESULTS,
        "next((c for c in alike if c.listed.seed == cell.listed.seed), alike[0])",
        "alike[0]",
        DIFFERENCES,
    ),
    Mutant(
        "Holm's correction for all but one comparison",
        STATS,
        "(len(p_values) - rank) * p_values[i]",
        "max(1, len(p_values) - rank - 1) * p_values[i]",
        DIFFERENCES,
    ),
    Mutant(
        "corrected p-values may fall",
        STATS,
        "highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))",
        "highest = min(1.0, (len(p_values) - rank) * p_values[i])",
        DIFFERENCES,
    ),
    Mutant(
        "a share of the first task's FLOPs", RESULTS, "whole = None if None in full else mean(full)", "whole = full[0]", COSTS
    ),
    Mutant(
        "question types of a row that ran on one task only",
        RESULTS,
        "if self.several else k: v",
        "if len(self.tasks) > 1 else k: v",
        ACCURACY,
    ),
    # ------------------------------------------------------------------------------------------------------------ families
    Mutant("two pictures in a prompt taken for crops", "vtc/families/llava_onevision.py", "int(n) != 1", "int(n) > 2", WHOLE),
    Mutant("the number of pictures is not looked at", "vtc/families/llava_onevision.py", "int(n) != 1", "False", WHOLE),
    # -------------------------------------------------------------------------------------------------------------- engine
    Mutant(
        "padding overwrites a living patch: signals",
        TOWER,
        "values * valid.view(*valid.shape, *[1] * (values.dim() - 2))",
        "values",
        RAGGED,
    ),
    Mutant(
        "padding overwrites a living patch: coming back",
        ENCODER,
        "            hidden = torch.where(self.with_head(run.valid, True)[..., None], hidden, run.left.gather(1, at))\n",
        "            pass\n",
        ("test_corners.py::test_patches_of_views_of_different_length_come_back_as_they_left",),
    ),
    Mutant(
        "padding pays attention",
        SIGNALS,
        "    if tap.mask is None:\n        return tap.patches(attention_colsum",
        "    if True:\n        return tap.patches(attention_colsum",
        RAGGED,
    ),
    Mutant(
        "taps use d^-1/2 instead of the model's own scaling",
        UPSTREAM,
        r"query\.shape\[-1\] \*\* -0\.5 if scaling is None else scaling",
        "query.shape[-1] ** -0.5",
        EAGER,
        regex=True,
    ),
    Mutant(
        "surviving newlines count as patches of the next stage",
        CHOOSE,
        'it.patches = kept if part.newline_policy != "compete" or not it.layout.has_newlines else None',
        "it.patches = kept",
        (
            "test_corners.py::test_newlines_that_survived_are_no_patches_of_the_next_stage",
            "test_corners.py::test_registered_methods_in_a_composition_see_patches_only",
        ),
    ),
    Mutant(
        "un-patching removes what somebody else wrapped after us",
        UNDO,
        "if vars(owner).get(name) is not wrapper:",
        "if name not in vars(owner):",
        ("test_corners.py::test_a_wrapper_put_on_after_us_stays_and_works",),
    ),
    Mutant(
        "the check of packed lengths is gone",
        TOWER,
        "if not agree(lengths, record.lengths):",
        "if False:",
        (
            "test_corners.py::test_an_adapter_that_is_off_by_one_is_found_out",
            "test_corners.py::test_an_adapter_that_mixes_up_two_pictures_is_found_out",
        ),
    ),
    Mutant(
        "as many rows as pictures taken for one picture each",
        TOWER,
        "theirs = set(accumulate(expected)), {end for end in accumulate(packed) if end}",
        "theirs = set(accumulate(expected)), set(accumulate(packed))",
        ("test_compositions.py::test_compositions_that_failed_once",),
    ),
    Mutant(
        "gaps of positions stay where a row drops nothing",
        TEXT,
        "self.shorten(ctx, compact) if closes or ctx.alive() != ctx.held",
        "self.shorten(ctx, compact) if ctx.alive() != ctx.held",
        ("test_compositions.py::test_compositions_that_failed_once",),
    ),
    Mutant("a 4-D mask's columns of the cached prefix", TEXT, "mask[:, 0, -1, seen : seen + q]", "mask[:, 0, -1, :q]", TALK),
    Mutant(
        "a 4-D mask hides nothing",
        TEXT,
        "return (last | ~last.any(1, keepdim=True)).expand(shape)",
        "return torch.ones(shape, dtype=torch.bool)",
        TALK,
    ),
    Mutant(
        "a flash mask that ignores cached keys",
        LISTEN,
        "(torch.arange(q, device=query.device) + keys - q)[:, None]",
        "torch.arange(q, device=query.device)[:, None]",
        COLUMNS,
    ),
    Mutant(
        "a flash mask without padding",
        LISTEN,
        "full = mask.bool()[:, None, None, :] & causal",
        "full = causal[None, None]",
        COLUMNS,
    ),
    Mutant(
        "padding of the first turn forgotten at a second reduction",
        CACHE,
        "                cols, valid = self.columns()\n            if",
        "                cols, valid = self.columns()[0], None\n            if",
        TALK,
    ),
    Mutant(
        "the first turn's shift forgotten",
        CACHE,
        "seg.shift if self.shift is None else self.shift + seg.shift",
        "seg.shift",
        TALK,
    ),
    Mutant(
        "the order of pixels is ignored",
        TOWER,
        "weight = (torch.arange(bits.numel(), device=bits.device) * 2654435761 + 40503) % 2147483647",
        "weight = torch.ones_like(bits)",
        ("test_corners.py::test_a_picture_s_fingerprint_is_of_its_pixels_in_their_places",),
    ),
    # ---------------------------------------------------------------------------------------------- core, kernels, reducers
    Mutant(
        "budgets are rounded down",
        CORE,
        "rounding: Callable[[float], int] = round)",
        "rounding: Callable[[float], int] = int)",
        TOKENS,
    ),
    Mutant(
        "an average of whole tokens",
        CORE,
        "exact = amount * n if isinstance(amount, float)",
        "exact = round(amount * n) if isinstance(amount, float)",
        TOKENS,
    ),
    Mutant(
        "a note at equality",
        CORE,
        "return isinstance(self.amount, int) and self.amount > n",
        "return isinstance(self.amount, int) and self.amount >= n",
        (
            "test_core.py::test_a_budget_is_above_what_there_is_if_it_is_more_and_a_number",
            "test_core.py::test_an_image_below_its_budget_is_noted_and_one_at_it_is_not",
        ),
    ),
    Mutant(
        "not the lowest of equals: of a block",
        "kernels/ref/similarity.py",
        "which = int(token[some[distance == best]].min())",
        "which = int(token[some[distance == best]].max())",
        ISOLATED,
    ),
    Mutant(
        "not the lowest of equals: of a later block",
        "kernels/ref/similarity.py",
        "best == farthest and which < winner",
        "best == farthest and which > winner",
        ISOLATED,
    ),
    Mutant(
        "similar at the threshold",
        "kernels/ref/similarity.py",
        "near = (cosine > threshold)",
        "near = (cosine >= threshold)",
        ("test_ties.py::test_a_cosine_at_the_threshold",),
    ),
    Mutant(
        "a preset with 0.75 for 0.25",
        "vtc/reducers/fastv.py",
        '"k2-r75": {"layer": 2, "keep": 0.25}',
        '"k2-r75": {"layer": 2, "keep": 0.75}',
        ("test_presets.py::test_a_preset_is_what_its_name_promises",),
    ),
    Mutant(
        "groups of the last seed",
        "eval/vtcbench.py",
        "if full is None or (model, task) in seen:",
        "if full is None:",
        ("test_eval_numbers.py::test_groups_of_vtc_bench_are_of_the_first_seed",),
    ),
)
