"""The classifier that every cycle trains on what is labelled (spec initial_pools sections 2.1, 2.4 and 3)."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from dataeff.core.config import Config
from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, ImageSource, Preprocess, TrainStream, eval_batches
from dataeff.data.sources import ArrayStore
from dataeff.data.subsets import IntArray
from dataeff.nn.workers import share_batch_norm
from dataeff.pretraining.networks import EncoderClassifier, EncoderConfig, build_classifier
from dataeff.supervised import EVAL_BATCH, MAX_BAD_STEPS, mix

IN_MEMORY = 512 * 2**20  # bytes of decoded images that a training keeps
INIT, DATA, DROPOUT = range(3)  # what a seed is drawn for


class ClassifierConfig(Config):
    """Network and training of one cycle. Defaults: the CPU recipe of spec section 8; table 3.1 is preset `paper`."""

    encoder: EncoderConfig = EncoderConfig()
    epochs: int = Field(40, ge=1, le=100_000, description="passes over the labelled images")
    min_steps: int = Field(160, ge=0, description="mini-batches at least, so that a small labelled set trains as long")
    batch: int = Field(32, ge=2, description="images in a mini-batch over all workers; at most the labelled ones")
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(0.05, gt=0, le=10, description="learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD (Nesterov), and beta_1 of Adam")
    weight_decay: float = Field(3e-4, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = "cosine"
    cosine_min_factor: float = Field(0.0, ge=0, le=1, description="share of lr at the end of the cosine")
    augment: Literal["none", "shift", "shift_flip"] = Field("shift_flip", description="shift: no mirroring, for digits")
    eval_every: int = Field(2, ge=1, description="epochs between evaluations on V, whose best weights are kept")
    balanced: bool = Field(False, description="weigh classes by their inverse frequency; a missing one weighs nothing")

    def lr_at(self, progress: float) -> float:
        """Learning rate at a fraction of the training, from 0 to 1."""
        if self.schedule == "constant":
            return self.lr
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.cosine_min_factor + (1 - self.cosine_min_factor) * cosine)


class Committee(nn.Module):
    """One classifier, or several trained independently; answers with the mean of their probabilities."""

    def __init__(self, members: list[EncoderClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @classmethod
    def fresh(
        cls, size: int, encoder: EncoderConfig, dropout_p: float, num_classes: int, in_channels: int, seed: int
    ) -> "Committee":
        """Members with independent weights, drawn from `seed` alone."""
        config = encoder.model_copy(update={"dropout_p": dropout_p})
        members = []
        for number in range(size):
            torch.manual_seed(mix(seed, INIT, number))
            members.append(build_classifier(config, num_classes, in_channels))
        return cls(members)

    def __iter__(self) -> Iterator[EncoderClassifier]:
        for member in self.members:
            assert isinstance(member, EncoderClassifier)
            yield member

    def __len__(self) -> int:
        return len(self.members)

    def forward(self, x: Tensor) -> Tensor:
        """Images float (B, C, H, W) -> log of the mean probabilities, float32 (B, K)."""
        logs = [member(x).float().log_softmax(1) for member in self]
        return torch.stack(logs).logsumexp(0) - math.log(len(self))


def train_member(
    model: EncoderClassifier,
    config: ClassifierConfig,
    labelled: ImageSource,
    val: ImageSource,
    preprocess: Preprocess,
    runtime: Runtime,
    seed: int,
) -> float:
    """Train `model` in place and leave it with the weights of its best validation accuracy, the latest among equals.

    Data order, augmentation and dropout are functions of (seed, mini-batch, place in it).

    Returns:
        That validation accuracy, 0..1.

    Warns:
        UserWarning: all labelled images are of one class.

    Raises:
        ValueError: the loss was not finite ten times in a row.
    """
    labelled, val = in_memory(labelled), in_memory(val)
    if len(np.unique(labelled.labels)) == 1:
        warnings.warn(f"all {len(labelled)} labelled images are of one class", stacklevel=2)
    batch = batch_size(config.batch, len(labelled), runtime.world_size)
    per_epoch = max(1, len(labelled) // batch)
    epochs = max(config.epochs, math.ceil(config.min_steps / per_epoch))
    total, check_every = epochs * per_epoch, config.eval_every * per_epoch
    share_batch_norm(model, runtime)
    network = runtime.wrap_model(model)
    optimizer = _optimizer(model, config)
    weights = class_weights(labelled.labels, model.linear.out_features).to(runtime.device) if config.balanced else None
    best, best_accuracy, bad = _copy(model), -1.0, 0
    stream = TrainStream(
        labelled,
        preprocess,
        Augment(config.augment),
        batch_size=batch,
        seed=mix(seed, DATA),
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=runtime.options.loader_workers,
    )
    with stream:
        for iteration, part in zip(range(total), runtime.wrap_loader(stream), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(iteration / total)
            finite = _train_batch(
                network.train(), optimizer, part, weights, mix(seed, DROPOUT, iteration, runtime.rank)
            )
            bad = 0 if finite else bad + 1
            if bad == MAX_BAD_STEPS:
                raise ValueError(f"the classifier's gradient was not finite {bad} times in a row; use a smaller lr")
            if (iteration + 1) % check_every == 0 or iteration + 1 == total:
                accuracy = accuracy_of(model, val, preprocess, runtime)
                if accuracy >= best_accuracy:
                    best, best_accuracy = _copy(model), accuracy
    model.load_state_dict(best)
    model.eval()
    return best_accuracy


def batch_size(wanted: int, images: int, world_size: int) -> int:
    """Images in a mini-batch: what is wanted, at most what there is, a multiple of the workers, and 2 for each at least
    (BatchNorm). A set smaller than that repeats its images, each augmented anew."""
    return max(2 * world_size, min(wanted, images) // world_size * world_size)


def class_weights(labels: IntArray, num_classes: int) -> Tensor:
    """N / (classes present * n_c) for each class, float32 (K,); 0 for one without images."""
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    weights = np.divide(len(labels) / present, counts, out=np.zeros(num_classes), where=counts > 0)
    return torch.from_numpy(weights).float()


def _train_batch(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, weights: Tensor | None, dropout_seed: int
) -> bool:
    """One update; whether its gradient was finite (otherwise nothing is updated)."""
    torch.manual_seed(dropout_seed)
    loss = F.cross_entropy(network(batch.images).float(), batch.labels, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(_gradients(network))))
    if finite:
        optimizer.step()
    return finite


def _gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def _optimizer(model: nn.Module, config: ClassifierConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        betas = (config.momentum, 0.999)
        return torch.optim.Adam(model.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def accuracy_of(model: nn.Module, source: ImageSource, preprocess: Preprocess, runtime: Runtime) -> float:
    """Share of the images that `model` names right, over all workers."""
    runtime.sync_buffers(model)
    model.eval()
    right = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for batch in _batches(source, preprocess, runtime):
        right += (model(batch.images).argmax(1) == batch.labels).sum()
    return float(runtime.all_reduce(right)) / len(source)


@dataclass(frozen=True)
class Answers:
    """What the members of a committee say of N images.

    probabilities: float64 [M, N, C]; features: float32 [N, D], the first member's penultimate ones; shared: float32
    [N, W], its features before the projection and dropout.
    """

    probabilities: NDArray[np.float64]
    features: NDArray[np.float32]
    shared: NDArray[np.float32]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean probabilities, float64 [N, C]."""
        averaged: NDArray[np.float64] = self.probabilities.mean(axis=0)
        return averaged


