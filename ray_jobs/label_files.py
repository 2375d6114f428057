"""What people and the labelling job exchange: a filled-in `to_label.csv`, and the contact sheet for it."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image

from dataeff.data.label_file import LabelTable, wrong_label
from ray_jobs.cli import UserError

THUMBNAIL = 160  # pixels of the longer side
SHOWN = 12  # problems that one message names


def read_labels(
    path: Path, asked: Sequence[str], classes: Sequence[str], answered: Mapping[str, str]
) -> dict[str, str] | None:
    """Labels of a filled-in request: image -> class, for every image that was asked for; None while all are empty.

    Rows are numbered as a spreadsheet shows them: the header is row 1. Classes are compared without regard to case and
    surrounding spaces. Columns besides `image` and `label` are ignored; commas, semicolons and tabs separate.

    Args:
        asked: the request's images, in its order.
        answered: earlier answers, to tell a label that comes again from one that nobody asked for.

    Raises:
        UserError: one line that names every wrong row (the first dozen): an unknown class, a missing, empty or repeated
            row, an image that was not asked for.
    """
    try:
        rows = LabelTable.read(path).labels()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    by_name = {name.casefold(): name for name in classes}
    first_row: dict[str, int] = {}
    labels: dict[str, str] = {}
    problems: list[str] = []
    for number, image, label in rows:
        if image in first_row:
            problems.append(f"rows {first_row[image]} and {number}: {image!r} twice")
            continue
        if image in asked:
            first_row[image] = number
        why = wrong_label(image, label, asked, classes, answered)
        if why:
            problems.append(f"row {number}: {why}")
        elif label:
            labels[image] = by_name[label.casefold()]
    if not any(label for _, _, label in rows) and not problems and len(first_row) == len(asked):
        return None
    unknown = {image for number, image, label in rows if label}
    problems += [f"row {row}: no label for {image!r}" for image, row in first_row.items() if image not in unknown]
    problems += [
        f"no row for {image!r} (row {number + 2} of the request)"
        for number, image in enumerate(asked)
        if image not in first_row
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{path}: {'; '.join(problems[:SHOWN])}{more}. Nothing was taken from it and nothing is lost: correct the "
            "file and run the same command again"
        )
    return labels


def contact_sheet(
    title: str, names: Sequence[str], images: Sequence[PIL.Image.Image], classes: Sequence[str], file_name: str
) -> str:
    """A page that shows what to label, with a choice under each image and a button that saves the filled-in CSV.

    Everything is in the page: it can be opened from disk, or sent to whoever knows the answers.

    Args:
        names: as in the CSV.
        images: of any size, shown scaled down.
        file_name: that the button saves under.
    """
    options = "".join(f"<option>{html.escape(name)}</option>" for name in ("", *classes))
    figures = "\n".join(
        f'<figure data-image="{html.escape(name)}"><img alt="" src="{_thumbnail(image)}"><figcaption>'
        f"{number + 2}. {html.escape(name)}</figcaption><select>{options}</select></figure>"
        for number, (name, image) in enumerate(zip(names, images, strict=True))
    )
    return (
        PAGE.replace("{title}", html.escape(title))
        .replace("{file}", json.dumps(file_name))
        .replace("{classes}", html.escape(", ".join(classes)))
        .replace("{figures}", figures)
    )


def _thumbnail(image: PIL.Image.Image) -> str:
    """A data URI of an image, scaled down where it is large."""
    picture = image.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{font:15px/1.5 system-ui,sans-serif;margin:1.5em;color:#222}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:1em}
figure{margin:0;padding:.5em;border:1px solid #ddd;border-radius:6px}figure.done{background:#eef6e8}
img{width:100%;height:160px;object-fit:contain;image-rendering:pixelated}
figcaption{font-size:12px;overflow-wrap:anywhere}select{width:100%}
header{position:sticky;top:0;background:#fff;padding:.5em 0}
</style></head><body>
<header><h1>{title}</h1><p>Classes: {classes}. Choose below and save, or write the classes into the column
<code>label</code> of the CSV file. <button>Save CSV</button> <span></span></p></header>
<main>
{figures}
</main>
<script>
const figures = [...document.querySelectorAll("figure")];
const count = () => {
  const done = figures.filter(f => f.querySelector("select").value);
  figures.forEach(f => f.classList.toggle("done", done.includes(f)));
  document.querySelector("span").textContent = done.length + " of " + figures.length + " labelled";
};
const quote = text => '"' + text.replaceAll('"', '""') + '"';
document.addEventListener("change", count);
document.querySelector("button").addEventListener("click", () => {
  const rows = figures.map(f => quote(f.dataset.image) + "," + quote(f.querySelector("select").value));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([["image,label", ...rows].join("\\n") + "\\n"], {type: "text/csv"}));
  link.download = {file};
  link.click();
});
count();
</script></body></html>
"""
