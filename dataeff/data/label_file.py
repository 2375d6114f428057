"""`to_label.csv`: what people are asked to label, in the folder of a labelling (see `dataeff.data.labelling`).

`ray_jobs.label` writes it beside `request.json` and takes it when it is filled in: in a spreadsheet, or label by label
over HTTP (`serve.labelling`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dataeff.core.config import Config, nearest
from dataeff.core.run import replace_text
from dataeff.data.cache import locked
from dataeff.data.labelling import read_answers, read_manifest

REQUEST, STATE = "to_label.csv", "request.json"
COLUMNS = ("image", "label")


class LabelConflict(ValueError):
    """A label that goes against what the folder holds."""


class Request(Config):
    """What people have been asked for and have not answered yet."""

    cycle: int = Field(ge=0)
    images: list[str] = Field(description="in the order of the CSV")


@dataclass(frozen=True)
class LabelTable:
    """A request's CSV as it is on disk. Commas, semicolons or tabs separate; any columns besides two are kept.

    Args:
        rows: the cells of every row that is not blank, the first row without the columns' names.
        numbers: of these rows, as a spreadsheet shows them: the names are in row 1.
    """

    columns: list[str]
    rows: list[list[str]]
    numbers: list[int]
    delimiter: str = ","

    @classmethod
    def empty(cls, images: Sequence[str]) -> LabelTable:
        """The table that asks for `images`."""
        return cls(list(COLUMNS), [[image, ""] for image in images], list(range(2, len(images) + 2)))

    @classmethod
    def read(cls, path: Path) -> LabelTable:
        """The table in a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not UTF-8, or without the two columns.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text; save it as CSV UTF-8") from None
        header = next(iter(text.splitlines()), "")
        delimiter = max(",;\t", key=header.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        table = cls(next(reader, []), [], [], delimiter)
        missing = [name for name in COLUMNS if name not in table._names()]
        if missing:
            raise ValueError(f"{path}: no column {' and '.join(missing)} in its first row, which is {header!r}")
        for cells in reader:
            if any(cell.strip() for cell in cells):
                table.rows.append(cells)
                table.numbers.append(reader.line_num)
        return table

    def _names(self) -> list[str]:
        return [name.strip().casefold() for name in self.columns]

    def labels(self) -> list[tuple[int, str, str]]:
        """(row number, image, label) of every row; an empty label is none."""
        image, label = (self._names().index(name) for name in COLUMNS)
        padded = (cells + [""] * len(self.columns) for cells in self.rows)
        return [
            (number, cells[image].strip(), cells[label].strip())
            for number, cells in zip(self.numbers, padded, strict=True)
        ]

    def fill_in(self, labels: Mapping[str, str]) -> LabelTable:
        """The table with `labels` in the rows of these images; an image without a row gets one."""
        image_column, label_column = (self._names().index(name) for name in COLUMNS)
        width, rows, missing = len(self.columns), [], dict(labels)
        for cells, (_, image, _) in zip(self.rows, self.labels(), strict=True):
            if image in labels:
                cells = cells + [""] * (width - len(cells))
                cells[label_column] = labels[image]
                missing.pop(image, None)
            rows.append(cells)
        for image, label in missing.items():
            rows.append([""] * width)
            rows[-1][image_column], rows[-1][label_column] = image, label
        return LabelTable(self.columns, rows, list(range(2, len(rows) + 2)), self.delimiter)


def held(folder: Path) -> AbstractContextManager[None]:
    """The request of `folder`, against other processes and threads that fill it in or take it."""
    return locked(folder, "request")


def write_csv(
    path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS, delimiter: str = ","
) -> None:
    """A CSV file, complete or not at all, and on disk when this returns."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([columns, *rows])
    replace_text(path, text.getvalue(), durable=True)


def read_request(folder: Path) -> Request | None:
    """What people are asked for now, if anything."""
    path = folder / STATE
    return Request.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def wrong_label(
    image: str, label: str, asked: Collection[str], classes: Sequence[str], answered: Mapping[str, str]
) -> str:
    """Why `label` of `image` cannot be taken; empty where it can, or where there is none yet.

    Args:
        asked: the request's images.
        answered: earlier answers, to tell a label that comes again from one that nobody asked for.
    """
    if image not in asked:
        why = f"was labelled {answered[image]!r} before" if image in answered else "was not asked for"
        return f"{image!r} {why}"
    if label and label.casefold() not in {name.casefold() for name in classes}:
        return f"unknown class {label!r} of {image!r} ({nearest(label, classes)})"
    return ""


def request_labels(folder: Path) -> tuple[Request | None, dict[str, str]]:
    """What people are asked for now, and the labels that its CSV has already: image -> label."""
    request, table = _waiting(folder)
    return request, _filled(request, table)


def add_labels(folder: Path, labels: Mapping[str, str]) -> int:
    """Write labels (image -> class) into the request that waits: all of them, or none.

    Labels that were given before are left as they are, so that the same call again changes nothing. Classes are
    compared without regard to case.

    Returns:
        How many images of the request have no label yet.

    Raises:
        LabelConflict: an image has another label already, or a person's file of the request cannot be read.
        ValueError: an unknown class, or an image that was not asked for.
        FileNotFoundError: not the folder of a labelling.
    """
    classes, new = read_manifest(folder).classes, {}
    by_name = {name.casefold(): name for name in classes}
    with held(folder):
        answered = read_answers(folder)
        request, table = _waiting(folder)
        filled = _filled(request, table)
        asked = set(request.images) if request else set()
        for image, label in labels.items():
            before = answered.get(image) or filled.get(image)
            if before is None:
                if why := wrong_label(image, label, asked, classes, answered):
                    raise ValueError(why)
                new[image] = by_name[label.casefold()]
            elif before.casefold() != label.casefold():
                raise LabelConflict(f"{image!r} was labelled {before!r} before, now {label!r}")
        if new:
            table = table.fill_in(new)
            write_csv(folder / REQUEST, table.rows, table.columns, table.delimiter)
    return len(asked - filled.keys() - new.keys())


def _waiting(folder: Path) -> tuple[Request | None, LabelTable]:
    request = read_request(folder)
    try:
        return request, LabelTable.read(folder / REQUEST)
    except FileNotFoundError:
        return request, LabelTable.empty(request.images if request else [])
    except ValueError as error:
        raise LabelConflict(str(error)) from None


def _filled(request: Request | None, table: LabelTable) -> dict[str, str]:
    asked = set(request.images) if request else set()
    return {image: label for _, image, label in table.labels() if label and image in asked}
