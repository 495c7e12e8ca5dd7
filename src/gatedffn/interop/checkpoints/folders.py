"""What a folder holds beside its weights: the index, the configuration, the tokenizer."""

import json
import re
import shutil
from pathlib import Path

from gatedffn.interop.checkpoints.checkpoint import Checkpoint, few
from gatedffn.interop.checkpoints.opening import CONFIG, PICKLES, SET_ASIDE, inside, is_index
from gatedffn.interop.checkpoints.plan import Plan

# Weights of other frameworks, and copies of these in other formats.
OTHER_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")


def result_name(name: str) -> str:
    """The name of a result's file or index, by that of the source's.

    >>> result_name("pytorch_model.bin.index.json"), result_name("a.safetensors")
    ('model.safetensors.index.json', 'a.safetensors')
    """
    pickles = "|".join(map(re.escape, PICKLES))
    if not re.search(rf"({pickles})(\.index\.|$)", name):
        return name
    own = re.sub(r"^pytorch_model", "model", name)
    return re.sub(rf"({pickles})(?=\.index\.|$)", ".safetensors", own)


def write_index(checkpoint: Checkpoint, path: Path, weights: dict[str, str]) -> None:
    """Writes the index of a result, with what the source's said beside the files."""
    old = (checkpoint.index or {}).get("metadata")
    size = sum(store.entries[name].size for name, store in checkpoint.where.items())
    metadata = {**(old if isinstance(old, dict) else {}), "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": weights}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def copy_others(plan: Plan, folder: Path) -> list[str]:
    """Copies what is no weights; returns what the user should know."""
    source = plan.checkpoint.path
    notes, left = [], []
    read = {plan.checkpoint.chosen, *(store.path.name for store in plan.checkpoint.stores)}
    for path in sorted(source.iterdir()):
        name = path.name
        if name in read:
            continue
        if path.is_dir() or path.suffix in OTHER_WEIGHTS or is_index(name):
            left.append(name)
        elif name not in (CONFIG, SET_ASIDE):
            shutil.copyfile(inside(source, name), folder / name)
    if left:
        notes.append(f"not copied: {few(left, len(left))}")
    kept = next((name for name in (CONFIG, SET_ASIDE) if (source / name).is_file()), None)
    if kept is not None:
        same = kept == CONFIG and plan.layout.name == plan.to.name and plan.read.tp == plan.tp
        readable = same or not plan.unread
        shutil.copyfile(inside(source, kept), folder / (CONFIG if readable else SET_ASIDE))
        if not readable:
            named = (plan.config or {}).get("architectures")
            notes.append(
                f"config.json names {named}, whose code does not read layout "
                f"{' and '.join(map(repr, plan.unread))}: it "
                f"is kept as {SET_ASIDE}, since with it a library would load all but the blocks"
            )
    return notes
