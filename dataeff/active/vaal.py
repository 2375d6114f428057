"""Variational adversarial active learning: is an image like the labelled ones? (spec initial_pools section 2.3, `vaal`)

A beta-VAE embeds labelled and unlabelled images alike; a discriminator tells from the mean of an embedding whether its
image is labelled, and the VAE learns to deceive it (Sinha et al. 2019). Both are trained anew in every cycle. Images
that the discriminator is surest about being unlabelled are asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from dataeff.active.scores import FloatArray
from dataeff.core.config import Config

IntArray = NDArray[np.int64]
Images = Callable[[IntArray], Tensor]

DEPTH = 4  # convolutions, each halving the side
LOG_VARIANCE = 10.0  # bound on its absolute value
LR_DROPS = 25  # times in a training that the learning rates fall by LR_FACTOR
LR_FACTOR = 0.9
_INITIAL, _BATCH, _NOISE = 0, 1, 2  # what a random draw is for


class VaalConfig(Config):
    """Settings of VAAL. Defaults: the source's, for 32 x 32 images."""

    epochs: int = Field(100, ge=1, description="passes over labelled and unlabelled images together, in a cycle")
    batch: int = Field(64, ge=2, description="labelled, and as many unlabelled, images in a mini-batch")
    lr: float = Field(5e-4, gt=0, le=1, description="Adam, both networks")
    latent: int = Field(32, ge=1, description="size of an embedding; 64 for 64 x 64 images")
    widths: tuple[int, int, int, int] = Field((128, 256, 512, 1024), description="channels of the encoder")
    hidden: int = Field(512, ge=1, description="width of the discriminator's 5 layers")
    beta: float = Field(1.0, ge=0, description="weight of the KL divergence (mean over images and dimensions)")
    gamma: float = Field(1.0, ge=0, description="weight of deceiving the discriminator")


