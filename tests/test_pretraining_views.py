"""Views of images: what they change, what they leave alone, and that they depend on their own draws only."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dataeff.data.distortions import blur, fill_boxes
from dataeff.pretraining.views import (
    CONTRAST_DRAWS,
    SCORE_DRAWS,
    STRONG_DRAWS,
    WEAK_DRAWS,
    Recipe,
    contrast_view,
    rotations,
    score_copies,
    strong_view,
    weak_view,
)

VIEWS: list[tuple[Callable[[Tensor, Tensor, Recipe], Tensor], int]] = [
    (contrast_view, CONTRAST_DRAWS),
    (weak_view, WEAK_DRAWS),
    (strong_view, STRONG_DRAWS),
    (lambda images, draws, recipe: torch.cat(score_copies(images, draws, recipe), 1), SCORE_DRAWS),
]


def images(count: int, channels: int, side: int = 12) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(count))


def draws(count: int, width: int) -> Tensor:
    return torch.rand(count, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("recipe", ["digits", "photos"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_a_view_depends_on_the_image_and_its_own_draws_alone(number: int, channels: int, recipe: Recipe) -> None:
    view, width = VIEWS[number]
    x, u = images(40, channels), draws(40, width)
    whole = view(x, u, recipe)
    assert whole.shape[0] == 40 and whole.shape[2:] == x.shape[2:]
    assert float(whole.min()) >= -1e-6 and float(whole.max()) <= 1 + 1e-6
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(view(x[order], u[order], recipe), whole[order])
    torch.testing.assert_close(view(x[3:4], u[3:4], recipe), whole[3:4])
    assert not torch.equal(view(x, u.flip(0), recipe), whole)


def test_grey_images_have_three_copies_to_compare_with_and_photos_in_colour_four() -> None:
    u = draws(2, SCORE_DRAWS)
    assert len(score_copies(images(2, 1), u, "photos")) == 3
    assert len(score_copies(images(2, 3), u, "photos")) == 4
    assert len(score_copies(images(2, 3), u, "digits")) == 3


def test_the_copies_of_photos_are_mirrored_blurred_jittered_and_grey() -> None:
    x = images(2, 3)
    mirrored, blurred, jittered, grey = score_copies(x, draws(2, SCORE_DRAWS), "photos")
    torch.testing.assert_close(mirrored, x.flip(3))
    assert float(blurred.std()) < float(x.std()) and not torch.allclose(jittered, x, atol=0.02)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


def test_a_weak_view_is_a_shift_by_whole_pixels() -> None:
    x = images(1, 1, 8)
    middle = torch.tensor([[0.5, 0.5, 0.9]])
    torch.testing.assert_close(weak_view(x, middle, "digits"), x)
    right = weak_view(x, torch.tensor([[0.9, 0.5, 0.1]]), "digits")
    torch.testing.assert_close(right[..., :-1], x[..., 1:])
    assert float(right[..., -1].abs().max()) < 1e-6


def test_only_photos_are_mirrored() -> None:
    x, u = images(1, 1, 8), torch.tensor([[0.5, 0.5, 0.1]])
    torch.testing.assert_close(weak_view(x, u, "photos"), x.flip(3))
    torch.testing.assert_close(weak_view(x, u, "digits"), x)


def test_a_strong_view_cuts_a_square_of_half_the_side() -> None:
    u = torch.full((1, STRONG_DRAWS), 0.5)
    u[:, WEAK_DRAWS : WEAK_DRAWS + 8 : 2] = 0.0  # four times the operation that changes nothing
    view = strong_view(torch.ones(1, 3, 32, 32), u, "photos")
    assert int((view == 0).sum()) == 3 * 16 * 16 and float(view[0, 0, 16, 16]) == 0


def test_blur_keeps_the_mean_of_a_constant_and_follows_each_deviation() -> None:
    torch.testing.assert_close(
        blur(torch.full((2, 3, 8, 8), 0.3), torch.tensor([0.1, 2.0])), torch.full((2, 3, 8, 8), 0.3)
    )
    point = torch.zeros(2, 1, 9, 9)
    point[:, :, 4, 4] = 1
    narrow, wide = blur(point, torch.tensor([0.1, 2.0]))
    torch.testing.assert_close(narrow, point[0])
    assert float(wide.max()) < 0.2 and float(wide.sum()) == pytest.approx(1)


def test_boxes_may_leave_the_image() -> None:
    filled = fill_boxes(torch.ones(1, 1, 4, 4), *(torch.tensor([v]) for v in (-1, 2, 3, 5)), value=0.5)
    assert int((filled == 0.5).sum()) == 2 * 2


def test_four_quarter_turns_come_back_to_the_beginning() -> None:
    x = images(2, 3)
    turned = rotations(x)
    assert turned.shape[0] == 8
    torch.testing.assert_close(turned[:2], x)
    torch.testing.assert_close(torch.rot90(turned[6:], 1, (2, 3)), x)
