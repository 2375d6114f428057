"""Data files on disk: the layout of the decoded cache, and what happens when files change or disagree."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dataeff.data import Augment, Preprocess, TrainStream, cache, fingerprint, open_splits

Pixels = NDArray[np.uint8]


def pictures(count: int, height: int = 8, width: int = 8, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width), dtype=np.uint8)


def write_parquet(path: Path, images: Sequence[Pixels] | Pixels) -> None:
    """Grey PNG images whose labels alternate between the two classes."""
    blobs = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        blobs.append(stream.getvalue())
    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    table = pa.table({"image": blobs, "label": [i % 2 for i in range(len(blobs))]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": names}), path)


@pytest.mark.parametrize("batch_bytes", [1, 200, 4 * 2**20])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7)])
def test_cached_images_are_right_for_any_batch_and_image_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(cache, "_BATCH_BYTES", batch_bytes)
    images = pictures(31, *shape)
    write_parquet(tmp_path / "set" / "train.parquet", images)
    write_parquet(tmp_path / "set" / "test.parquet", images)
    text = f"parquet:{tmp_path / 'set'}?val=0&cache={tmp_path / 'cache'}"
    open_splits(text)
    train = open_splits(text).train
    order = np.random.default_rng(1).permutation(31)
    assert np.array_equal(train.images(order)[:, 0].numpy(), images[order])
    assert np.array_equal(train.images([30, 4, 4])[:, 0].numpy(), images[[30, 4, 4]])
    assert train.images([]).shape == (0, 1, *shape)


def test_a_stream_is_the_same_with_and_without_the_cache(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", pictures(40))
    text = f"parquet:{tmp_path / 'set'}?val=0.1&test=0.2"
    batches = []
    for source in (text, f"{text}&cache={tmp_path / 'cache'}"):
        train = open_splits(source).train
        for workers in (0, 2):
            with TrainStream(train, Preprocess.fit(train), Augment("shift"), 8, seed=0, workers=workers) as stream:
                batches.append(torch.cat([next(stream).images for _ in range(5)]))
    assert all(torch.equal(batches[0], other) for other in batches[1:])


def test_changed_data_or_another_size_get_a_cache_of_their_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", pictures(20))
    write_parquet(tmp_path / "set" / "test.parquet", pictures(6))
    text = f"parquet:{tmp_path / 'set'}?val=0&cache={tmp_path / 'cache'}"
    open_splits(text)
    assert open_splits(f"{text}&size=4").image_shape == (1, 4, 4)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 4
    changed = pictures(20, seed=1)
    write_parquet(tmp_path / "set" / "train.parquet", changed)
    assert np.array_equal(open_splits(text).train.images([15])[0, 0].numpy(), changed[15])


@pytest.mark.parametrize("cached", [False, True])
def test_test_images_of_another_size_than_training_are_refused(tmp_path: Path, cached: bool) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", pictures(10))
    write_parquet(tmp_path / "set" / "test.parquet", pictures(4, 9, 8))
    text = f"parquet:{tmp_path / 'set'}" + (f"?cache={tmp_path / 'cache'}" if cached else "")
    with pytest.raises(ValueError, match=r"first training image is 8x8 .* test\.parquet row 0 is 9x8; add size=N"):
        open_splits(text)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", pictures(10))
    write_parquet(tmp_path / "train-1.parquet", pictures(10))
    file = tmp_path / "train-1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-1\.parquet: not a readable Parquet file"):
        open_splits(f"parquet:{tmp_path}")


def test_a_large_set_is_fingerprinted_by_sizes_and_sampled_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_LIMIT", 10)
    monkeypatch.setattr(fingerprint, "PIECE", 4)
    file = tmp_path / "data"
    contents = [b"a" * 100, b"b" + b"a" * 99, b"a" * 99 + b"b", b"a" * 101, b"a" * 50 + b"b" + b"a" * 49]
    seen = set()
    for content in contents:
        file.write_bytes(content)
        seen.add(fingerprint.files_fingerprint(tmp_path, [file]))
    assert len(seen) == len(contents)
