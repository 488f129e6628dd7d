"""What named sources give to a run: budgets, caps, a curriculum, with ramps, phases and ranges that were passed over."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.load import checked_config
from pretrain.data.mixture import Mixture
from pretrain.data.order import Order, Source
from pretrain.data.shares import PERIOD
from pretrain.errors import UserError
from pretrain.schedule import Plan
from pretrain.spikes import Ranges, past

FEW = settings(max_examples=15, deadline=None)
LENGTH, CHUNK = 32, 256
TOKENS = (100_001, 50_001, 20_001)  # of the sources a, b and c


def make(
    sources: dict[str, Any],
    total: str = "400 steps",
    size: int = 16,
    tokens: Sequence[int] = TOKENS,
    batch: dict[str, Any] | None = None,
    **data: Any,
) -> Mixture:
    """Of sources by name, whose shards are not needed."""
    named = {name: {"folder": name, **given} for name, given in sources.items()}
    values = {
        "data": {"train": named, "seq_length": LENGTH, "lanes": 16, "window": 2, **data},
        "batch": {"size": size, "micro_size": 1, **(batch or {})},
        "schedule": {"total": total},
    }
    config = checked_config(values, "mixture")
    lengths = [phase.data.seq_length for phase in config.phases]
    sizes = [[Source((count - 1) // length, CHUNK // length) for count in tokens] for length in lengths]
    plan = Plan(config, sum(source.samples for source in sizes[-1]))
    return Mixture(config.data, 1, tokens[: len(named)], [part[: len(named)] for part in sizes], plan)


def read(mixture: Mixture, skipped: Ranges = ()) -> list[list[tuple[int, int, int]]]:
    """Of each step its sources, samples and tokens a sequence, from the order of its phase."""
    plan, course = mixture.plan, mixture.course(skipped)
    found: list[list[tuple[int, int, int]]] = []
    for phase, steps in itertools.groupby(range(plan.total_steps), plan.phase):
        firsts = [(past(plan.samples_before(step), skipped), plan.size(step)) for step in steps]
        numbers = np.concatenate([np.arange(first, first + size) for first, size in firsts])
        parts = zip(*(part.tolist() for part in course.orders[phase].locate(numbers)), strict=True)
        length = plan.phases[phase].data.seq_length
        found += [[(*next(parts), length) for _ in range(size)] for _, size in firsts]
    return found


def counted(steps: list[list[tuple[int, int, int]]], sources: int) -> list[int]:
    """Tokens of each source, one sequence after the other."""
    totals = [0] * sources
    for source, _, length in itertools.chain.from_iterable(steps):
        totals[source] += length
    return totals


WEIGHED = {"a": {"weight": 5}, "b": {"weight": 3}, "c": {"weight": 2}}
CURRICULUM = [
    {"from": "100 steps", "weights": {"a": 1, "b": 0, "c": 3}},
    {"from": "150K tokens", "weights": {"a": 1, "b": 1, "c": 1}},
]
RAMP = {"ramp": {"start": 4, "increment": 4, "length": "120 steps"}}
PHASES = [{"seq_length": 16, "length": "90 steps"}, {"seq_length": 8, "length": "10K tokens"}]
# Everything that moves a border, alone and together.
WAYS: dict[str, dict[str, Any]] = {
    "weights": {"sources": WEIGHED},
    "curriculum": {"sources": WEIGHED, "curriculum": CURRICULUM},
    "ramp": {"sources": WEIGHED, "curriculum": CURRICULUM, "batch": RAMP},
    "phases": {"sources": WEIGHED, "curriculum": CURRICULUM, "phases": PHASES},
    "caps": {"sources": {"a": {}, "b": {"epochs": 1}, "c": {"epochs": 2}}, "batch": RAMP},
    "all": {
        "sources": {"a": {"weight": 1}, "b": {"weight": 1, "epochs": 1}, "c": {"weight": 1, "epochs": 1.5}},
        "curriculum": CURRICULUM,
        "batch": RAMP,
        "phases": PHASES,
    },
    "budgets": {"sources": {"a": {}, "b": {"tokens": "33K"}, "c": {"tokens": "41K"}}, "phases": PHASES},
}
PASSED = ((96, 176), (1600, 2400))


@pytest.mark.parametrize("skipped", [(), PASSED], ids=["straight", "passing over samples"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_seen_are_those_of_all_sequences_before_a_step(way: str, skipped: Ranges) -> None:
    mixture = make(**WAYS[way])
    steps = read(mixture, skipped)
    for step in (0, 1, 89, 90, 91, 100, 101, 233, 400):
        seen = mixture.course(skipped).tokens(step)
        assert seen == counted(steps[:step], 3), step
        assert sum(seen) == mixture.plan.tokens_before(step)
    told = mixture.seen(400, skipped)
    assert told["b"] == {"tokens": seen[1], "epochs": seen[1] / TOKENS[1]}


@pytest.mark.parametrize("skipped", [(), PASSED], ids=["straight", "passing over samples"])
def test_weights_change_at_just_their_step(skipped: Ranges) -> None:
    mixture = make(**WAYS["ramp"])
    steps, plan = read(mixture, skipped), mixture.plan
    third = next(step for step in range(400) if plan.tokens_before(step) >= 150_000)
    assert 100 < third < 399
    sources = [{source for source, _, _ in step} for step in steps]
    assert set().union(*sources[100:third]) == {0, 2}, "b has no weight there"
    assert 1 in set().union(*sources[90:100]) and 1 in set().union(*sources[third : third + 5])
    for begin, end, shares in ((0, 100, (0.5, 0.3, 0.2)), (100, third, (0.25, 0, 0.75)), (third, 400, (1 / 3,) * 3)):
        part = counted(steps[begin:end], 3)
        assert [count / sum(part) for count in part] == pytest.approx(shares, abs=0.01)
    assert set(mixture.course(skipped).events) == {100, third}
    assert "step 100: data.curriculum: from here a 25.00%, b 0.00%, c 75.00%" in mixture.course(skipped).events[100]


def test_in_a_run_that_passed_over_samples_no_sequence_is_read_twice_in_an_epoch() -> None:
    """Across changes of weights on either side of the range, which lies over one of them."""
    mixture = make(**WAYS["curriculum"])
    begin = mixture.plan.samples_before(100)
    for skipped in (((begin - 80, begin + 160),), ((160, 320), (begin, begin + 16)), ((begin + 16, begin + 32),)):
        order = mixture.course(skipped).orders[0]
        for step in (99, 100, 101):
            number = past(mixture.plan.samples_before(step), skipped)
            assert mixture.course(skipped).slots(step) == mixture.course().slots(step)
            assert order.locate(np.array([number]))[0] in np.flatnonzero(mixture.course().slots(step))
        reads = [(source, sample) for step in read(mixture, skipped)[:150] for source, sample, _ in step]
        largest = [pair for pair in reads if pair[0] == 0]
        assert len(set(largest)) == len(largest) < mixture.sizes[0][0].samples


def test_what_was_read_before_a_range_stays_as_it_was() -> None:
    mixture = make(**WAYS["all"])
    straight = read(mixture)
    first = mixture.plan.samples_before(120)
    assert read(mixture, ((first, first + 160),))[:120] == straight[:120]


def test_counting_costs_the_same_at_ten_and_at_ten_billion_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at the lanes' visits, one more on either side of each range that was passed over."""
    sources = {"a": {"weight": 5}, "b": {"weight": 3, "epochs": 9}, "c": {"weight": 2}}
    curriculum = [
        {"from": "100 steps", "weights": {"a": 1, "b": 0, "c": 3}},
        {"from": "1B tokens", "weights": {"a": 1, "b": 1, "c": 1}},
    ]
    mixture = make(sources, "1T tokens", 1024, (10**12, 10**11, 10**12), curriculum=curriculum)
    plan, looks, visits = mixture.plan, [0], Order.visits
    mixture.course(PASSED)

    def counting(order: Order, number: int) -> Any:
        looks[0] += 1
        return visits(order, number)

    monkeypatch.setattr(Order, "visits", counting)
    for skipped, most in (((), 2), (PASSED, 6)):
        for samples in (10, 10**10):
            step, looks[0] = samples // 1024 + 5, 0
            assert sum(mixture.course(skipped).tokens(step)) == plan.tokens_before(step)
            assert looks[0] <= most


