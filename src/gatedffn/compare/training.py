"""One run of a comparison: the Hugging Face Trainer over one model, one seed, one learning rate."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from gatedffn.compare.checkpoints import at_step, seal
from gatedffn.compare.data import Tokens
from gatedffn.compare.machine import on_gpu
from gatedffn.compare.models import build, counted_loads, initialise
from gatedffn.compare.settings import MEASURED_AT_ONCE, Run, Setting
from gatedffn.compare.task import task_of
from gatedffn.errors import StorageError

Progress = Callable[[int, float | None], None]
"""Called with the number of steps done and, where there is one, the newest training loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run gave. Losses are in nats a token; `curve` has (step, loss) on the selection part.

    `diverged`: a loss was not finite, or the end is worse than the start and worse than guessing.
    `step_time` is the median in seconds, None where a resumed run had nothing left to time.
    `load` has for each layer with experts how often each was chosen for the held-out part.
    """

    held_out: float
    selection: float
    diverged: bool
    curve: list[tuple[int, float]]
    training_curve: list[tuple[int, float]]
    step_time: float | None
    load: list[list[int]]


class _InOrder(Trainer):
    """The Trainer, with the windows in the order in which they lie, sealed checkpoints, and one
    line on a full disk.
    """

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        assert self.args.output_dir is not None
        place = Path(self.args.output_dir)
        # A full disk shows in three ways, by whose file it was.
        try:
            super()._save_checkpoint(*arguments, **named)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            why, *_ = str(error).splitlines()
            raise StorageError(f"{place}: a checkpoint cannot be written: {why}") from error
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:
            seal(at_step(place, self.state.global_step))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(cast(Sized, train_dataset or self.train_dataset))


class _Watch(TrainerCallback):
    """Times the steps, reports progress, and ends a run whose loss is no number."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.times: list[float] = []
        self.loss: float | None = None
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if on_gpu():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)
        self.progress(state.global_step, self.loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss"):
            if logs and name in logs:
                self.loss = logs[name]
                if not math.isfinite(self.loss):
                    control.should_training_stop = True
                    control.should_save = False  # whoever went on from it would make a step more


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers too small for the format become 0 in this thread, until the end.

    With them an LSTM's step on a CPU can take twenty times as long.
    """
    before = float(torch.tensor(1e-40) * 0.5) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@_without_denormals()
def train(
    setting: Setting,
    run: Run,
    tokens: Tokens,
    folder: Path,
    checkpoint: str | None,
    progress: Progress,
    processes: int,
) -> Outcome:
    """Trains and measures one run; its checkpoints go to `folder` and stay there.

    From a `checkpoint` that a killed run left it goes on, with the same numbers as without.
    """
    # One bar a checkpoint would tear the table.
    disable_progress_bar()
    model = build(setting, run.variant, tokens.vocabulary)
    initialise(model, setting.init, run.seed)
    task = task_of(setting, tokens, run.seed)
    watch = _Watch(progress)
    trainer = _InOrder(
        model=model,
        args=_arguments(setting, run, folder, processes),
        train_dataset=task.train,
        eval_dataset=task.selection,
        data_collator=_stack,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = list(trainer.state.log_history)
    with counted_loads(model) as counted:
        loss = trainer.evaluate(task.held_out)["eval_loss"]
    load = [trainer.accelerator.reduce(counts).tolist() for counts in counted.values()]
    curve = _curve(history, "eval_loss", setting.steps)
    if curve and curve[-1][0] == trainer.state.global_step:
        selection_loss = curve[-1][1]
    else:
        selection_loss = trainer.evaluate(task.selection)["eval_loss"]
    training_curve = _means(_curve(history, "loss", setting.steps), setting.steps)
    measured = [loss, *(loss for _, loss in curve + training_curve)]
    worst = max(training_curve[0][1], math.log(tokens.vocabulary))
    return Outcome(
        held_out=loss,
        selection=selection_loss,
        diverged=loss > worst or not all(map(math.isfinite, measured)),
        curve=curve,
        training_curve=training_curve,
        step_time=_typical(watch.times),
        load=load,
    )


def _arguments(setting: Setting, run: Run, folder: Path, processes: int) -> TrainingArguments:
    # Several processes fill their last batch up with windows that they have measured already.
    together = max(setting.batch, MEASURED_AT_ONCE)
    measured = together if processes == 1 else setting.batch // processes
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch // processes,
        per_device_eval_batch_size=measured,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(setting.warmup * setting.steps),
        optim="adafactor" if setting.optimizer == "adafactor" else "adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=on_gpu(),
        # Every loss, as a mean over several steps would begin anew after a checkpoint.
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=max(1, setting.steps // setting.evaluations),
        save_strategy="steps" if setting.checkpoint_every else "no",
        save_steps=setting.checkpoint_every or setting.steps,
        save_total_limit=2,
        seed=run.seed,
        data_seed=run.seed,
        use_cpu=not on_gpu(),
        ddp_backend="gloo" if processes > 1 and not on_gpu() else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        dataloader_pin_memory=on_gpu(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
    )
    # With several GPUs in sight the Trainer would multiply the batch; torchrun shares it.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    assert arguments.train_batch_size * processes == setting.batch
    return arguments


def _stack(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([w[name] for w in windows]) for name in windows[0]}


def _curve(history: list[dict[str, Any]], name: str, steps: int) -> list[tuple[int, float]]:
    points = {entry["step"]: entry[name] for entry in history if name in entry}
    return [(step, points[step]) for step in sorted(points) if step <= steps]


def _means(curve: list[tuple[int, float]], steps: int) -> list[tuple[int, float]]:
    """The means over stretches of so many steps that there are about 50, each at its end."""
    every = max(1, steps // 50)
    stretches: dict[int, list[tuple[int, float]]] = {}
    for step, loss in curve:
        stretches.setdefault((step - 1) // every, []).append((step, loss))
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in stretches.values()]


def _typical(times: list[float]) -> float | None:
    # The first steps also make caches and threads.
    rest = times[len(times) // 10 :]
    return statistics.median(rest) if rest else None
