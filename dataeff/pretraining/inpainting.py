"""Context encoder: the central square of an image from what surrounds it, scored by its squared error.

Source: spec initial_pools_active_learning, section 2.2 g.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.pretraining.autoencoder import SLOPE, ConvDecoder, ConvEncoder
from dataeff.pretraining.settings import InpaintingConfig
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update


class Discriminator(nn.Module):
    """Squares (B, C, h, w) -> logits (B,) of being real."""

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.encoder = ConvEncoder(shape, widths)
        self.hidden = nn.Linear(self.encoder.features, widths[0])
        self.linear = nn.Linear(widths[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.leaky_relu(self.hidden(self.encoder(x)), SLOPE))
        return logits[:, 0]


class Generator(nn.Module):
    """Images with a hole -> the hole's contents, both on the normalised scale."""

    def __init__(self, config: InpaintingConfig, image_shape: tuple[int, int, int], hole: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = ConvEncoder(image_shape, config.widths)
        self.code = nn.Linear(self.encoder.features, config.latent)
        self.decoder = ConvDecoder(hole, config.widths, config.latent, bounded=False)

    def forward(self, x: Tensor) -> Tensor:
        hole: Tensor = self.decoder(F.leaky_relu(self.code(self.encoder(x)), SLOPE))
        return hole


class Inpainting(PretextModule):
    """Encoder and decoder of four convolutions, and the discriminator where one is asked for.

    Raises:
        ValueError: images of less than 4 pixels a side.
    """

    def __init__(self, config: InpaintingConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        channels, height, width = image_shape
        if min(height, width) < 4:
            raise ValueError(f"inpainting needs images of at least 4x4, got {height}x{width}")
        self.config = config
        tall, wide = height // 2, width // 2
        top, left = (height - tall) // 2, (width - wide) // 2
        self.hole = (slice(top, top + tall), slice(left, left + wide))
        self.generator = Generator(config, image_shape, (channels, tall, wide))
        if config.adversarial:
            self.discriminator = Discriminator((channels, tall, wide), config.widths)

    def stages(self, context: Context) -> list[Stage]:
        return [InpaintingStage(self, context)]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> normalised images whose central square has the mean colour, and that square."""
        x = self.normalise(x)
        masked = x.clone()
        masked[:, :, self.hole[0], self.hole[1]] = 0
        return masked, x[:, :, self.hole[0], self.hole[1]]

    def sample_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.generator.code(self.generator.encoder(self.split(x)[0]))
        return features

    def sample_losses(self, x: Tensor) -> Tensor:
        masked, square = self.split(x)
        error: Tensor = (self.generator(masked).float() - square).square().mean((1, 2, 3))
        return error


class InpaintingStage(Stage):
    """(1 - a) L2 + a adversarial loss for the generator, then the discriminator's step; a = 0: L2 alone."""

    def __init__(self, task: Inpainting, context: Context) -> None:
        networks: dict[str, nn.Module] = {"generator": task.generator}
        if task.config.adversarial:
            networks["discriminator"] = task.discriminator
        super().__init__(task.config, networks, context)
        self.task, self.config = task, task.config

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        masked, square = self.task.split(batch.images)
        made = networks["generator"](masked).float()
        error = (made - square).square().mean()
        weight = self.config.adversarial
        if not weight:
            yield Update("generator", error, {"loss": error, "l2": error})
            return
        fooled = self._as_judged(made)
        loss = (1 - weight) * error + weight * F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled))
        yield Update("generator", loss, {"loss": loss, "l2": error})
        real, fake = networks["discriminator"](torch.cat([square, made.detach()])).float().chunk(2)
        judged = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        judged = judged + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        yield Update("discriminator", judged / 2, {"discriminator": judged / 2})

    def _as_judged(self, made: Tensor) -> Tensor:
        """The discriminator's logits of squares, without a gradient for its own weights."""
        discriminator = self.task.discriminator
        discriminator.requires_grad_(False)
        logits: Tensor = discriminator(made).float()
        discriminator.requires_grad_(True)
        return logits
