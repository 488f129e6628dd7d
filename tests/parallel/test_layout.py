"""A layout as a value, and the check that it fits: every problem at once, mends that mend, and nothing accepted that
cannot be built."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backends import Backends
from parallel.axes import ContextAxis, TensorAxis
from parallel.grid import Grid
from parallel.layout import Layout, ParallelConfig, Problem, Shapes, layout_problems
from parallel.logical import logical_tensors
from parallel.stages import cuts, layers_of_parts
from pretrain.build import build_stages
from pretrain.config.run import Config
from pretrain.sizes import Sizes

degrees = st.integers(1, 64)
layouts = st.builds(
    Layout,
    tensor=degrees,
    sequence=st.booleans(),
    context=degrees,
    pipeline=degrees,
    virtual=degrees,
    data=degrees,
    zero=st.integers(0, 3),
)


@given(layouts)
@settings(derandomize=True, deadline=None)
def test_a_layout_is_read_from_what_it_prints_and_from_its_short_form(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vp": "virtual", "dp": "data", "zero": "zero"}
    parts = [f"{name}={getattr(layout, axis)}" for name, axis in names.items()] + ["sp"] * layout.sequence
    assert Layout.parse(",".join(parts)) == Layout.parse(" , ".join(reversed(parts))) == layout


def test_a_layout_reads_as_in_the_papers() -> None:
    assert str(Layout.parse("tp=2,sp,pp=4,dp=8,zero=1")) == "tp2 x sp x pp4 x dp8, zero 1"
    assert str(Layout()) == "1 process, zero 0" and Layout.parse("") == Layout()
    assert Layout.parse("tp=2,cp=3,pp=5,vp=7,dp=11").size == 2 * 3 * 5 * 11


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tp=2,ep=2", "'ep=2' is none of tp=N, cp=N, pp=N, vp=N, dp=N, zero=N, sp or offload"),
        ("tp", "'tp' is none of"),
        ("tp=-1", "'tp=-1' is none of"),
        ("tp=2;pp=2", "'tp=2;pp=2' is none of"),
        ("pp=0", "a degree is at least 1"),
        ("zero=4", "stages 0 to 3"),
        ("tp=2,pp=2,tp=4", "'tp=4' comes after another"),
        ("sp,sp", "'sp' comes after another"),
    ],
)
def test_a_layout_that_cannot_be_read_is_refused_with_the_part_that_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Layout.parse(text)


def test_data_parallelism_is_what_the_other_degrees_leave() -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=3, virtual=2, zero=1)
    assert Layout.of(parallel, 24) == Layout.parse("tp=2,sp,pp=3,vp=2,dp=4,zero=1")
    assert Layout.of(parallel, 24).size == 24
    with pytest.raises(ValueError, match="20 processes are not a multiple of tensor x context x pipeline = 6"):
        Layout.of(parallel, 20)


def test_every_problem_is_told_at_once() -> None:
    parallel = ParallelConfig(tensor=5, sequence=True, context=2, pipeline=4, virtual=2, zero=3)
    found = layout_problems(parallel, Shapes(6, 8, 4, 64, (("data.seq_length", 32),), (8,), 4), world=7)
    told = " | ".join(f"{problem.path}: {problem.message}; {problem.mend}" for problem in found)
    for what in (
        "parallel.zero: stage 3 shares out gradients while a pipeline still adds to them: wrong norms; set parallel.zero=1",
        "5 does not divide model.num_heads 8; the nearest that works: 4",
        "5 does not divide model.num_kv_heads 4; the nearest that works: 4",
        "5 does not divide model.ffn_hidden_size 64",
        "5 does not divide data.seq_length 32",
        "5 does not divide the vocabulary (padded to 128s)",
        "parallel.virtual: pipeline 4 x virtual 2 is more than model.num_layers 6; the nearest that works: pipeline 3",
        "parallel: tensor x context x pipeline = 40 does not divide the 7 processes; start 40 processes",
    ):
        assert what in told
    assert len(found) == 8


def test_problems_of_the_batch_are_told() -> None:
    def told(parallel: ParallelConfig, sizes: tuple[int, ...], micro: int, world: int) -> list[Problem]:
        return layout_problems(parallel, Shapes(4, 4, 4, 64, (("data.seq_length", 32),), sizes, micro), world)

    interleaved = ParallelConfig(pipeline=2, virtual=2)
    assert told(ParallelConfig(), (8,), 2, 3) == [
        (
            "batch.size",
            "8 sequences cannot be shared by 3 data-parallel ranks",
            "the nearest that works: 9 with batch.micro_size 1",
        )
    ]
    assert told(ParallelConfig(), (8,), 3, 2) == [
        ("batch.micro_size", "3 does not divide a rank's 4 of 8 sequences a step", "the nearest that works: 2")
    ]
    [problem] = told(interleaved, (6,), 6, 2)
    assert problem.path == "batch.micro_size" and problem.mend == "the nearest that works: 3"
    [problem] = told(interleaved, (5,), 5, 2)
    assert problem.path == "batch.size" and problem.mend == "the nearest that works: 4 with batch.micro_size 2"
    full, *ramp = told(ParallelConfig(), (9, 3, 5, 7), 2, 2)
    assert full.path == "batch.size" and [problem.path for problem in ramp] == ["batch.ramp"]
    assert told(ParallelConfig(), (8, 4), 2, 2) == [] == told(interleaved, (8, 4), 2, 2)


# -- against what really fits ----------------------------------------------------------------------------------------


def draw(random: Random) -> tuple[ParallelConfig, Shapes, int]:
    """A run that half of the time fits."""
    pick = random.choice
    parallel = ParallelConfig(
        tensor=pick([1, 1, 2, 2, 3, 4]),
        sequence=pick([False, False, True]),
        pipeline=pick([1, 1, 2, 3, 4]),
        virtual=pick([1, 1, 1, 2]),
        zero=pick([0, 1, 1, 2]),
        offload=pick([False, False, False, True]),
        context=pick([1, 1, 1, 2, 3]),
    )
    heads = pick([2, 4, 6])
    kv_heads = pick([groups for groups in (1, 2, heads) if heads % groups == 0])
    size = pick([4, 6, 8, 12, 24])
    ramp = (size // 2,) if random.random() < 0.3 else ()
    lengths = tuple((name, pick([8, 12, 16])) for name in ("the source's length", "the target's length"))
    shapes = Shapes(pick([2, 4, 6, 8]), heads, kv_heads, pick([6, 8, 12]), lengths, (size, *ramp), pick([1, 2, 3]))
    return parallel, shapes, parallel.tensor * parallel.context * parallel.pipeline * pick([1, 1, 2, 3])


def works(parallel: ParallelConfig, shapes: Shapes, world: int) -> bool:
    """Everything that is dealt out comes out even."""
    tensor, stages, parts, context = parallel.tensor, parallel.pipeline, parallel.virtual, parallel.context
    if (parallel.sequence and tensor == 1) or (parts > 1 and stages == 1) or world % (tensor * context * stages):
        return False
    if (parallel.zero > 1 and stages > 1) or (parallel.offload and parallel.zero < 2):
        return False
    slices = context * (tensor if parallel.sequence else 1)
    if shapes.num_heads % (tensor * context) or any(length % slices for _, length in shapes.lengths):
        return False
    dealt = [shapes.num_heads, shapes.kv_heads, shapes.feed_forward_size, 128]
    if parallel.sequence:
        dealt += [length for _, length in shapes.lengths]
    if any(extent % tensor for extent in dealt) or shapes.num_layers < stages * parts:
        return False
    for size in shapes.batch_sizes:
        micro_batches, rest = divmod(size * tensor * context * stages, world * shapes.micro_size)
        if rest or (parts > 1 and micro_batches % stages):
            return False
    return True


def samples(count: int) -> Iterator[tuple[ParallelConfig, Shapes, int]]:
    random = Random(20)
    return (draw(random) for _ in range(count))


def test_problems_are_found_exactly_where_something_does_not_fit() -> None:
    fits = 0
    for parallel, shapes, world in samples(3000):
        problems = layout_problems(parallel, shapes, world)
        assert (not problems) == works(parallel, shapes, world), (parallel, shapes, world, problems)
        fits += not problems
    assert 150 < fits < 2700


def mended(
    problem: Problem, parallel: ParallelConfig, shapes: Shapes, world: int
) -> tuple[ParallelConfig, Shapes, int]:
    """The run with the one change that the problem's mend names."""
    text = problem.mend
    if match := re.match(r"set parallel\.(\w+)=(\w+)", text):
        value = False if match[2] == "false" else int(match[2])
        return parallel.model_copy(update={match[1]: value}), shapes, world
    if match := re.fullmatch(r"start (\d+) processes", text):
        return parallel, shapes, int(match[1])
    if problem.path == "batch.ramp":
        unit = int(re.fullmatch(r"make start and increment multiples of (\d+)", text)[1])  # type: ignore[index]
        full = shapes.batch_sizes[0]
        return parallel, shapes._replace(batch_sizes=(full, *range(unit, full, unit))), world
    match = re.fullmatch(r"the nearest that works: (?:pipeline )?(\d+)(?: with batch\.micro_size (\d+))?", text)
    assert match, text
    number = int(match[1])
    if problem.path == "batch.size":
        return parallel, shapes._replace(batch_sizes=(number,), micro_size=int(match[2] or shapes.micro_size)), world
    if problem.path == "batch.micro_size":
        return parallel, shapes._replace(micro_size=number), world
    axis = {"parallel.tensor": "tensor", "parallel.context": "context"}.get(problem.path, "pipeline")
    degree = getattr(parallel, axis)
    return parallel.model_copy(update={axis: number}), shapes, world // degree * number


