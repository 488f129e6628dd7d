"""What a run tells of itself, and when."""

from __future__ import annotations

from pretrain.config.duration import Interval, Span
from pretrain.config.section import Section, meaning


class MonitorConfig(Section):
    """Logging, validation and samples. Nothing here changes the training but `patience`."""

    log_every: Interval = meaning(
        Span(10, "steps"), "between lines of metrics.jsonl and TensorBoard, in steps or tokens"
    )
    validate_every: Interval | None = meaning(None, "between validations; null: only at the end")
    validation_samples: int | None = meaning(None, "sequences of held-out data a validation; null: all of them", ge=1)
    patience: int | None = meaning(None, "stop after so many validations without a better loss; null: never", ge=1)
    sample_every: Interval | None = meaning(None, "between texts by the model in TensorBoard; null: none")
    sample_prompt: str = meaning("", "what such a text begins with; of attention the sample, where it is not empty")
    sample_tokens: int = meaning(100, "tokens of such a text", ge=1)
    translate_pairs: int | None = meaning(
        None,
        "sequence-to-sequence: held-out pairs to write targets for, scored by BLEU, a validation; null: none",
        ge=1,
    )
    attention_every: Interval | None = meaning(
        None, "between images in TensorBoard of what each head looks at in sample_prompt, or the first held-out sample"
    )
    attention_layers: list[int] | None = meaning(
        None, "numbers of the layers that are drawn, from 0; null: four of them, from the first to the last"
    )
    tensorboard: bool = meaning(True, "write TensorBoard files into the run's folder")
    peak_tflops: float | None = meaning(
        None,
        "this device's peak in TFLOP/s at precision.compute, for MFU; null: known for some GPUs, else no MFU",
        gt=0,
    )
