"""The plan of a run against a loop that adds up the batches, and learning rates against their papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.duration import Span
from pretrain.config.load import load_config
from pretrain.config.run import Config
from pretrain.schedule import Plan
from tests.distributed import REPOSITORY


def config_of(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def simulated(config: Config, steps: int) -> list[tuple[int, int]]:
    """Sequences of each step and their tokens, one step after the other: has the phase lasted as long as it should, and of
    the ramp's equal parts, how many are over?"""
    ramp, waiting, found = config.batch.ramp, list(config.data.phases), []
    tokens, began = 0, {"steps": 0, "tokens": 0}
    for step in range(steps):
        now = {"steps": step, "tokens": tokens}
        if waiting and now[waiting[0].length.unit] - began[waiting[0].length.unit] >= waiting[0].length.count:
            began = now
            waiting.pop(0)
        size = (waiting[0].batch_size if waiting else None) or config.batch.size
        length = waiting[0].seq_length if waiting else config.data.seq_length
        if ramp is not None:
            increments = (config.batch.size - ramp.start) // ramp.increment
            position = now[ramp.length.unit]
            over = increments if position >= ramp.length.count else position * increments // ramp.length.count
            size = ramp.start + int(over) * ramp.increment
        found.append((size, length))
        tokens += size * length
    return found


def simulated_sizes(config: Config, steps: int) -> list[int]:
    return [size for size, _ in simulated(config, steps)]


def tokens_after(config: Config, steps: int) -> list[int]:
    """Tokens that 0, 1, ... steps took."""
    totals = [0]
    for size, length in simulated(config, steps):
        totals.append(totals[-1] + size * length)
    return totals


def first_step_at(span: Span, tokens: list[int]) -> int:
    """Steps until the span is reached or passed, by counting them."""
    return next(step for step in count() if (step if span.unit == "steps" else tokens[step]) >= span.count)


STEPS = st.builds(Span, st.integers(0, 60), st.just("steps"))
TOKENS = st.builds(Span, st.integers(0, 4000), st.just("tokens"))
SPANS = STEPS | TOKENS
INTERVALS = SPANS.filter(lambda span: span.count > 0)
LONG = 4100  # steps of one token each that reach any of these spans


@st.composite
def ramped(draw: st.DrawFn) -> Config:
    start, increment, times = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 9))
    batch: dict[str, Any] = {"size": start + increment * times}
    if draw(st.booleans()):
        batch["ramp"] = {"start": start, "increment": increment, "length": str(draw(SPANS))}
    data: dict[str, Any] = {"seq_length": draw(st.integers(1, 40))}
    lengths = st.integers(1, data["seq_length"])
    size = st.none() if "ramp" in batch else st.none() | st.integers(1, 20)
    phase = st.fixed_dictionaries({"seq_length": lengths, "length": INTERVALS.map(str), "batch_size": size})
    data["phases"] = draw(st.lists(phase, max_size=2))
    total = str(draw(INTERVALS))
    return config_of(batch=batch, data=data, schedule={"total": total})


@settings(max_examples=150, deadline=None)
@given(ramped(), SPANS)
def test_steps_samples_and_tokens_are_those_of_a_loop_that_adds_them_up(config: Config, span: Span) -> None:
    plan, sizes = Plan(config), simulated_sizes(config, LONG)
    tokens = tokens_after(config, LONG)
    for step in [*range(70), 500]:
        assert (plan.size(step), plan.seq_length(step)) == simulated(config, step + 1)[-1]
        assert plan.samples_before(step) == sum(sizes[:step])
        assert plan.tokens_before(step) == tokens[step]
    assert plan.steps(span) == first_step_at(span, tokens)
    assert plan.total_steps == first_step_at(config.schedule.total, tokens)


@settings(max_examples=100, deadline=None)
@given(ramped(), st.data())
def test_a_resumed_plan_is_the_tail_of_the_whole(config: Config, data: st.DataObject) -> None:
    plan = Plan(config)
    whole = list(plan.steps_from(0))
    assert [size for _, size in whole] == simulated_sizes(config, plan.total_steps)
    assert all(first + size == after for (first, size), (after, _) in pairwise(whole))
    step = data.draw(st.integers(0, plan.total_steps))
    assert list(Plan(config).steps_from(step)) == whole[step:]
    by_phase = [
        list(plan.steps_from(0 if p == 0 else plan.end_of(p - 1), plan.end_of(p))) for p in range(len(plan.phases))
    ]
    assert [taken for phase in by_phase for taken in phase] == whole


@settings(max_examples=100, deadline=None)
@given(ramped(), INTERVALS, st.integers(0, 60), st.integers(0, 60))
def test_an_interval_is_due_when_one_of_its_ends_was_passed(config: Config, every: Span, start: int, more: int) -> None:
    plan, tokens = Plan(config), tokens_after(config, 120)
    before, after = (start, start + more) if every.unit == "steps" else (tokens[start], tokens[start + more])
    passed = any(before < multiple <= after for multiple in range(every.count, after + 1, every.count))
    assert plan.due(every, start, start + more) == passed
    assert not plan.due(None, start, start + more)


