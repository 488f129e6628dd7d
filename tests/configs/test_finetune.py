"""The shipped fine-tuning configurations: every section shown, and the settings that the figures of the README came from."""

from __future__ import annotations

import pytest

from pretrain.config import yaml
from pretrain.config.load import load_config
from pretrain.schedule import Plan
from tests.distributed import REPOSITORY

FOLDER = REPOSITORY / "configs/finetune"
SETTINGS = {  # rate, batch, length, epochs
    "classification": (5e-5, 32, 128, 3),
    "tagging": (1e-4, 16, 128, 3),
    "question-answering": (2e-4, 8, 384, 4),
    "instruction": (1e-4, 16, 256, 3),
}


def test_there_is_one_for_each_of_these_tasks() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SETTINGS)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_config_shows_all_its_sections_and_has_the_usual_settings(kind: str) -> None:
    path = FOLDER / f"{kind}.yaml"
    config = load_config(path)
    assert set(yaml.parse(path.read_text())) == set(type(config).model_fields)
    rate, batch, length, epochs = SETTINGS[kind]
    assert config.objective.kind == kind and config.run.dir == f"runs/{kind}"
    assert (config.optimizer.learning_rate, config.batch.size, config.data.seq_length) == (rate, batch, length)
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.model.dropout) == ((0.9, 0.999), 0.01, 0.1)
    plan = Plan(config, samples_per_epoch=1000)
    assert plan.total_steps == -(-1000 * epochs // batch)
    peak = max(range(plan.total_steps), key=plan.learning_rate)
    assert peak + 1 == pytest.approx(plan.total_steps / 10, abs=1) and plan.learning_rate(plan.total_steps - 1) == 0
