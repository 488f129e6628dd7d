"""What may differ when a run is resumed: every field of the configuration, changed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config.load import resume_problems
from pretrain.config.objective import OF_KINDS
from pretrain.config.run import Config

# Rich, so that no field is at a value that allows no other.
BASE = Config.model_validate(
    {
        "model": {"max_positions": 512, "positions": "rope"},
        "data": {"train": "a", "validation": "b", "weights": [1.0]},
        "batch": {"size": 16, "ramp": {"start": 4, "increment": 2, "length": "8 steps"}},
        "schedule": {"total": "100 steps", "warmup": "5 steps", "decay": "90 steps"},
        "parallel": {"recompute": "none"},
        "monitor": {"validate_every": "10 steps"},
    }
)
ENCODER = Config.model_validate(
    {
        **BASE.model_dump(mode="json"),
        "model": {"kind": "bert", "max_positions": 512},
        "objective": {"kind": "masked", "masking": "span", "mask_share": 0.5, "pairs": "order"},
    }
)
NAMED = Config.model_validate(
    {
        **BASE.model_dump(mode="json"),
        "data": {"train": {"web": "a", "code": {"folder": "b", "epochs": 4, "validation": "c"}}, "seq_length": 128},
    }
)
# DESIGN, promise 2: "On resume only `parallel`, `batch.micro_size`, `monitor`, `checkpoint` and a longer `schedule.total`
# may differ"; and what does not decide the numbers: whose kernels compute them (promise 1), where the run and the shards
# lie, how far is read ahead.
SPIKES = ("run.on_spike", "run.spike_factor", "run.max_rewinds")  # what is done about the loss, from here on
MAY_DIFFER: tuple[str, ...] = (
    "parallel.",
    "monitor.",
    "checkpoint.",
    "batch.micro_size",
    "run.dir",
    "run.stop_at",
    *SPIKES,
)
MAY_DIFFER += ("data.train", "data.validation")
MAY_DIFFER += ("kernels.", "data.prefetch", "data.cache.", "data.remote.", "schedule.total")
ONE_VALUE = ("version", "model.kind", "objective.kind", "optimizer.kind")
WORDS = (
    "swiglu",
    "triton",
    "rms",
    "post",
    "alibi",
    "linear",
    "wsd",
    "full",
    "fp32",
    "never",
    "other",
    "none",
    "word",
    "pass",
)
CANDIDATES = (
    False,
    True,
    2,
    3,
    4,
    0.5,
    0.25,
    3.5,
    768,
    [0.5],
    [3, 3],
    [0.5, 0.5],
    {"kind": "ntk"},
    "rewind",
    {"rank": 2},
    "120 steps",
    "7 steps",
    *WORDS,
    "0.5 of total",
    ["a", "b"],
    "weight",
    "other {text}",
    [{"seq_length": 8, "length": "3 steps"}],
    "3 GiB",
    "https://store.example",
    [{"from": "8 steps", "weights": {"web": 1, "code": 2}}],
)


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def task(kind: str) -> Config:
    """On labelled examples."""
    values = BASE.model_dump(mode="json")
    values["batch"]["ramp"] = values["data"]["weights"] = None
    values["model"]["initial"] = "m"
    return Config.model_validate({**values, "objective": {"kind": kind}})


PAIRS = {
    kind: Config.model_validate(
        {**BASE.model_dump(mode="json"), "model": {"kind": "encoder-decoder"}, "objective": {"kind": kind}}
    )
    for kind in ("span-corruption", "prefix", "sequence-to-sequence")
}
TASKS = {kind: task(kind) for kind in ("classification", "question-answering", "instruction")}


def base_of(path: str) -> Config:
    """In which a field has an effect."""
    if path == "model.lora":
        return TASKS["classification"]
    field = path.removeprefix("objective.").split(".")[0]
    kinds = " ".join(kinds for kinds, names in OF_KINDS.items() if field in names).split()
    special = {"model.decoder_layers": "prefix", "monitor.translate_pairs": "sequence-to-sequence"}
    if path in ("data.temperature", "data.curriculum"):
        return NAMED
    if path in special:
        return PAIRS[special[path]]
    if not kinds or "causal" in kinds:
        return BASE
    others = {"masked": ENCODER, **PAIRS, **TASKS}
    return next(config for kind, config in others.items() if kind in kinds)


def changed(path: str) -> Config:
    """Its base with another value at `path`, the first that the configuration takes."""
    for candidate in CANDIDATES:
        values = base_of(path).model_dump(mode="json")
        *sections, key = path.split(".")
        place = values
        for section in sections:
            place = place[section]
        if place[key] == candidate:
            continue
        place[key] = candidate
        try:
            return Config.model_validate(values)
        except ValidationError:
            continue
    raise AssertionError(f"no other value found for {path}")


@pytest.mark.parametrize("path", [path for path in leaves(BASE.model_dump(mode="json")) if path not in ONE_VALUE])
def test_only_what_does_not_change_the_numbers_may_differ(path: str) -> None:
    problems = resume_problems(base_of(path), changed(path))
    if path.startswith(MAY_DIFFER):
        assert problems == []
    else:
        assert [problem.path for problem in problems] == [path]
        assert "was started with" in problems[0].message and "run.dir" in problems[0].mend


def with_total(total: str) -> Config:
    return Config.model_validate({**BASE.model_dump(mode="json"), "schedule": {"total": total}})


@pytest.mark.parametrize(("before", "after"), [("100 steps", "101 steps"), ("1M tokens", "1B tokens")])
def test_a_run_may_become_longer(before: str, after: str) -> None:
    assert resume_problems(with_total(before), with_total(after)) == []


@pytest.mark.parametrize(
    ("before", "after"), [("100 steps", "99 steps"), ("1B tokens", "1M tokens"), ("100 steps", "1B tokens")]
)
def test_a_run_may_not_become_shorter_or_be_counted_otherwise(before: str, after: str) -> None:
    (problem,) = resume_problems(with_total(before), with_total(after))
    assert problem.path == "schedule.total" and "can only become longer" in problem.mend
    assert before in problem.message and after in problem.message


def test_a_phases_micro_batches_alone_may_differ() -> None:
    def with_phase(**changes: Any) -> Config:
        values = BASE.model_dump(mode="json")
        values["data"]["phases"] = [{"seq_length": 8, "length": "3 steps", **changes}]
        return Config.model_validate(values)

    assert resume_problems(with_phase(micro_size=2), with_phase(micro_size=1)) == []
    (problem,) = resume_problems(with_phase(), with_phase(length="4 steps"))
    assert problem.path == "data.phases.0.length" and "'3 steps'" in problem.message


def test_a_removed_section_and_several_differences_are_all_named() -> None:
    values = BASE.model_dump(mode="json")
    values["batch"]["ramp"], values["run"]["seed"], values["optimizer"]["betas"] = None, 7, [0.8, 0.9]
    problems = resume_problems(BASE, Config.model_validate(values))
    assert {problem.path for problem in problems} == {"batch.ramp", "run.seed", "optimizer.betas"}


def test_the_same_configuration_resumes() -> None:
    assert resume_problems(BASE, Config.model_validate(BASE.model_dump(mode="json"))) == []


def with_source(**changes: Any) -> Config:
    values = NAMED.model_dump(mode="json")
    values["data"]["train"]["code"] |= changes
    return Config.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"epochs": 5}, "data.train.code.epochs"),
        ({"epochs": None}, "data.train.code.epochs"),
        ({"tokens": "2K"}, "data.train.code.tokens"),
    ],
)
def test_what_a_named_source_gives_may_not_differ_and_is_named(changes: dict[str, Any], path: str) -> None:
    (problem,) = resume_problems(NAMED, with_source(**changes))
    assert problem.path == path and "was started with" in problem.message


def test_where_the_shards_of_named_sources_lie_may_differ() -> None:
    assert resume_problems(NAMED, with_source(folder="elsewhere", validation="there")) == []


def test_another_weight_another_name_and_another_curriculum_are_named() -> None:
    def weighed(weights: dict[str, float], later: float) -> Config:
        values = NAMED.model_dump(mode="json")
        values["data"]["train"] = {
            name: {"folder": "a", "weight": weight, "validation": "c"} for name, weight in weights.items()
        }
        changed = dict.fromkeys(weights, later)
        values["data"]["curriculum"] = [{"from": "9 steps", "weights": changed}]
        return Config.model_validate(values)

    before = weighed({"web": 1, "code": 2}, 3)
    assert [problem.path for problem in resume_problems(before, weighed({"web": 1, "code": 3}, 3))] == [
        "data.train.code.weight"
    ]
    assert {problem.path for problem in resume_problems(before, weighed({"web": 1, "code": 2}, 4))} == {
        "data.curriculum.0.weights.web",
        "data.curriculum.0.weights.code",
    }
    renamed = {problem.path for problem in resume_problems(before, weighed({"web": 1, "books": 2}, 3))}
    assert {"data.train.code", "data.train.books"} <= renamed


def test_a_run_of_budgets_may_not_become_longer() -> None:
    def of(total: str) -> Config:
        values = with_source(tokens="2K").model_dump(mode="json")
        return Config.model_validate({**values, "schedule": {"total": total}})

    (problem,) = resume_problems(of("100 steps"), of("200 steps"))
    assert problem.path == "schedule.total" and "the budgets of data.train are shares of it" in problem.mend
