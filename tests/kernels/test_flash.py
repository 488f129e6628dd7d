"""The Triton attention kernels, interpreted on the CPU, against the definition in float64: forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention_triton import unsupported
from tests.distributed import run_python
from tests.kernels import flash_cases as cases
from tests.kernels.flash_cases import Setting
from tests.kernels.workers import interpret


def assert_right(setting: Setting) -> None:
    """`flash_cases.wrong` says what is held: twice plain torch's error, and a Frobenius norm."""
    assert interpret(cases.wrong, setting) == []


# Around the tile of 16: one place, one less and more than a tile, several tiles with a ragged end and without.
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 65, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_around_the_tile_sizes(length: int, causal: bool) -> None:
    heads, dtype = (2, "float32") if length < 60 else (1, "float32" if causal else "float16")
    assert_right(Setting(length, length, heads=heads, causal=causal, dtype=dtype))


@pytest.mark.parametrize("size", [16, 20, 80, 128, 256])
def test_every_head_size_is_padded_to_a_power_of_two(size: int) -> None:
    assert_right(Setting(17, 17, heads=1, size=size))
    assert_right(Setting(17, 17, heads=1, size=size, dtype="float16", descriptors=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_read_the_key_head_of_their_group(groups: int) -> None:
    assert_right(Setting(18, 18, heads=4, groups=groups, batch=2, slopes=True))


@pytest.mark.parametrize("window", [1, 5, 33, 34])
@pytest.mark.parametrize("causal", [True, False])
def test_window_is_the_places_less_than_that_far_away(window: int, causal: bool) -> None:
    assert_right(Setting(34, 34, causal=causal, window=window, heads=1))


@pytest.mark.parametrize("options", [{}, {"slopes": True}, {"softcap": 0.7}, {"scale": 0.03}, {"dropout": True}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_option_alone_and_with_a_window_of_keys_elsewhere(options: dict[str, Any], dtype: str) -> None:
    assert_right(Setting(33, 33, dtype=dtype, **options))
    assert_right(Setting(20, 37, dtype=dtype, causal=False, window=6, first_query=3, **options))


@pytest.mark.parametrize(("queries", "keys", "first"), [(1, 50, 49), (3, 40, 37), (20, 50, 20), (40, 20, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_stand_at_first_query_among_the_keys(queries: int, keys: int, first: int, causal: bool) -> None:
    assert_right(Setting(queries, keys, first_query=first, causal=causal, dropout=True, first_head=5))


@pytest.mark.parametrize("lengths", [(40,), (1, 1, 1, 30, 7), (16, 17, 7), (20, 20)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9, "dropout": True, "softcap": 2.0}])
def test_a_query_sees_its_own_document_alone(lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    assert_right(Setting(40, 40, heads=1, documents=lengths, **options))


def test_documents_of_keys_elsewhere() -> None:
    assert_right(Setting(20, 40, documents=(30, 10), first_query=20))
    # The second document has no key, the third one and two queries, the fourth key's no query.
    lengths = {"documents": (6, 0, 1, 20, 13), "query_documents": (3, 20, 2, 0, 15)}
    assert_right(Setting(40, 40, batch=2, causal=False, **lengths))


@pytest.mark.parametrize("layout", ["packed", "apart", "transposed", "odd"])
@pytest.mark.parametrize("descriptors", [False, True])
def test_any_strides_will_do(layout: str, descriptors: bool) -> None:
    assert_right(Setting(20, 20, groups=2, batch=2, layout=layout, descriptors=descriptors))
    assert_right(Setting(20, 20, size=20, layout=layout, descriptors=descriptors, dtype="float16"))


EVERYTHING: dict[str, Any] = {"window": 20, "documents": (1, 30, 9), "dropout": True, "slopes": True, "softcap": 3.0}


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32), (64, 64)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_tile_gives_the_same(tile: tuple[int, int], descriptors: bool) -> None:
    assert_right(Setting(40, 40, heads=1, tile=tile, descriptors=descriptors))
    assert_right(Setting(40, 40, tile=tile, descriptors=descriptors, causal=False, **EVERYTHING))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ragged_shapes(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    groups = data.draw(st.sampled_from([1, 2]))
    assert_right(
        Setting(
            queries,
            keys,
            heads=groups * data.draw(st.sampled_from([1, 2])),
            groups=groups,
            size=data.draw(st.integers(1, 40)),
            dtype=data.draw(st.sampled_from(["float32", "float16"])),
            causal=data.draw(st.booleans()),
            window=data.draw(st.sampled_from([None, 1, 3, 17])),
            slopes=data.draw(st.booleans()),
            dropout=data.draw(st.booleans()),
            first_query=data.draw(st.integers(0, 20)),
            tile=data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)])),
            descriptors=data.draw(st.booleans()),
        )
    )


# -- hostile numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_of_ten_thousand_are_no_worse_than_plain_torch(dtype: str) -> None:
    assert_right(Setting(33, 33, magnitude=4000.0, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("length", [17, 64])
def test_rows_whose_sums_of_exponentials_underflow(dtype: str, length: int) -> None:
    """lse below -88.7, where exp of it is 0 in float32: cuDNN's backward gave NaN there (pytorch #196678)."""
    setting = Setting(length, length, offset=6.0, dtype=dtype, heads=1)
    lse, exact = interpret(cases.logarithms, setting)
    assert max(exact) < -88.7
    assert lse == pytest.approx(exact, rel=1e-6 if dtype == "float32" else 1e-3)
    assert_right(setting)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(40, 20, window=4, first_query=18),
        Setting(40, 20, window=4, first_query=200, causal=False),
        Setting(40, 40, causal=False, documents=(6, 0, 34), query_documents=(20, 10, 10), dropout=True),
        Setting(40, 20, window=4, first_query=18, edges=(-6, -1, 2)),
        Setting(40, 40, causal=False, documents=(6, 0, 34), query_documents=(20, 10, 10), edges=(-6, 0, 1)),
        Setting(40, 20, window=4, first_query=200, causal=False, edges=(-6, -1, 2)),
        Setting(5, 0),
        Setting(5, 0, edges=(0,)),
    ],
)
def test_a_query_that_sees_no_key_gives_zero_and_has_gradient_zero(setting: Setting) -> None:
    blind, nonzero, infinite = interpret(cases.blind_rows, setting)
    assert blind > 0
    assert nonzero == 0
    assert infinite == blind
    if setting.keys:
        assert_right(setting)


def test_no_queries_give_nothing() -> None:
    assert interpret(cases.shapes, Setting(0, 5)) == [(1, 0, 2, 16), (1, 0, 2, 16), (1, 5, 1, 16), (1, 5, 1, 16)]


def test_offsets_have_64_bits() -> None:
    assert interpret(cases.far_apart) == 0.0


# -- what must hold whatever the numbers ---------------------------------------------------------------------------

SQUARE = Setting(40, 37, heads=2, groups=2, batch=2, size=64, first_query=3, first_head=5)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)])
def test_dropout_is_the_hash_for_every_tile_forward_and_backward(tile: tuple[int, int]) -> None:
    in_output, in_gradient, expected = interpret(cases.masks, SQUARE._replace(tile=tile))
    assert in_output.equal(expected)
    assert in_gradient.equal(expected)


