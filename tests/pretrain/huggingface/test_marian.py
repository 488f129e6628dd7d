"""Encoder-decoders go to MarianMTModel and come from it: the same targets, and one can begin where another ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import weight_shapes
from pretrain.data.pairs import Lengths, prepare_pairs
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from pretrain.huggingface.export import export
from pretrain.huggingface.forms import join, take
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.marian import MARIAN as MAP
from pretrain.huggingface.rows import Row
from pretrain.huggingface.vocabulary import Use, write_tokenizer
from pretrain.loading import find_checkpoint, load_model
from pretrain.models.blocks import sinusoids
from pretrain.models.transformer import EncoderDecoder
from pretrain.runs import run_config, run_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.translation import Search, translate
from pretrain.vocabulary import vocabulary_of
from tests.pretrain import running
from tests.pretrain.huggingface.models import EOS, LENGTH, MARIAN, edit_config, make_theirs, write_run
from tests.pretrain.huggingface.test_interchange import assert_same_logits, quiet, theirs_of
from tests.pretrain.tokenization.samples import WRITERS

TEXTS = ["the quick brown fox", "jumps", "over the lazy dog", "def f(x):", "birds sing", "1234"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """With shorter targets than sources."""
    folder = tmp_path_factory.mktemp("marian") / "run"
    objective = {"kind": "sequence-to-sequence", "source_length": 30}
    write_run(folder, {**MARIAN, "decoder_layers": 2, "max_positions": None}, tokenizer, objective=objective)
    return folder


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    export(run, run.parent / "out", say=quiet)
    return run.parent / "out"


# -- the same targets --------------------------------------------------------------------------------------------------


def test_transformers_writes_what_we_write(run: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Greedily, by its own tokenizer, of sources padded to one length."""
    theirs, words = theirs_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    given = words(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert given["attention_mask"].min() == 0
    found = theirs.generate(**given, num_beams=1, max_length=19)
    model = load_model(run).model
    assert isinstance(model, EncoderDecoder) and model.max_length == 18
    written = [translate(model, tokenizer.encode(text), EOS, Search(1)) for text in TEXTS]
    assert len({tuple(one.tokens) for one in written}) > 1, "what is random differs from text to text"
    for row, one in zip(found.tolist(), written, strict=True):
        wanted = [EOS, *one.tokens, *([EOS] if one.finished else [])]
        assert row == wanted + [3] * (len(row) - len(wanted))


def test_an_imported_folder_writes_what_transformers_writes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """And is predicted for, evaluated and generated from by the commands."""
    theirs = make_theirs("marian")
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH, closing="eos", special=tokenizer.special))
    ran = running.command("import", tmp_path / "theirs", "--out", tmp_path / "run")
    assert ran.code == 0 and f"next: python -m pretrain predict {tmp_path / 'run'}" in ran.out, ran.told
    (tmp_path / "sources.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    out = tmp_path / "out.jsonl"
    ran = running.command(
        "predict", tmp_path / "run", "--input", tmp_path / "sources.txt", "--beams", "1", "--out", out
    )
    assert ran.code == 0, ran.told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for text, line in zip(TEXTS, lines, strict=True):
        source = torch.tensor([[*tokenizer.encode(text), EOS]])
        [found] = theirs.generate(source, num_beams=1, max_length=LENGTH + 1).tolist()
        assert line["text"] == tokenizer.decode(found)
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{text}\n" for text in TEXTS))
    ran = running.command("evaluate", tmp_path / "run", "--data", tmp_path / "pairs.tsv", "--beams", "1")
    losses = []
    for text in TEXTS:
        ids = [*tokenizer.encode(text), EOS]
        with torch.no_grad():
            given = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[EOS, *ids[:-1]]])}
            losses.append(
                torch.nn.functional.cross_entropy(theirs(**given).logits[0], torch.tensor(ids), reduction="none")
            )
    assert json.loads(ran.out)["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert (
        running.command("generate", tmp_path / "run", "--prompt", TEXTS[0], "--temperature", "0").out
        == lines[0]["text"] + "\n"
    )


