"""`gatedffn compare`: which feed-forward to use, on one's own data."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gatedffn.cli.progress import LiveTable
from gatedffn.compare.kinds import in_words
from gatedffn.compare.sources import DEFAULT_FIELD, STANDARD_LIBRARY
from gatedffn.errors import MissingExtra, SettingError, StorageError

if TYPE_CHECKING:
    from gatedffn.compare.schedule import Extent
    from gatedffn.compare.settings import Setting
    from gatedffn.compare.study import Prepared, Result

NEEDED = ("transformers", "accelerate", "datasets", "tokenizers", "scipy", "matplotlib", "psutil")
ENDINGS = {"decoder": "", "gated-conv": "-conv", "t5": "-t5"}
"""What the default folder's name ends with."""


NOT_FOR_A_REPORT = (
    *(
        "data",
        "field",
        "encoding",
        "preset",
        "config",
        "seeds",
        "first_seed",
        "lr",
        "checkpoint_every",
    ),
    *("allow_mismatch", "minutes", "until", "workers", "on", "shard", "dry_run"),
)
"""Options that would say how runs are done, or which."""


def compare(
    command: typer.Context,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA", help="Data, as with --data.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What can be read is {in_words()}. Repeat for more. Default: {STANDARD_LIBRARY}."
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="The field with the text, where there are fields; a.b is b in a. Default: "
            f"{DEFAULT_FIELD}."
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="The encoding of files that are not in UTF-8 and have no byte order mark, such "
            "as latin-1."
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="quick (minutes), hour, standard (hours of a GPU), large (weeks).")
    ] = "quick",
    model: Annotated[
        str,
        typer.Option(
            help="decoder; t5: encoder-decoder with span corruption; or gated-conv: Dauphin's "
            "network and an LSTM of its size."
        ),
    ] = "decoder",
    config: Annotated[
        str | None,
        typer.Option(
            help="The decoder's architecture: a Hugging Face config.json, or a model's name there."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="What to compare; repeat. Default: the paper's eight."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with. Default: relu, or the first variant."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each variant; with one there is no interval.")
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(help="The first seed; others make another study.")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate. Repeat: the best of them for each variant."),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or adafactor.")] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Training steps of a run. Repeat: how the answer changes over them."),
    ] = None,
    d_model: Annotated[
        list[int] | None,
        typer.Option(help="Width of the model. Repeat: how the answer changes over them."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a step.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, or bpe:SIZE, trained on the training part.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="fan_in (1 / sqrt(fan_in) everywhere), or a number such as 0.02."),
    ] = None,
    multiple_of: Annotated[
        int | None, typer.Option(help="Hidden widths are rounded up to a multiple of this.")
    ] = None,
    held_out_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the final loss is measured on, at most.")
    ] = None,
    selection_tokens: Annotated[
        int | None, typer.Option(help="Tokens that learning curves are measured on, at most.")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; 0 repeats an unfinished run from its start."),
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare variants of unequal size.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Default: gatedffn-compare-PRESET.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Add seeds, of every variant, as long as they end within this time."),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(help="Add seeds until every interval reaches less than this to each side."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at a time. Default: measured here once; one for each GPU."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="A Ray cluster to run on: its address, or ray for one on this machine."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="PART/PARTS: this part of the seeds; --report joins the parts."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Train nothing: make the report of a folder's runs, or of several folders'."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, costs and the time, train nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, progress on stderr.")
    ] = False,
) -> None:
    """Which feed-forward should I use? The same model, parameters, data and order; only it differs.

    Trains every variant on your text with several seeds and shows held-out losses, differences
    with their 95% intervals, sizes and times. Stop it at any moment; the same command goes on.

    Example: `gatedffn compare --data my_texts/ --variant relu --variant swiglu --seeds 5`
    """
    began = time.monotonic()
    _need_extra()
    from gatedffn.compare.schedule import Extent, read_shard

    options = {
        "variants": tuple(variant or ()),
        "baseline": baseline,
        "seeds": seeds,
        "first_seed": first_seed,
        "learning_rates": tuple(lr or ()),
        "optimizer": optimizer,
        "layers": layers,
        "heads": heads,
        "context": context,
        "batch": batch,
        "tokenizer": tokenizer,
        "init": init,
        "multiple_of": multiple_of,
        "held_out_tokens": held_out_tokens,
        "selection_tokens": selection_tokens,
        "checkpoint_every": checkpoint_every,
        "allow_mismatch": allow_mismatch or None,
    }
    widths: Sequence[int | None] = d_model if d_model else [None]
    counts: Sequence[int | None] = steps if steps else [None]
    scales = [{**options, "d_model": w, "steps": count} for w in widths for count in counts]
    if report:
        if len(scales) > 1:
            raise SettingError("--report is of one setting: give --steps and --d-model once")
        idle = [name for name in NOT_FOR_A_REPORT if _given(command, name)]
        if idle:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise SettingError(f"--report takes the stored runs as they are: leave out {names}")
        told = {**scales[0], "model": model if _given(command, "model") else None}
        _report([*report, *map(Path, more or [])], told, out, as_json=as_json)
        return
    settings = _settings(preset, model, config, scales)
    extent = Extent(
        shard=(1, 1) if shard is None else read_shard(shard),
        minutes=minutes,
        until=until,
        most=seeds,
        first_seed=first_seed or 0,
    )
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=as_json, quiet=not first)
    from gatedffn.compare.grids import scale_names
    from gatedffn.compare.study import check, prepare_all, study

    sources = [*(data or []), *(more or [])]
    folder = out or Path(f"gatedffn-compare-{preset}{ENDINGS[settings[0].model]}")
    for setting in settings:
        check(setting, extent, workers, on)
    _check_apart(folder, sources)
    if not dry_run:
        _check_writable(folder)
    console.print("reading the data and counting parameters")
    studies = prepare_all(settings, sources, field, encoding)
    console.print(escape(studies[0].data["description"]))
    if dry_run:
        if first:
            _show_plans(console, studies, extent, as_json=as_json)
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
    if len(finished) == 1:
        _show_result(console, finished[0], folder, as_json=as_json)
    elif finished:
        _show_scales(console, finished, folder, as_json=as_json)
    if finished and shard:
        console.print(f"this is shard {shard}; gatedffn compare --report FOLDER... joins them")
    if torch.distributed.is_initialized():
        # A process that ends while its group's threads wait for the others is aborted.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _check_apart(folder: Path, sources: Sequence[str]) -> None:
    """What is written must not be read as text by the command that goes on."""
    for source in sources:
        read = Path(source).expanduser()
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