# -- caps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lanes", "size"), [(1, 16), (16, 16), (64, 8)])
def test_no_sequence_is_read_more_often_than_its_epochs_allow(lanes: int, size: int) -> None:
    sources = {"a": {"weight": 1}, "b": {"weight": 2, "epochs": 2}, "c": {"weight": 1, "epochs": 1}}
    mixture = make(sources, "700 steps", size, lanes=lanes)
    reads = np.array([(source, sample) for step in read(mixture) for source, sample, _ in step])
    for index, epochs in ((1, 2), (2, 1)):
        samples = mixture.sizes[0][index].samples
        counts = np.bincount(reads[reads[:, 0] == index, 1], minlength=samples)
        assert counts.max() == epochs
        left = epochs * samples - counts.sum()
        assert 0 <= left <= 4 * lanes + size, "it ends as late as it may"


def test_a_source_that_ends_gives_its_share_to_the_others_in_proportion() -> None:
    sources = {"a": {"weight": 3}, "b": {"weight": 1}, "c": {"weight": 4, "epochs": 1}}
    mixture = make(sources)
    (step,) = mixture.course().events
    assert (
        mixture.course()
        .events[step]
        .endswith("c has given what it may (epochs: 1): from here a 75.00%, b 25.00%, c 0.00%")
    )
    before, after = (counted(part, 3) for part in (read(mixture)[:step], read(mixture)[step:]))
    assert [count / sum(before) for count in before] == pytest.approx([3 / 8, 1 / 8, 1 / 2], abs=0.01)
    assert [count / sum(after) for count in after] == pytest.approx([3 / 4, 1 / 4, 0], abs=0.01)


