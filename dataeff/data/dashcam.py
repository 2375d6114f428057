"""A rendered dash-cam stream for driving-style tasks: short clips of a moving view, and what the driver does next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dataeff.data.subsets import IntArray

STATES = ("left", "right", "forward", "stop")
FRAMES, SIZE, TEXTURE = 6, 16, 48
PERSIST, JUNCTION = 0.98, 0.2
ZOOM, NOISE = 0.12, 0.05
_CHUNK = 500


@dataclass(frozen=True)
class Clips:
    """frames: float32 [N, T, 1, H, W] in 0..1 but for noise; labels: int64 [N], the state after the last frame (see
    `STATES`); states: int64 [N, T]; junctions: bool [N, T], frames with the marker."""

    frames: Tensor
    labels: Tensor
    states: IntArray
    junctions: NDArray[np.bool_]


def render_clips(count: int, seed: int) -> Clips:
    """`count` clips of `FRAMES` frames of `SIZE` x `SIZE` pixels (spec idk_cascades section 8.2).

    The world of a clip is a smooth random texture. Turning left or right shifts the view by one pixel a frame, driving
    forward zooms in, stopping leaves it as it is. A frame with a bright marker in its corner is a junction: the next
    state is any of the four, otherwise the state persists with probability 0.98. So the next state can be read off the
    last movement, except after a junction, where nobody knows it.
    """
    rng = np.random.default_rng((seed, 8))
    junctions = rng.random((count, FRAMES)) < JUNCTION
    states = np.empty((count, FRAMES + 1), dtype=np.int64)
    states[:, 0] = rng.integers(0, 4, count)
    for step in range(FRAMES):
        drawn = rng.integers(0, 4, count)
        change = junctions[:, step] | (rng.random(count) >= PERSIST)
        states[:, step + 1] = np.where(change, drawn, states[:, step])
    movement = states[:, :FRAMES]
    frames = torch.cat(
        [_render(movement[start : start + _CHUNK], rng) for start in range(0, count, _CHUNK)]
        or [torch.empty(0, FRAMES, 1, SIZE, SIZE)]
    )
    marked = torch.from_numpy(junctions)
    frames[..., :3, :3] = torch.where(marked[:, :, None, None, None], torch.ones(()), frames[..., :3, :3])
    frames += torch.from_numpy(rng.normal(0, NOISE, frames.shape)).float()
    return Clips(frames, torch.from_numpy(states[:, -1]), movement, junctions)


def _render(states: IntArray, rng: np.random.Generator) -> Tensor:
    """The moving view without markers and noise: float32 [n, T, 1, SIZE, SIZE]."""
    coarse = torch.from_numpy(rng.random((len(states), 1, 12, 12))).float()
    texture = functional.interpolate(coarse, size=(TEXTURE, TEXTURE), mode="bicubic", align_corners=False).clamp(0, 1)
    # A frame shows what has moved since the one before, so that a state is visible from its own frame on.
    moved = np.cumsum(np.where(states == 0, -1, np.where(states == 1, 1, 0)), axis=1)
    zoomed = np.cumsum(np.where(states == 2, ZOOM, 0.0), axis=1)
    steps = torch.linspace(-1, 1, SIZE) * (SIZE - 1) / (TEXTURE - 1)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    views = []
    for frame in range(states.shape[1]):
        scale = torch.from_numpy(np.exp(-zoomed[:, frame])).float()[:, None, None]
        shift = torch.from_numpy(moved[:, frame] * 2 / (TEXTURE - 1)).float()[:, None, None]
        grid = torch.stack([columns * scale + shift, rows * scale], dim=-1)
        views.append(functional.grid_sample(texture, grid, padding_mode="reflection", align_corners=True))
    return torch.stack(views, dim=1)
