"""Intersection over union of class maps."""

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Pixels of each true class (rows) by predicted class (columns), int64 (K, K); add up those of several batches.

    Args:
        predicted: int64, any shape, in [0, K).
        labels: int64 of the same shape, in [0, K) or `ignore`.

    Raises:
        ValueError: shapes that differ, or labels outside the above.
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted and labels must have one shape, got {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    counted = labels != ignore
    pairs = labels[counted] * num_classes + predicted[counted]
    if len(pairs) and (int(labels[counted].min()) < 0 or int(labels[counted].max()) >= num_classes):
        raise ValueError(f"labels must be in [0, {num_classes}) or {ignore}")
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """TP / (TP + FP + FN) of each class, float64 (K,); NaN for one that is neither there nor predicted."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal()).double()


def mean_iou(confusion: Tensor) -> float:
    """Mean over the classes that occur."""
    return float(class_iou(confusion).nanmean())