def test_where_a_source_ends_does_not_depend_on_how_long_the_run_is() -> None:
    """A run may be made longer when it goes on."""
    sources = {"a": {}, "b": {"epochs": 1}, "c": {"epochs": 2}}
    shorter, longer = make(sources), make(sources, "4000 steps")
    assert shorter.recipe == longer.recipe
    events = longer.course().events
    assert shorter.course().events == {step: words for step, words in events.items() if step < 400}
    assert read(longer)[:400] == read(shorter)


def test_a_run_longer_than_what_its_sources_may_give_is_refused_with_the_numbers() -> None:
    sources = {"a": {"epochs": 2}, "b": {"epochs": 2}, "c": {"epochs": 1}}
    with pytest.raises(UserError) as caught:
        make(sources, "1M tokens")
    words = str(caught.value)
    assert "the run takes 1,000,448 tokens" in words and "no source may give more" in words
    assert "(2 epochs)" in words and "raise epochs" in words
    step = int(words.rpartition('"')[0].rpartition('"')[2].removesuffix(" steps"))
    most = make(sources, f"{step} steps")  # the mend that it names
    assert 310_000 < most.total <= 320_000
    with pytest.raises(UserError, match=f"from step {step:,} on"):
        make(sources, f"{step + 1} steps")


def test_a_source_without_weight_does_not_save_a_run_that_runs_dry() -> None:
    curriculum = [{"from": "10 steps", "weights": {"a": 0, "b": 1, "c": 0}}]
    with pytest.raises(UserError, match="no source may give more"):
        make({"a": {}, "b": {"epochs": 1}, "c": {}}, curriculum=curriculum)


def test_a_run_that_passed_over_what_its_caps_left_goes_on_and_says_so() -> None:
    """Refused it could not be mended: caps may not change when a run goes on."""
    mixture = make({"a": {"epochs": 1}, "b": {"epochs": 1}}, "280 steps")
    course = mixture.course(((160, 1600),))
    assert sum(course.tokens(280)) == mixture.total
    assert any("samples were passed over, and no source may give more" in words for words in course.events.values())


# -- budgets ---------------------------------------------------------------------------------------------------------


