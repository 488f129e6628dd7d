"""`python -m pretrain tensorboard`, asked as a browser asks: TensorBoard's application in this process, without a port."""

from __future__ import annotations

import getpass
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import viewer
from pretrain.errors import UserError
from tests.pretrain import running
from tests.pretrain.browsing import Ask, browser, session_groups


@pytest.fixture(scope="module")
def ask(tiny_data: Path) -> Iterator[Ask]:
    """GET (or with a body POST) a path of TensorBoard's on the shared run."""
    with viewer.linked(viewer.boards_of([str(running.trained(tiny_data))])) as folder:
        yield browser(folder)


def test_the_run_goes_by_its_name_and_every_page_that_it_fills_is_on(ask: Ask) -> None:
    assert ask("/data/runs") == ["run"]
    pages = ask("/data/plugins_listing")
    assert all(pages[page]["enabled"] for page in ("scalars", "custom_scalars", "text", "hparams"))


def test_the_charts_that_stand_first_show_the_run(ask: Ask) -> None:
    """Each has points, but for those of what this run does not have; loss has both curves."""
    [overview] = ask("/data/plugin/custom_scalars/layout")["category"]
    found = {
        chart["title"]: {
            tag: points
            for pattern in chart["multiline"]["tag"]
            for tag, points in ask("/data/plugin/custom_scalars/scalars", run="run", tag=pattern)[
                "tag_to_events"
            ].items()
        }
        for chart in overview["chart"]
    }
    loss, *others = found.values()
    assert loss.keys() == {"loss/train", "loss/validation"}
    assert [step for _, step, _ in loss["loss/train"]] == list(range(1, 13))
    assert [step for _, step, _ in loss["loss/validation"]] == [0, 4, 8, 12]
    assert len(others) == 7 and all(others), found
    assert [sorted(chart) for chart in others if len(chart) > 1] == [
        ["speed/data_wait_seconds", "speed/step_seconds"],
        ["timeline/resume", "timeline/rewind", "timeline/skip", "timeline/spike"],
    ]


def test_groups_of_tags_sort_by_what_matters(ask: Ask) -> None:
    tags = ask("/data/plugin/scalars/tags")["run"]
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(tags)))
    assert groups == ["loss", "optimizer", "speed", "system", "timeline"]


def test_texts_and_what_happened_can_be_read(ask: Ask) -> None:
    groups = dict.fromkeys(tag.partition("/")[0] for tag in sorted(ask("/data/plugin/text/tags")["run"]))
    assert list(groups) == ["happened", "samples", "settings"], "the first two are open"
    told = ask("/data/plugin/text/text", run="run", tag="happened/checkpoint/text_summary")
    assert [event["step"] for event in told][-1] == 12 and "saved (" in told[-1]["text"]
    assert [event["step"] for event in ask("/data/plugin/text/text", run="run", tag="samples/text_summary")] == [6, 12]


def test_the_page_of_hyperparameters_has_the_run_and_its_validation_loss(ask: Ask) -> None:
    experiment = ask("/data/plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"optimizer.learning_rate", "model.num_layers", "run.seed"} <= names
    [group] = session_groups(ask)
    assert group["hparams"]["optimizer.learning_rate"] == pytest.approx(1e-2)
    [metric] = group["metricValues"]
    assert metric["name"]["tag"] == "loss/validation" and metric["trainingStep"] == 12


# -- which runs, and where -------------------------------------------------------------------------------------------


def board(folder: Path) -> str:
    (folder / "tensorboard").mkdir(parents=True)
    return str(folder)


def test_runs_go_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    hostile = board(tmp_path / "c, d:e $(x) 'q'\n")
    runs = [board(tmp_path / name) for name in ("a/one", "b/one", "b/two", "sweep", "sweep/trials/03/run")]
    names = viewer.boards_of([*runs, runs[0], hostile])
    assert list(names) == ["a-one", "b-one", "two", "sweep", "sweep-03", Path(hostile).name]
    assert names["sweep-03"] == tmp_path / "sweep/trials/03/run/tensorboard"
    with viewer.linked(names) as folder:
        assert {path.name: path.resolve() for path in folder.iterdir()} == names
        assert folder.stat().st_mode & 0o077 == 0, "for this user alone"
    assert not folder.exists() and all(path.is_dir() for path in names.values())


def test_names_that_would_be_one_stay_apart(tmp_path: Path) -> None:
    names = viewer.boards_of([board(tmp_path / name) for name in ("x/a-b", "x/a/b", "y/b", "y/a-b")])
    assert len(set(names)) == len(set(names.values())) == 4


def options(run: str, port: int | None = None, host: str = "127.0.0.1") -> Namespace:
    return Namespace(runs=[run], port=port, host=host)


def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """TensorBoard's options, in place of its start."""
    started: list[tuple[str, ...]] = []

    def serving(folder: Path, *options: str) -> Namespace:
        started.append(options)
        return Namespace(main=lambda: 0)

    monkeypatch.setattr(viewer, "serving", serving)
    return started


def test_it_listens_on_this_machine_alone_at_a_free_port_and_says_how_to_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = served(monkeypatch)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(viewer, "PORT", port)
        assert viewer.main(options(board(tmp_path / "mine"))) == 0
        with pytest.raises(UserError, match=f"--port {port}: is in use"):
            viewer.main(options(str(tmp_path / "mine"), port))
    [(*_, chosen)] = started
    assert started[0][:2] == ("--host", "127.0.0.1") and int(chosen) > port
    told = capsys.readouterr().out
    assert f"http://localhost:{chosen}/#custom_scalars" in told
    assert f"ssh -N -L {chosen}:localhost:{chosen} {getpass.getuser()}@{socket.gethostname()}" in told


def test_everyone_is_let_in_only_where_that_is_asked_for_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = served(monkeypatch)
    assert viewer.main(options(board(tmp_path / "mine"), host="0.0.0.0")) == 0
    assert started[0][:2] == ("--host", "0.0.0.0") and "warning: whoever reaches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("port", "host", "words"),
    [(0, "127.0.0.1", "--port 0: a port is"), (70000, "127.0.0.1", "70000"), (None, "no.such.host.invalid", "--host")],
)
def test_where_it_cannot_listen_it_says_so(tmp_path: Path, port: int | None, host: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        viewer.main(options(board(tmp_path / "mine"), port, host))
