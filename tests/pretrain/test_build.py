"""What is decided when a run is built, and the words for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import codecache

from kernels.backends import Backends
from parallel.layout import Layout
from pretrain import build
from pretrain.build import choose_compile, choose_precision
from pretrain.config.load import checked_config
from pretrain.config.run import Config
from pretrain.errors import UserError


def grid(tensor: int = 1, device: str = "cpu", told: Any = None) -> Any:
    """As much of a grid as a choice needs; `told`: what rank 0 says, where this is another rank."""
    return SimpleNamespace(
        layout=Layout(tensor=tensor),
        device=torch.device(device),
        from_first=lambda value: value if told is None else told,
    )


def config(**precision: str) -> Config:
    return Config.model_validate({"precision": precision})


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set and removed again, so that it is restored")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, "set by the test, so that it is restored")
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH on which there is a g++ and nothing else."""
    path = tmp_path / "bin" / "g++"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return path


# -- torch.compile ---------------------------------------------------------------------------------------------------


def test_it_compiles_where_a_compiler_is_found(compiler: Path) -> None:
    assert choose_compile(config(compile="auto"), grid()) == (True, "compiled")
    assert choose_compile(config(compile="always"), grid()) == (True, "compiled")


def test_it_never_compiles_when_told_so(compiler: Path) -> None:
    compiles, why = choose_compile(config(compile="never"), grid())
    assert not compiles and why == "eager (precision.compile: never)"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_without_a_compiler_it_goes_on_and_says_what_is_missing(compiler: Path) -> None:
    compiler.unlink()
    compiles, why = choose_compile(config(compile="auto"), grid())
    assert not compiles and "eager" in why and "g++" in why


def test_without_a_compiler_always_is_a_mistake_with_its_mend(compiler: Path) -> None:
    compiler.unlink()
    with pytest.raises(UserError, match=r"precision\.compile: always needs .*g\+\+.*install one, or set it to auto"):
        choose_compile(config(compile="always"), grid())


def test_the_compiler_that_cxx_names_counts(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang-of-mine")
    assert not choose_compile(config(compile="auto"), grid())[0]
    compiler.rename(compiler.with_name("clang-of-mine"))
    assert choose_compile(config(compile="auto"), grid())[0]


def test_tensor_parallelism_is_eager_but_where_it_is_asked_for(compiler: Path) -> None:
    compiles, why = choose_compile(config(compile="auto"), grid(tensor=2))
    assert not compiles and "tensor parallelism" in why
    assert choose_compile(config(compile="always"), grid(tensor=2)) == (True, "compiled")


def test_compiled_code_lies_where_nobody_else_can_write(compiler: Path, tmp_path: Path) -> None:
    """Also where the folder was there before with other permissions: what is in it is unpickled."""
    folder = tmp_path / "cache" / "pretrain" / "inductor"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    choose_compile(config(compile="auto"), grid())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert Path(codecache._HEADER_DIR).parent == Path(codecache._HEADER_LOCK_DIR).parent.parent == folder


def test_a_cache_folder_of_the_users_choice_stays(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    choose_compile(config(compile="auto"), grid())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_precision_that_is_named_stays(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "computes_in_bf16", lambda device: compute == "fp32")
    wished = config(compute=compute)
    assert choose_precision(wished, grid()) == wished


@pytest.mark.parametrize(("fast", "compute"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_where_it_is_the_faster(fast: bool, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes nothing else of the config."""
    monkeypatch.setattr(build, "computes_in_bf16", lambda device: fast)
    wished = config(compute="auto", compile="never")
    chosen = choose_precision(wished, grid())
    assert chosen.precision.compute == compute and chosen.precision.compile == "never"
    assert chosen.model_dump(exclude={"precision"}) == wished.model_dump(exclude={"precision"})


def test_all_ranks_take_what_the_first_one_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts may differ: one with bfloat16 units and one without must not train in two precisions."""
    monkeypatch.setattr(build, "computes_in_bf16", lambda device: True)
    assert choose_precision(config(compute="auto"), grid(told="fp32")).precision.compute == "fp32"


# -- kernels ---------------------------------------------------------------------------------------------------------


def test_norms_rotary_and_activations_are_torchs_unless_asked_for() -> None:
    """Also on a GPU, where loss and optimizer are Triton's if they can be."""
    for device in ("cpu", "meta"):
        chosen = build.choose_kernels(Config(model={"positions": "rope"}), grid(device=device), torch.float32)
        assert {name: who for name, (who, _) in chosen.items()} == dict.fromkeys(
            ("loss", "norm", "rotary", "activation", "optimizer"), "torch"
        )
    assert [name for name, (_, reason) in chosen.items() if reason] == ["loss", "optimizer"]


def test_who_turns_positions_is_not_told_where_none_are_turned() -> None:
    chosen = build.choose_kernels(Config(), grid(), torch.float32)
    assert "rotary" not in chosen and build.try_kernels(chosen, Backends())[0].endswith(
        "activation torch, optimizer torch"
    )


@pytest.mark.parametrize("part", ["norm", "rotary", "activation"])
def test_triton_is_refused_where_it_cannot_run(part: str) -> None:
    wish = Config(model={"positions": "rope"}, kernels={part: "triton"})
    with pytest.raises(UserError, match=rf"kernels.{part}: triton cannot run on cpu: .*TRITON_INTERPRET.*torch can"):
        build.choose_kernels(wish, grid(), torch.float32)


def test_rows_that_are_too_wide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "unsupported", lambda _: "")
    wish = Config(model={"hidden_size": 6144}, kernels={"norm": "triton"})
    with pytest.raises(UserError, match=r"kernels.norm: .* rows of at most 4,096 features are supported, found 6,144"):
        build.choose_kernels(wish, grid(), torch.float32)


def test_a_wish_for_rotary_without_any_is_told() -> None:
    with pytest.raises(UserError, match=r"kernels.rotary: has no effect with model.positions: learned"):
        checked_config({"kernels": {"rotary": "triton"}}, "test")
