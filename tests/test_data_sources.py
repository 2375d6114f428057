import io
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dataeff.data import BadImageError, absolute_spec, open_images, open_splits
from dataeff.data import decode as decode_module
from dataeff.data import sources as sources_module
from dataeff.data.embedded import DIGITS
from dataeff.data.sources import UNKNOWN
from dataeff.data.spec import parse_spec

CIFAR = Path(__file__).parents[1].parent / "shared" / "data" / "cifar10"


def picture(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_parquet(
    path: Path, images: list[bytes | None], labels: list[int | None], names: list[str] | None = None
) -> None:
    column = pa.array(
        [None if image is None else {"bytes": image, "path": None} for image in images],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """40 training images in two files of several row groups, 10 for testing, classes cat and dog."""
    folder = tmp_path / "set"
    for part in range(2):
        numbers = range(20 * part, 20 * part + 20)
        write_parquet(
            folder / f"train-{part}.parquet",
            [encoded(picture(n)) for n in numbers],
            [n % 2 for n in numbers],
            ["cat", "dog"],
        )
    numbers = range(100, 110)
    write_parquet(
        folder / "test.parquet", [encoded(picture(n)) for n in numbers], [n % 2 for n in numbers], ["cat", "dog"]
    )
    return folder


def without_labels(parquet: Path) -> None:
    for file in parquet.glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns("label"), file)


def write_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8)) -> None:
    for k, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for n in range(count):
            picture(100 * k + n, size).save(root / name / f"{n:03}.png")


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources_module, "decode", fail)


# The data string


def test_an_unknown_source_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'parket'.*did you mean 'parquet'.*digits-easy-hard"):
        open_splits("parket:x")


