"""The encoder-decoder against torch's own layers, in loss and gradients; and what holds for it under every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import noise
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig, pair_parameters
from pretrain.models.transformer import EncoderDecoder
from tests.pretrain.models.references import Named, assert_gradients_equal, gradients_of, weights_of

VOCAB, SOURCE, TARGET = 50, 12, 8
SMALL: dict[str, Any] = {
    "kind": "encoder-decoder",
    "num_layers": 2,
    "decoder_layers": 3,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "activation": "relu",
    "positions": "sinusoidal",
    "norm_position": "post",
    "scale_embeddings": True,
    "initial_scale": 0.2,
}
MODERN = {
    "positions": "rope",
    "norm": "rms",
    "norm_position": "pre",
    "activation": "swiglu",
    "biases": False,
    "num_kv_heads": 2,
    "tie_embeddings": False,
}


def make(seed: int = 1, **options: Any) -> EncoderDecoder:
    """With biases and norms away from 0 and 1, so that none of them can be missing unseen."""
    given = {name: options.pop(name) for name in ("label_smoothing", "z_loss", "recompute") if name in options}
    model = EncoderDecoder(ModelConfig(**{**SMALL, **options}), Parts(), VOCAB, (SOURCE, TARGET), **given)
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                rows = (len(parameter),)
                parameter.add_(noise.normal(noise.key(seed, name), rows, (0,), rows), alpha=0.1)
    return model


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "inputs": torch.randint(VOCAB, (rows, SOURCE + TARGET), generator=generator),
        "targets": torch.randint(VOCAB, (rows, TARGET), generator=generator),
        "mask": (torch.rand(rows, TARGET, generator=generator) < 0.7).float(),
        "sample_keys": noise.sample_keys(1, torch.arange(rows)),
    }


# -- torch's own layers ------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The 2017 model of torch's encoder and decoder layers, written from the paper."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, pre = config.hidden_size, config.norm_position == "pre"
        sizes: dict[str, Any] = {
            "d_model": hidden,
            "nhead": config.num_heads,
            "dim_feedforward": config.feed_forward_size,
            "dropout": 0.0,
            "layer_norm_eps": config.norm_epsilon,
            "batch_first": True,
            "norm_first": pre,
        }
        ends = [nn.LayerNorm(hidden, config.norm_epsilon) if pre else None for _ in range(2)]
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**sizes), config.num_layers, ends[0], enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), config.layers_of_decoder, ends[1])
        self.embedding = nn.Parameter(torch.empty(VOCAB, hidden))
        self.scale = math.sqrt(hidden)

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        source, tokens = inputs[:, :SOURCE], inputs[:, SOURCE:]
        memory = self.encoder(self._embed(source))
        ahead = torch.triu(torch.ones(TARGET, TARGET, dtype=torch.bool), diagonal=1)
        states = self.decoder(self._embed(tokens), memory, tgt_mask=ahead)
        losses = F.cross_entropy((states @ self.embedding.T).transpose(1, 2), targets, reduction="none")
        return (losses * mask).sum()

    def _embed(self, ids: Tensor) -> Tensor:
        hidden = self.embedding.shape[1]
        rows = [
            [
                math.sin(place / 10000 ** (i / hidden)) if i % 2 == 0 else math.cos(place / 10000 ** ((i - 1) / hidden))
                for i in range(hidden)
            ]
            for place in range(ids.shape[1])
        ]
        return self.embedding[ids] * self.scale + torch.tensor(rows, dtype=self.embedding.dtype)


def as_torch(ours: Named) -> Named:
    """Our tensors under torch's names; query, key and value are one of theirs."""
    theirs = {"embedding": ours["embedding.weight"]}
    plain = {"out": "out_proj", "norm_1": "norm1", "up": "linear1", "down": "linear2"}
    for name, tensor in ours.items():
        side, *parts = name.split(".")
        if parts[0] == "norm":
            theirs[name] = tensor
        if side not in ("encoder", "decoder") or parts[0] != "blocks":
            continue
        layer, kind = f"{side}.layers.{parts[1]}", parts[-1]
        inner = parts[2:-1]
        if inner[0] in ("attention", "cross"):
            home = f"{layer}.{'self_attn' if inner[0] == 'attention' else 'multihead_attn'}"
            if inner[-1] == "out":
                theirs[f"{home}.out_proj.{kind}"] = tensor
            elif inner[-1] == "q":
                prefix = name.removesuffix(f"q.{kind}")
                both = [ours[f"{prefix}{which}.{kind}"] for which in ("k", "v")]
                theirs[f"{home}.in_proj_{kind}"] = torch.cat([tensor, *both])
        elif inner[0] == "feed_forward":
            theirs[f"{layer}.{plain[inner[1]]}.{kind}"] = tensor
        else:
            last = {"norm_1": "norm1", "cross_norm": "norm2", "norm_2": "norm3" if side == "decoder" else "norm2"}
            theirs[f"{layer}.{last[inner[0]]}.{kind}"] = tensor
    return theirs


