"""What a run leaves beside its metrics: `active.json` and a picture of what it asked for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dataeff.core.run import replace_text
from dataeff.data import Splits
from dataeff.data.subsets import IntArray

SHOWN, CELL = 16, 50  # images a cycle in the picture, and pixels of one


def write_record(
    path: Path,
    pool_size: int,
    batches: Sequence[IntArray],
    records: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
) -> None:
    """All indices and measurements of a run as JSON; a class without test images has null accuracy."""
    cycles = [
        {
            **record,
            "class_accuracy": [None if np.isnan(value) else value for value in record["class_accuracy"]],
            "indices": batch.tolist(),
        }
        for record, batch in zip(records, batches, strict=True)
    ]
    table = {"pool_size": pool_size, "classes": list(classes), "cycles": cycles}
    replace_text(path, json.dumps(table, allow_nan=False) + "\n")


def plot_asked(path: Path, splits: Splits, batches: Sequence[IntArray]) -> None:
    """A row of images for each cycle: the first that it asked for."""
    columns = max(min(SHOWN, len(batch)) for batch in batches)
    sheet = PIL.Image.new("RGB", (columns * CELL, len(batches) * CELL), "white")
    for row, batch in enumerate(batches):
        for column, image in enumerate(splits.train.images(batch[:SHOWN])):
            picture = PIL.Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy().squeeze()))
            scale = (CELL - 2) / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            sheet.paste(picture.resize(size, PIL.Image.Resampling.NEAREST), (column * CELL, row * CELL))
    sheet.save(path)
