"""Blocks of chain-shaped search spaces (spec nas_adversarial_robustness section 2.4): MBConv and residual blocks."""

from torch import Tensor, nn

MBCONVS = tuple(f"mb{kernel}_{expansion}" for kernel in (3, 5, 7) for expansion in (3, 6))
SPACES: dict[str, tuple[str, ...]] = {"mbconv": MBCONVS, "resnet": ("basic", "bottleneck")}
BLOCKS = (*MBCONVS, "basic", "bottleneck", "identity")


def _conv_norm(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]


class ResidualSum(nn.Module):
    """body(x) + x where the shape stays, else body(x), or body(x) + shortcut(x)."""

    def __init__(self, body: nn.Module, same: bool, shortcut: nn.Module | None, relu: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.same = body, shortcut, same
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.same:
            y = y + x
        elif self.shortcut is not None:
            y = y + self.shortcut(x)
        out: Tensor = self.activation(y)
        return out


def make_block(name: str, channels: int, width: int, stride: int) -> nn.Module:
    """The module of a block, (B, channels, H, W) -> (B, width, H/stride, W/stride).

    Raises:
        ValueError: an identity where the shape changes.
    """
    same = channels == width and stride == 1
    if name == "identity":
        if not same:
            raise ValueError(f"identity cannot go from {channels} to {width} channels with stride {stride}")
        return nn.Identity()
    if name.startswith("mb"):
        kernel, expansion = int(name[2]), int(name[4])
        inner = channels * expansion
        body = [
            *_conv_norm(channels, inner, 1),
            nn.ReLU6(),
            *_conv_norm(inner, inner, kernel, stride, inner),
            nn.ReLU6(),
            *_conv_norm(inner, width, 1),
        ]
        return ResidualSum(nn.Sequential(*body), same, None, relu=False)
    shortcut = None if same else nn.Sequential(*_conv_norm(channels, width, 1, stride))
    if name == "basic":
        body = [*_conv_norm(channels, width, 3, stride), nn.ReLU(), *_conv_norm(width, width, 3)]
    else:
        inner = max(1, width // 4)
        body = [
            *_conv_norm(channels, inner, 1),
            nn.ReLU(),
            *_conv_norm(inner, inner, 3, stride),
            nn.ReLU(),
            *_conv_norm(inner, width, 1),
        ]
    return ResidualSum(nn.Sequential(*body), same, shortcut, relu=True)