def test_the_folder_says_how_targets_begin_and_are_searched(run: Path, folder: Path, tokenizer: Tokenizer) -> None:
    theirs = json.loads((folder / "config.json").read_text())
    assert theirs["decoder_start_token_id"] == theirs["eos_token_id"] == EOS and theirs["pad_token_id"] == 3
    assert theirs["forced_eos_token_id"] is None and theirs["max_position_embeddings"] == 30
    told = json.loads((folder / "generation_config.json").read_text())
    assert "length_penalty" not in told and theirs_of(folder).generation_config.num_beams == 4
    longest = theirs_of(folder).generate(torch.tensor([[5, 6, EOS]]), eos_token_id=-1).shape[1]
    assert longest == 31 == told["max_length"], "the start, and as many tokens as there are positions"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words(TEXTS[0]).input_ids == [*tokenizer.encode(TEXTS[0]), EOS] and words.model_max_length == 30
    assert words(text_target=TEXTS[1]).input_ids == [*tokenizer.encode(TEXTS[1]), EOS]


@pytest.mark.parametrize("kind", ["span-corruption", "prefix"])
def test_a_model_of_text_goes_with_names_for_its_sentinels(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    count = 12 if kind == "span-corruption" else 0
    objective = {"kind": kind, **({"sentinels": count} if count else {})}
    model = write_run(tmp_path / "run", {**MARIAN, "max_positions": LENGTH + 30}, tokenizer, objective=objective)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    assert_same_logits(model, theirs_of(tmp_path / "out"), tokenizer.vocab_size + count)
    words, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), run_config(tmp_path / "run")
    marks = vocabulary_of(ours, tokenizer).sentinels
    assert len(marks) == count and len(words) == tokenizer.vocab_size + count
    for number, index in enumerate(marks):
        assert words.convert_ids_to_tokens(index) == f"<extra_id_{number}>"
    assert words.decode([*tokenizer.encode("fox"), *marks], skip_special_tokens=True) == "fox"
    again = import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    assert again.model.vocab_size == (tokenizer.vocab_size + count if count else None)
    assert load_model(tmp_path / "again").tokenizer.content == tokenizer.content


def test_a_tokenizer_without_padding_goes_with_a_word(tmp_path: Path) -> None:
    """GPT-2's; the sentinels behind it are its own when it comes back."""
    ours = load_tokenizer(WRITERS["byte-level"](tmp_path / "made"))
    write_run(tmp_path / "run", MARIAN, ours, objective={"kind": "span-corruption", "sentinels": 12})
    done = export(tmp_path / "run", tmp_path / "out", say=quiet)
    assert "the tokenizer has no padding of its own, so transformers takes one text at a time" in done.notes
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("fox").input_ids == [*ours.encode("fox"), ours.eos] and words.pad_token_id is None
    assert words.convert_ids_to_tokens(ours.vocab_size) == "<extra_id_11>"
    assert import_folder(tmp_path / "out", tmp_path / "again", say=quiet).model.vocab_size is None
    again = run_tokenizer(tmp_path / "again")
    assert again.vocab_size == ours.vocab_size + 12 and again.encode("a <extra_id_3>") == ours.encode("a <extra_id_3>")


# -- features in another order -----------------------------------------------------------------------------------------


def test_even_places_go_first_and_come_back() -> None:
    row = Row("theirs", ("a", "b"), even_first=(1,))
    ours = [torch.arange(10.0).view(2, 5), torch.arange(10.0, 15).view(1, 5)]
    whole = join(row, ours, 1)
    assert whole.tolist() == [[0, 2, 4, 1, 3], [5, 7, 9, 6, 8], [10, 12, 14, 11, 13]]
    assert all(
        take(row, name, whole, [(2, 5), (1, 5)], 1).equal(tensor) for name, tensor in zip("ab", ours, strict=True)
    )
    assert join(row, [torch.arange(5)], 1).tolist() == [0, 1, 2, 3, 4], "a bias has no such dimension"