def test_a_long_runs_ramp_is_exact() -> None:
    """The plan equals exact fractions, part by part; past 2^53 too, where floats no longer count."""
    odd = 2**53 + 1
    ramp = {"start": 1, "increment": 1, "length": f"{odd} tokens"}
    plan = Plan(config_of(batch={"size": 2, "ramp": ramp}, data={"seq_length": 1}))
    assert (plan.size(odd - 1), plan.size(odd), plan.steps(Span(odd, "tokens"))) == (1, 2, odd)
    for size, length in [(256, 4 * 10**9), (512, 6 * 10**9 + 1), (1536, 12 * 10**9), (1536, 10**17 + 3)]:
        ramp = {"start": 16, "increment": 16, "length": f"{length} tokens"}
        plan = Plan(config_of(batch={"size": size, "ramp": ramp}, data={"seq_length": 2048}))
        parts, step, sample = (size - 16) // 16, 0, 0
        for number in range(1, parts + 1):
            left = Fraction(length * number, parts) - sample * 2048
            steps = max(math.ceil(left / (16 * number * 2048)), 0)
            assert plan.size(step) == 16 * number and plan.samples_before(step) == sample
            step, sample = step + steps, sample + steps * 16 * number
        assert plan.size(step) == size and plan.size(step - 1) == size - 16
        assert plan.steps(Span(sample * 2048, "tokens")) == step
        assert plan.steps(Span(sample * 2048 + 1, "tokens")) == step + 1


def test_gpt3_smalls_ramp_reaches_the_full_batch_by_its_length() -> None:
    config = load_config(REPOSITORY / "configs/gpt/gpt3-small.yaml")
    plan = Plan(config)
    full = next(step for step in count() if plan.size(step) == 256)
    assert plan.size(0) * 2048 == 32768  # "32k tokens"
    assert plan.size(full) * 2048 == 524288 and plan.size(full - 1) == 240
    assert 4e9 <= plan.tokens_before(full) < 4e9 + 240 * 2048  # within one step
    assert {plan.size(step) for step in range(full)} == set(range(16, 256, 16))
    assert 300e9 <= plan.tokens_before(plan.total_steps) < 300e9 + 524288
    # Warmed up at 375M tokens, at a tenth from 260B tokens on.
    warm, cold = plan.steps(Span(375_000_000, "tokens")), plan.steps(Span(260_000_000_000, "tokens"))
    assert plan.learning_rate(warm - 2) < plan.learning_rate(warm - 1) == pytest.approx(6e-4, rel=1e-4)
    assert plan.learning_rate(cold - 1) == plan.learning_rate(plan.total_steps - 1) == pytest.approx(6e-5, rel=1e-12)
    assert plan.learning_rate(cold - 200) > plan.learning_rate(cold - 1)


# -- learning rates --------------------------------------------------------------------------------------------------

PEAK, FINAL, SEQ = 3e-3, 0.1, 32
Shape = Callable[[float, float, float], float]  # position t, warm-up w, end T -> fraction of the peak after the warm-up


def cosine(t: float, w: float, T: float) -> float:
    """Loshchilov and Hutter 2017, equation 5: eta_min + (eta_max - eta_min) (1 + cos(pi T_cur / T_i)) / 2."""
    return FINAL + 0.5 * (1 - FINAL) * (1 + math.cos(math.pi * (t - w) / (T - w)))


def linear(t: float, w: float, T: float) -> float:
    return 1 - (1 - FINAL) * (t - w) / (T - w)


def noam(t: float, w: float, T: float) -> float:
    """Vaswani et al. 2017, equation 3, scaled so that its highest value, at t = w, is 1."""
    hidden = 512
    return hidden**-0.5 * min(t**-0.5, t * w**-1.5) / (hidden**-0.5 * w**-0.5)


def stable(decay: float) -> Shape:
    """Hu et al. 2024, "MiniCPM": warm-up, stable, then a decay over the last part."""
    return lambda t, w, T: 1.0 if t <= T - decay else 1 - (1 - FINAL) * (t - (T - decay)) / decay


SHAPES: dict[str, Shape] = {"cosine": cosine, "linear": linear, "inverse-sqrt": noam, "constant": lambda t, w, T: 1.0}
BATCHES: list[dict[str, Any]] = [
    {"size": 12},
    {"size": 12, "ramp": {"start": 4, "increment": 2, "length": "17 steps"}},
    {"size": 12, "ramp": {"start": 2, "increment": 5, "length": "3K tokens"}},
]


