"""The driving task on rendered clips: a CNN + LSTM, and a person behind it (spec idk_cascades section 8.2)."""

import numpy as np
import pytest
import torch

from dataeff.cascades.idk.driving import LRCN, answers, hand_over, train_lrcn
from dataeff.cascades.idk.fit import FitConfig
from dataeff.data.dashcam import FRAMES, SIZE, render_clips


def test_clips_are_the_same_for_a_seed_and_have_the_stated_shapes() -> None:
    clips, again, other = render_clips(60, 1), render_clips(60, 1), render_clips(60, 2)
    assert clips.frames.shape == (60, FRAMES, 1, SIZE, SIZE)
    assert torch.equal(clips.frames, again.frames) and not torch.equal(clips.frames, other.frames)
    assert clips.labels.shape == (60,) and set(clips.labels.tolist()) <= {0, 1, 2, 3}


def test_the_view_moves_as_the_state_says() -> None:
    clips = render_clips(400, 0)
    state, marked = clips.states, clips.junctions
    plain = ~marked[:, 3] & ~marked[:, 4]
    before, after = clips.frames[:, 3, 0], clips.frames[:, 4, 0]

    def difference(first: torch.Tensor, second: torch.Tensor, rows: np.ndarray) -> float:
        return float((first[rows] - second[rows]).square().mean())

    stop, left, right = (np.flatnonzero(plain & (state[:, 4] == number)) for number in (3, 0, 1))
    noise = 2 * 0.05**2
    assert difference(before, after, stop) == pytest.approx(noise, rel=0.1)
    # The view of a left turn moves one pixel to the left over the world: what was at x is now at x + 1.
    for rows, shift in ((left, 1), (right, -1)):
        moved = before.roll(shift, dims=2)
        inner = slice(2, -2)
        assert difference(moved[:, :, inner], after[:, :, inner], rows) < 2 * noise
        assert difference(before, after, rows) > 2 * noise


def test_a_state_persists_but_for_junctions() -> None:
    clips = render_clips(4000, 3)
    last, label = clips.states[:, -1], clips.labels.numpy()
    junction = clips.junctions[:, -1]
    assert (last == label)[~junction].mean() == pytest.approx(0.985, abs=0.01)
    assert (last == label)[junction].mean() == pytest.approx(0.25, abs=0.05)
    assert junction.mean() == pytest.approx(0.2, abs=0.02)
    corner = clips.frames[:, -1, 0, :3, :3].mean((1, 2))
    assert corner[torch.from_numpy(junction)].mean() > 0.95


def test_the_order_of_frames_matters_to_the_network() -> None:
    torch.manual_seed(0)
    model, clips = LRCN().eval(), render_clips(8, 0).frames
    assert model(clips).shape == (8, 4)
    assert not torch.allclose(model(clips), model(clips.flip(1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_person_takes_over_less_than_a_third_of_the_time_for_95_percent() -> None:
    train, calibration, test = render_clips(4000, 10), render_clips(2000, 11), render_clips(3000, 12)
    model = train_lrcn(train)
    known, new = answers(model, calibration), answers(model, test)
    fast = float((new.argmax(1) == test.labels).double().mean())
    assert 0.75 < fast < 0.88
    for kind in ("prob", "entropy", "cost"):
        found = [
            hand_over(
                (known, calibration.labels),
                (new, test.labels),
                FitConfig(kind=kind, accuracy_goal=goal, steps=1000),  # type: ignore[arg-type]
            )
            for goal in (0.95, 0.99, 1.0)
        ]
        rates = [one.interventions for one in found]
        print(kind, fast, [(round(one.test.accuracy, 4), round(one.interventions, 4)) for one in found])
        assert rates[0] < 0.30 and found[0].test.accuracy > 0.94
        assert rates[0] < rates[1] <= rates[2]
