"""The maps: each knows every option of ours, so that none can pass unseen."""

from __future__ import annotations

import pytest

from pretrain.config.model import ModelConfig
from pretrain.huggingface.architecture import Architecture
from pretrain.huggingface.architectures import KNOWN

# What says nothing of a trained model: where it began, and the rate where no other is given.
OF_TRAINING = {"dropout", "scale_initial_by_depth", "initial", "reset", "lora"}


def unknown(architecture: Architecture) -> set[str]:
    """Options of ours that the map does not name."""
    theirs = {"model_type": architecture.model_type, "intermediate_size": 8, "max_position_embeddings": 8}
    settings = architecture.settings(theirs)
    named = {*settings, *architecture.unsaid, *OF_TRAINING}
    if settings["positions"] != "rope":
        named |= {"rope_base", "rope_scaling"}
    return set(ModelConfig.model_fields) - named


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.model_type)
def test_each_map_names_every_option_that_changes_what_a_model_computes(architecture: Architecture) -> None:
    assert unknown(architecture) == set()


def test_an_option_that_a_map_forgot_would_be_found() -> None:
    fields = vars(KNOWN[0])
    options = tuple(option for option in fields["options"] if getattr(option, "ours", "") != "attention_window")
    assert unknown(Architecture(**{**fields, "options": options})) == {"attention_window"}
