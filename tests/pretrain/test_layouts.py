"""One loss: real processes under every kind of layout train as one process does, to the fifth digit in float32.

Losses alone hide most faults (AdamW forgives a wrong scale), so gradient norms, each logical tensor's gradient and each
logical tensor's weights are compared too. The last tests break the code on purpose: the comparison must see it.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from parallel.layout import Layout
from tests.distributed import run_ranks
from tests.training import Course, differences, distance, follow_training, noise_alone, write_config

# A scale of 0.1 is at 32 features what 0.02 is at some hundreds: attention scores that differ, gradients well above
# rounding. AdamW divides each gradient by its own size, so of an element whose gradient is as small as its rounding it
# makes a full step in a random direction; an epsilon above rounding keeps the comparison about the layouts. (At a scale of
# 0.02 and an epsilon of 1e-8 the micro-batch size alone changes one process's gradient norm by 1.3e-5.)
COMMON = [
    "model.initial_scale=0.1",
    "optimizer.epsilon=1e-5",
    "optimizer.learning_rate=2e-3",
    "monitor.validation_samples=6",
]
MODERN = ["model.positions=rope", "model.norm=rms", "model.activation=swiglu"]
CLASSIC = ["model.positions=learned", "model.norm=layer", "model.activation=gelu"]
MODELS = {
    "modern": [*MODERN, "model.biases=false"],
    "classic": CLASSIC,
    "classic untied": [*CLASSIC, "model.tie_embeddings=false"],
    "grouped untied": [*MODERN, "model.num_kv_heads=2", "model.tie_embeddings=false"],
}


class Case(NamedTuple):
    layout: str
    model: str
    micro: int
    recompute: str = "none"

    def __str__(self) -> str:
        return f"{self.layout or 'one process'}: {self.model}, micro {self.micro}"


# The one process that all are compared with computes all 8 sequences of a step at once. tests/test_matrix.py has every pair
# of axes; here each engine and schedule is seen at work, and what is logged and validated is compared too.
CASES = [
    Case("", "modern", 1, "full"),
    Case("tp=2", "grouped untied", 2, "selective"),
    Case("tp=2,sp", "classic untied", 2),
    Case("pp=4", "classic untied", 4, "selective"),  # fewer micro-batches than stages
    Case("pp=2,vp=2", "modern", 2, "full"),
    Case("dp=2,zero=1", "grouped untied", 2),
    Case("tp=2,sp,pp=2", "classic", 2, "full"),
    Case("pp=2,vp=2,dp=2,zero=1", "classic", 2),
    Case("tp=2,pp=2,dp=2,zero=1", "classic", 2),
]
PLAIN, INTERLEAVED = (f"forward_backward_pipelining_{how}_interleaving" for how in ("without", "with"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("documents"))


def make_shards(folder: Path) -> Path:
    """Half of the documents are single words, half paragraphs: micro-batches differ much in the targets that count. The
    vocabulary of 380 leaves padding on the last tensor rank alone."""
    from pretrain.data.prepare import prepare
    from pretrain.data.preparing.options import Options

    modules = islice(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")), 24)
    texts = [path.read_bytes()[:4000].decode("ascii", "ignore") for path in modules]
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text("\n\n".join(text.split()) if number % 2 else text)
    options = Options(vocab_size=380, validation=0.2, split="blank-line", tokens_per_chunk=1024)
    prepare([folder], folder / "shards", options, processes=1, say=lambda _: None)
    return folder / "shards"


Follow = Callable[..., list[Course]]


@pytest.fixture(scope="module")
def follow(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Follow:
    """Train under a layout in real processes: each rank's course."""

    def run(layout: str, model: str, *overrides: str, bug: str = "") -> list[Course]:
        wanted = Layout.parse(layout)
        config = write_config(tmp_path_factory.mktemp("run"), shards)
        parallel = [
            f"parallel.{axis}={str(getattr(wanted, axis)).lower()}"
            for axis in ("tensor", "sequence", "pipeline", "virtual", "zero")
        ]
        settings = [*COMMON, *MODELS[model], *parallel, *overrides]
        return run_ranks(wanted.size, follow_with, bug, str(config), settings)

    return run


@pytest.fixture(scope="module")
def reference(follow: Follow) -> Callable[[str], Course]:
    """What one process does, run once a model."""
    known: dict[str, Course] = {}

    def course(model: str) -> Course:
        if model not in known:
            known[model] = follow("", model, "batch.micro_size=8")[0]
        return known[model]

    return course


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_the_same_under_every_layout(
    case: Case, follow: Follow, reference: Callable[[str], Course]
) -> None:
    settings = [f"batch.micro_size={case.micro}", f"parallel.recompute={case.recompute}"]
    courses = follow(case.layout, case.model, *settings)
    assert list(differences(reference(case.model), courses[0])) == []
    assert all(course.logged == courses[0].logged for course in courses), "ranks disagree"
    _check_engines(Layout.parse(case.layout), courses)


