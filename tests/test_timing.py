"""Everything that is timed, under a clock of our own: which moments count, and what is made of them, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from clocks import Clock, Script
from models import make_inputs, shared
from transformers import DynamicCache

import vtc
from vtc import stats, trial
from vtc.eval import speed
from vtc.eval.bench import common
from vtc.eval.bench import model as bench
from vtc.eval.speed import Run, kv_cache_bytes, measure, run_once
from vtc.reducers.downsample import Downsample
from vtc.reducers.uniform import Uniform

MODEL = "llava"


@pytest.fixture
def inputs():
    return make_inputs(MODEL, shared(MODEL))


def cubes(first: int, count: int) -> list[float]:
    """Seconds whose differences are all different, and grow unevenly."""
    return [float(n**3) for n in range(first, first + count)]


# ------------------------------------------------------------------------------------------------------------- one run
@pytest.mark.parametrize(("steps", "decode"), [(1, 127), (2, (127 + 217) / 2), (5, 331)])
def test_every_part_of_a_run_has_its_two_moments(monkeypatch, inputs, steps, decode):
    """Start, tower, projector, decoder, head, end; then two per decoded token, of which the median is taken."""
    clock = Script(0, 1, 8, 27, 64, 125, *cubes(6, 2 * steps)).put_into(monkeypatch, speed)
    run = run_once(shared(MODEL), inputs, None, steps)
    expected = {"vision_ms": 7.0, "prefill_ms": 37.0, "ttft_ms": 125.0, "decode_ms": decode}
    assert run.times == {part: 1e3 * seconds for part, seconds in expected.items()}
    assert clock.looks == 6 + 2 * steps and run.reducer_ms == 0 and run.peak_bytes is None


def test_a_reducer_s_time_is_part_of_where_it_ran(monkeypatch, inputs):
    """The clock stands still but while it chooses: at the boundary that is part of the prefill, in the tower of vision."""
    clock = Clock().put_into(monkeypatch, speed, stats)
    choose, shrink = Uniform.select, Downsample.resize

    def slow_choice(self, signals):
        clock.at += 0.25
        return choose(self, signals)

    def slow_resize(self, *args):
        clock.at += 2.0
        return shrink(self, *args)

    monkeypatch.setattr(Uniform, "select", slow_choice)
    monkeypatch.setattr(Downsample, "resize", slow_resize)
    run = run_once(shared(MODEL), inputs, vtc.create("uniform", keep=5), 1)
    assert run.times == {"vision_ms": 0.0, "prefill_ms": 250.0, "ttft_ms": 250.0, "decode_ms": 0.0} and run.reducer_ms == 250.0
    run = run_once(shared(MODEL), inputs, vtc.create("downsample", keep=4), 1)
    assert run.times == {"vision_ms": 2000.0, "prefill_ms": 0.0, "ttft_ms": 2000.0, "decode_ms": 0.0}
    assert run.reducer_ms == 2000.0
    run = run_once(shared(MODEL), inputs, None, 1)
    assert set(run.times.values()) == {0.0} and run.reducer_ms == 0


# ------------------------------------------------------------------------------------------------------------ many runs
@pytest.mark.parametrize("warmup", [1, 3])
def test_warm_up_is_no_part_of_the_result(monkeypatch, inputs, warmup):
    """A second per look while it warms up, a millisecond after: everything that is reported is of the milliseconds."""
    clock = Clock(1.0).put_into(monkeypatch, speed)
    pairs = []

    def after_a_pair() -> None:
        pairs.append(clock.at)
        clock.tick = 1.0 if len(pairs) < warmup else 2**-10

    found = measure(shared(MODEL), inputs, None, repeats=3, warmup=warmup, decode_steps=2, progress=after_a_pair)
    assert len(pairs) == warmup + 3
    one = 1e3 * 2**-10
    for side in ("unreduced", "reduced"):
        for part, looks in (("vision_ms", 1), ("prefill_ms", 1), ("ttft_ms", 5), ("decode_ms", 1)):
            assert found[side][part] == dict.fromkeys(("value", "low", "high"), looks * one), (side, part)
    assert found["speedup"] == {
        part: dict.fromkeys(("value", "low", "high"), 1.0) for part in ("vision", "prefill", "ttft", "decode")
    }
    assert (found["batch_size"], found["prompt_tokens"]) == tuple(inputs["input_ids"].shape)


def one_run(ms: float, *, kv: int = 1, peak: int | None = None, own: float = 0.0) -> Run:
    return Run({"vision_ms": 2 * ms, "prefill_ms": ms, "ttft_ms": 4 * ms, "decode_ms": 8 * ms}, own, kv, peak)


def test_a_speed_up_is_the_median_of_pairs_that_take_turns(monkeypatch, inputs):
    """Not the ratio of the medians; unreduced over reduced; and neither side always goes first."""
    plain, reduced = [9.0, 1.0, 2.0, 30.0, 5.0, 12.0], [9.0, 4.0, 1.0, 10.0, 10.0, 3.0]
    order, taken = [], {True: iter(reduced), False: iter(plain)}

    def scripted(model, given, reducer, steps):
        order.append(reducer is not None)
        held = 7 if reducer is None else 3
        return one_run(next(taken[reducer is not None]), kv=held, peak=100 * held + len(order), own=1.5 * len(order))

    monkeypatch.setattr(speed, "run_once", scripted)
    found = measure(shared(MODEL), inputs, vtc.create("uniform", keep=4), repeats=5, warmup=1, decode_steps=1)
    assert order == [False, True, True, False, False, True, True, False, False, True, True, False]
    ratios = {"value": 2.0, "low": 0.45, "high": 3.2}  # of 0.25, 2, 3, 0.5 and 4
    assert all(got == pytest.approx(ratios) for got in found["speedup"].values())
    assert found["unreduced"]["prefill_ms"]["value"] == 5.0 and found["reduced"]["prefill_ms"]["value"] == 4.0
    assert [found["unreduced"][p]["value"] for p in ("vision_ms", "ttft_ms", "decode_ms")] == [10.0, 20.0, 40.0]
    assert found["reduced"]["reducer_ms"]["value"] == 1.5 * 7  # of the third, sixth, seventh, tenth and eleventh run
    assert (found["unreduced"]["kv_bytes"], found["reduced"]["kv_bytes"]) == (7, 3)
    assert (found["unreduced"]["peak_bytes"], found["reduced"]["peak_bytes"]) == (712, 311), "the highest of the runs"


# -------------------------------------------------------------------------------------------------------- bytes of a cache
def cache_of(*pairs: tuple[torch.Tensor, torch.Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for i, (key, value) in enumerate(pairs):
        cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), i)
        cache.layers[i].keys, cache.layers[i].values = key, value
    return cache


def test_a_cache_is_as_large_as_the_memory_it_holds_on_to():
    """Slices keep the whole alive, several views of one memory hold it once, and a type counts by its width."""
    whole, half = torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 10, 8, dtype=torch.float16)
    assert kv_cache_bytes(cache_of((whole.clone(), whole.clone()))) == 2 * 1600 * 4
    assert kv_cache_bytes(cache_of((whole[:, :, :10], whole.clone()[:, :, 90:]))) == 2 * 1600 * 4
    assert kv_cache_bytes(cache_of((whole[:, :, :50], whole[:, :, 50:]))) == 1600 * 4
    assert kv_cache_bytes(cache_of((half, half.clone()), (whole, half.clone()))) == 3 * 160 * 2 + 1600 * 4
    assert kv_cache_bytes(DynamicCache()) == 0


def test_a_reduced_cache_holds_no_memory_of_what_was_dropped(inputs):
    model = shared(MODEL)
    prompt, (heads, width, item) = inputs["input_ids"].shape[1], (2, 8, 8)
    full = run_once(model, inputs, None, 1).kv_bytes
    short = run_once(model, inputs, vtc.create("uniform", keep=5), 1).kv_bytes
    assert full == 2 * 5 * prompt * heads * width * item
    assert short == 2 * 5 * (prompt - 16 + 5) * heads * width * item


# ---------------------------------------------------------------------------------------------------------- other clocks
def test_spans_of_a_clock_add_up(monkeypatch):
    """Also those of another clock; a copy keeps the time, and what happens between spans is not counted."""
    Script(0, 1, 10, 12, 100, 104, 200, 208).put_into(monkeypatch, stats)
    mine, other = stats.Clock(), stats.Clock()
    cpu = torch.device("cpu")
    assert mine.milliseconds() == 0
    for clock in (mine, mine, other):
        with clock.span(cpu):
            pass
    assert (mine.milliseconds(), other.milliseconds()) == (3000.0, 4000.0)
    mine.add(other)
    twin = copy.deepcopy(mine)
    with pytest.raises(KeyError), mine.span(cpu):
        raise KeyError
    assert mine.milliseconds() == 15000.0, "a span that ends with an error counts"
    assert twin.milliseconds() == 7000.0 and other.milliseconds() == 4000.0


def test_reducer_milliseconds_are_per_call(monkeypatch):
    log = stats.StatsLog()
    image = stats.ImageStats(0, 16, 4, [16, 4])
    for seconds in (1.0, 2.0, 6.0):
        Script(0.0, seconds).put_into(monkeypatch, stats)
        clock = stats.Clock()
        with clock.span(torch.device("cpu")):
            pass
        log.append(stats.CallStats([image, image], _clock=clock))
    log.append(stats.CallStats(text_only=True))
    assert log.summary() == {
        "images": 6, "calls": 4, "slots": 16.0, "kept": 4.0, "avg_tokens": 10.0, "reducer_ms": 3000.0,
    }  # fmt: skip


def test_a_trial_times_one_token_and_the_whole_answer_and_drops_the_first_pair(monkeypatch):
    """Runs alternate; each looks at the clock four times: around one token, around all."""
    from PIL import Image

    model, processor = vtc.load_pocket()
    clock = Clock().put_into(monkeypatch, trial)
    generate, calls = type(model).generate, []

    def scripted(self, **kwargs):
        patched = hasattr(self, "_vtc_handle")
        calls.append((patched, kwargs["max_new_tokens"]))
        # seconds: 2 to the number of the run of its kind, ten times as long where patched
        number = sum(kind == patched for kind, _ in calls)
        clock.at += 2.0**number * (10 if patched else 1)
        return generate(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", scripted)
    outcome = trial.trial(
        model, processor, Image.new("RGB", (112, 112), "red"), "yes ?", vtc.create("uniform", keep=49), max_new_tokens=2, runs=2
    )
    assert calls == [(False, 1), (False, 2), (True, 1), (True, 2)] * 3
    assert (outcome.before.ttft_ms, outcome.before.total_ms) == ([8e3, 32e3], [16e3, 64e3])
    assert (outcome.after.ttft_ms, outcome.after.total_ms) == ([80e3, 320e3], [160e3, 640e3])
    assert outcome.after.to_dict()["total_ms"] == {"median": 400e3, "min": 160e3, "max": 640e3}


def test_what_the_bench_times(monkeypatch, inputs):
    clock = Clock(0.5).put_into(monkeypatch, common, bench)
    assert common.timed(lambda: None, torch.device("cpu")) == 0.5
    assert common.milliseconds([0.001, 0.002, 0.003, 0.004, 0.1]) == {"ms_p20": 1.8, "ms_p50": 3.0, "ms_p80": 23.2}
    assert bench.first_token_ms(shared(MODEL), inputs) == 500.0
    clock.tick = 0.0
    choose = Uniform.select

    chosen = []

    def slow(self, signals):
        chosen.append(1)
        clock.at += 0.05 if len(chosen) > bench.WARMUP else 10.0
        return choose(self, signals)

    monkeypatch.setattr(Uniform, "select", slow)
    looks = clock.looks
    ideal, added = bench.overhead(shared(MODEL), inputs, vtc.create("uniform", keep=4), 8, 1)
    assert ideal == 0 and added == pytest.approx(50), "of the runs behind the warm-up"
    assert clock.looks - looks == 2 * 2 * (bench.WARMUP + 1)