class Vae(nn.Module):
    """4 convolutions, Gaussian embedding, 4 layers back. Images (B, C, H, W) with values in about [-1, 1].

    Args:
        channels: C.
        side: of the images inside: a multiple of 16. Images of another size are scaled to it on the way in.
    """

    def __init__(self, channels: int, side: int, config: VaalConfig) -> None:
        super().__init__()
        self.side = side
        widths = config.widths
        self.encoder = nn.Sequential()
        for before, after in zip((channels, *widths[:-1]), widths, strict=True):
            self.encoder.extend([nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()])
        flat = widths[-1] * (side // 2**DEPTH) ** 2
        self.mean = nn.Linear(flat, config.latent)
        self.log_variance = nn.Linear(flat, config.latent)
        self.start = (widths[-1], side // 2 ** (DEPTH - 1), side // 2 ** (DEPTH - 1))
        self.expand = nn.Linear(config.latent, int(np.prod(self.start)))
        self.decoder = nn.Sequential()
        for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True):
            up = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
            self.decoder.extend([up, nn.BatchNorm2d(after), nn.ReLU()])
        self.decoder.append(nn.Conv2d(widths[0], channels, 1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of each embedding, both (B, latent)."""
        hidden = self.encoder(self.resized(images)).flatten(1)
        return self.mean(hidden), self.log_variance(hidden).clamp(-LOG_VARIANCE, LOG_VARIANCE)

    def decode(self, embedding: Tensor) -> Tensor:
        """Images (B, C, side, side)."""
        out: Tensor = self.decoder(self.expand(embedding).view(-1, *self.start))
        return out

    def resized(self, images: Tensor) -> Tensor:
        """`images` with sides of `side`."""
        if images.shape[-2:] == (self.side, self.side):
            return images
        return F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)


def build_discriminator(latent: int, hidden: int) -> nn.Sequential:
    """5 linear layers, embedding (B, latent) -> logit (B, 1) of being labelled."""
    layers: list[nn.Module] = []
    for before in (latent, hidden, hidden, hidden):
        layers += [nn.Linear(before, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 1))


def vae_loss(reconstruction: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor, beta: float) -> Tensor:
    """Mean squared error over all elements + beta * KL divergence, a mean over images and dimensions as well.

    The released code sums the KL over all images and dimensions against a mean error, which collapses the embedding.
    """
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
    return F.mse_loss(reconstruction, images) + beta * divergence


class VaalTraining:
    """Training of one cycle, a mini-batch at a time.

    Initial weights, images and noise are pure functions of (seed, mini-batch), so a training that goes on from a
    `state_dict` ends where an undisturbed one does.

    Args:
        images: indices (B,) into the original training set -> images float (B, C, H, W), without augmentation.
        labelled, unlabelled: those indices, int64 [L] and [U], neither empty.
        seed: make it from the run's seed and the cycle.
        device: such as "cpu" or "cuda".

    Example::

        training = VaalTraining(images, labelled, unlabelled, VaalConfig(epochs=5), seed=3)
        while training.steps_done < training.total_steps:
            training.step()
        labelledness = training.labelledness(unlabelled)
    """

    def __init__(
        self,
        images: Images,
        labelled: IntArray,
        unlabelled: IntArray,
        config: VaalConfig,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.images, self.labelled, self.unlabelled = images, labelled, unlabelled
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.steps_done = 0
        _, channels, height, width = images(labelled[:1]).shape
        side = -(-max(height, width) // 2**DEPTH) * 2**DEPTH
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._draw(_INITIAL))
            self.vae = Vae(channels, side, config).to(self.device)
            self.discriminator = build_discriminator(config.latent, config.hidden).to(self.device)
        self.vae_optimizer = torch.optim.Adam(self.vae.parameters(), lr=config.lr)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=config.lr)

    @property
    def total_steps(self) -> int:
        """Mini-batches of the whole training."""
        return max(1, self.config.epochs * (len(self.labelled) + len(self.unlabelled)) // self.config.batch)

    def step(self) -> dict[str, float]:
        """One mini-batch for the VAE, then one for the discriminator on the embeddings before; their losses."""
        drop = self.steps_done * LR_DROPS // self.total_steps
        for optimizer in (self.vae_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * LR_FACTOR**drop
        self.vae.train()
        # One batch: BatchNorm in batches of their own would hide from the discriminator what tells the two apart.
        images = torch.cat([self._batch(number, part) for number, part in enumerate((self.labelled, self.unlabelled))])
        mean, log_variance = self.vae.encode(images)
        embedding = mean + (0.5 * log_variance).exp() * self._noise(mean.shape)
        decoded, target = self.vae.decode(embedding), self.vae.resized(images)
        deceived = F.softplus(-self.discriminator(mean)).mean()  # -log D
        # Means over twice as many images as the sums over labelled and unlabelled in the published losses.
        loss = 2 * vae_loss(decoded, target, mean, log_variance, self.config.beta) + 2 * self.config.gamma * deceived
        _descend(self.vae_optimizer, loss)
        labelled, unlabelled = self.discriminator(mean.detach()).chunk(2)
        told_apart = F.softplus(-labelled).mean() + F.softplus(unlabelled).mean()
        _descend(self.discriminator_optimizer, told_apart)
        self.steps_done += 1
        return {"vae_loss": loss.item(), "discriminator_loss": told_apart.item()}

    @torch.no_grad()
    def labelledness(self, indices: IntArray, batch: int = 256) -> FloatArray:
        """D(mu(x)): probability of being labelled, float64 [len(indices)]."""
        self.vae.eval()
        parts = [torch.empty(0)]
        for start in range(0, len(indices), batch):
            images = self.images(indices[start : start + batch]).to(self.device)
            parts.append(self.discriminator(self.vae.encode(images)[0])[:, 0].sigmoid().cpu())
        return torch.cat(parts).double().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors and plain values."""
        return {"steps_done": self.steps_done} | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, of a training with the same arguments."""
        self.steps_done = int(state["steps_done"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "vae": self.vae,
            "discriminator": self.discriminator,
            "vae_optimizer": self.vae_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def _draw(self, *purpose: int) -> int:
        return int(np.random.SeedSequence((self.seed, *purpose)).generate_state(1)[0])

    def _batch(self, number: int, indices: IntArray) -> Tensor:
        """A mini-batch; always a full one, for BatchNorm's sake: few images come more than once."""
        rng = np.random.default_rng((self.seed, _BATCH, number, self.steps_done))
        rows = rng.choice(len(indices), self.config.batch, replace=len(indices) < self.config.batch)
        return self.images(indices[rows]).to(self.device)

    def _noise(self, shape: torch.Size) -> Tensor:
        # Drawn on the CPU, so that every device draws the same.
        generator = torch.Generator().manual_seed(self._draw(_NOISE, self.steps_done))
        return torch.randn(shape, generator=generator).to(self.device)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