def _check_engines(layout: Layout, courses: list[Course]) -> None:
    """megatron-core's schedules and DeepSpeed's step really ran where they should, on every rank and in every step."""
    schedule = {1: None, 2: PLAIN, 4: PLAIN}[layout.pipeline] if layout.virtual == 1 else INTERLEAVED
    for course in courses:
        steps = len(course.logged)
        assert steps == 10
        assert course.calls.get("step", 0) == (steps if layout.zero else 0)
        assert {name for name in course.calls if name != "step"} == ({schedule} if schedule else set())
        assert schedule is None or course.calls[schedule] > steps  # and validations


def test_training_with_label_smoothing_and_z_loss_is_the_same(
    follow: Follow, reference: Callable[[str], Course]
) -> None:
    """Under a cut vocabulary, whose last rank alone has padding, and a pipeline; three steps."""
    added = ["objective.label_smoothing=0.1", "objective.z_loss=1e-3", "schedule.total=3 steps"]
    one = follow("", "modern", "batch.micro_size=8", *added)[0]
    courses = follow("tp=2,pp=2", "modern", "batch.micro_size=2", *added)
    assert list(differences(one, courses[0])) == []
    assert all(course.logged == courses[0].logged for course in courses), "ranks disagree"
    plain = reference("modern").logged[0]["loss"]
    assert one.logged[0]["loss"] > plain + 0.01, "both must act: z-loss alone adds about 1e-3 ln(384)^2"


@pytest.mark.parametrize("model", MODELS)
def test_what_is_compared_has_all_that_could_go_wrong(
    model: str, follow: Follow, reference: Callable[[str], Course]
) -> None:
    course = reference(model)
    norms = [step["grad_norm"] for step in course.logged]
    assert min(norms) > 0.2 and sum(norm > 1.0 for norm in norms) >= 5, "clipping must act"
    assert course.validated[-1] < course.validated[0] - 0.2, "it must learn"
    total = sum(tensor.double().square().sum() for tensor in course.gradients.values()) ** 0.5
    assert abs(total / norms[0] - 1) < 1e-5, "the norm must count each logical element once"
    # Attention without rotary positions does not change when all keys are shifted: those gradients are truly zero.
    shifts = {f"blocks.{i}.attention.k.bias" for i in range(4)} if model.startswith("classic") else set()
    assert noise_alone(course) == shifts


def test_weights_that_noise_alone_moves_neither_fail_nor_hide_a_fault(follow: Follow) -> None:
    one, other = (follow("", "classic", "optimizer.epsilon=1e-8", f"batch.micro_size={size}")[0] for size in (8, 2))
    noise = noise_alone(one)
    assert noise == {f"blocks.{i}.attention.k.bias" for i in range(4)}
    wandered = [line for line in differences(one, other) if any(name in line for name in noise)]
    assert wandered and all(line.startswith("weights: ") for line in wandered)
    assert not any(".k.bias" in line for line in differences(one, other, exempt=noise))
    gradients = dict(other.gradients)
    gradients["blocks.1.attention.k.bias"] = gradients["blocks.1.attention.k.bias"] + 1e-6
    faulty = differences(one, other._replace(gradients=gradients), exempt=noise)
    assert any("gradients: blocks.1.attention.k.bias" in line for line in faulty)


def test_micro_batches_differ_in_the_targets_that_count(follow: Follow) -> None:
    [course] = follow("", "modern", "batch.micro_size=1")
    steps = [course.counts[first : first + 8] for first in range(0, len(course.counts), 8)]
    assert len(steps) == 10
    assert all(max(step) - min(step) >= 3 for step in steps)


# -- bfloat16, which rounds differently in every layout ----------------------------------------------------------------

BF16 = "precision.compute=bf16"


@pytest.fixture(scope="module")
def bf16(follow: Follow) -> Course:
    return follow("", "classic", BF16, "batch.micro_size=8")[0]


@pytest.fixture(scope="module")
def bf16_micro(follow: Follow) -> Course:
    return follow("", "classic", BF16, "batch.micro_size=1")[0]


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,zero=1"])
def test_bf16_under_data_parallelism_differs_no_more_than_by_micro_batches(
    layout: str, follow: Follow, bf16: Course, bf16_micro: Course
) -> None:
    course = follow(layout, "classic", BF16, "batch.micro_size=2")[0]
    allowed = distance(bf16, bf16_micro)
    assert 0 < allowed["gradients"] < 0.01
    found = distance(bf16, course)
    assert {name for name in found if found[name] > 2 * allowed[name]} == set(), (found, allowed)