@FEW
@given(
    st.sampled_from([20, 50, 300]), st.sampled_from([4, 8, 32]), st.sampled_from([1, 16, 256]), st.booleans(), st.data()
)
def test_a_budget_is_met_to_the_batch(
    steps: int, size: int, lanes: int, all_of_them: bool, data: st.DataObject
) -> None:
    total = steps * size * LENGTH
    budgets = [data.draw(st.integers(LENGTH, total // 3)) for _ in range(2)]
    sources: dict[str, Any] = {name: {"tokens": count} for name, count in zip("ab", budgets, strict=True)}
    sources["c"] = {"tokens": total - sum(budgets)} if all_of_them else {}
    budgets += [total - sum(budgets)] if all_of_them else []
    mixture = make(sources, f"{steps} steps", size, lanes=lanes)
    seen = mixture.course().tokens(steps)
    assert seen == counted(read(mixture), 3)
    for budget, count in zip(budgets, seen, strict=False):
        assert abs(budget - count) <= size * LENGTH


def test_a_budget_is_spread_over_the_run() -> None:
    mixture = make({"a": {}, "b": {"tokens": "50K"}, "c": {}})
    for step in (100, 200, 300, 400):
        assert mixture.course().tokens(step)[1] == pytest.approx(50_000 * step / 400, rel=0.02)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"a": {"tokens": "200K"}, "b": {"tokens": "200K"}, "c": {}},
         "the budgets of a, b are 400,000 tokens together, and the run has 204,800; lower them, or raise schedule.total"),
        ({"a": {"tokens": "20K"}, "b": {"tokens": "20K"}, "c": {"tokens": "20K"}},
         'every source has a budget, 60,000 tokens together, and the run has 204,800; set schedule.total="60000 tokens"'),
        ({"a": {}, "b": {}, "c": {"tokens": "50K", "epochs": 2}},
         "data.train.c.tokens: 50,000 are more than 2 epochs of its 20,001; lower them, raise its epochs, or prepare more"),
        ({"a": {"weight": 1}, "b": {"weight": 1e-5}}, "from step 0 on b would give less than 1/4096 of the sequences"),
        ({"a": {"weight": 1}, "b": {"weight": 1e-5}, "c": {"tokens": 96}}, "on b would give less than 1/4096"),
    ],
)  # fmt: skip
def test_amounts_that_cannot_be_are_refused_with_the_numbers(sources: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        make(sources)
    assert words in str(caught.value)


# -- shares by size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (2.0, 0.5), (5.0, 0.2)])
def test_without_weights_shares_are_by_size_and_temperature(temperature: float, power: float) -> None:
    slots = make({"a": {}, "b": {}, "c": {}}, temperature=temperature).course().slots(0)
    sizes = [count**power for count in TOKENS]
    assert [count / PERIOD for count in slots] == pytest.approx([size / sum(sizes) for size in sizes], abs=1 / PERIOD)


# -- the recipe, and what is told ------------------------------------------------------------------------------------


def test_whatever_decides_the_order_is_in_the_recipe() -> None:
    curriculum = [{"from": "100 steps", "weights": {"a": 1, "b": 1, "c": 1}}]
    other = [{"from": "101 steps", "weights": {"a": 1, "b": 1, "c": 1}}]
    heavier = [{"from": "100 steps", "weights": {"a": 1, "b": 1, "c": 2}}]
    variants: list[Mixture] = [
        make(WEIGHED),
        make({**WEIGHED, "a": {"weight": 4}}),
        make({"x": {"weight": 5}, "y": {"weight": 3}, "z": {"weight": 2}}),
        make({**WEIGHED, "c": {"weight": 2, "epochs": 3}}),
        make({**WEIGHED, "c": {"weight": 2, "epochs": 4}}),
        make({**WEIGHED, "c": {"tokens": "20K"}}),
        make({**WEIGHED, "c": {"tokens": "21K"}}),
        make({**WEIGHED, "c": {"tokens": "21K"}}, "401 steps"),
        make(WEIGHED, curriculum=curriculum),
        make(WEIGHED, curriculum=other),
        make(WEIGHED, curriculum=heavier),
        make({"a": {}, "b": {}, "c": {}}),
        make({"a": {}, "b": {}, "c": {}}, temperature=2.0),
    ]
    recipes = [repr(mixture.recipe) for mixture in variants]
    assert len(set(recipes)) == len(recipes)
    assert make(WEIGHED).recipe == variants[0].recipe


def test_a_run_tells_what_each_source_is_to_give() -> None:
    mixture = make({"a": {"weight": 1}, "b": {"weight": 1, "epochs": 1}})
    seen = mixture.course().tokens(400)
    first, second = mixture.told()
    assert (
        first == f"  a: 50.00% of the sequences at first; {seen[0]:,} tokens in all, {seen[0] / TOKENS[0]:.2f} epochs"
    )
    assert second.startswith("  b: 50.00% of the sequences at first;") and "epochs" in second
    late = make(WEIGHED, curriculum=[{"from": "400 steps", "weights": {"a": 1, "b": 1, "c": 1}}])
    assert late.told()[-1] == "warning: data.curriculum: the run ends before step 400, where one begins"


def test_changes_that_come_in_the_same_step_are_refused() -> None:
    curriculum = [{"from": "2 steps", "weights": {"a": 1}}, {"from": "800 tokens", "weights": {"a": 2}}]
    with pytest.raises(
        UserError, match=r"data.curriculum.1.from: 800 tokens is step 2, and the one before begins with step 2"
    ):
        make({"a": {}}, curriculum=curriculum)
