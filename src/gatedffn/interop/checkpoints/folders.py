"""What a folder holds beside its weights: the index, the configuration, the tokenizer."""

import json
import shutil
from pathlib import Path

from gatedffn.interop.checkpoints.checkpoint import (
    CONFIG,
    INDEXES,
    PICKLES,
    SET_ASIDE,
    Checkpoint,
    inside,
)
from gatedffn.interop.checkpoints.plan import Plan

# Weights of other frameworks, and copies of these in other formats.
OTHER_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")


def write_index(checkpoint: Checkpoint, folder: Path, weights: dict[str, str]) -> None:
    """Writes the index of a result, with what the source's said beside the files."""
    old = (checkpoint.index or {}).get("metadata")
    size = sum(store.entries[name].size for name, store in checkpoint.where.items())
    metadata = {**(old if isinstance(old, dict) else {}), "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": weights}, indent=2, sort_keys=True)
    (folder / INDEXES[0]).write_text(text + "\n", encoding="utf-8")


def copy_others(plan: Plan, folder: Path) -> list[str]:
    """Copies what is no weights; returns what the user should know."""
    source = plan.checkpoint.path
    notes, left = [], []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in INDEXES or path in [store.path for store in plan.checkpoint.stores]:
            continue
        if path.is_dir() or path.suffix in OTHER_WEIGHTS or name.endswith(".index.json"):
            left.append(name)
        elif name not in (CONFIG, SET_ASIDE):
            shutil.copyfile(inside(source, name), folder / name)
    if left:
        notes.append(f"not copied: {', '.join(left)}")
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
