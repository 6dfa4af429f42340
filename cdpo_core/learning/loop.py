"""One training loop: AdamW or Muon, warm-up and cosine, clipping, weight averaging, and exact continuation.

The batch of a step is a function of the step alone, so a run that continues from a checkpoint computes
the same bytes as one that was never stopped (same device, same number of threads).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cdpo_core.errors import TrainingError
from cdpo_core.sealed import sealed_files, write_sealed

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime

Metrics = Mapping[str, Tensor]
STEM = "checkpoint"
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
# Muon's steps are scaled to the size of AdamW's, whatever the width; being better conditioned, they may be larger.
MUON_RATE = 2.0
# A run writes about this many records and checkpoints, and reports its progress about as often times five.
RECORDS, REPORTS = 20, 100
# Between two of these checkpoints, another as soon as so much work could be lost.
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class Schedule:
    """How the weights move.

    Attributes:
        steps: optimizer steps.
        learning_rate: the peak; warm-up is linear, then a half cosine falls to 0.
        warmup: share of the steps until the peak.
        adam_beta2: Adam's second-moment decay.
        averaging: decay of the running average of the weights that is returned; 0 returns the last.
        max_norm: gradients are clipped to this norm.
        muon: whether the matrices within the layers are trained by Muon (arXiv:2502.16982) instead of AdamW, at
            MUON_RATE times the learning rate.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.05
    adam_beta2: float = 0.99
    averaging: float = 0.0
    max_norm: float = 1.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0; it is never 0 within the run."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step + 1 - rising) / (self.steps + 1 - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    module: nn.Module,
    losses_at: Callable[[int], Iterable[Metrics]],
    schedule: Schedule,
    runtime: Runtime,
    stage: str,
) -> list[dict[str, Any]]:
    """Train a module's trainable parameters in place.

    Args:
        module: what is trained.
        losses_at: step -> the micro-batches of that step, one after the other, each a mapping with
            `loss` (a differentiable scalar) and further scalars to record. Their sums over the
            micro-batches are the step's figures. A generator, so that one graph lives at a time.
        schedule: steps, learning rate, averaging.
        runtime: its `scratch` keeps the checkpoint, its `progress` hears of the steps.
        stage: what progress and errors call this training.

    Returns:
        About 20 records {step, loss, ...}, the means over the steps since the record before.

    Raises:
        TrainingError: a loss or gradient that is not finite.
    """
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    values = list(parameters.values())
    optimizers = _optimizers(parameters, schedule)
    averages = [value.detach().clone() for value in values] if schedule.averaging else []
    checkpoint = Checkpoint(runtime.scratch, parameters, optimizers, averages)
    start, records, window = checkpoint.load()
    record_every, report_every = -(-schedule.steps // RECORDS), -(-schedule.steps // REPORTS)
    if start:
        runtime.progress(stage, start, schedule.steps)
    saved = time.monotonic()
    for step in range(start, schedule.steps):
        for name, value in _train_step(losses_at(step), values, optimizers, schedule, step, stage).items():
            window[name] = window.get(name, 0.0) + value
        if averages:
            decay = min(schedule.averaging, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [value.detach() for value in values], 1 - decay)
        done = step + 1
        is_recorded = done % record_every == 0 or done == schedule.steps
        if is_recorded:
            count = done - (records[-1]["step"] if records else 0)
            records.append({"step": done, **{name: value / count for name, value in window.items()}})
            window = {}
        if is_recorded or time.monotonic() - saved >= CHECKPOINT_SECONDS:
            checkpoint.save(done, records, window)
            saved = time.monotonic()
        if done % report_every == 0 or done == schedule.steps:
            runtime.progress(stage, done, schedule.steps)
    with torch.no_grad():
        for parameter, average in zip(values, averages, strict=False):
            parameter.copy_(average)
    return records


def _optimizers(parameters: Mapping[str, nn.Parameter], schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the layers' matrices and AdamW for the others."""
    matrices = {name for name, value in parameters.items() if schedule.muon and _is_layer_matrix(name, value)}
    others = [value for name, value in parameters.items() if name not in matrices]
    rate, betas = schedule.learning_rate, (0.9, schedule.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=betas, weight_decay=0.0, fused=True))
    if matrices:
        chosen = [parameters[name] for name in sorted(matrices)]
        optimizers.append(torch.optim.Muon(chosen, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _is_layer_matrix(name: str, value: Tensor) -> bool:
    """A matrix of a numbered layer; embeddings and heads are none, and adapters are left to AdamW."""
    return value.ndim == 2 and bool(re.search(r"\.\d+\.", name)) and "lora_" not in name


def _train_step(
    losses: Iterable[Metrics],
    values: list[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    step: int,
    stage: str,
) -> dict[str, float]:
    """One optimizer step on the sum of the micro-batches' losses; returns the summed scalars."""
    for parameter in values:
        parameter.grad = None
    sums: dict[str, float] = {}
    for metrics in losses:
        metrics["loss"].backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    norm = float(nn.utils.clip_grad_norm_(values, schedule.max_norm, foreach=True))
    if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
        raise TrainingError(
            f"the {stage} loss is not finite at step {step + 1} of {schedule.steps} "
            f"(loss {sums['loss']:g}, gradient norm {norm:g})",
            where=f"{stage}, step {step + 1}",
            fix="lower its learning rate; if that does not help, check the data for extreme texts",
        )
    for optimizer in optimizers:
        rate = schedule.rate(step) * (MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return sums


@dataclass(frozen=True)
class Checkpoint:
    """Weights, moments, averages, step and records in one file, replaced as a whole.

    The step and the records travel in the safetensors header, so that they cannot disagree with the
    tensors after a kill between two writes; a checksum over both is the file's name (`cdpo_core.sealed`).

    Attributes:
        folder: where `checkpoint-<sha256>.safetensors` lies; None keeps no checkpoints.
    """

    folder: Path | None
    parameters: Mapping[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    averages: list[Tensor]

    def save(self, step: int, records: list[dict[str, Any]], window: Mapping[str, float]) -> None:
        """Write the state after `step` steps; `window` holds the sums of the steps since the last record."""
        from safetensors.torch import save_file

        if self.folder is None:
            return
        tensors = {name: tensor.detach().contiguous() for name, tensor in self._tensors().items()}
        state = json.dumps({"step": step, "records": records, "window": window})
        kept = write_sealed(self.folder, STEM, lambda path: save_file(tensors, path, metadata={"state": state}))
        for old in self.folder.glob(f"{STEM}-*"):
            if old != kept:
                old.unlink()

    def load(self) -> tuple[int, list[dict[str, Any]], dict[str, float]]:
        """Put the last state back; returns (steps done, records, window), (0, [], {}) if there is none to continue."""
        from safetensors import safe_open

        last = None
        for path in sealed_files(self.folder, STEM) if self.folder is not None else ():
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                # Two files are there when a kill came between writing one and removing the one before.
                if last is None or state["step"] > last["step"]:
                    last, saved = state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file)
        if last is None:
            return 0, [], {}
        self._put_back(saved, last["step"])
        return int(last["step"]), last["records"], last["window"]

    def _put_back(self, saved: Mapping[str, Tensor], step: int) -> None:
        for _, weight, optimizer, moments in self._optimized():
            optimizer.state[weight] = {moment: torch.zeros_like(weight) for moment in moments}
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[weight]["step"] = torch.tensor(float(step), device=weight.device)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(saved[name])

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter, optimizer, moments in self._optimized():
            tensors[f"weight.{name}"] = parameter
            for moment in moments:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        for name, average in zip(self.parameters, self.averages, strict=False):
            tensors[f"average.{name}"] = average
        return tensors

    def _optimized(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, tuple[str, ...]]]:
        """Each parameter's name, itself, the optimizer that trains it, and the names of its moments there."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], parameter, optimizer, MOMENTS[type(optimizer)]


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of a forward pass whose weights are kept in float32 and will be saved in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
