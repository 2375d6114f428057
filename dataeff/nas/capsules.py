"""Capsule operations as optional candidates, with three routings (spec ss_pcp_darts section 2.10).

A position's channels are capsules; a 3x3 depthwise convolution gathers each capsule's neighbourhood, every input
capsule i votes for every output capsule j, and routing decides how much of a vote counts.
"""

import torch
from torch import Tensor, nn

ROUTINGS = {"dynamic": 4, "em": 16, "self": 4}  # numbers in a capsule
ITERATIONS = 3


class CapsuleOp(nn.Module):
    """(B, C, H, W) -> (B, C, H/stride, W/stride).

    Args:
        routing: dynamic (3 iterations), em (3 iterations, 4x4 poses) or self (attention, none).

    Raises:
        ValueError: channels that are not a multiple of the capsule's dimension.
    """

    def __init__(self, routing: str, channels: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        self.routing, self.dimension = routing, ROUTINGS[routing]
        if channels % self.dimension:
            raise ValueError(
                f"caps_{routing}: {channels} channels are not a multiple of the capsule dimension {self.dimension}"
            )
        self.capsules = count = channels // self.dimension
        self.gather = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        part = 4 if routing == "em" else self.dimension  # a 4x4 pose times a 4x4 matrix
        self.weight = nn.Parameter(torch.randn(count, count, part, part) / part**0.5)
        self.activation = nn.Conv2d(channels, count, 1, groups=count) if routing != "dynamic" else None
        self.route = nn.Conv2d(channels, count * count, 1, groups=count) if routing == "self" else None
        if routing == "em":
            self.beta_u, self.beta_a = nn.Parameter(torch.zeros(count)), nn.Parameter(torch.zeros(count))
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gather(x)
        batch, channels, height, width = x.shape
        u = x.permute(0, 2, 3, 1).reshape(-1, self.capsules, self.dimension)  # a row a position
        rows = self._rows(x, u)
        out: Tensor = self.norm(rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2))
        return out

    def _rows(self, x: Tensor, u: Tensor) -> Tensor:
        if self.routing == "dynamic":
            return dynamic_routing(torch.einsum("nid,ijde->nije", u, self.weight))
        assert self.activation is not None
        active = self.activation(x).permute(0, 2, 3, 1).reshape(-1, self.capsules).sigmoid()
        if self.routing == "em":
            pose = u.unflatten(2, (4, 4))
            votes = torch.einsum("niab,ijbc->nijac", pose, self.weight).flatten(3)
            pose, active = em_routing(votes, active, self.beta_u, self.beta_a)
        else:
            assert self.route is not None
            logits = self.route(x).permute(0, 2, 3, 1).reshape(-1, self.capsules, self.capsules)
            pose, active = self_routing(torch.einsum("nid,ijde->nije", u, self.weight), active, logits)
        return pose * active[..., None]


def dynamic_routing(votes: Tensor) -> Tensor:
    """Votes u_hat (N, I, J, d) -> output capsules v (N, J, d), whose lengths are below 1."""
    logits = torch.zeros(votes.shape[:3], device=votes.device, dtype=votes.dtype)
    v = votes.new_zeros(())
    for _ in range(ITERATIONS):
        s = (logits.softmax(2)[..., None] * votes).sum(1)
        square = s.square().sum(-1, keepdim=True)
        v = square / (1 + square) * s / (square + 1e-9).sqrt()
        logits = logits + (votes * v[:, None]).sum(-1)
    return v


def em_routing(votes: Tensor, active: Tensor, beta_u: Tensor, beta_a: Tensor) -> tuple[Tensor, Tensor]:
    """Votes (N, I, J, h) and activations (N, I) -> means (N, J, h) and activations (N, J)."""
    assigned = torch.full(votes.shape[:3], 1 / votes.shape[2], device=votes.device, dtype=votes.dtype)
    mean, found = votes.new_zeros(()), votes.new_zeros(())
    for iteration in range(ITERATIONS):
        share = assigned * active[..., None]
        total = share.sum(1)[..., None] + 1e-6  # (N, J, 1)
        mean = (share[..., None] * votes).sum(1) / total
        distance = (votes - mean[:, None]).square()
        variance = (share[..., None] * distance).sum(1) / total + 1e-6
        cost = ((beta_u[:, None] + 0.5 * variance.log()) * total).sum(-1)
        found = (0.01 * (1 - 0.95 ** (iteration + 1)) * (beta_a - cost)).sigmoid()
        density = -0.5 * (distance / variance[:, None] + variance.log()[:, None]).sum(-1)
        assigned = ((found + 1e-9).log()[:, None] + density).softmax(2)
    return mean, found


def self_routing(votes: Tensor, active: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Votes (N, I, J, d), activations (N, I), routing logits (N, I, J) -> capsules (N, J, d), activations (N, J)."""
    share = logits.softmax(2) * active[..., None]
    total = share.sum(1) + 1e-6
    return (share[..., None] * votes).sum(1) / total[..., None], total / (active.sum(1, keepdim=True) + 1e-6)
