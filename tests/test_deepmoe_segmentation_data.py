"""Images with classes of pixels: rendered scenes, Parquet with masks, crops, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dataeff.data import Augment, TrainStream, absolute_spec, open_splits
from dataeff.data.segmentation import PairPreprocess, RandomCrop, class_table, fit_classes, open_segmentation, unpack
from dataeff.data.shapes_segmentation import IGNORE, ShapesSegmentation

NAMES = ["sky", "void", "road"]


def png(array: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write(
    path: Path,
    masks: list[NDArray[np.uint8]],
    images: list[NDArray[np.uint8]] | None = None,
    label: dict[str, Any] | None = None,
    column: str = "label",
) -> None:
    """Images whose red channel is 10 times the mask, unless given."""
    if images is None:
        images = [np.stack([10 * mask, mask, mask], 2) for mask in masks]
    described = label if label is not None else {"_type": "Image", "classes": NAMES, "ignore": 1}
    metadata = json.dumps({"info": {"features": {column: described}}})
    struct = [{"bytes": png(mask), "path": "x.png"} for mask in masks]
    table = pa.table({"image": [png(image) for image in images], column: struct})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path, row_group_size=3)


def masks(count: int, height: int = 16, width: int = 20) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 3, (height, width), dtype=np.uint8) for _ in range(count)]


def test_masks_come_with_their_images_and_void_pixels_do_not_count(tmp_path: Path) -> None:
    drawn = masks(10)
    drawn[3][0, 0] = 255
    write(tmp_path / "train.parquet", drawn)
    splits = open_segmentation(f"parquet:{tmp_path}?val=0.2&test=0.2")
    assert splits.classes == ("sky", "road") and splits.image_shape == (3, 16, 20)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (6, 2, 2)
    images, classes = unpack(PairPreprocess.fit(splits.train)(splits.train.images([3, 0])))
    assert images.shape == (2, 3, 16, 20) and abs(float(images.mean())) < 1
    expected = np.where(drawn[3] == 2, 1, np.where((drawn[3] == 1) | (drawn[3] == 255), IGNORE, 0))
    assert np.array_equal(classes[0].numpy(), expected)
    pairs = splits.train.images([3])
    assert np.array_equal(pairs[0, 0].numpy(), (10 * drawn[3].astype(int) % 256).astype(np.uint8))
    # What is cut is the end of the rows, not a random part: neighbours of a film stay on one side.
    assert splits.test.describe(0) == "train.parquet row 8" and splits.val.describe(0) == "train.parquet row 6"


def test_validation_files_are_the_test_split_where_that_has_none(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", masks(10), column="mask")
    write(tmp_path / "val.parquet", masks(4), column="mask")
    splits = open_segmentation(f"parquet:{tmp_path}")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (9, 1, 4)
    assert splits.test.describe(2) == "val.parquet row 2"
    with pytest.raises(ValueError, match="test= has no effect"):
        open_segmentation(f"parquet:{tmp_path}?test=0.2")
    write(tmp_path / "test.parquet", masks(3), column="mask")
    splits = open_segmentation(f"parquet:{tmp_path}?labels=4")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (4, 4, 3)
    assert [splits.train.describe(i)[-1] for i in range(4)] == ["0", "3", "6", "9"]


def test_other_sizes_are_scaled_to_cover_and_masks_keep_their_classes(tmp_path: Path) -> None:
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[:, 20:] = 2
    write(tmp_path / "train.parquet", [mask] * 5)
    splits = open_segmentation(f"parquet:{tmp_path}?size=32")
    assert splits.image_shape == (3, 32, 32)
    classes = 255 - splits.train.images([0])[0, 3]
    assert set(classes.unique().tolist()) == {0, 1}
    assert bool((classes[:, :16] == 0).all()) and bool((classes[:, 16:] == 1).all())
    one = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    assert torch.equal(fit_classes(one, (4, 4))[0, ::2, ::2], one[0])


def test_a_table_of_classes_counts_the_ignored_one_out_wherever_it_is() -> None:
    names, table = class_table(["a", "void", "b"], 1)
    assert names == ("a", "b") and table[:4].tolist() == [0, 255, 1, 254] and table[255] == 255
    names, table = class_table(["a", "b"], None)
    assert names == ("a", "b") and table[:3].tolist() == [0, 1, 254]


def test_shifts_and_crops_move_pixels_and_classes_together_and_pad_with_ignore() -> None:
    splits = open_segmentation("shapes?size=32")
    pairs = splits.train.images(np.arange(8))
    preprocess = PairPreprocess.fit(splits.train)
    with TrainStream(splits.train, preprocess.cropped((16, 24)), RandomCrop("shift_flip"), 8, seed=0) as stream:
        batch = next(stream)
    assert batch.images.shape == (8, 4, 16, 24)
    _, classes = unpack(batch.images)
    assert set(classes.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}
    draws = torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.1]], dtype=torch.float64)
    moved = RandomCrop("shift_flip", padding=4)(pairs[:2], draws, (32, 32))
    assert torch.equal(moved[0, :, 4:, 4:], pairs[0, :, :28, :28])
    assert torch.equal(moved[1].flip(-1)[:, 4:, 4:], pairs[1, :, :28, :28])
    assert bool((unpack(preprocess(moved))[1][0, :4] == IGNORE).all())
    last = RandomCrop("shift", padding=4)(pairs[:1], torch.full((1, 2), 0.999, dtype=torch.float64), (32, 32))
    assert torch.equal(last[0, :, :28, :28], pairs[0, :, 4:, 4:])


def test_without_augmentation_a_crop_is_the_centre() -> None:
    splits = open_segmentation("shapes?size=32")
    preprocess = PairPreprocess.fit(splits.train)
    with TrainStream(splits.train, preprocess.cropped((16, 16)), RandomCrop("none"), 4, seed=0) as stream:
        batch = next(stream)
    whole = preprocess(splits.train.images(batch.indices))
    torch.testing.assert_close(batch.images, whole[:, :, 8:24, 8:24])


def test_shapes_are_those_of_the_renderer_and_seeds_differ() -> None:
    splits = open_segmentation("shapes?size=32")
    assert splits.image_shape == (3, 32, 32) and splits.classes == ShapesSegmentation.classes
    images, classes = ShapesSegmentation(1000, 32).batch([600])
    preprocess = PairPreprocess(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(1 / 2.2,) * 3)
    found: tuple[Tensor, Tensor] = unpack(preprocess(splits.val.images([0])))
    torch.testing.assert_close(found[0], images, atol=0.006, rtol=0)
    assert torch.equal(found[1], classes)
    other = open_segmentation("shapes?size=32&seed=1")
    assert other.fingerprint != splits.fingerprint and not torch.equal(other.val.images([0]), splits.val.images([0]))
    assert absolute_spec("shapes?size=32") == "shapes?size=32"


def test_loader_processes_read_the_same_batches() -> None:
    splits = open_segmentation("shapes?size=16&labels=16")
    preprocess = PairPreprocess.fit(splits.train)
    found = []
    for workers in (0, 2):
        with TrainStream(splits.train, preprocess, RandomCrop("shift_flip"), 8, 0, workers=workers) as stream:
            found.append([next(stream).images for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits", "'digits' is not for images with classes of pixels"),
        ("shapes?longtail=3", "option 'longtail' is not for images"),
        ("shapes?val=0.2", "val= has no effect"),
        ("shapes?labels=700", "labels=700: the training split has 600"),
        ("shapes:here", "takes no location"),
        ("shapes?size=8", "at least 1 image of at least 16 pixels"),
    ],
)
def test_data_that_has_no_classes_of_pixels_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_segmentation(text)


def test_bad_files_are_refused_with_their_name_and_row(tmp_path: Path) -> None:
    def refused(message: str, split: str = "train", **changes: Any) -> None:
        write(tmp_path / "train.parquet", **{"masks": masks(4), **changes})
        with pytest.raises(ValueError, match=message):
            opened = open_segmentation(f"parquet:{tmp_path}?val=0.25&test=0.25")
            getattr(opened, split).images([0])

    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_segmentation(f"parquet:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match="no train"):
        open_segmentation(f"parquet:{tmp_path}")
    wrong = masks(4)
    wrong[0][2, 3] = 7
    refused(r"train.parquet row 0 has a pixel of class 7, outside the class list \(0 to 2\)", masks=wrong)
    uneven = [np.zeros((16, 24, 3), dtype=np.uint8)] * 4
    refused(r"row 0 has an image of \[16, 24\] and a mask of \[16, 20\]", images=uneven)
    mixed = masks(3) + masks(1, 32, 20)
    refused(r"train.parquet row 3 is \[32, 20\] pixels, the first image \[16, 20\]; give size=N", "test", masks=mixed)
    refused("must list the 'classes'", label={"_type": "Image"})
    refused("must list the 'classes'", label={"classes": NAMES, "ignore": 300})
    refused("no column of masks", column="depth")
    write(tmp_path / "train.parquet", masks(4))
    write(tmp_path / "val.parquet", masks(2), label={"classes": ["a", "b"]})
    with pytest.raises(ValueError, match="the files list different classes"):
        open_segmentation(f"parquet:{tmp_path}")


def test_classification_says_that_data_with_masks_is_not_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'shapes' has classes of pixels, not of images"):
        open_splits("shapes")
    write(tmp_path / "train.parquet", masks(4))
    with pytest.raises(ValueError, match="not integer classes"):
        open_splits(f"parquet:{tmp_path}")


def test_a_crop_kind_is_an_augmentation_with_the_same_draws() -> None:
    assert [RandomCrop(kind).draws for kind in ("none", "shift", "shift_flip")] == [0, 2, 3]  # type: ignore[arg-type]
    assert isinstance(RandomCrop("shift"), Augment)
