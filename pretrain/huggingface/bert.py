"""BERT: token, position and segment embeddings with a norm, LayerNorm after each layer, and the heads of its
pre-training or of a task."""

from __future__ import annotations

from pretrain.huggingface.architecture import ONE_STACK, Architecture, Choice, Equal, Ours, Same, Theirs
from pretrain.huggingface.rows import ModelClass, Row

LAYER = "bert.encoder.layer.{layer}"
POOLER = (Row("bert.pooler.dense.{kind}", ("pooler.dense.{kind}",)),)
MASKED = (
    Row("cls.predictions.transform.dense.{kind}", ("transform.dense.{kind}",)),
    Row("cls.predictions.transform.LayerNorm.{kind}", ("transform.norm.{kind}",)),
    Row("cls.predictions.bias", ("head.bias",)),
    Row("cls.predictions.decoder.weight", ("head.weight",)),
)
PAIRS = (Row("cls.seq_relationship.{kind}", ("pair_head.{kind}",)),)
CLASSIFIER = (Row("classifier.{kind}", ("task_head.{kind}",)),)
OLD_POOLER = (r"bert\.pooler\.dense\.(weight|bias)",)  # in older files, where every class had one

BERT = Architecture(
    model_type="bert",
    prefix="bert.",
    options=(
        *ONE_STACK,
        Ours("kind", "bert"),
        Same("vocab_size", "vocab_size", 30522),
        Same("max_positions", "max_position_embeddings", 512),
        Same("segments", "type_vocab_size", 2),
        Same("hidden_size", "hidden_size", 768),
        Same("num_layers", "num_hidden_layers", 12),
        Same("num_heads", "num_attention_heads", 12),
        Same("ffn_hidden_size", "intermediate_size", 3072),
        Choice(
            "activation",
            "hidden_act",
            {"gelu": ("gelu", "gelu_python"), "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh"), "relu": ("relu",)},
            "gelu",
        ),
        Same("norm_epsilon", "layer_norm_eps", 1e-12),
        Equal("embedding_dropout", lambda ours: ours["residual_dropout"], "residual_dropout"),
        Same("residual_dropout", "hidden_dropout_prob", 0.1),
        Same("embedding_dropout", "hidden_dropout_prob", 0.1),
        Same("attention_dropout", "attention_probs_dropout_prob", 0.1),
        Same("initial_scale", "initializer_range", 0.02),
        Same("tie_embeddings", "tie_word_embeddings", True),
        Ours("positions", "learned"),
        Theirs("position_embedding_type", "absolute"),
        Ours("norm", "layer"),
        Ours("norm_position", "post"),
        Ours("embedding_norm", True),
        Ours("biases", True),
        Ours("attention_window", None),
        Equal("num_kv_heads", lambda ours: ours["num_heads"], "num_heads"),
        Equal("head_size", lambda ours: ours["hidden_size"] / ours["num_heads"], "hidden_size / num_heads"),
        Theirs("is_decoder", False),
        Theirs("add_cross_attention", False),
    ),
    rows=(
        Row("bert.embeddings.word_embeddings.weight", ("embedding.weight",)),
        Row("bert.embeddings.position_embeddings.weight", ("positions",)),
        Row("bert.embeddings.token_type_embeddings.weight", ("segments",)),
        Row("bert.embeddings.LayerNorm.{kind}", ("embedding_norm.{kind}",)),
        Row(f"{LAYER}.attention.self.query.{{kind}}", ("blocks.{layer}.attention.q.{kind}",)),
        Row(f"{LAYER}.attention.self.key.{{kind}}", ("blocks.{layer}.attention.k.{kind}",)),
        Row(f"{LAYER}.attention.self.value.{{kind}}", ("blocks.{layer}.attention.v.{kind}",)),
        Row(f"{LAYER}.attention.output.dense.{{kind}}", ("blocks.{layer}.attention.out.{kind}",)),
        Row(f"{LAYER}.attention.output.LayerNorm.{{kind}}", ("blocks.{layer}.norm_1.{kind}",)),
        Row(f"{LAYER}.intermediate.dense.{{kind}}", ("blocks.{layer}.feed_forward.up.{kind}",)),
        Row(f"{LAYER}.output.dense.{{kind}}", ("blocks.{layer}.feed_forward.down.{kind}",)),
        Row(f"{LAYER}.output.LayerNorm.{{kind}}", ("blocks.{layer}.norm_2.{kind}",)),
    ),
    classes=(
        ModelClass("BertModel", ("masked",), optional=POOLER),
        ModelClass("BertForPreTraining", ("masked",), (*MASKED, *POOLER, *PAIRS)),
        ModelClass("BertForMaskedLM", ("masked",), MASKED, optional=(*POOLER, *PAIRS)),
        ModelClass("BertForSequenceClassification", ("classification", "regression"), (*POOLER, *CLASSIFIER)),
        ModelClass("BertForTokenClassification", ("tagging",), CLASSIFIER, ignored=OLD_POOLER),
        ModelClass(
            "BertForQuestionAnswering",
            ("question-answering",),
            (Row("qa_outputs.{kind}", ("task_head.{kind}",)),),
            ignored=OLD_POOLER,
        ),
        ModelClass("BertForMultipleChoice", ("multiple-choice",), (*POOLER, *CLASSIFIER)),
    ),
    ignored=(r".*\.position_ids", r"cls\.predictions\.decoder\.bias"),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),  # TensorFlow's
)