def test_dropout_keeps_as_many_as_it_says() -> None:
    kept, _, _ = interpret(cases.masks, Setting(64, 64, heads=4, groups=4, batch=2, size=64, tile=(64, 64)))
    rate, sigma = 1 - cases.FRACTION, (cases.FRACTION * (1 - cases.FRACTION) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - rate) < 5 * sigma


@pytest.mark.parametrize("place", [0, 15, 16, 30])
def test_no_query_sees_the_future(place: int) -> None:
    by_keys, by_query = interpret(cases.disturbed, Setting(40, 40), place)
    assert by_keys == [at < place for at in range(40)]
    assert by_query == [at != place or at == 0 for at in range(40)]  # the first sees one key, whatever its query


@pytest.mark.parametrize("place", [0, 10, 30])
def test_no_query_sees_another_document(place: int) -> None:
    lengths = (10, 20, 10)
    own = [0] * 10 + [1] * 20 + [2] * 10
    by_keys, _ = interpret(cases.disturbed, Setting(40, 40, causal=False, documents=lengths), place)
    assert by_keys == [document != own[place] for document in own]


def test_the_order_of_documents_changes_none_of_them() -> None:
    assert interpret(cases.permuted, (1, 20, 3, 17), (2, 3, 0, 1)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"slopes": False, "edges": (-6, -1, 0, 1, 2, 7)}])