def _given(command: typer.Context, name: str) -> bool:
    """Whether an option was given, be it with its default."""
    source = command.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _settings(
    preset: str, model: str, config: str | None, scales: Sequence[dict[str, Any]]
) -> "list[Setting]":
    """A setting for each scale; what a configuration says cannot also be an option."""
    from gatedffn.compare.grids import scale_names
    from gatedffn.compare.settings import make_setting

    told: dict[str, Any] = {}
    if config is not None:
        from gatedffn.compare.models.config import read_config

        told = read_config(config)
        for name in ("d_model", "layers", "heads"):
            if any(scale[name] is not None for scale in scales):
                raise SettingError(f"{name} is in the config: change it there, or leave one out")
    settings = [make_setting(preset, model, **{**scale, **told}) for scale in scales]
    scale_names(settings)
    return settings


def _report(
    folders: list[Path], changes: dict[str, Any], out: Path | None, *, as_json: bool
) -> None:
    from gatedffn.compare.join import joined

    _show_result(
        Console(stderr=as_json), joined(folders, changes), out or folders[0], as_json=as_json
    )


def _need_extra() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"compare needs {', '.join(missing)}; this installs it: pip install 'gatedffn[compare]'"
        )


def _show_plans(
    console: Console, studies: "Sequence[Prepared]", extent: "Extent", *, as_json: bool
) -> None:
    if as_json:
        plans = [_plan(prepared) for prepared in studies]
        typer.echo(json.dumps(plans[0] if len(plans) == 1 else plans, indent=2))
        return
    for prepared in studies:
        _show_plan(console, prepared, extent)


def _plan(prepared: "Prepared") -> dict[str, Any]:
    from gatedffn.compare.statistics import expected_reach
    from gatedffn.compare.study import estimated_seconds

    return {
        "setting": asdict(prepared.setting),
        "data": prepared.data["description"],
        "variants": {
            arm: asdict(cost) | {"mismatch": prepared.mismatch[arm]}
            for arm, cost in prepared.costs.items()
        },
        "runs": prepared.setting.runs,
        "estimated_seconds": estimated_seconds(prepared),
        "shows_differences_above": expected_reach(prepared.setting),
    }


