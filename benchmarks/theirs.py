"""The yardstick of BERT and the encoder-decoder: transformers' own modules, trained by a plain loop on this engine's batches.

The batches are made before anything is timed. AdamW is fused, in two groups; clipping as the engine clips.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.data.stream import Stream
from pretrain.objectives.batch import AnyBatch, MaskedBatch, PairBatch
from pretrain.objectives.choice import objective_for

HELD = 32  # steps of batches, gone through again


def steps(config: Config, bf16: bool, compiled: bool) -> Iterator[float | None]:
    """Train for ever; the loss of every tenth step."""
    torch.manual_seed(config.run.seed)
    sources = Sources.open(config)
    model, loss_of = (bert if config.model.kind == "bert" else marian)(config, sources.vocabulary.size)
    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        fused=True,
    )
    context = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    for step, batch in enumerate(itertools.cycle(batches(config, sources))):
        with context:
            loss = forward(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item() if step % 10 == 0 else None


def batches(config: Config, sources: Sources) -> list[tuple[Tensor, ...]]:
    stream, objective = sources.train, objective_for(config, sources)
    assert isinstance(stream, Stream)
    size, made = config.batch.size, []
    for step in range(HELD):
        numbers = np.arange(step * size, (step + 1) * size)
        tokens = stream.read(numbers, objective.also)
        batch: AnyBatch = objective(torch.from_numpy(numbers), torch.from_numpy(tokens))
        made.append(masked_inputs(batch) if isinstance(batch, MaskedBatch) else pair_inputs(batch))
    return made


def masked_inputs(batch: MaskedBatch) -> tuple[Tensor, ...]:
    """Ids, segments, labels (-100 where none is predicted), and whether the second segment follows, as transformers has it."""
    labels = torch.full_like(batch.inputs, -100)
    counted = batch.mask > 0
    rows = torch.arange(len(labels))[:, None].expand_as(batch.places)
    labels[rows[counted], batch.places[counted]] = batch.targets[counted]
    assert batch.labels is not None
    return batch.inputs, batch.segments, labels, batch.labels


def pair_inputs(batch: AnyBatch) -> tuple[Tensor, ...]:
    """Sources, what the decoder reads, and labels."""
    assert isinstance(batch, PairBatch)
    source, read = batch.inputs.split(batch.inputs.shape[1] - batch.targets.shape[1], dim=1)[:2]
    return source.contiguous(), read.contiguous(), batch.targets


def bert(config: Config, vocabulary: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    from transformers import BertConfig, BertForPreTraining

    shape = config.model
    model = BertForPreTraining(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.feed_forward_size,
            hidden_dropout_prob=shape.dropout,
            attention_probs_dropout_prob=shape.dropout,
            max_position_embeddings=config.data.seq_length,
        )
    )

    def loss_of(ids: Tensor, segments: Tensor, labels: Tensor, follows: Tensor) -> Tensor:
        return model(input_ids=ids, token_type_ids=segments, labels=labels, next_sentence_label=follows).loss

    return model, loss_of


def marian(config: Config, vocabulary: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    model = marian_model(config, vocabulary, 0, vocabulary - 1, config.data.seq_length)

    def loss_of(source: Tensor, read: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=source, decoder_input_ids=read, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]

    return model, loss_of


def marian_model(config: Config, vocabulary: int, eos: int, pad: int, longest: int) -> Any:
    """transformers' MarianMTModel of the config's shape. longest: positions of either side."""
    from transformers import MarianConfig, MarianMTModel

    shape = config.model
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=shape.hidden_size,
            encoder_layers=shape.num_layers,
            decoder_layers=shape.num_layers,
            encoder_attention_heads=shape.num_heads,
            decoder_attention_heads=shape.num_heads,
            encoder_ffn_dim=shape.feed_forward_size,
            decoder_ffn_dim=shape.feed_forward_size,
            activation_function=shape.activation,
            dropout=shape.dropout,
            attention_dropout=0.0,
            activation_dropout=0.0,
            scale_embedding=True,
            max_position_embeddings=longest,
            init_std=shape.initial_scale,
            pad_token_id=pad,
            eos_token_id=eos,
            bos_token_id=eos,
            decoder_start_token_id=eos,
            forced_eos_token_id=None,
        )
    )
