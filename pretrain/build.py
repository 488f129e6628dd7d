"""What a config becomes at one place of the grid: stages of the model, their schedule, the engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kernels import norm_triton, selftest
from kernels.available import Backend, Chosen, choose, no_triton, unsupported
from kernels.backends import Backends, Refused
from parallel.engine import AdamWOptions, Engine, parted, set_weights
from parallel.grid import Grid
from parallel.initial import initial_values
from parallel.layers import Parts
from parallel.logical import canonical
from parallel.mixout import Mixout
from parallel.schedules import Schedule
from parallel.stages import Stage, cuts, layers_of_parts, parameter_paths
from parallel.zero import make_engine
from pretrain.activations import alone
from pretrain.config.model import layer_parameters
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.models.make import make_model
from pretrain.models.stack import Stack
from pretrain.sizes import Sizes
from pretrain.trainable import frozen_weights, layer_of

Values = Callable[[str, nn.Parameter], torch.Tensor]
# What `auto` gives Triton on a GPU. The others' kernels only once they are measured to be faster than torch.compile's.
PREFERRED = ("loss", "optimizer")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Built:
    stages: list[Stage]
    schedule: Schedule
    engine: Engine
    compiled: str  # for people: compiled or not, and why
    kernels: str  # for people: whose kernels compute what
    passed_over: list[str]  # for people: whose would be preferred, and why they are not taken
    mixout: Mixout | None = None

    def train(self, training: bool) -> None:
        """Dropout, label smoothing and z-loss on or off."""
        for stage in self.stages:
            stage.train(training)


def build(config: Config, grid: Grid, shape: Sizes, values: Values | None = None) -> Built:
    """The model at its initial weights, ready to train. values: the initial weights, random ones unless given."""
    compiled, why = choose_compile(config, grid)
    dtype = DTYPES[config.precision.compute]
    objective = config.objective
    # Filler of rows and padding are kept apart as documents are.
    hidden = shape.fills_rows and objective.kind in ("masked", "span-corruption")
    apart = objective.has_head or hidden or alone(config)
    backends = Backends(config.kernels.attention, grid.device, dtype, documents=apart)
    stages = build_stages(config, grid, shape, dtype, compiled, backends)
    kernels, passed_over = try_kernels(choose_kernels(config, grid, dtype), backends)
    engine = make_engine(stages, grid, optimizer_options(config), _tied_end(stages, config, grid))
    schedule = Schedule(engine.modules, grid, config.model.hidden_size, dtype, engine.no_sync)
    values = values or (lambda path, parameter: initial_values(path, parameter, config.run.seed))
    set_weights(engine, values)
    return Built(stages, schedule, engine, why, kernels, passed_over, make_mixout(stages, config, values))


def make_mixout(stages: list[Stage], config: Config, values: Values) -> Mixout | None:
    """Of the matrices of the blocks that learn, as the authors' code has it: no embeddings, biases, norms and heads."""
    if not config.optimizer.mixout:
        return None
    learning, _ = parted(parameter_paths(stages))
    matrices = {p: path for p, path in learning.items() if p.dim() == 2 and "blocks" in path.split(".")}
    return Mixout(matrices, values, config.optimizer.mixout, config.run.seed)


def build_stages(
    config: Config, grid: Grid, shape: Sizes, dtype: torch.dtype, compiled: bool, backends: Backends
) -> list[Stage]:
    """Raises UserError if a wished backend cannot compute what it is wished for."""
    chosen = {name: who for name, (who, _) in choose_kernels(config, grid, dtype).items() if name in Chosen._fields}
    parts = Parts(grid.tensor, grid.context, backends, Chosen(**chosen))
    layout, frozen = grid.layout, frozen_weights(config, shape)
    stages = []
    for cut in cuts(stage_layers(config, shape.vocab_size), layout.pipeline, grid.stage):
        try:
            model = make_model(config, parts, shape, cut.layers, cut.first, cut.last)
            for phase in config.data.phases:
                assert isinstance(model, Stack), "an encoder-decoder has no phases"
                model.prepare(phase.seq_length)
        except Refused as error:
            raise UserError(f"kernels.attention: {error}") from None
        for path, parameter in model.named_parameters():
            parameter.rate = learning_rate_of(path, config)  # type: ignore[attr-defined]
            parameter.requires_grad_(canonical(path, parameter.pieces[0]) not in frozen)  # type: ignore[attr-defined]
        stages.append(Stage(model.to(grid.device, dtype), cut, compiled))
    return stages


def learning_rate_of(path: str, config: Config) -> float:
    """Of a parameter, as a share of the learning rate: 1 for what is above the blocks, layer_decay for the last block and
    its powers downwards, the embeddings at the bottom (Howard and Ruder 2018, section 3.2; Clark et al. 2020, "ELECTRA")."""
    layer = layer_of(path, config.model)
    return 1.0 if layer is None else config.optimizer.layer_decay ** (config.model.total_layers - layer)  # type: ignore[no-any-return]


