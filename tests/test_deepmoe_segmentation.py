"""Segmentation with a dilated backbone on rendered shapes: data, IoU, loss, training and sub-channel execution."""

import pytest
import torch

from dataeff.data.shapes_segmentation import IGNORE, ShapesSegmentation
from dataeff.dynamic.deepmoe.inference import DeepMoEInference
from dataeff.dynamic.deepmoe.losses import deepmoe_loss
from dataeff.dynamic.deepmoe.model import build_deepmoe
from dataeff.metrics.iou import class_iou, confusion_matrix, mean_iou


def test_rendered_shapes_are_a_function_of_seed_and_index() -> None:
    first, again, other = ShapesSegmentation(9, 32), ShapesSegmentation(9, 32), ShapesSegmentation(9, 32, seed=1)
    images, labels = first.batch([0, 5])
    assert torch.equal(images[1], again.batch([5])[0][0]) and not torch.equal(images, other.batch([0, 5])[0])
    assert images.shape == (2, 3, 32, 32) and labels.dtype == torch.int64
    seen = set(ShapesSegmentation(60, 32).batch(list(range(60)))[1].unique().tolist())
    assert seen == {0, 1, 2, 3, 4, IGNORE}
    with pytest.raises(IndexError, match="0 to 8"):
        first.batch([9])


def test_iou_of_a_hand_counted_case_leaves_ignored_pixels_and_absent_classes_out() -> None:
    labels = torch.tensor([[0, 0, 1], [1, IGNORE, 1]])
    predicted = torch.tensor([[0, 1, 1], [1, 2, 0]])
    confusion = confusion_matrix(predicted, labels, 4)
    assert confusion[:2, :2].tolist() == [[1, 1], [1, 2]] and int(confusion.sum()) == 5
    assert class_iou(confusion)[:2].tolist() == pytest.approx([1 / 3, 2 / 4])
    assert mean_iou(confusion) == pytest.approx((1 / 3 + 1 / 2) / 2)
    with pytest.raises(ValueError, match=r"\[0, 4\) or 255"):
        confusion_matrix(predicted, labels + 4, 4)


def test_a_gated_dilated_network_learns_to_segment_and_runs_on_its_active_channels() -> None:
    torch.manual_seed(0)
    data = ShapesSegmentation(64, 32)
    model = build_deepmoe(
        "drn10", 5, width=1, widths=(8, 16, 16, 16), embedding_widths=(8, 8, 8, 8), latent=8, class_head="linear"
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for iteration in range(60):
        images, labels = data.batch([(16 * iteration + i) % 48 for i in range(16)])
        output = model(images)
        loss, parts = deepmoe_loss(output, labels, lam=0.3, mu=0.1, mu_mode="presence")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(parts["base"]))
    assert losses[-1] < 0.6 * losses[0]
    images, labels = data.batch(list(range(48, 64)))
    model.eval()
    fast = DeepMoEInference(model)(images)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(fast.logits, expected.logits, rtol=1e-5, atol=1e-5)
    confusion = confusion_matrix(fast.logits.argmax(1), labels, 5)
    background = confusion_matrix(torch.zeros_like(labels), labels, 5)
    assert mean_iou(confusion) > mean_iou(background) + 0.05