@torch.no_grad()
def answers_of(committee: Committee, source: ImageSource, preprocess: Preprocess, runtime: Runtime) -> Answers:
    """Answers of all members in evaluation mode, without augmentation, to every image in order; each worker reads its
    share of the images, and all get the whole."""
    runtime.sync_buffers(committee)
    committee.eval()
    probabilities: list[Tensor] = []
    features: list[Tensor] = []
    shared: list[Tensor] = []
    first = next(iter(committee))
    for batch in _batches(source, preprocess, runtime):
        trunk = first.encoder.trunk(batch.images)
        embedding = first.encoder.project(trunk)
        logits = [first.linear(embedding), *(member(batch.images) for member in list(committee)[1:])]
        probabilities.append(torch.stack([part.double().softmax(1) for part in logits], 1))
        features.append(embedding.float())
        shared.append(trunk.float())
    widths = [(len(committee), first.linear.out_features), (first.encoder.proj_dim,), (first.encoder.width,)]
    kinds = (torch.float64, torch.float32, torch.float32)
    whole = [
        _gather(parts, len(source), width, kind, runtime)
        for parts, width, kind in zip((probabilities, features, shared), widths, kinds, strict=True)
    ]
    return Answers(whole[0].astype(np.float64).transpose(1, 0, 2), *(part.astype(np.float32) for part in whole[1:]))


def _gather(
    parts: list[Tensor], count: int, width: tuple[int, ...], dtype: torch.dtype, runtime: Runtime
) -> NDArray[np.floating]:
    """The rows of all workers, in the order of the images."""
    rows = np.array_split(np.arange(count), runtime.world_size)[runtime.rank]
    whole = torch.zeros(count, *width, dtype=dtype, device=runtime.device)
    if len(rows):
        whole[int(rows[0]) : int(rows[-1]) + 1] = torch.cat(parts)
    found: NDArray[np.floating] = runtime.all_reduce(whole).cpu().numpy()
    return found


def _batches(source: ImageSource, preprocess: Preprocess, runtime: Runtime) -> Iterator[Batch]:
    workers = runtime.options.loader_workers
    return runtime.wrap_loader(eval_batches(source, preprocess, EVAL_BATCH, runtime.rank, runtime.world_size, workers))


def in_memory(source: ImageSource) -> ImageSource:
    """The same images decoded once, where they fit into `IN_MEMORY`."""
    if len(source) * math.prod(source.image_shape) > IN_MEMORY:
        return source
    pixels = ArrayStore(source.images(np.arange(len(source))), "image")
    return ImageSource(pixels, source.labels, source.flags)