def test_every_mend_removes_its_problem() -> None:
    seen: defaultdict[str, int] = defaultdict(int)
    for parallel, shapes, world in samples(3000):
        for problem in layout_problems(parallel, shapes, world):
            after = {other.path for other in layout_problems(*mended(problem, parallel, shapes, world))}
            # With another pipeline a layout may want another batch; what the mend is about must be well.
            assert problem.path not in after, (problem, parallel, shapes, world)
            seen[problem.path] += 1
    assert set(seen) >= {"parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual"}
    assert set(seen) >= {"batch.size", "batch.micro_size", "batch.ramp"}


def config_of(parallel: ParallelConfig, shapes: Shapes, tied: bool) -> Config:
    model = {
        "num_layers": shapes.num_layers,
        "num_heads": shapes.num_heads,
        "num_kv_heads": shapes.kv_heads,
        "head_size": 2,
        "hidden_size": 4,
        "ffn_hidden_size": shapes.feed_forward_size,
        "tie_embeddings": tied,
    }
    return Config.model_validate({"model": model, "data": {"seq_length": shapes.lengths[0][1]}, "parallel": parallel})


def place(layout: Layout, tensor_rank: int, stage: int) -> Grid:
    """A place of the grid, without its processes."""
    axis = TensorAxis(layout.tensor, tensor_rank, None, layout.sequence)
    return Grid(layout, 0, layout.size, torch.device("meta"), axis, ContextAxis(), 0, stage, 0, None, None, None, None)