def test_an_unknown_option_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'label'.*did you mean 'labels'.*longtail"):
        open_splits("digits?label=5")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("labels=0", "at least 1"),
        ("labels=many", "whole number"),
        ("val=0.9", "from 0 to 0.5"),
        ("val=nan", "from 0 to 0.5"),
        ("longtail=0.5", "from 1 to"),
        ("size=2", "from 4 to 2048"),
        ("channels=2", "1 or 3"),
        ("on_bad_image=skp", "did you mean 'skip'"),
        ("seed=-1", "from 0"),
        ("cache=", "needs a folder"),
        ("seed=1&seed=2", "once"),
        ("root=x", "unknown option"),
    ],
)
def test_an_option_out_of_range_states_value_and_range(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_spec(f"digits?{option}")
    assert option.split("&")[0].split("=")[0] in str(error.value)


def test_a_fraction_for_a_split_that_exists_is_refused(parquet: Path) -> None:
    with pytest.raises(ValueError, match="test= has no effect"):
        open_splits(f"parquet:{parquet}?test=0.3")


def test_an_absolute_spec_keeps_the_options_and_resolves_the_folders(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = absolute_spec("parquet:set?labels=6&cache=decoded")
    assert text == f"parquet:{parquet}?labels=6&cache={tmp_path}/decoded"
    assert absolute_spec("digits?seed=1") == "digits?seed=1"


# Embedded sets


def test_the_stored_digits_and_cuts_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    made = {"images": digits.images, "labels": digits.target}
    for size, names in ((0.3, ("train", "test")), (597, ("pairs_train", "pairs_test"))):
        rows = np.arange(len(digits.target))
        sides = train_test_split(rows, test_size=size, stratify=digits.target, random_state=0)
        made |= dict(zip(names, sides, strict=True))
    with np.load(DIGITS) as stored:
        assert stored.keys() == made.keys()
        for name, values in made.items():
            np.testing.assert_array_equal(stored[name], values)


def test_digits_are_split_70_30_whatever_the_seed() -> None:
    one, two = open_splits("digits?val=0"), open_splits("digits?val=0&seed=7")
    assert (len(one.train), len(one.val), len(one.test)) == (1257, 0, 540)
    assert one.image_shape == (1, 8, 8) and one.train.images([0]).dtype == torch.uint8
    assert torch.equal(one.test.images(range(540)), two.test.images(range(540)))
    assert one.train.images(range(1257)).max() == 255


def test_the_validation_cut_is_stratified_and_disjoint_from_train() -> None:
    splits = open_splits("digits?val=0.2")
    names = {splits.train.describe(i) for i in range(len(splits.train))}
    assert names.isdisjoint(splits.val.describe(i) for i in range(len(splits.val)))
    shares = np.bincount(splits.val.labels) / np.bincount(np.concatenate([splits.train.labels, splits.val.labels]))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_easy_digits_are_clean_and_centred_and_hard_ones_noisy() -> None:
    splits = open_splits("digits-easy-hard")
    assert (len(splits.train), len(splits.test), splits.image_shape) == (3000, 1000, (1, 12, 12))
    hard = splits.train.flags["hard"]
    assert 0.37 < hard.mean() < 0.43
    border = splits.train.images(range(3000)).float()
    border[:, :, 2:10, 2:10] = 0
    assert border[~torch.from_numpy(hard)].max() == 0
    assert (border[torch.from_numpy(hard)].amax((1, 2, 3)) > 0).all()


def test_flags_follow_a_subset() -> None:
    train = open_splits("digits-easy-hard").train
    part = train.subset([5, 3, 900])
    np.testing.assert_array_equal(part.flags["hard"], train.flags["hard"][[5, 3, 900]])
    assert torch.equal(part.images([2]), train.images([900])) and part.describe(0) == train.describe(5)


def test_no_validation_original_is_a_training_original() -> None:
    splits = open_splits("digits-easy-hard")
    easy = {
        name: {s.images([i]).numpy().tobytes() for i in np.flatnonzero(~s.flags["hard"])}
        for name, s in (("train", splits.train), ("val", splits.val))
    }
    assert not easy["train"] & easy["val"]


def test_size_and_channels_reshape_embedded_images() -> None:
    assert open_splits("digits?size=16&channels=3").image_shape == (3, 16, 16)


# Subsets


def test_labels_keeps_a_stratified_subset_of_train_only() -> None:
    splits = open_splits("digits?labels=50")
    assert len(splits.train) == 50 and len(splits.test) == 540
    assert set(np.bincount(splits.train.labels)) == {5}


def test_longtail_makes_the_first_class_ratio_times_the_last() -> None:
    counts = np.bincount(open_splits("digits?longtail=10").train.labels)
    assert (np.diff(counts) <= 0).all() and counts[0] / counts[-1] == pytest.approx(10, rel=0.1)


def test_more_labels_than_images_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match="labels=5000: must be from 10 .* to 1131"):
        open_splits("digits?labels=5000")


# Parquet


def test_parquet_rows_are_the_encoded_images_in_file_order(parquet: Path) -> None:
    splits = open_splits(f"parquet:{parquet}?val=0")
    assert splits.classes == ("cat", "dog") and splits.image_shape == (3, 8, 8)
    for n in (0, 6, 7, 19, 20, 39):
        np.testing.assert_array_equal(splits.train.images([n])[0].permute(1, 2, 0), np.asarray(picture(n)))
    assert splits.train.describe(27) == "train-1.parquet row 7"


def test_a_binary_column_named_img_works_too(tmp_path: Path) -> None:
    table = pa.table({"img": pa.array([encoded(picture(n)) for n in range(8)], pa.large_binary()), "label": [0, 1] * 4})
    pq.write_table(table, tmp_path / "train.parquet")
    splits = open_splits(f"parquet:{tmp_path}?val=0&test=0.5")
    assert splits.classes == ("0", "1") and (len(splits.train), len(splits.test)) == (4, 4)


def test_a_validation_file_is_used_where_there_is_one(parquet: Path) -> None:
    write_parquet(parquet / "validation.parquet", [encoded(picture(n)) for n in range(4)], [0, 1, 0, 1], ["cat", "dog"])
    splits = open_splits(f"parquet:{parquet}")
    assert (len(splits.train), len(splits.val)) == (40, 4)


def damaged(parquet: Path, image: bytes | None) -> Path:
    images: list[bytes | None] = [encoded(picture(n)) for n in range(20)]
    images[11] = image
    write_parquet(parquet / "train-1.parquet", images, [n % 2 for n in range(20)], ["cat", "dog"])
    return parquet


BAD_IMAGES = {
    "garbage": b"no image at all",
    "empty": b"",
    "null": None,
    "truncated png": encoded(picture(0))[:-60],
    "truncated jpeg": encoded(picture(0, (64, 64)), "JPEG")[:-400],
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_by_file_and_row(parquet: Path, kind: str) -> None:
    path = damaged(parquet, BAD_IMAGES[kind])
    with pytest.raises(BadImageError, match=r"^train-1\.parquet row 11 "):
        splits = open_splits(f"parquet:{path}?val=0&size=8")
        splits.train.images(range(len(splits.train)))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(parquet, encoded(picture(0, (64, 64))))
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 1000)
    with pytest.raises(BadImageError, match=r"row 11 has 4,096 pixels.*decompression bomb"):
        open_splits(f"parquet:{path}?size=8")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_the_declared_size_of_any_format_is_checked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = torch.frombuffer(bytearray(encoded(picture(0, (64, 64)), kind)), dtype=torch.uint8)
    assert decode_module.decode(blob, 3).shape == (3, 64, 64)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadImageError, match="bomb"):
        decode_module.decode(blob, 3)