@pytest.mark.parametrize("layout", ["dp=2,zero=1", "tp=2,pp=2", "tp=2,pp=2,zero=1"])
def test_bf16_is_as_near_to_fp32_under_every_layout(
    layout: str, follow: Follow, bf16: Course, reference: Callable[[str], Course]
) -> None:
    """Tensor parallelism also rounds the halves of a sum, so its runs lie further from a bf16 run of one process than
    those that share its forward pass; but not further from the truth."""
    course = follow(layout, "classic", BF16, "batch.micro_size=2")[0]
    truth = reference("classic")
    allowed, found = distance(truth, bf16), distance(truth, course)
    assert {name for name in found if found[name] > 2 * allowed[name]} == set(), (found, allowed)
    changed = [tensor for name, tensor in course.weights.items() if name.endswith("up.weight")]
    assert all((tensor.bfloat16().float() != tensor).float().mean() > 0.9 for tensor in changed), "masters are float32"


# -- the comparison sees faults ----------------------------------------------------------------------------------------


def follow_with(bug: str, config_path: str, overrides: list[str]) -> Course:
    """`follow_training` in a rank, with a fault put into the code."""
    with FAULTS[bug]():
        return follow_training(config_path, overrides)


@contextmanager
def _none() -> Iterator[None]:
    yield


@contextmanager
def _no_sum_over_slices() -> Iterator[None]:
    with mock.patch("parallel.layers.mark_summed", lambda parameter, axis: parameter):
        yield


@contextmanager
def _no_tied_sum() -> Iterator[None]:
    with mock.patch("parallel.replicated.sum_tied", lambda parameter, group: None):
        yield


@contextmanager
def _tied_counted_twice() -> Iterator[None]:
    with mock.patch("parallel.gradients.counts_once", lambda p, rank: rank == 0 or hasattr(p, "tensor_model_parallel")):
        yield


@contextmanager
def _mean_of_means() -> Iterator[None]:
    from pretrain.train import Run

    def forward_backward(run: Run, data: Any) -> torch.Tensor:
        run.built.train(True)
        total = torch.zeros(())
        for batch in data.batches:
            loss = run.built.stages[0](batch)
            with run.engine.no_sync():
                (loss / batch.mask.sum() / len(data.batches)).backward()
            total += loss.detach()
        return total

    with mock.patch.object(Run, "forward_backward", forward_backward):
        yield


@contextmanager
def _masks_by_local_head() -> Iterator[None]:
    with mock.patch("parallel.layers.Parts.first", lambda parts, count: 0):
        yield


@contextmanager
def _masks_by_local_row() -> Iterator[None]:
    with mock.patch("parallel.layers.Parts.first_row", lambda parts, rows: 0):
        yield


@contextmanager
def _default_exchange() -> Iterator[None]:
    """megatron-core's own settings for interleaved stages, with which two stages' messages are mixed up on gloo."""
    from parallel import schedules

    original = schedules._schedule_config

    def config(*args: Any) -> Any:
        made = original(*args)
        made.overlap_p2p_comm, made.batch_p2p_comm = False, True
        return made

    with mock.patch("parallel.schedules._schedule_config", config):
        yield


FAULTS = {
    "": _none,
    "no sum over slices": _no_sum_over_slices,
    "no tied sum": _no_tied_sum,
    "tied counted twice": _tied_counted_twice,
    "mean of means": _mean_of_means,
    "masks by local head": _masks_by_local_head,
    "masks by local row": _masks_by_local_row,
    "default exchange": _default_exchange,
}


BRIEF = "schedule.total=3 steps"


@pytest.fixture(scope="module")
def briefly(follow: Follow) -> Course:
    return follow("", "classic", BRIEF, "batch.micro_size=8")[0]


@pytest.mark.parametrize(
    ("layout", "bug"),
    [
        ("tp=2,sp", "no sum over slices"),
        ("pp=2", "no tied sum"),
        ("pp=2", "tied counted twice"),
        ("dp=2", "mean of means"),
        ("tp=2", "masks by local head"),
        ("tp=2,sp", "masks by local row"),
        ("pp=2,vp=2", "default exchange"),
    ],
)
def test_a_fault_is_seen(layout: str, bug: str, follow: Follow, briefly: Course) -> None:
    course = follow(layout, "classic", "batch.micro_size=2", BRIEF, bug=bug)[0]
    found = list(differences(briefly, course))
    print(*found, sep="\n")
    assert any("gradients" in line for line in found) or any("grad_norm" in line for line in found)


def test_without_a_fault_none_is_seen(follow: Follow, briefly: Course) -> None:
    course = follow("", "classic", "batch.micro_size=2", BRIEF)[0]
    assert list(differences(briefly, course)) == []
