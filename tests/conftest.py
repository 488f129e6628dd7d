"""What all tests share: quiet one-thread settings, ranks, and a small set of shards."""

from __future__ import annotations

import os
import signal
import sysconfig
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch: one thread a process, since ranks share the cores; and every cache in a folder of this
# session's own, so that no test depends on what another session or the user's home left. pytest-xdist's workers have the
# folder of the process that started them: one of them compiles what all of them need.
_CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.TemporaryDirectory(prefix="pretrain-tests-")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # but for `make gpu`
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
if _CACHE is not None:
    for _variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        os.environ[_variable] = str(Path(_CACHE.name) / _variable.lower())
for _variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_variable, None)

# A shell starts what runs in its background with Ctrl-C ignored, and every process from here on would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests.distributed import run_ranks, stop_zygotes

MAY_SKIP = ("needs a GPU",)  # under CI any other skipped test is a failure: it could have run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also the tests marked thorough, as .ci/run does")
    group = parser.getgroup("torture", "runs killed at random places (tests/pretrain/test_torture.py)")
    group.addoption("--schedules", type=int, default=5, help="schedules of kills (default: 5)")
    group.addoption("--first-seed", type=int, default=5, help="seed of the first; the others' follow (default: 5)")
    group = parser.getgroup("kernels", "kernels compiled for GPUs that are not there (tests/kernels/test_compiled.py)")
    group.addoption("--all-kernels", action="store_true", help="compile every case, not a few (many minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` has fifteen minutes."""
    if config.getoption("--thorough"):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    torch.set_num_threads(1)
    yield
    stop_zygotes()
    if _CACHE is not None:
        _CACHE.cleanup()


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world, function, *args, timeout=120)`: the result of each rank."""
    return run_ranks


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and validation/: 40 small modules of the standard library, 512 tokens, sequences of up to
    32 divide the chunks. Not to be changed by a test."""
    from pretrain.data.prepare import prepare
    from pretrain.data.preparing.options import Options

    folder = Path(sysconfig.get_paths()["stdlib"])
    small = (path for path in sorted(folder.glob("*.py")) if 2_000 < path.stat().st_size < 12_000)
    files = [path for path, _ in zip(small, range(40), strict=False)]
    out = tmp_path_factory.mktemp("data") / "shards"
    options = Options(vocab_size=512, validation=0.2, tokens_per_chunk=4096)
    prepare(files, out, options, processes=1, say=lambda _: None)
    return out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a skipped test fails, but for the reasons in MAY_SKIP."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if not reason.startswith(MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"skipped where all tests must run: {reason}"
    return report