@pytest.mark.parametrize("cache", [False, True])
def test_skipping_drops_bad_images_and_counts_them(parquet: Path, tmp_path: Path, cache: bool) -> None:
    path = damaged(parquet, BAD_IMAGES["truncated png"])
    option = f"&cache={tmp_path / 'decoded'}" if cache else ""
    for _ in range(2):
        splits = open_splits(f"parquet:{path}?val=0&on_bad_image=skip{option}")
        assert splits.skipped == 1 and len(splits.train) == 39
        assert splits.train.describe(31) == "train-1.parquet row 12"
        np.testing.assert_array_equal(splits.train.images([31])[0].permute(1, 2, 0), np.asarray(picture(12)))


@pytest.mark.parametrize(
    ("label", "message"), [(2, "label 2 is outside the class list"), (-1, "label -1"), (None, "null")]
)
def test_a_bad_label_is_named_by_file_and_row(parquet: Path, label: int | None, message: str) -> None:
    labels: list[int | None] = [0, 1, 0, label]
    write_parquet(parquet / "test.parquet", [encoded(picture(n)) for n in range(4)], labels, ["cat", "dog"])
    with pytest.raises(ValueError, match=rf"test\.parquet row 3: .*{message}"):
        open_splits(f"parquet:{parquet}")


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture(n)) for n in range(8)], [0] * 8, ["cat", "dog"])
    with pytest.raises(ValueError, match="class 'dog' has no images"):
        open_splits(f"parquet:{tmp_path}")


def test_mixed_sizes_name_the_first_two_that_differ(parquet: Path) -> None:
    path = damaged(parquet, encoded(picture(0, (9, 10))))
    with pytest.raises(
        ValueError, match=r"train-0\.parquet row 0 is 8x8 .* train-1\.parquet row 11 is 9x10; add size=N"
    ):
        open_splits(f"parquet:{path}")
    assert open_splits(f"parquet:{path}?size=8").train.images(range(36)).shape == (36, 3, 8, 8)


def test_a_size_beyond_the_checked_headers_is_refused_when_read(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(parquet, encoded(picture(0, (9, 10))))
    monkeypatch.setattr(sources_module.DecodingStore, "check_sizes", lambda *_: None)
    train = open_splits(f"parquet:{path}?val=0").train
    with pytest.raises(ValueError, match=r"train-1\.parquet row 11 is 9x10"):
        train.images(range(40))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_splits(f"parquet:{tmp_path / 'absent'}")
    write_parquet(tmp_path / "other.parquet", [encoded(picture(0))], [0])
    with pytest.raises(FileNotFoundError, match=r"no train\*\.parquet .*other\.parquet"):
        open_splits(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match="names no location"):
        open_splits("folder")


def test_missing_or_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    for table, message in (
        (pa.table({"picture": [b"x"], "label": [0]}), "no column 'image' or 'img'; its columns are picture, label"),
        (pa.table({"image": [b"x"], "class": [0]}), "no column 'label'; its columns are image, class"),
        (pa.table({"image": [3], "label": [0]}), "column 'image' is int64"),
        (pa.table({"image": [b"x"], "label": ["cat"]}), "column 'label' is string"),
    ):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=re.escape(f"train.parquet: {message}")):
            open_splits(f"parquet:{tmp_path}")
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"train\.parquet: not a readable Parquet file"):
        open_splits(f"parquet:{tmp_path}")


