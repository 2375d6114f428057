"""Rendered letters and digits, and sampling rates in the data string."""

import numpy as np
import pytest

from dataeff.data import open_splits


def test_letters_are_26_classes_of_16x16_and_the_same_every_time():
    first, again = open_splits("letters"), open_splits("letters")
    assert first.image_shape == (1, 16, 16) and first.classes[0] == "A" and len(first.classes) == 26
    assert len(first.train) + len(first.val) == 26 * 60 and len(first.test) == 26 * 30
    assert first.fingerprint == again.fingerprint != open_splits("letters?seed=1").fingerprint
    images = first.train.images(np.arange(len(first.train))).float()
    assert images.std() > 30 and images[0].max() > 150


def test_rendered_digits_have_the_classes_of_the_handwritten_ones():
    assert open_splits("rendered-digits").classes == open_splits("digits").classes


def test_images_of_a_class_differ_and_classes_can_be_told_apart():
    splits = open_splits("rendered-digits")
    pixels = splits.train.images(np.arange(len(splits.train))).flatten(1).numpy().astype(np.float64)
    assert len(np.unique(pixels, axis=0)) == len(pixels)
    from sklearn.neighbors import KNeighborsClassifier

    test = splits.test.images(np.arange(len(splits.test))).flatten(1).numpy()
    score = KNeighborsClassifier(3).fit(pixels, splits.train.labels).score(test, splits.test.labels)
    assert score > 0.6


@pytest.mark.parametrize(("rate", "share"), [("100", 1.0), ("50", 0.5), ("15", 0.15)])
def test_a_sampling_rate_keeps_that_share_of_every_class(rate, share):
    whole, part = open_splits("digits").train, open_splits(f"digits?rate={rate}").train
    assert len(part) == round(share * len(whole))
    np.testing.assert_allclose(np.bincount(part.labels), share * np.bincount(whole.labels), atol=1.01)


def test_the_smallest_rate_keeps_one_image_of_every_class():
    assert sorted(open_splits("digits?rate=0.01").train.labels.tolist()) == list(range(10))


@pytest.mark.parametrize("rate", ["0", "101", "-5", "nan", "many"])
def test_rates_outside_0_to_100_are_refused(rate):
    with pytest.raises(ValueError, match=f"rate={rate}: must be a percentage above 0 and up to 100"):
        open_splits(f"digits?rate={rate}")


def test_a_rate_and_a_number_of_labels_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        open_splits("digits?rate=50&labels=100")
