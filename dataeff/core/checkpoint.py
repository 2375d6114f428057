"""Training state on disk: one file of tensors and plain values, and a seal that is written last.

A process can be killed at any moment, also while a checkpoint is copied; a checkpoint counts only when its seal
matches.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STATE, SEAL = "state.pt", "seal.json"


def save_checkpoint(directory: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists, dicts) into `directory`, which must exist."""
    directory = Path(directory)
    temporary = directory / f"{STATE}.part"
    torch.save(dict(state), temporary)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(temporary, directory / STATE)
    seal = {"sha256": digest, "steps_done": state["experiment"]["steps_done"]}
    part = directory / f"{SEAL}.part"
    part.write_text(json.dumps(seal), encoding="utf-8")
    os.replace(part, directory / SEAL)


def load_checkpoint(directory: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is incomplete, or was edited.
    """
    directory = Path(directory)
    try:
        seal = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        with (directory / STATE).open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == seal["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise ValueError(f"checkpoint {directory}: incomplete or edited; delete it to resume from an earlier one")
    state: dict[str, Any] = torch.load(directory / STATE, map_location="cpu", weights_only=True)
    return state


def is_complete(directory: str | Path) -> bool:
    """Whether `directory` holds a checkpoint that can be loaded."""
    try:
        load_checkpoint(directory)
    except (OSError, ValueError, RuntimeError):
        return False
    return True