def test_files_with_different_class_lists_are_refused(parquet: Path) -> None:
    write_parquet(parquet / "test.parquet", [encoded(picture(0))], [0], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"train-0\.parquet and test\.parquet list different classes"):
        open_splits(f"parquet:{parquet}")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_any_mode_decodes_as_pillow_does(mode: str, channels: int) -> None:
    data = encoded(picture(3, (16, 16), mode))
    blob = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    expected = decode_module.pil_to_tensor(Image.open(io.BytesIO(data)), channels)
    assert torch.equal(decode_module.decode(blob, channels), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_of_any_mode_decodes_as_pillow_does(mode: str, channels: int) -> None:
    data = encoded(picture(3, (17, 13), mode), "JPEG")
    blob = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    expected = decode_module.pil_to_tensor(Image.open(io.BytesIO(data)), channels)
    assert torch.equal(decode_module.decode(blob, channels), expected)


def test_sixteen_bit_greys_keep_their_upper_byte() -> None:
    image = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    blob = torch.frombuffer(bytearray(encoded(image)), dtype=torch.uint8)
    expected = (np.arange(64) * 1000 // 256).reshape(8, 8)
    np.testing.assert_array_equal(decode_module.decode(blob, 1)[0], expected)


# Folders and torchvision


def test_a_folder_with_train_and_test_is_read_as_such(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 6, "dog": 4})
    write_folder(tmp_path / "test", {"cat": 2, "dog": 2})
    splits = open_splits(f"folder:{tmp_path}?val=0.2")
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 4)
    assert open_splits(f"folder:{tmp_path}?val=0").train.describe(7) == "train/dog/001.png"


def test_a_folder_of_classes_is_cut_by_seed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 20})
    one, two, three = (open_splits(f"folder:{tmp_path}?test=0.25&seed={seed}") for seed in (0, 0, 1))
    assert (len(one.train), len(one.val), len(one.test)) == (27, 3, 10)
    assert np.bincount(one.test.labels).tolist() == [5, 5]
    names = [[splits.test.describe(i) for i in range(10)] for splits in (one, two, three)]
    assert names[0] == names[1] != names[2]


def test_images_without_labels_can_be_opened_where_none_is_read(parquet: Path) -> None:
    labelled = open_images(f"parquet:{parquet}?val=0.2")
    assert len(labelled) == 32 and set(labelled.labels) == {0, 1}
    without_labels(parquet)
    pool = open_images(f"parquet:{parquet}?size=6")
    assert len(pool) == 40 and set(pool.labels) == {UNKNOWN} and pool.image_shape == (3, 6, 6)
    assert torch.equal(
        open_images(f"parquet:{parquet}").images([39])[0], torch.tensor(np.array(picture(39))).permute(2, 0, 1)
    )
    assert len(open_images("digits?labels=50")) == 50
    with pytest.raises(ValueError, match="no column 'label'.*for search_data of nas_search"):
        open_splits(f"parquet:{parquet}")
    with pytest.raises(ValueError, match="no labels to choose by: leave labels= out"):
        open_images(f"parquet:{parquet}?labels=5")
    write_parquet(parquet / "train-1.parquet", [encoded(picture(1))], [0])
    with pytest.raises(ValueError, match="train-1.parquet has a column 'label' and other files have none"):
        open_images(f"parquet:{parquet}")


def test_a_folder_of_images_without_classes_can_be_opened_where_no_label_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images .files named .bmp"):
        open_images(f"folder:{tmp_path}")
    for number in range(5):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    pool = open_images(f"folder:{tmp_path}")
    assert len(pool) == 5 and set(pool.labels) == {UNKNOWN} and pool.describe(3) == "3.png"
    assert torch.equal(pool.images([2])[0], torch.tensor(np.array(picture(2))).permute(2, 0, 1))
    with pytest.raises(FileNotFoundError, match="no class folders"):
        open_splits(f"folder:{tmp_path}")
    write_folder(tmp_path, {"cat": 10, "dog": 10})
    assert set(open_images(f"folder:{tmp_path}?val=0").labels) == {0, 1}


def test_an_empty_or_unknown_class_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match="train/emu/: this class has no images"):
        open_splits(f"folder:{tmp_path}")
    (tmp_path / "train" / "emu").rmdir()
    write_folder(tmp_path / "test", {"fox": 1})
    with pytest.raises(ValueError, match="test/fox/: this class is not in the training split"):
        open_splits(f"folder:{tmp_path}")


def test_a_bad_image_file_is_named_by_its_path(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 5, "dog": 5})
    file = tmp_path / "dog" / "002.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(BadImageError, match=r"^dog/002\.png is corrupt or truncated"):
        splits = open_splits(f"folder:{tmp_path}?val=0")
        for split in (splits.train, splits.test):
            split.images(range(len(split)))


def write_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, count], dtype=">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + (np.arange(count) % 10).astype(np.uint8).tobytes())


