"""What `gatedffn compare` does with its options: settings, the studies in turn, reports."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from gatedffn.cli.compare_plan import show_plans
from gatedffn.cli.compare_shown import show_results
from gatedffn.cli.progress import LiveTable
from gatedffn.compare.join import joined
from gatedffn.compare.scales import scale_names
from gatedffn.compare.schedule import Extent, read_shard
from gatedffn.compare.settings import SCALES, Setting, make_setting
from gatedffn.compare.store import outdated
from gatedffn.compare.study import check, prepare_all, study
from gatedffn.errors import SettingError, StorageError
from gatedffn.files import expanded

ENDINGS = {"decoder": "", "gated-conv": "-conv", "moe": "-moe", "t5": "-t5"}
"""What the default folder's name ends with."""


def settings_of(
    preset: str,
    model: str,
    config: str | None,
    options: Mapping[str, Any],
    scales: Mapping[str, Sequence[int]],
) -> list[Setting]:
    """A setting for each scale; what a configuration says cannot also be an option."""
    told: dict[str, Any] = {}
    if config is not None:
        from gatedffn.compare.models.config import read_config

        told = read_config(config)
        for name in ("d_model", "layers", "heads"):
            if options.get(name) is not None or scales.get(name):
                raise SettingError(f"{name} is in the config: change it there, or leave one out")
    values_of: list[Sequence[int | None]] = [scales[name] or (None,) for name in SCALES]
    settings = [
        make_setting(preset, model, **{**options, **dict(zip(SCALES, values, strict=True)), **told})
        for values in product(*values_of)
    ]
    scale_names(settings)
    return settings


def default_folder(preset: str, setting: Setting) -> Path:
    """Where results go unless one says where."""
    return Path(f"gatedffn-compare-{preset}{ENDINGS[setting.model]}")


def extent_of(
    shard: str | None,
    minutes: float | None,
    until: float | None,
    seeds: int | None,
    first_seed: int | None,
) -> Extent:
    """Which of the seeds, and until when."""
    return Extent(
        shard=(1, 1) if shard is None else read_shard(shard),
        minutes=minutes,
        until=until,
        most=seeds,
        first_seed=first_seed or 0,
    )


def compare(
    settings: Sequence[Setting],
    sources: Sequence[str],
    field: str | None,
    encoding: str | None,
    folder: Path,
    *,
    extent: Extent,
    workers: int | None,
    on: str | None,
    dry_run: bool,
    as_json: bool,
    began: float,
) -> None:
    """Does every study and shows what came, or with `dry_run` what it would take."""
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=as_json, quiet=not first)
    for setting in settings:
        check(setting, extent, workers, on)
    _check_apart(folder, sources)
    if not dry_run:
        _check_writable(folder)
    _tell_outdated(console, [folder])
    console.print("reading the data and counting parameters")
    studies = prepare_all(settings, sources, field, encoding)
    console.print(escape(studies[0].data["description"]))
    if dry_run:
        if first:
            show_plans(console, studies, folder, extent, workers, on, as_json=as_json)
        return
    titles, results = scale_names(settings), []
    try:
        # With --json the result alone goes to stdout, whatever a library may print there.
        quiet = redirect_stdout(sys.stderr) if as_json else nullcontext()
        for number, prepared in enumerate(studies, 1):
            if len(studies) > 1:
                console.print(titles[number - 1])
            with quiet, LiveTable(console, prepared.setting) as display:
                results.append(
                    study(
                        prepared,
                        folder,
                        display,
                        workers=workers,
                        on=on,
                        extent=extent.of_several(number, len(studies)),
                        began=began,
                    )
                )
    except KeyboardInterrupt:
        console.print(
            f"stopped; finished runs are in {escape(str(folder))}, and the same command goes on"
        )
        raise typer.Exit(130) from None
    finished = [result for result in results if result is not None]
    if finished:
        show_results(console, finished, folder, as_json=as_json)
        part, parts = extent.shard
        if parts > 1:
            console.print(
                f"this is shard {part}/{parts}; gatedffn compare --report FOLDER... joins them"
            )
    if torch.distributed.is_initialized():
        # A process that ends while its group's threads wait for the others is aborted.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def report(
    folders: Sequence[Path], changes: Mapping[str, Any], out: Path | None, *, as_json: bool
) -> None:
    """Makes the reports of stored runs again, one for each scale."""
    console = Console(stderr=as_json)
    _tell_outdated(console, folders)
    show_results(console, joined(folders, changes), out or folders[0], as_json=as_json)


def _tell_outdated(console: Console, folders: Sequence[Path]) -> None:
    for words in (words for folder in folders for words in outdated(folder)):
        console.print(escape(words), soft_wrap=True)


def _check_apart(folder: Path, sources: Sequence[str]) -> None:
    """What is written must not be read as text by the command that goes on."""
    for source in sources:
        read = expanded(source)
        if read.is_dir() and folder.resolve().is_relative_to(read.resolve()):
            raise SettingError(
                f"{folder} is in {source}, so that results would be read as data: choose a folder "
                "outside with --out"
            )


def _check_writable(folder: Path) -> None:
    """What cannot be kept must be known before hours of work, not after."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "may not be written" if there.is_dir() else "is a file"
        raise StorageError(f"{folder} cannot be made: {there} {why}; choose another with --out")
