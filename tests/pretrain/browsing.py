"""TensorBoard as a browser asks it: its application in this process, without a port."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import viewer

Ask = Callable[..., Any]


def browser(folder: Path) -> Ask:
    """TensorBoard on a folder, read once: GET, or with a body POST, a path of its own."""
    from tensorboard.backend import application
    from werkzeug.test import Client

    once = ("--load_fast", "false", "--reload_interval", "0", "--reload_task", "blocking")
    program = viewer.serving(folder, *once)
    provider, multiplexer = program._make_data_provider()
    made = application.TensorBoardWSGIApp(
        program.flags, program.plugin_loaders, provider, program.assets_zip_provider, multiplexer
    )
    client = Client(made)

    def ask(path: str, body: Any = None, **query: str) -> Any:
        options: Any = {"query_string": query} if body is None else {"json": body}
        answer = client.open(path, method="GET" if body is None else "POST", **options)
        assert answer.status_code == 200, (path, answer.status, answer.get_data(as_text=True))
        return json.loads(answer.get_data(as_text=True))

    return ask


def session_groups(ask: Ask) -> list[Any]:
    """Rows of the page of hyperparameters."""
    experiment = ask("/data/plugin/hparams/experiment", {"experimentName": ""})
    wished = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": info["name"], "order": "ORDER_ASC"} for info in experiment["metricInfos"]],
        "startIndex": 0,
        "sliceSize": 100,
    }
    found: list[Any] = ask("/data/plugin/hparams/session_groups", wished)["sessionGroups"]
    return found
