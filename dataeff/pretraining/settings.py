"""What can be set in self-supervised pretraining, one class a task.

Defaults are the CPU recipe of spec initial_pools_active_learning section 8; the published values of section 3 are in
`ray_jobs/configs/pretrain/paper.yaml`.
"""

import math
from typing import Literal

from pydantic import Field

from dataeff.core.config import Config
from dataeff.pretraining.networks import EncoderConfig
from dataeff.pretraining.views import Recipe

TaskName = Literal["simclr", "vae", "rotation", "inpainting", "deepcluster", "scan"]


class TrainingConfig(Config):
    """How one network is trained: epochs, mini-batches, optimiser."""

    epochs: int = Field(60, ge=1, le=100_000)
    batch: int = Field(256, ge=2, description="images in a mini-batch over all workers; at most the pool is taken")
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(2e-3, gt=0, le=10, description="learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, and beta_1 of Adam")
    weight_decay: float = Field(0.0, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = "constant"

    def lr_at(self, progress: float) -> float:
        """Learning rate at a fraction of the stage, from 0 to 1."""
        return self.lr * (0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0)


class SimCLRConfig(TrainingConfig):
    """Contrastive pretraining and the contrastive score (section 2.2 c)."""

    task: Literal["simclr"] = "simclr"
    encoder: EncoderConfig = EncoderConfig()
    views: Recipe = Field("digits", description="digits: shift, turn, scale; photos: crop, mirror, colour")
    temperature: float = Field(0.5, gt=0, le=10, description="T; 0.1 in the code base that the source names")
    score: Literal["with_negatives", "single_pair"] = Field(
        "with_negatives", description="single_pair: the published score, which is 0 but for rounding"
    )
    references: int = Field(511, ge=1, le=65_535, description="other images in the score's denominator, if there are")


class VAEConfig(TrainingConfig):
    """Variational autoencoder and its reconstruction error (section 2.2 b)."""

    task: Literal["vae"] = "vae"
    epochs: int = Field(25, ge=1, le=100_000)
    batch: int = Field(64, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(1e-3, gt=0, le=10)
    widths: tuple[int, int, int, int] = Field((32, 64, 128, 256), description="channels of the encoder's convolutions")
    latent: int = Field(16, ge=1, le=4096, description="numbers in the code; 128 for 32x32 images")
    kl_weight: float | None = Field(None, ge=0, le=1e6, description="w_KL; None: mini-batch over images")
    score: Literal["recon", "elbo"] = Field("recon", description="elbo: with a drawn code, plus w_KL times KL")
    input: Literal["symmetric", "normalized"] = Field(
        "symmetric", description="symmetric: pixels in [-1, 1]; normalized: mean 0, deviation 1, beyond Tanh's reach"
    )
    val_fraction: float = Field(0.05, gt=0, le=0.5, description="of the images, held out to choose the epoch")


class RotationConfig(TrainingConfig):
    """Prediction of four rotations (section 2.2 f)."""

    task: Literal["rotation"] = "rotation"
    epochs: int = Field(25, ge=1, le=100_000)
    batch: int = Field(64, ge=2, description="images in a mini-batch over all workers, each in four rotations")
    lr: float = Field(1e-3, gt=0, le=10)
    encoder: EncoderConfig = EncoderConfig()
    views: Recipe = "digits"


class InpaintingConfig(TrainingConfig):
    """Context encoder: prediction of the central square (section 2.2 g)."""

    task: Literal["inpainting"] = "inpainting"
    epochs: int = Field(25, ge=1, le=100_000)
    batch: int = Field(64, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(1e-3, gt=0, le=10)
    widths: tuple[int, int, int, int] = Field((32, 64, 128, 256), description="channels of the encoder's convolutions")
    latent: int = Field(64, ge=1, le=4096, description="numbers in the bottleneck")
    adversarial: float = Field(0.001, ge=0, lt=1, description="weight against the discriminator; 0: L2 only")


class DeepClusterConfig(TrainingConfig):
    """k-means pseudo-labels and training on them in turn (section 2.2 h)."""

    task: Literal["deepcluster"] = "deepcluster"
    epochs: int = Field(30, ge=1, le=100_000)
    batch: int = Field(128, ge=2, description="images in a mini-batch over all workers")
    encoder: EncoderConfig = EncoderConfig()
    views: Recipe = "digits"
    n_clusters: int | None = Field(None, ge=2, description="K of the result; None: the classes of the data")
    pseudo_clusters: int | None = Field(None, ge=2, description="of the pseudo-labels in training; None: K")
    reassign: int = Field(5, ge=1, le=1000, description="epochs between two clusterings; 1 for large pools")
    pca_dim: int = Field(256, ge=1, le=4096, description="whitened dimensions, if the features have as many")


class ScanClusterConfig(TrainingConfig):
    """SCAN's second stage: neighbours belong together."""

    epochs: int = Field(30, ge=1, le=100_000)
    batch: int = Field(128, ge=2, description="anchors in a mini-batch over all workers")
    lr: float = Field(1e-3, gt=0, le=10)
    neighbours: int = Field(20, ge=1, le=1000, description="M an image; 50 for Tiny ImageNet")
    entropy_weight: float = Field(5.0, ge=0, le=1000, description="lambda_H, of the entropy of the mean prediction")


class ScanSelfLabelConfig(TrainingConfig):
    """SCAN's third stage: confident images label themselves."""

    epochs: int = Field(10, ge=0, le=100_000, description="0 leaves the stage out")
    batch: int = Field(256, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(1e-3, gt=0, le=10)
    threshold: float = Field(0.99, gt=0, lt=1, description="confidence of a pseudo-label; 0.75 for Tiny ImageNet")


class ScanConfig(Config):
    """SimCLR, clustering of neighbours, self-labelling (section 2.2 e)."""

    task: Literal["scan"] = "scan"
    n_clusters: int | None = Field(None, ge=2, description="K; None: the classes of the data; 20 for CIFAR-100")
    simclr: SimCLRConfig = SimCLRConfig()
    cluster: ScanClusterConfig = ScanClusterConfig()
    selflabel: ScanSelfLabelConfig = ScanSelfLabelConfig()


PretextConfig = SimCLRConfig | VAEConfig | RotationConfig | InpaintingConfig | DeepClusterConfig | ScanConfig


class TaskSettings(Config):
    """The settings of every task; a part of a method's own settings."""

    simclr: SimCLRConfig = SimCLRConfig()
    vae: VAEConfig = VAEConfig()
    rotation: RotationConfig = RotationConfig()
    inpainting: InpaintingConfig = InpaintingConfig()
    deepcluster: DeepClusterConfig = DeepClusterConfig()
    scan: ScanConfig = ScanConfig()


class PretextSettings(TaskSettings):
    """The settings of every task, and which one is meant."""

    task: TaskName = "simclr"

    def chosen(self, num_classes: int) -> PretextConfig:
        """The settings of `task`, with as many clusters as classes where their number is left open."""
        return with_clusters(getattr(self, self.task), num_classes)


def with_clusters(config: PretextConfig, n_clusters: int) -> PretextConfig:
    """The same settings with a number of clusters wherever they leave it open."""
    if isinstance(config, DeepClusterConfig | ScanConfig) and config.n_clusters is None:
        return config.model_copy(update={"n_clusters": n_clusters})
    return config