@torch.no_grad()
def test_a_tensor_whose_features_were_forgotten_is_seen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each in turn put back into our order: the logits are others."""
    model = write_run(tmp_path / "run", {**MARIAN, "num_layers": 1}, tokenizer, "marian")
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    theirs, names = theirs_of(tmp_path / "out"), set(weight_shapes(find_checkpoint(tmp_path / "run", None)))
    seen = 0
    for row in MAP.rows_of(MAP.classes[0], {"num_layers": 1, "decoder_layers": 1}, names):
        held = theirs.get_parameter(row.theirs)
        kept = held.clone()
        held.copy_(take(row, row.ours[0], kept, [tuple(kept.shape)], 4))
        if not held.equal(kept):
            seen += 1
            with pytest.raises(AssertionError):
                assert_same_logits(model, theirs, 330)
        held.copy_(kept)
    assert_same_logits(model, theirs, 330)
    # Weights and biases of what adds to the stream (3 attentions, 2 feed-forwards) and of 5 norms; weights of what reads it.
    assert seen == 1 + 2 * (3 + 2 + 5) + 3 * 3 + 2


def test_the_table_of_positions_is_ours_to_the_last(folder: Path) -> None:
    table = theirs_of(folder).model.decoder.embed_positions.weight
    ours = sinusoids(30, 24)
    assert table[:, :12].equal(ours[:, 0::2]) and table[:, 12:].equal(ours[:, 1::2])


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_position": "pre"}, ["model.norm_position: 'pre'"]),
        ({"positions": "rope"}, ["model.positions: 'rope'"]),
        ({"positions": "alibi"}, ["model.positions: 'alibi'"]),
        ({"positions": "learned"}, ["model.positions: 'learned'"]),
        ({"norm": "rms"}, ["model.norm: 'rms'"]),
        ({"norm_epsilon": 1e-6}, ["model.norm_epsilon: 1e-06 (it can be 1e-05)"]),
        ({"activation": "geglu"}, ["model.activation: 'geglu'"]),
        ({"activation": "swiglu", "biases": False}, ["model.activation: 'swiglu'", "model.biases: False"]),
        ({"embedding_norm": True}, ["model.embedding_norm: True"]),
        ({"num_kv_heads": 2}, ["model.num_kv_heads: 2"]),
        ({"head_size": 8}, ["model.head_size: 8"]),
        ({"attention_window": [None, None, None, 4], "decoder_layers": 4}, ["model.attention_window"]),
        ({"embedding_dropout": 0.1}, ["model.embedding_dropout: 0.1"]),
    ],
)
def test_an_option_that_marian_has_not_is_named(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], words: list[str]
) -> None:
    write_run(tmp_path / "run", {**MARIAN, **options}, tokenizer, "marian")
    with pytest.raises(UserError, match="no architecture of Hugging Face's can have all of") as error:
        export(tmp_path / "run", tmp_path / "out", say=quiet)
    [line] = str(error.value).splitlines()[1:]
    assert line.startswith("  marian has no ") and all(word in line for word in words)
    assert line.count("model.") == len(words) and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    home = tmp_path_factory.mktemp("theirs")
    make_theirs("marian").save_pretrained(home)
    write_tokenizer(home, tokenizer, Use(LENGTH))
    return home


def refusal(made: Path, tmp_path: Path, **changes: Any) -> str:
    """Of a copy of the folder: fields of config.json changed, or tensors added."""
    folder = tmp_path / "theirs"
    folder.mkdir(exist_ok=True)
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, {"format": "pt"})
    edit_config(folder, **{name: value for name, value in changes.items() if name not in tensors})
    with pytest.raises(UserError) as error:
        import_folder(folder, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists() and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_start_token_id": 3}, "decoder_start_token_id is 3, but in this program a target begins after"),
        ({"eos_token_id": 0}, "eos_token_id is 0, but in this program"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads: 2 (it can be what encoder_attention_heads is, 4)"),
        ({"decoder_ffn_dim": 48}, "decoder_ffn_dim: 48 (it can be what encoder_ffn_dim is, 40)"),
        ({"activation_function": "swish"}, "activation_function: 'swish' (it can be 'gelu'"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings: False (it can be True)"),
        ({"decoder_vocab_size": 339}, "decoder_vocab_size: 339 (it can be what vocab_size is, 340)"),
        ({"decoder_layers": 2}, "holds model.decoder.layers.2."),
        ({"encoder_layers": 3}, "lacks the tensor model.encoder.layers.2."),
        ({"max_position_embeddings": None}, "data.seq_length"),
        ({"final_logits_bias": torch.full((1, 340), 1e-4)}, "final_logits_bias holds other values than zero"),
        ({"final_logits_bias": torch.zeros(1, 339)}, "final_logits_bias is (1, 339), but by config.json (1, 340)"),
        (
            {"model.encoder.embed_positions.weight": sinusoids(LENGTH, 24)},
            "model.encoder.embed_positions.weight holds another table than that of sinusoidal positions",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_folder_that_is_not_ours_is_named(made: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(made, tmp_path, **changes)


def test_a_start_that_config_json_leaves_out_is_marians(made: Path, tmp_path: Path) -> None:
    copied = json.loads((made / "config.json").read_text())
    del copied["decoder_start_token_id"]
    other = tmp_path / "other"
    other.mkdir()
    for path in made.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps(copied))
    assert "decoder_start_token_id is 58100" in refusal(other, tmp_path)


def test_two_tokenizers_are_refused_with_what_to_do(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((made / name).read_bytes())
    for name in ("source.spm", "target.spm"):
        (other / name).write_bytes((made / "tokenizer.model").read_bytes())
    (other / "vocab.json").write_text("{}")
    assert "one for sources and one for targets" in refusal(other, tmp_path)
    import_folder(other, tmp_path / "run", made / "tokenizer.model", say=quiet)  # as the message says


def test_a_folder_of_the_body_with_its_tables_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Older files have the tables of positions and copies of the embedding; a body's tensors have no prefix."""
    theirs = make_theirs("marian")
    theirs.model.save_pretrained(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "model.safetensors"
    held = load_file(weights)
    held["encoder.embed_tokens.weight"] = held.get("shared.weight", theirs.model.shared.weight).detach().clone()
    for side in ("encoder", "decoder"):
        held[f"{side}.embed_positions.weight"] = getattr(theirs.model, side).embed_positions.weight.detach().clone()
    save_file(held, weights, {"format": "pt"})
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    assert_same_logits(load_model(tmp_path / "run").model, theirs, 340)


# -- where a training begins -------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_pairs_are_learned_from_where_span_corruption_ended(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """From the run, or from the folder that it was exported to: the same steps, bit by bit, from its weights."""
    objective = {"kind": "span-corruption", "sentinels": 12}
    model = write_run(tmp_path / "before", {**MARIAN, "dropout": 0.1}, tokenizer, objective=objective)
    export(tmp_path / "before", tmp_path / "out", say=quiet)
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{n} foxes\t{n + 1} dogs\n" for n in range(200)))
    options = Options(tokenizer=tmp_path / "out", validation=0.1)
    prepare_pairs([table], tmp_path / "shards", Lengths(24, 24), options, say=quiet)
    losses = {}
    for name in ("before", "out"):
        ran = running.train(
            tmp_path / f"from-{name}",
            tmp_path / "shards",
            f"model={{initial: {tmp_path / name}}}",
            "objective={kind: sequence-to-sequence}",
            "data.seq_length=48",
            "schedule.total=2 steps",
            "monitor={log_every: 1 steps, tensorboard: false}",
        )
        assert ran.code == 0 and f"from {tmp_path / name}, step" in ran.out, ran.told
        losses[name] = [line["loss"] for line in running.lines_of(tmp_path / f"from-{name}" / "run") if "loss" in line]
    assert losses["before"] == losses["out"] and len(losses["out"]) == 2
    trained = load_model(tmp_path / "from-out" / "run").model
    moved = {name: (tensor - model.state_dict()[name]).abs().max() for name, tensor in trained.state_dict().items()}
    assert trained.config.residual_dropout_rate == 0.1 and 0 < max(moved.values()) <= 0.021, (
        "two steps of 1e-2 from its weights"
    )