def check_rates(config: Config, shape: Shape) -> None:
    """Each step's rate, at the position of its own end in the unit of the total, is the warm-up's or the shape's."""
    tokens = tokens_after(config, 400)
    in_tokens = config.schedule.total.unit == "tokens"

    def place(span: Span) -> int:
        """Where a span ends, in the total's unit: as written, or at the end of the step that reaches it."""
        if (span.unit == "tokens") == in_tokens:
            return span.count
        step = first_step_at(span, tokens)
        return tokens[step] if in_tokens else step

    steps = first_step_at(config.schedule.total, tokens)
    end, warmup = tokens[steps] if in_tokens else steps, place(config.schedule.warmup)
    plan = Plan(config)
    assert plan.total_steps == steps and 0 < warmup < end
    for step in range(steps):
        t = tokens[step + 1] if in_tokens else step + 1
        wanted = PEAK * (t / warmup if t < warmup else shape(t, warmup, end))
        assert plan.learning_rate(step) == pytest.approx(wanted, rel=1e-12), f"step {step}"


@pytest.mark.parametrize("batch", BATCHES, ids=["even", "ramp in steps", "ramp in tokens"])
@pytest.mark.parametrize("total", ["60 steps", "20K tokens"])
@pytest.mark.parametrize("warmup", ["9 steps", "2K tokens"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_rate_is_the_papers_formula(kind: str, warmup: str, total: str, batch: dict[str, Any]) -> None:
    schedule = {"kind": kind, "warmup": warmup, "total": total, "final_fraction": FINAL}
    config = config_of(
        batch=batch, data={"seq_length": SEQ}, optimizer={"learning_rate": PEAK}, schedule=schedule
    )  # fmt: skip
    check_rates(config, SHAPES[kind])


@pytest.mark.parametrize(("total", "decay", "length"), [
    ("60 steps", "15 steps", 15), ("60 steps", None, 6), ("20160 tokens", "4K tokens", 4000), ("19200 tokens", None, 1920),
])  # fmt: skip
def test_wsd_decays_over_its_last_part(total: str, decay: str | None, length: int) -> None:
    schedule = {"kind": "wsd", "warmup": "9 steps", "total": total, "decay": decay, "final_fraction": FINAL}
    config = config_of(
        batch={"size": 10}, data={"seq_length": SEQ}, optimizer={"learning_rate": PEAK}, schedule=schedule
    )
    check_rates(config, stable(length))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_decay_that_ends_early_keeps_the_final_rate_until_the_end(kind: str) -> None:
    schedule = {"kind": kind, "warmup": "9 steps", "total": "60 steps", "decay": "40 steps", "final_fraction": FINAL}
    config = config_of(optimizer={"learning_rate": PEAK}, schedule=schedule)
    check_rates(config, lambda t, w, T: SHAPES[kind](t, w, 40) if t < 40 else FINAL)


@settings(max_examples=60, deadline=None)
@given(ramped(), st.sampled_from(["cosine", "linear", "wsd"]), st.floats(0, 1))
def test_the_last_step_has_exactly_the_final_rate(config: Config, kind: str, final: float) -> None:
    schedule = {"kind": kind, "total": str(config.schedule.total), "final_fraction": final}
    plan = Plan(Config.model_validate({**config.model_dump(mode="json"), "schedule": schedule}))
    assert plan.learning_rate(plan.total_steps - 1) == pytest.approx(1e-3 * final, rel=1e-12, abs=0)


@settings(max_examples=60, deadline=None)
@given(ramped(), st.sampled_from(["cosine", "linear", "inverse-sqrt", "wsd", "constant"]), SPANS)
def test_no_step_has_a_rate_of_zero_or_above_the_peak(config: Config, kind: str, warmup: Span) -> None:
    schedule = {"kind": kind, "total": str(config.schedule.total), "warmup": str(warmup if warmup.count else "1 steps")}
    plan = Plan(Config.model_validate({**config.model_dump(mode="json"), "schedule": schedule}))
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)


@pytest.mark.parametrize(("samples", "size"), [(100, 8), (96, 8), (7, 8), (1000, 1)])
def test_epochs_are_passes_over_the_data(samples: int, size: int) -> None:
    config = config_of(
        batch={"size": size, "micro_size": 1},
        schedule={"kind": "linear", "total": "2.5 epochs", "warmup": "0.5 epochs", "final_fraction": 0.0},
    )
    plan = Plan(config, samples_per_epoch=samples)
    assert plan.total_steps == math.ceil(2.5 * samples / size)
    peak = max(range(plan.total_steps), key=plan.learning_rate)
    assert peak + 1 == math.ceil(0.5 * samples / size) or plan.total_steps < 4
    every = Span(Fraction(1, 2), "epochs")
    crossed = [step for step in range(plan.total_steps) if plan.due(every, step, step + 1)]
    assert len(crossed) == len({(step + 1) * size * 2 // samples for step in crossed}) or samples < size
    assert all((step + 1) * size >= 0.5 * samples for step in crossed[:1])