def test_a_torchvision_set_is_read_from_its_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    splits = open_splits(f"torchvision:MNIST?root={tmp_path}&val=0")
    assert (len(splits.train), len(splits.test), splits.image_shape) == (30, 10, (1, 28, 28))
    assert splits.classes[3] == "3 - three" and splits.train.labels[13] == 3
    assert splits.train.images([0]).float().mean() > 50


def test_torchvision_without_files_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MNIST: the train files are not under .*add download=1"):
        open_splits(f"torchvision:MNIST?root={tmp_path}")
    with pytest.raises(ValueError, match="did you mean 'CIFAR10'"):
        open_splits(f"torchvision:cifar-10?root={tmp_path}")
    with pytest.raises(ValueError, match="needs root=DIR"):
        open_splits("torchvision:MNIST")


def test_images_are_spread_over_the_whole_split() -> None:
    source = open_splits("digits").test
    few = source.spread(5)
    last = len(source) - 1
    rows = [0, round(last / 4), round(last / 2), round(3 * last / 4), last]
    assert (
        torch.equal(few.images(range(5)), source.images(rows)) and few.labels.tolist() == source.labels[rows].tolist()
    )
    assert source.spread(None) is source and source.spread(10**6) is source


# Cache and fingerprint


def test_a_cached_set_is_never_decoded_again(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_splits(f"parquet:{parquet}")
    text = f"parquet:{parquet}?cache={tmp_path / 'decoded'}"
    first = open_splits(text)
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded again"):
        plain.train.images([0])
    for splits in (first, open_splits(text)):
        assert splits.fingerprint == plain.fingerprint
        splits.train.images([3, 0, 7])
        assert splits.train.describe(30) == plain.train.describe(30)
    monkeypatch.undo()
    everything = range(len(plain.train))
    assert torch.equal(open_splits(text).train.images(everything), plain.train.images(everything))


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_cache_is_rebuilt(parquet: Path, tmp_path: Path, damage: str) -> None:
    text = f"parquet:{parquet}?cache={tmp_path / 'decoded'}"
    expected = open_splits(text).train.images(range(36))
    for file in (tmp_path / "decoded").glob("*.arrow"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.unlink()
        file.write_bytes({"cut": data[:-100], "flip": data, "other": b"nonsense"}[damage])
    assert torch.equal(open_splits(text).train.images(range(36)), expected)
    assert len(list((tmp_path / "decoded").glob("*.arrow*"))) == 2


def test_an_interrupted_build_leaves_no_cache_behind(parquet: Path, tmp_path: Path) -> None:
    path = damaged(parquet, BAD_IMAGES["truncated png"])
    with pytest.raises(BadImageError, match=r"train-1\.parquet row 11"):
        open_splits(f"parquet:{path}?cache={tmp_path / 'decoded'}")
    assert not list((tmp_path / "decoded").glob("*.arrow*"))


def _open_and_sum(text: str, results: "multiprocessing.Queue[int]") -> None:
    train = open_splits(text).train
    results.put(int(train.images(range(len(train))).long().sum()))


def test_several_processes_may_open_one_cache_at_once(parquet: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[int] = context.Queue()
    text = f"parquet:{parquet}?cache={tmp_path / 'decoded'}"
    processes = [context.Process(target=_open_and_sum, args=(text, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(timeout=30)
    plain = open_splits(f"parquet:{parquet}").train
    assert sums == {int(plain.images(range(len(plain))).long().sum())}


def test_the_fingerprint_follows_content_and_selection_but_not_the_place(parquet: Path, tmp_path: Path) -> None:
    before = open_splits(f"parquet:{parquet}").fingerprint
    moved = parquet.rename(tmp_path / "moved")
    assert open_splits(f"parquet:{moved}").fingerprint == before
    assert open_splits(f"parquet:{moved}?labels=10").fingerprint != before
    assert open_splits(f"parquet:{moved}?seed=1").fingerprint != before
    write_parquet(moved / "test.parquet", [encoded(picture(n)) for n in range(1, 11)], [0, 1] * 5, ["cat", "dog"])
    assert open_splits(f"parquet:{moved}").fingerprint != before


@pytest.mark.skipif(not CIFAR.is_dir(), reason="shared/data/cifar10 is absent")
def test_cifar_opens_with_its_published_counts() -> None:
    splits = open_splits(f"parquet:{CIFAR}?val=0")
    assert (len(splits.train), len(splits.test), splits.image_shape) == (50_000, 5_000, (3, 32, 32))
    assert splits.classes[0] == "airplane" and set(np.bincount(splits.train.labels)) == {5000}
    assert splits.train.images([49_999, 0]).float().mean() > 20
