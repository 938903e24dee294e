"""Which files a model came from: a folder, or the local snapshot of a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from promoe_triton.errors import PromoeError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def checkpoint_files(model: Any) -> list[Path]:
    """Return the safetensors files a loaded model came from. Raises PromoeError where there are none."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        raise PromoeError("the model was not loaded from a checkpoint")
    revision = getattr(model.config, "_commit_hash", None)
    return resolve_files(name, revision=revision, local_files_only=True)


def resolve_files(name: str, **options: Any) -> list[Path]:
    """Return the safetensors files of a checkpoint folder or hub id, in the order of their names.

    options: transformers' download options (revision, token, cache_dir, local_files_only, subfolder...).
    Raises PromoeError, naming what was looked for, where there is no complete safetensors checkpoint.
    """
    try:
        single = _find(name, WEIGHTS, options)
        if single:
            return [single]
        index = _find(name, INDEX, options)
        if index is None:
            raise PromoeError(
                f"{name} has neither {WEIGHTS} nor {INDEX}: promoe_triton reads safetensors checkpoints only"
            )
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [_find(name, shard, options) for shard in shards]
    except OSError as error:
        raise PromoeError(f"{name} is no checkpoint that can be read: {error}") from error
    for shard, file in zip(shards, files, strict=True):
        if file is None:
            raise PromoeError(f"{name} is incomplete: its index names {shard}, which is missing")
    return [file for file in files if file is not None]


def _find(name: str, file: str, options: dict[str, Any]) -> Path | None:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    # Its name may be relative to a folder that the process leaves while the model still reads from it.
    return Path(found).absolute() if found else None
