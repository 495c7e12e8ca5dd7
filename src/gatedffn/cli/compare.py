"""`gatedffn compare`: which feed-forward to use, on one's own data. Here are its options alone."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from gatedffn.cli.named import HELP, all_named, complete, complete_variant, named
from gatedffn.compare.kinds import in_words
from gatedffn.compare.settings import MODELS, PRESETS
from gatedffn.compare.sources import DEFAULT_FIELD, STANDARD_LIBRARY
from gatedffn.errors import MissingExtra, SettingError

NEEDED = ("transformers", "accelerate", "datasets", "tokenizers", "scipy", "matplotlib", "psutil")
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
        str,
        typer.Option(
            help="quick (minutes), hour, standard (hours of a GPU), large (weeks).",
            autocompletion=complete(*PRESETS),
        ),
    ] = "quick",
    model: Annotated[
        str,
        typer.Option(
            help="decoder; moe: the decoder with experts; t5: encoder-decoder with span "
            "corruption; or gated-conv: Dauphin's network and an LSTM of its size.",
            autocompletion=complete(*MODELS),
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
        typer.Option(
            help=f"What to compare: {HELP}. Repeat. Default: the paper's eight.",
            autocompletion=complete_variant,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with. Default: relu, or the first variant.",
            autocompletion=complete_variant,
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
    experts: Annotated[
        int | None, typer.Option(help="Experts in each layer of moe. Default: 8.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that a token goes through. Default: 2.")
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(help="Factor of the loss that keeps experts' loads alike. Default: 0.01."),
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
            help="Train nothing: make the reports of a folder's runs, or of several folders'."
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
    from gatedffn.cli import compare_flow as flow

    options = {
        "variants": all_named(variant),
        "baseline": None if baseline is None else named(baseline),
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
        "experts": experts,
        "top_k": top_k,
        "balance": balance,
        "held_out_tokens": held_out_tokens,
        "selection_tokens": selection_tokens,
        "checkpoint_every": checkpoint_every,
        "allow_mismatch": allow_mismatch or None,
    }
    scales = {"d_model": tuple(d_model or ()), "steps": tuple(steps or ())}
    if report:
        _refuse(command, NOT_FOR_A_REPORT)
        told = {**options, **scales, "model": model if _given(command, "model") else None}
        flow.report([*report, *map(Path, more or [])], told, out, as_json=as_json)
        return
    settings = flow.settings_of(preset, model, config, options, scales)
    flow.compare(
        settings,
        [*(data or []), *(more or [])],
        field,
        encoding,
        out or flow.default_folder(preset, settings[0]),
        extent=flow.extent_of(shard, minutes, until, seeds, first_seed),
        workers=workers,
        on=on,
        dry_run=dry_run,
        as_json=as_json,
        began=began,
    )


def _need_extra() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"compare needs {', '.join(missing)}; this installs it: pip install 'gatedffn[compare]'"
        )


def _given(command: typer.Context, name: str) -> bool:
    """Whether an option was given, be it with its default."""
    source = command.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse(command: typer.Context, names: tuple[str, ...]) -> None:
    idle = [f"--{name.replace('_', '-')}" for name in names if _given(command, name)]
    if idle:
        raise SettingError(
            f"--report takes the stored runs as they are: leave out {', '.join(idle)}"
        )