def stage_layers(config: Config, vocab_size: int) -> list[int]:
    """Layers of each part of the pipeline: the user's, or balanced."""
    parallel, model = config.parallel, config.model
    if parallel.layers is not None:
        return parallel.layers
    head = 0.0 if config.objective.has_head else vocab_size * model.hidden_size / layer_parameters(model)
    return layers_of_parts(model.total_layers, parallel.pipeline * parallel.virtual, head)


def choose_kernels(config: Config, grid: Grid, dtype: torch.dtype) -> dict[str, tuple[Backend, str]]:
    """Who computes what besides attention, and why not Triton where `auto` would prefer it; rotary only where there is any.

    Raises UserError where a wish cannot be met."""
    sample = torch.empty(0, device=grid.device, dtype=dtype)
    why_not: dict[str, Callable[[], str]] = {
        "loss": lambda: unsupported(sample),
        "norm": lambda: unsupported(sample) or norm_triton.unsupported_width(config.model.hidden_size, sample.dtype),
        "rotary": lambda: unsupported(sample),
        "activation": lambda: unsupported(sample),
        "optimizer": lambda: no_triton(grid.device),
    }
    chosen = {}
    for name, reason in why_not.items():
        if name == "rotary" and config.model.positions != "rope":
            continue
        preferred: Backend = "triton" if name in PREFERRED else "torch"
        try:
            chosen[name] = choose(getattr(config.kernels, name), grid.device, reason, preferred)
        except ValueError as error:
            raise UserError(f"kernels.{name}: {error}") from None
    return chosen


def try_kernels(kernels: dict[str, tuple[Backend, str]], backends: Backends) -> tuple[str, list[str]]:
    """Whose kernels compute what, once attention's have passed their self-test here; and whose would be preferred.

    Raises UserError where the self-test fails."""
    told, passed_over = [f"attention {backends.told()}"], [f"attention, {who}" for who in backends.passed_over()]
    told += [f"{name} {who}" for name, (who, _) in kernels.items()]
    passed_over += [f"{name}, triton: {reason}" for name, (_, reason) in kernels.items() if reason]
    try:
        for call, (backend, _) in backends.chosen.items():
            selftest.check(backend, call, backends.device, backends.dtype)
    except selftest.Broken as error:
        raise UserError(str(error)) from None
    return ", ".join(told), passed_over


def _tied_end(stages: list[Stage], config: Config, grid: Grid) -> nn.Parameter | None:
    """This rank's end of an embedding that the first and the last stage share across the pipeline."""
    if not config.model.tie_embeddings or config.objective.has_head or grid.layout.pipeline == 1:
        return None
    if grid.first_stage:
        return stages[0].module.embedding.weight  # type: ignore[union-attr, return-value]
    return stages[-1].module.tied_copy if grid.last_stage else None  # type: ignore[return-value]


def optimizer_options(config: Config) -> AdamWOptions:
    optimizer = config.optimizer
    return AdamWOptions(
        optimizer.betas,
        optimizer.epsilon,
        optimizer.weight_decay,
        optimizer.clip_norm,
        config.kernels.optimizer,
        apart=optimizer.mixout > 0,
    )


def choose_precision(config: Config, grid: Grid) -> Config:
    """The config with precision.compute decided, by rank 0 for all, as it is kept in the run's folder."""
    if config.precision.compute != "auto":
        return config
    compute = grid.from_first("bf16" if computes_in_bf16(grid.device) else "fp32")
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": compute})})


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here. On a CPU only with matrix units: with AVX-512's dot products alone
    (avx512_bf16) it is 0.6 to 0.7 times as fast, and emulated 5 to 30 times slower (docs/log.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "arm_bf16", "bf16"))


def choose_compile(config: Config, grid: Grid) -> tuple[bool, str]:
    """Whether torch.compile runs, and the reason in words."""
    wish = config.precision.compile
    if wish == "never":
        return False, "eager (precision.compile: never)"
    if wish == "auto" and (grid.layout.tensor > 1 or grid.layout.context > 1):
        return False, "eager (tensor parallelism's or context parallelism's collectives would break the graph)"
    if wish == "auto" and grid.layout.zero == 3:
        return False, "eager (ZeRO-3 gathers weights between the layers, which would break the graph)"
    if grid.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        if wish == "always":
            raise UserError(
                "precision.compile: always needs a C++ compiler (g++) on PATH; install one, or set it to auto"
            )
        return False, "eager (no C++ compiler found; training is faster with g++ installed)"
    _private_compile_cache()
    return True, "compiled"


def _private_compile_cache() -> None:
    """Compiled code is unpickled when it is reused, and headers are compiled into it, so both must lie where nobody else
    can write. inductor keeps headers in the shared /tmp wherever the rest lies."""
    from torch._inductor import codecache

    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pretrain" / "inductor"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    headers = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "headers"
    headers.mkdir(parents=True, exist_ok=True, mode=0o700)
    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(headers), str(headers / "locks")
