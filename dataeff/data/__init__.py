"""Data sets named by one string, their splits, preprocessing, augmentation and deterministic streams."""

from dataeff.data.decode import BadImageError
from dataeff.data.sources import ImageSource
from dataeff.data.spec import absolute_spec
from dataeff.data.splits import Splits, open_images, open_splits
from dataeff.data.stream import Batch, TrainStream, eval_batches
from dataeff.data.subsets import longtail_subset, stratified_split, stratified_subset
from dataeff.data.transforms import Augment, Preprocess, uniform_draws

__all__ = [
    "Augment",
    "BadImageError",
    "Batch",
    "ImageSource",
    "Preprocess",
    "Splits",
    "TrainStream",
    "absolute_spec",
    "eval_batches",
    "longtail_subset",
    "open_images",
    "open_splits",
    "stratified_split",
    "stratified_subset",
    "uniform_draws",
]