Tensors = dict[str, np.ndarray]


def counts(config: Config, layout: Layout, stage: int) -> Tensors:
    """How often each element of each logical tensor lies in the shares of one pipeline stage's tensor ranks."""
    found: Tensors = {}
    for rank in range(layout.tensor):
        with torch.device("meta"):
            stages = build_stages(config, place(layout, rank, stage), Sizes(200), torch.float32, False, Backends())
        for part in stages:
            for name, piece, parameter in logical_tensors(part.module):
                whole = found.setdefault(name, np.zeros(piece.shape, dtype=int))
                if rank == 0 or hasattr(parameter, "tensor_model_parallel"):
                    whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))] += 1
    return found


def test_every_accepted_layout_can_be_built_and_its_shares_tile_the_model() -> None:
    fitting = [sample for sample in samples(400) if not layout_problems(*sample)][:40]
    assert len(fitting) == 40 and len({(parallel.tensor, parallel.pipeline) for parallel, _, _ in fitting}) > 6
    for number, (parallel, shapes, world) in enumerate(fitting):
        config = config_of(parallel, shapes, tied=number % 2 == 0)
        layout = Layout.of(parallel, world)
        whole = counts(config, Layout(), 0)
        held = [counts(config, layout, stage) for stage in range(layout.pipeline)]
        if config.model.tie_embeddings and layout.pipeline > 1:
            held[-1].pop("embedding.weight")  # the copy
        names = [name for tensors in held for name in tensors]
        assert sorted(names) == sorted(whole), layout
        assert all((tensor == 1).all() for tensors in held for tensor in tensors.values()), layout


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.floats(0, 20))
@settings(derandomize=True, deadline=None)
def test_stages_tile_the_layers_in_order(extra: int, pipeline: int, virtual: int, head: float) -> None:
    parts = pipeline * virtual
    layers = layers_of_parts(parts + extra, parts, head)
    held = [cuts(layers, pipeline, rank) for rank in range(pipeline)]
    in_order = [held[chunk % pipeline][chunk // pipeline] for chunk in range(parts)]  # Narayanan, 2.2
    assert [layer for cut in in_order for layer in cut.layers] == list(range(parts + extra))
    assert [cut.first for cut in in_order] == [True, *[False] * (parts - 1)]
    assert [cut.last for cut in in_order] == [*[False] * (parts - 1), True]


@given(st.integers(1, 9), st.integers(2, 4), st.floats(0, 8))
@settings(derandomize=True, deadline=None)
def test_no_other_share_of_the_layers_has_a_faster_slowest_part(extra: int, parts: int, head: float) -> None:
    def slowest(layers: Sequence[int]) -> float:
        return max([*layers[:-1], layers[-1] + head])

    everything = (
        layers for layers in itertools.product(range(1, extra + 2), repeat=parts) if sum(layers) == parts + extra
    )
    assert slowest(layers_of_parts(parts + extra, parts, head)) == min(map(slowest, everything))