def _show_plan(console: Console, prepared: "Prepared", extent: "Extent") -> None:
    from gatedffn.compare.look import label
    from gatedffn.compare.statistics import expected_seeds
    from gatedffn.compare.study import estimated_seconds

    setting = prepared.setting
    seconds = estimated_seconds(prepared)
    table = Table("variant", "width", "parameters", "mismatch", "MFLOP/token")
    for arm, cost in prepared.costs.items():
        table.add_row(
            label(arm),
            f"{cost.width:,}",
            f"{cost.parameters:,}",
            f"{prepared.mismatch[arm]:+.2%}",
            f"{cost.flops / 1e6:.2f}",
        )
    console.print(table)
    seen = setting.steps * setting.tokens_per_step
    console.print(
        f"mismatch: of the compared parameters to those of {label(setting.baseline)}\n"
        f"{setting.runs} runs of {setting.steps:,} steps, {seen:,} tokens each; the training part "
        f"has {len(prepared.tokens.train):,} tokens\n"
        f"the preset is made for: {setting.needs}\n"
        f"estimated time here: {_duration(seconds)}\n{_expected(setting)}"
    )
    if extent.minutes is not None:
        blocks = max(extent.least, int(60 * extent.minutes * setting.seeds / seconds))
        console.print(f"--minutes {extent.minutes:g}: time for about {blocks} seeds in one process")
    if extent.until is not None:
        count = expected_seeds(setting, extent.until)
        words = "how many seeds is not known" if count is None else f"about {count} seeds"
        console.print(f"--until {extent.until:g}: {words}")


def _expected(setting: "Setting") -> str:
    """What the study will be able to show."""
    from gatedffn.compare.look import label
    from gatedffn.compare.statistics import expected_reach, kind

    shown: dict[str, float] = {}
    for arm, half in expected_reach(setting).items():
        shown[kind(arm)] = max(half, shown.get(kind(arm), 0.0))
    if not shown:
        return "how small a difference it will show is not known: this setting's spread is not"
    words = " and ".join(f"{half:.3f} ({name})" for name, half in shown.items())
    return (
        f"{setting.seeds} seeds show differences to {label(setting.baseline)} above about {words} "
        "nats a token, by the preset's spread on the default text"
    )


def _duration(seconds: float) -> str:
    for limit, unit, name in ((5400, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            count = max(1, round(seconds / unit))
            return f"about {count} {name if count > 1 else name.removesuffix('s')}"
    return f"about {round(seconds / 86_400)} days"


def _show_result(console: Console, result: "Result", folder: Path, *, as_json: bool) -> None:
    from gatedffn.compare import report, tables
    from gatedffn.compare.answer import answer, notes

    paths = report.write_report(result, folder)
    setting = result.setting
    if as_json:
        typer.echo(json.dumps(report.summary_of(result), indent=2))
    else:
        console.print()
        for line in answer(result):
            console.print(f"[bold]{escape(line)}[/bold]")
        console.print()
        _print_table(
            console,
            "held out, best first; losses in nats a token",
            tables.headers(setting.baseline),
            [tables.cells(row, setting) for row in result.rows],
        )
        published = tables.published_cells(result)
        if published:
            title = "published, in another setting (T5 on C4): for orientation only"
            _print_table(console, title, tables.PUBLISHED_HEADERS, published)
        for note in notes(result):
            console.print(f"- {escape(note)}")
    _print_written(console, paths)


def _show_scales(
    console: Console, results: "Sequence[Result]", folder: Path, *, as_json: bool
) -> None:
    from gatedffn.compare import grids, report

    names = grids.scale_names([result.setting for result in results])
    for name, result in zip(names, results, strict=True):
        report.write_report(result, folder / name.replace(", ", "-").replace(" ", "-"))
    paths = grids.write_scales(results, folder)
    head, body = grids.scale_cells(results)
    if as_json:
        summaries = [report.summary_of(result) for result in results]
        table = {
            "scales": summaries,
            "differences": [dict(zip(head, b, strict=True)) for b in body],
        }
        typer.echo(json.dumps(table, indent=2))
    else:
        console.print()
        for line in grids.scale_answers(results):
            console.print(f"[bold]{escape(line)}[/bold]")
        console.print()
        _print_table(console, "held-out differences in nats a token", head, body)
    _print_written(console, paths, ", and a report for each")


def _print_written(console: Console, paths: Sequence[Path], more: str = "") -> None:
    console.print(f"wrote {escape(', '.join(map(str, paths)))}{more}", soft_wrap=True)


def _print_table(
    console: Console, title: str, head: Sequence[str], body: Sequence[Sequence[str]]
) -> None:
    table = Table(*head, title=title)
    for line in body:
        table.add_row(*line)
    # A pipe or a narrow log has no width of its own; a table cut at 80 columns is no table.
    wide = console if console.is_terminal else Console(file=console.file, width=200)
    wide.print(table)
