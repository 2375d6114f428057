"""Variational autoencoder, scored by the reconstruction error of an image.

Source: spec initial_pools_active_learning, section 2.2 b.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataeff.data import uniform_draws
from dataeff.pretraining.autoencoder import ConvDecoder, ConvEncoder, standard_normal
from dataeff.pretraining.pool import image_keys
from dataeff.pretraining.settings import VAEConfig
from dataeff.pretraining.task import Images
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update

LOG_VARIANCE_LIMIT = 10.0
ACTIVE_KL = 0.01  # nats; a dimension below carries nothing
SCORE_STREAM = 1_001


def kl_to_standard_normal(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of each dimension, in nats: -(1 + log sigma^2 - mu^2 - sigma^2) / 2."""
    return -0.5 * (1 + log_variance - mu.square() - log_variance.exp())


class VAE(PretextModule):
    """Encoder, code and decoder of four convolutions each.

    Attributes:
        kl_weight: w_KL, a buffer.
        score_seed: int64, of the drawn codes of the score "elbo".
    """

    kl_weight: Tensor
    score_seed: Tensor

    def __init__(self, config: VAEConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        self.config = config
        self.encoder = ConvEncoder(image_shape, config.widths)
        self.mu = nn.Linear(self.encoder.features, config.latent)
        self.log_variance = nn.Linear(self.encoder.features, config.latent)
        self.decoder = ConvDecoder(image_shape, config.widths, config.latent, bounded=True)
        self.register_buffer("kl_weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("score_seed", torch.zeros((), dtype=torch.int64))

    def stages(self, context: Context) -> list[Stage]:
        return [VAEStage(self, context)]

    def scaled(self, x: Tensor) -> Tensor:
        """Images in [0, 1] on the scale that is encoded and reconstructed."""
        return 2 * x - 1 if self.config.input == "symmetric" else self.normalise(x)

    def encode(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled images -> mean and log-variance (B, latent) of the code; the latter within +-10."""
        features = self.encoder(scaled)
        log_variance = self.log_variance(features).float().clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
        return self.mu(features).float(), log_variance

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and standard normal noise (B, latent), None for the mean code.

        Returns:
            Mean squared error (B,) of each image over its pixels, and KL (B, latent) in nats.
        """
        scaled = self.scaled(x)
        mu, log_variance = self.encode(scaled)
        code = mu if noise is None else mu + (0.5 * log_variance).exp() * noise
        error = (self.decoder(code).float() - scaled.float()).square().mean((1, 2, 3))
        return error, kl_to_standard_normal(mu, log_variance)

    def sample_features(self, x: Tensor) -> Tensor:
        return self.encode(self.scaled(x))[0]

    def sample_losses(self, x: Tensor) -> Tensor:
        if self.config.score == "recon":
            error: Tensor = self(x, None)[0]
            return error
        draws = uniform_draws(int(self.score_seed), 0, image_keys(x), self.config.latent, SCORE_STREAM)
        error, kl = self(x, standard_normal(torch.from_numpy(draws)).to(x))
        total: Tensor = error + float(self.kl_weight) * kl.sum(1)
        return total

    def kl_per_dim(self, images: Images) -> NDArray[np.float64]:
        """(latent,) mean KL in nats of each dimension of the code; near 0: the dimension has collapsed."""
        rows = self.answer(images, lambda x: kl_to_standard_normal(*self.encode(self.scaled(x))).double())
        means: NDArray[np.float64] = rows.astype(np.float64).mean(0)
        return means


class VAEStage(Stage):
    """Training on 1 - val_fraction of the images; the weights of the epoch with the least loss on the rest are kept."""

    def __init__(self, task: VAE, context: Context) -> None:
        super().__init__(task.config, {"vae": task}, context)
        self.task, self.config, self.draws = task, task.config, task.config.latent
        order = context.generator().permutation(len(context.pool))
        held_out = max(1, round(task.config.val_fraction * len(order)))
        self.held_out, self.members = np.sort(order[:held_out]), np.sort(order[held_out:])
        weight = task.config.kl_weight
        task.kl_weight.fill_(self.batch_size / len(self.members) if weight is None else weight)
        task.score_seed.fill_(context.seed)
        self.best_loss = float("inf")
        self.best: dict[str, Tensor] = {}

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        error, kl = networks["vae"](batch.images, standard_normal(batch.draws))
        loss = error.mean() + float(self.task.kl_weight) * kl.sum(1).mean()
        yield Update("vae", loss, {"loss": loss, "reconstruction": error.mean()})

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Loss, KL and dimensions in use on the held-out images, with the mean code."""
        self.context.runtime.sync_buffers(self.task)
        share = self.held_out[self.context.own_share(len(self.held_out))]
        sums = torch.zeros(2 + self.config.latent, dtype=torch.float64, device=self.task.device)
        for block in self.context.pool.blocks(share):
            error, kl = self.task(block.to(self.task.device), None)
            sums += torch.cat([error.sum()[None], torch.ones_like(error).sum()[None], kl.sum(0)]).double()
        error_sum, count, *kl_sums = self.context.runtime.all_reduce(sums).tolist()
        kl_means = np.array(kl_sums) / count
        loss = error_sum / count + float(self.task.kl_weight) * float(kl_means.sum())
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: tensor.clone() for name, tensor in self.task.state_dict().items()}
        return {
            "held_out_loss": loss,
            "held_out_kl": float(kl_means.sum()),
            "active_dims": float((kl_means > ACTIVE_KL).sum()),
        }

    def finish(self) -> None:
        if self.best:
            self.task.restore(self.best)

    def state(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best": self.best}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best_loss, self.best = float(state["best_loss"]), dict(state["best"])