@pytest.mark.parametrize("position", ["post", "pre"])
def test_loss_and_gradients_equal_torchs(position: str) -> None:
    model = make(norm_position=position).double()
    reference = Reference(model.config).double()
    names = {
        name.replace("attention.qkv", "attention").replace("cross.kv", "cross"): tensor
        for name, tensor in weights_of(model).items()
    }
    reference.load_state_dict(as_torch(names))
    batch = make_batch()
    loss = model(**batch)
    wanted = reference(batch["inputs"], batch["targets"], batch["mask"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-8)  # positions are float32
    loss.backward()
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert_gradients_equal(as_torch(gradients_of(model)), gradients, 1e-6)  # type: ignore[arg-type]


# -- under every option ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [{}, MODERN, {"positions": "alibi", "norm_position": "pre"}, {"positions": "learned"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["2017", "modern", "alibi", "learned"])
class TestEveryOption:
    def test_parameters_are_counted(self, options: dict[str, Any]) -> None:
        model = make(**options)
        held = sum(tensor.numel() for tensor in weights_of(model).values())
        assert held == pair_parameters(model.config, VOCAB, (SOURCE, TARGET))

    @torch.no_grad()
    def test_the_decoder_sees_the_whole_source_and_no_target_ahead(self, options: dict[str, Any]) -> None:
        model = make(**options).eval()
        inputs = make_batch()["inputs"]
        source, tokens = inputs[:, :SOURCE], inputs[:, SOURCE:].clone()
        before = model.logits(tokens, model.encode(source))
        tokens[:, 5] = (tokens[:, 5] + 1) % VOCAB
        after = model.logits(tokens, model.encode(source))
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
        assert (after[:, 5:] != before[:, 5:]).any(dim=2).all()
        for place in (0, SOURCE - 1):
            other = source.clone()
            other[:, place] = (other[:, place] + 1) % VOCAB
            changed = model.logits(tokens, model.encode(other))
            assert (changed != after).any(dim=2).all(), place

    @torch.no_grad()
    def test_a_packed_row_is_as_its_pairs_alone(self, options: dict[str, Any]) -> None:
        """Positions begin anew with each pair, and none sees another's."""
        model = make(**options).double().eval()
        batch = make_batch(1)
        (first, second), (left, right) = (7, SOURCE - 7), (3, TARGET - 3)
        of_source, of_target = [0] * first + [1] * second, [0] * left + [1] * right
        documents = torch.tensor([of_source + of_target], dtype=torch.int32)
        whole = model(**batch, documents=documents)
        inputs, alone = batch["inputs"], torch.zeros(2, dtype=whole.dtype)
        for source, target in ((slice(0, first), slice(0, left)), (slice(first, SOURCE), slice(left, TARGET))):
            row = torch.cat((inputs[:, :SOURCE][:, source], inputs[:, SOURCE:][:, target]), dim=1)
            alone += model(row, batch["targets"][:, target], batch["mask"][:, target], batch["sample_keys"])
        torch.testing.assert_close(whole, alone)

    @torch.no_grad()
    def test_step_by_step_with_caches_is_as_at_once(self, options: dict[str, Any]) -> None:
        model = make(**options).eval()
        inputs = make_batch()["inputs"]
        memory, tokens = model.encode(inputs[:, :SOURCE]), inputs[:, SOURCE:]
        caches = model.make_caches(memory, TARGET)
        steps = [model.logits(tokens[:, i : i + 1], memory, caches, i) for i in range(TARGET)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(tokens, memory), rtol=1e-5, atol=1e-5)

    def test_recomputation_changes_nothing(self, options: dict[str, Any]) -> None:
        found = {}
        for recompute in ("none", "selective", "full"):
            model = make(**options, dropout=0.2, recompute=recompute)
            loss = model(**make_batch())
            loss.backward()
            found[recompute] = (loss.item(), gradients_of(model))
        for recompute in ("selective", "full"):
            assert found[recompute][0] == found["none"][0]
            assert_gradients_equal(found[recompute][1], found["none"][1], 1e-6)


def test_stages_together_are_the_whole() -> None:
    """Cut anywhere, also inside either stack, with dropout on; the tied copy's gradient is the other end's part."""
    batch = make_batch()
    whole = make(dropout=0.2)
    whole(**batch).backward()
    wanted = gradients_of(whole)
    for cut in range(1, 5):
        first = EncoderDecoder(whole.config, Parts(), VOCAB, (SOURCE, TARGET), range(cut), last=False)
        second = EncoderDecoder(whole.config, Parts(), VOCAB, (SOURCE, TARGET), range(cut, 5), first=False)
        held = whole.state_dict()
        for stage in (first, second):
            stage.load_state_dict({name: held[name] for name in stage.state_dict()})
        second(**batch, hidden=first(**batch)).backward()
        assert first.tied_copy is None and second.tied_copy is not None
        found = gradients_of(second)
        for name, gradient in gradients_of(first).items():
            found[name] = found[name] + gradient if name in found else gradient
        assert_gradients_equal(found, wanted, 1e-6)


def test_smoothing_is_of_the_training_alone() -> None:
    model, batch = make(label_smoothing=0.1), make_batch()
    inputs = batch["inputs"]
    logits = model.logits(inputs[:, SOURCE:], model.encode(inputs[:, :SOURCE]))
    for smoothing, loss in ((0.1, model(**batch)), (0.0, model.eval()(**batch)[0])):
        each = F.cross_entropy(logits.mT, batch["targets"], reduction="none", label_smoothing=smoothing)
        assert loss.item() == pytest.approx((each * batch["mask"]).sum().item(), rel=1e-5)
    right = model(**batch)[1]
    assert right.item() == ((logits.argmax(dim=2) == batch["targets"]) * batch["mask"]).sum().item()
