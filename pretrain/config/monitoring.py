"""What a run tells of itself, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from parallel.layout import Problem
from pretrain.config.duration import Interval, Span
from pretrain.config.profile import MOST
from pretrain.config.section import Section, meaning


class MonitorConfig(Section):
    """Logging, validation and samples. Nothing here changes the training but `patience`."""

    log_every: Interval = meaning(
        Span(10, "steps"), "between lines of metrics.jsonl and TensorBoard, in steps or tokens"
    )
    straggler_factor: float = meaning(
        1.5, "a rank whose own part of a logged step takes so many times the median of its stage is warned of", gt=1
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
    norms_every: Interval | None = meaning(
        None, "between norms of weights and of their gradients, before clipping, in TensorBoard; null: none"
    )
    histograms_every: Interval | None = meaning(
        None, "between histograms of weights and of their gradients in TensorBoard; null: none"
    )
    norms_by: Literal["layer", "weight"] = meaning("layer", "one norm and histogram a layer, or one a weight")
    profile_steps: list[int] | None = meaning(
        None, f"first and last step, up to {MOST} of them, to profile: where their time went, and a trace; null: none"
    )
    tensorboard: bool = meaning(True, "write TensorBoard files into the run's folder")
    peak_tflops: float | None = meaning(
        None,
        "this device's peak in TFLOP/s at precision.compute, for MFU; null: known for some GPUs, else no MFU",
        gt=0,
    )

    def problems(self) -> Iterator[Problem]:
        chosen = self.profile_steps
        if chosen is not None and not (len(chosen) == 2 and 2 <= chosen[0] <= chosen[1] < chosen[0] + MOST):
            found = f"{chosen} is no [first, last] of at most {MOST} steps, the first of them 2 or later"
            yield Problem("profile_steps", found, "write for example [100, 104]")
        for name in ("attention_every", "norms_every", "histograms_every"):
            if getattr(self, name) is not None and not self.tensorboard:
                found = "goes into TensorBoard, which monitor.tensorboard turns off"
                yield Problem(name, found, "turn it on, or remove this")
