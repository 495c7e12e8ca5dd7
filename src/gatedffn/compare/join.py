"""Results from stored runs alone, of one folder or of several with parts of one comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatedffn.compare.schedule import blocks, schedule
from gatedffn.compare.settings import (
    LSTM,
    NOT_OF_A_RUN,
    SCALES,
    Run,
    Setting,
    arm_names,
    of_a_run,
    run_key,
)
from gatedffn.compare.store import Record, outdated, read_runs
from gatedffn.compare.study import Result, result_of
from gatedffn.errors import SettingError, StorageError, UnknownVariant
from gatedffn.variants import get_variant


def joined(folders: Sequence[Path], changes: Mapping[str, Any]) -> list[Result]:
    """A result for each scale of the runs in some folders; a run that two of them have counts once.

    The variants and learning rates are those of each folder's last run of a scale.

    Args:
        folders: of comparisons of one setting, or of several that differ in their scales alone.
        changes: other variants or another baseline; and where a folder has runs of several
            settings, the fields that tell those that are meant, for a scale any number of values.

    Raises:
        StorageError: a folder without runs, or with a file that is none.
        SettingError: runs of different settings, or no seed that every variant has.
    """
    changes = {name: value for name, value in changes.items() if value not in (None, (), [])}
    found = [_runs(folder, changes) for folder in folders]
    _check_equal([record for records in found for record in records])
    scales = sorted({_scale(record) for records in found for record in records})
    return [_joined(found, scale, changes, alone=len(scales) == 1) for scale in scales]


def _scale(record: Record) -> tuple[int, ...]:
    return tuple(record["setting"][name] for name in SCALES)


def _joined(
    found: Sequence[Sequence[Record]],
    scale: tuple[int, ...],
    changes: Mapping[str, Any],
    alone: bool,
) -> Result:
    parts = [[record for record in records if _scale(record) == scale] for records in found]
    last = [max(part, key=lambda record: str(record["finished"])) for part in parts if part]
    setting = _setting(last, changes)
    records = {Run(**record["run"]): record for part in parts for record in part}
    seeds = sorted({run.seed for run in records})
    if not all(blocks(setting, records, seeds).values()):
        missing = schedule(setting, records, seeds)
        named = ", ".join(f"{run.variant} with seed {run.seed}" for run in missing[:3])
        of = ", ".join(f"{name} {value}" for name, value in zip(SCALES, scale, strict=True))
        raise SettingError(
            f"{'' if alone else f'{of}: '}there is no seed that every variant has: {len(missing)} "
            f"runs are missing, such as {named}; the command that made the folder goes on"
            + ("" if alone else f", or name the other studies with {_options()}")
        )
    return result_of(setting, last[-1]["data"], records, seeds)


def _runs(folder: Path, changes: Mapping[str, Any]) -> list[Record]:
    runs = read_runs(folder).values()
    if not runs:
        raise StorageError(
            f"{folder} has no finished runs of a comparison: name its --out folder"
            + "".join(f"; {words}" for words in outdated(folder))
        )
    meant = list(runs)
    for name, value in changes.items():
        if name in NOT_OF_A_RUN:
            continue
        wanted = value if isinstance(value, (list, tuple)) else [value]
        lacking = [one for one in wanted if all(r["setting"].get(name) != one for r in meant)]
        if lacking:
            raise SettingError(f"no run in {folder} has {name} {lacking[0]}: leave it out")
        meant = [record for record in meant if record["setting"].get(name) in wanted]
    return meant


def _options() -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in SCALES)


def _facts(record: Record) -> dict[str, object]:
    """What two runs of one comparison, at one scale or at several, have in common."""
    setting = {n: v for n, v in of_a_run(record["setting"]).items() if n not in SCALES}
    return {**setting, **record["surroundings"]}


def _check_equal(records: Sequence[Record]) -> None:
    facts = [_facts(record) for record in records]
    names = dict.fromkeys(name for each in facts for name in each)
    different = {}
    for name in names:
        values = sorted({str(each.get(name)) for each in facts})
        if len(values) > 1:
            different[name] = " and ".join(values)
    if different:
        words = "; ".join(f"{name} is {values}" for name, values in different.items())
        raise SettingError(
            f"the runs are of different settings: {words}; name folders of one, or say which with "
            "the option, such as --model"
        )


def _setting(last: Sequence[Record], changes: Mapping[str, Any]) -> Setting:
    """The setting of the last runs of all folders together."""
    settings = [_setting_of(record) for record in last]
    if "variants" not in changes:
        _check_known([arm for setting in settings for arm in setting.variants])
    arms = dict.fromkeys(arm for setting in settings for arm in setting.variants)
    rates = dict.fromkeys(rate for setting in settings for rate in setting.learning_rates)
    setting = replace(settings[-1], variants=tuple(arms), learning_rates=tuple(rates))
    if "variants" in changes:
        setting = replace(setting, variants=arm_names(changes["variants"], setting.model))
    if "baseline" in changes:
        (baseline,) = arm_names([changes["baseline"]], setting.model)
        setting = replace(setting, baseline=baseline)
    if setting.baseline not in setting.variants:
        raise SettingError(
            f"the baseline {setting.baseline} is not among {', '.join(setting.variants)}: choose "
            "with --baseline"
        )
    return setting


def _check_known(arms: Sequence[str]) -> None:
    """Raises where a run is of a variant that only its user's file knows."""
    for arm in arms:
        try:
            _ = arm == LSTM or get_variant(arm)
        except UnknownVariant:
            raise SettingError(
                f"there are runs of {arm!r}, a variant of one's own: name it with --variant "
                f"PATH.py:NAME, and beside it the others that are meant"
            ) from None


def _setting_of(record: Record) -> Setting:
    facts: dict[str, Any] = record["setting"]
    _check_known([record["run"]["variant"]])
    try:
        tuples = {n: tuple(value) for n, value in facts.items() if isinstance(value, list)}
        setting = Setting(**facts | tuples)
        same = run_key(setting, Run(**record["run"]), record["surroundings"]) == record["key"]
    except TypeError:
        same = False
    if not same:
        raise SettingError(
            f"the run {record['key']} is of another version of gatedffn, or was changed by hand: "
            "report it with the version that made it"
        )
    return setting