def test_twice_the_same_is_bitwise_the_same(options: dict[str, Any]) -> None:
    setting = Setting(40, 40, heads=4, groups=2, causal=False, **(EVERYTHING | options))
    first, second = (interpret(cases.kernel_results, setting) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dropout": True, "documents": (7, 11), "slopes": True}, {"dropout": True, "edges": (-2, 0, 1)}]
)
def test_the_operator_is_a_sound_one(options: dict[str, Any]) -> None:
    """torch.library.opcheck: schema, autograd registration, fake tensors, and tracing by AOTAutograd."""
    assert set(interpret(cases.opcheck, Setting(18, 18, **options)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "options", [{}, {"dropout": True, "documents": (7, 11), "window": 5}, {"edges": (-2, 0, 1), "window": 5}]
)
def test_compiled_code_holds_it_whole(options: dict[str, Any]) -> None:
    """fullgraph: no break of the graph, forward or backward; the compiled function calls the operator."""
    difference, operators, launches = interpret(cases.compiled, Setting(18, 18, **options))
    assert difference == 0.0
    assert operators == ["kernels.flash_attention"]
    assert launches == [1, 1]


def test_bfloat16_is_refused_where_products_of_it_are_wrong() -> None:
    assert interpret(cases.refusal, "bfloat16") == "Triton's interpreter multiplies bfloat16 wrongly"
    assert interpret(cases.refusal, "float32") == ""


def test_a_processor_without_the_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match="they run on a GPU; on a CPU only in Triton's interpreter"):
        cases.kernel_results(Setting(4, 4))


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, ""),
        ((8, 0), torch.float32, ""),
        ((8, 6), torch.bfloat16, "tiles are known for compute capability 8.0, 9.0, 10.0, not 8.6"),
    ],
)
def test_a_device_without_tiles_is_refused(
    capability: tuple[int, int], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(1, 4, 1, 16, dtype=dtype, device="cuda")
        assert unsupported(q, q, q) == reason


def test_what_the_options_need_is_told() -> None:
    q = torch.zeros(1, 4, 2, 16)
    assert "no gradient" in unsupported(q, q, q, slopes=torch.ones(2, requires_grad=True))
    bias, edges = torch.ones(2, 4, requires_grad=True), torch.tensor([-1, 0, 1], dtype=torch.int32)
    assert "TRITON_INTERPRET" in unsupported(q, q, q, bias=bias, edges=edges)
    assert "not both" in unsupported(q, q, q, bias=bias, edges=edges, slopes=torch.ones(2))
    assert "needs both" in unsupported(q, q, q, bias=bias)
    assert "N = 2 heads are needed" in unsupported(q, q, q, bias=bias[:1], edges=edges)
    for keys in (None, torch.zeros(1, dtype=torch.int64)):
        assert "int32 `keys`" in unsupported(q, q, q, dropout=0.1, keys=keys)


def test_without_triton_the_reason_is_told() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.attention_triton import unsupported\n"
        "q = torch.zeros(1, 2, 1, 16); print(unsupported(q, q, q))"
    )
    assert run_python(["timeit", "-n1", "-r1", code]).stdout.startswith("triton is not installed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 257}, "at most 256"),
        ({"heads": 3, "groups": 2}, "N a multiple of G"),
        ({"dtype": "float64"}, "must all be float32, float16 or bfloat16"),
    ],
)
def test_what_cannot_run_is_told(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interpret(cases.kernel_results, Setting(4, 4, **change))
