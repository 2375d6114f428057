"""Seven ways to fine-tune a pretrained network, AdaSkips or plain, behind one interface.

Source: spec adaskips sections 5 and 2.6; the definitions are those of the published papers and of the transfer-learning
library that the source compares with.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.data import Batch
from dataeff.dynamic.adaskips.model import AdaSkipResNet, conv_norm_pairs
from dataeff.dynamic.adaskips.network import TransferNetwork, TransferOutput, frozen_copy

Numbers = dict[str, Tensor]
PROJECTION = 128


@dataclass
class Step:
    """A mini-batch for a method.

    Attributes:
        network: the model to call, which averages gradients over workers.
        model: the same without that.
        draws: uniform numbers for random skip weights, or None.
        uniform: uniform numbers (count,) of this mini-batch, equal on all workers.
        second_view: the batch's images, augmented differently.
        gather: tensors (B, ...) of all workers in order.
    """

    network: Callable[..., TransferOutput]
    model: TransferNetwork
    batch: Batch
    draws: Tensor | None = None
    uniform: Callable[[int], Tensor] = torch.rand
    second_view: Callable[[], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def run(self) -> TransferOutput:
        return self.network(self.batch.images, self.draws)


class FineTuneMethod(nn.Module, ABC):
    """A loss and what it remembers: its buffers and frozen networks are part of a checkpoint.

    Attributes:
        needs_source_head: the source classifier goes on as a second head.
        needs_projector: see `TransferNetwork`.
    """

    needs_source_head: ClassVar[bool] = False
    needs_projector: ClassVar[bool] = False

    def setup(self, model: TransferNetwork, source: TransferNetwork, loader: Iterable[Batch]) -> None:
        """Before the first mini-batch.

        Args:
            model: the network that will be trained.
            source: the pretrained network, plain and in evaluation mode.
            loader: the training images, each once, not augmented.
        """

    @abstractmethod
    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        """The total, and its parts without gradient."""

    def on_step_end(self, model: TransferNetwork) -> None:
        """After the update."""


class VanillaFineTune(FineTuneMethod):
    """Cross-entropy."""

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        return F.cross_entropy(step.run().logits, step.batch.labels), {}


class LearningWithoutForgetting(FineTuneMethod):
    """Cross-entropy + weight * KL(source network's softened answers, recorded before || the source head's now).

    Args:
        images, source_classes: size of the record.
        weight, temperature: 4 and 3 in the library.
    """

    needs_source_head = True
    recorded: Tensor

    def __init__(self, images: int, source_classes: int, weight: float = 4.0, temperature: float = 3.0):
        super().__init__()
        self.weight, self.temperature = weight, temperature
        self.register_buffer("recorded", torch.zeros(images, source_classes))

    @torch.no_grad()
    def setup(self, model: TransferNetwork, source: TransferNetwork, loader: Iterable[Batch]) -> None:
        for batch in loader:
            self.recorded[batch.indices] = source(batch.images, plain=True).logits

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        output = step.run()
        assert output.source_logits is not None
        entropy = F.cross_entropy(output.logits, step.batch.labels)
        distilled = softened_kl(output.source_logits, self.recorded[step.batch.indices], self.temperature)
        return entropy + self.weight * distilled, {"lwf": distilled.detach()}


def softened_kl(logits: Tensor, recorded: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of KL(softmax(recorded / T) || softmax(logits / T)), both (B, K)."""
    return F.kl_div(F.log_softmax(logits / temperature, 1), F.softmax(recorded / temperature, 1), reduction="batchmean")


class BatchSpectralShrinkage(FineTuneMethod):
    """Cross-entropy + weight * sum of the k smallest squared singular values of the features (B, d).

    With several workers each takes the singular values of its own part of the batch.
    """

    def __init__(self, weight: float = 0.001, k: int = 1):
        super().__init__()
        self.weight, self.k = weight, k

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        output = step.run()
        entropy = F.cross_entropy(output.logits, step.batch.labels)
        try:
            penalty = spectral_penalty(output.embedding, self.k)
        except torch.linalg.LinAlgError:
            warnings.warn("BSS: the singular values did not converge, penalty left out of a mini-batch", stacklevel=2)
            penalty = entropy.detach() * 0
        return entropy + self.weight * penalty, {"bss": penalty.detach()}


def spectral_penalty(features: Tensor, k: int, eps: float = 1e-6) -> Tensor:
    """Sum of the k smallest squared singular values of (B, d); k at most their number.

    `eps` on the diagonal keeps values that are zero, of features of low rank, apart.
    """
    values = torch.linalg.svdvals(features + eps * torch.eye(*features.shape, device=features.device))
    penalty: Tensor = values[-min(k, len(values)) :].square().sum()
    return penalty


class DELTA(FineTuneMethod):
    """Cross-entropy + weight/2 * distance of the feature maps to the source's + weight/2 * ||classifier||^2.

    The distance is sum over stages and channels of (C / HW) a_c ||FM_c - FM0_c||^2, mean over images, of each stage's
    last convolution. Attention a: how much the loss of a classifier on the source's features rises when filter c is
    zeroed.

    Args:
        source: its copy stays in the checkpoint.
        num_classes: K of the target.
        weight: of both terms, 0.01 in the library.
    """

    def __init__(self, source: TransferNetwork, num_classes: int, weight: float = 0.01):
        super().__init__()
        self.weight, self.num_classes = weight, num_classes
        self.source = frozen_copy(source)
        for number, conv in enumerate(last_convs(self.source.student)):
            self.register_buffer(f"attention{number}", torch.full((conv.out_channels,), 1 / conv.out_channels))

    def setup(self, model: TransferNetwork, source: TransferNetwork, loader: Iterable[Batch]) -> None:
        self.source.load_state_dict(source.state_dict())
        batches = list(loader)
        probe = _probe(self.source, batches, self.num_classes)
        for number, conv in enumerate(last_convs(self.source.student)):
            self.get_buffer(f"attention{number}").copy_(
                channel_attention(self._loss_increases(conv, probe, batches[0]))
            )

    @torch.no_grad()
    def _loss_increases(self, conv: nn.Conv2d, probe: nn.Linear, batch: Batch) -> Tensor:
        def loss() -> Tensor:
            embedding = self.source.student.run(batch.images, plain=True).embedding
            value: Tensor = F.cross_entropy(probe(embedding), batch.labels)
            return value

        before = loss()
        increases = []
        for channel in range(conv.out_channels):
            kept = conv.weight[channel].clone()
            conv.weight[channel] = 0
            increases.append(loss() - before)
            conv.weight[channel] = kept
        return torch.stack(increases)

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        with RecordedOutputs(last_convs(step.model.student)) as current:
            output = step.run()
        with torch.no_grad(), RecordedOutputs(last_convs(self.source.student)) as source:
            self.source.student.run(step.batch.images, plain=True)
        entropy = F.cross_entropy(output.logits, step.batch.labels)
        attention = [self.get_buffer(f"attention{number}") for number in range(len(current.maps))]
        distance = 0.5 * behaviour_distance(current.maps, source.maps, attention)
        head = 0.5 * sum(
            (parameter.square().sum() for parameter in step.model.student.fc.parameters()), torch.zeros_like(entropy)
        )
        return entropy + self.weight * (distance + head), {"delta": distance.detach()}


def behaviour_distance(maps: list[Tensor], source_maps: list[Tensor], attention: list[Tensor]) -> Tensor:
    """Sum over layers and channels of (C / HW) a_c ||FM_c - FM0_c||^2, mean over images; maps (B, C, H, W), a (C,)."""
    total = torch.zeros((), device=maps[0].device)
    for current, source, weight in zip(maps, source_maps, attention, strict=True):
        channels, height, width = current.shape[1:]
        squared = (current - source).square().sum((2, 3))
        total = total + channels / (height * width) * (squared * weight).sum(1).mean()
    return total


def channel_attention(increases: Tensor) -> Tensor:
    """softmax(z-score(loss increases) / 5), (C,); uniform where they do not differ."""
    if len(increases) < 2 or not float(increases.std()) > 0:
        return torch.full_like(increases, 1 / len(increases))
    return torch.softmax((increases - increases.mean()) / increases.std() / 5, 0)


def _probe(source: TransferNetwork, batches: list[Batch], num_classes: int) -> nn.Linear:
    """A linear classifier of the target's classes on the source's features."""
    with torch.no_grad():
        features = torch.cat([source.student.run(batch.images, plain=True).embedding for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    probe = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(probe(features), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


class CoTuning(FineTuneMethod):
    """Cross-entropy + weight * cross-entropy of the source head's answer to p(y_s | y_t), the mean answer of the source
    network to images of the target class.

    Args:
        num_classes, source_classes: K and K_s.
        weight: 2.3 in the library.
    """

    needs_source_head = True
    relationship: Tensor

    def __init__(self, num_classes: int, source_classes: int, weight: float = 2.3):
        super().__init__()
        self.weight = weight
        self.register_buffer("relationship", torch.full((num_classes, source_classes), 1 / source_classes))

    @torch.no_grad()
    def setup(self, model: TransferNetwork, source: TransferNetwork, loader: Iterable[Batch]) -> None:
        answers = [(source(batch.images, plain=True).logits.softmax(1), batch.labels) for batch in loader]
        probabilities, labels = (torch.cat(column) for column in zip(*answers, strict=True))
        self.relationship.copy_(class_relationship(probabilities, labels, len(self.relationship)))

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        output = step.run()
        assert output.source_logits is not None
        entropy = F.cross_entropy(output.logits, step.batch.labels)
        source = F.cross_entropy(output.source_logits, self.relationship[step.batch.labels])
        return entropy + self.weight * source, {"co_tuning": source.detach()}


def class_relationship(probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """p(y_s | y_t), (K, K_s): mean of the source's answers (N, K_s) over each class; uniform for one without images."""
    one_hot = F.one_hot(labels, num_classes).to(probabilities.dtype)
    counts = one_hot.sum(0)
    empty = counts == 0
    if bool(empty.any()):
        warnings.warn(f"Co-Tuning: classes {empty.nonzero().view(-1).tolist()} have no images", stacklevel=2)
    means = one_hot.T @ probabilities / counts.clamp_min(1)[:, None]
    return torch.where(empty[:, None], torch.full_like(means, 1 / means.shape[1]), means)


class StochasticNormalization(FineTuneMethod):
    """Cross-entropy; every norm of the pretrained network is a `StochNorm2d`.

    Args:
        p: probability that a channel takes the batch's statistics.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        norms = [module for module in step.model.modules() if isinstance(module, StochNorm2d)]
        draws = step.uniform(sum(norm.num_features for norm in norms))
        for norm, part in zip(norms, draws.split([norm.num_features for norm in norms]), strict=True):
            norm.by_batch = part < self.p
        output = step.run()
        for norm in norms:
            norm.by_batch = None
        return F.cross_entropy(output.logits, step.batch.labels), {}


class StochNorm2d(nn.BatchNorm2d):
    """BatchNorm that in training normalises the channels in `by_batch` (bool (C,)) by the batch's statistics and the
    others by the running ones; a BatchNorm where `by_batch` is None, and in evaluation."""

    by_batch: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.by_batch is None or not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        # Before the batch's statistics enter the running ones.
        running = F.batch_norm(
            input, self.running_mean.clone(), self.running_var.clone(), self.weight, self.bias, False, 0.0, self.eps
        )
        return torch.where(self.by_batch.view(1, -1, 1, 1), super().forward(input), running)


def use_stochastic_norms(student: AdaSkipResNet) -> None:
    """Make every BatchNorm of the pretrained part a `StochNorm2d`, in place."""
    new = {id(module) for part in student.new_parts() for module in part.modules()}
    for module in student.modules():
        if type(module) is nn.BatchNorm2d and id(module) not in new:
            module.__class__ = StochNorm2d


class BiTuning(FineTuneMethod):
    """Cross-entropy + two contrasts against queues of keys by class, from a momentum copy of the network.

    L_z: the projected query against projected keys; L_y: the label's classifier row [w, b] against pooled keys [h, 1].
    All are normalised; temperature 0.07; the 1 + K keys of the own class share the target mass.

    Args:
        model: the network to be trained, with a projector; copied.
        num_classes: K of the target.
        queue: keys kept of each class.
        momentum, temperature: of the copy, of the contrasts.
    """

    needs_projector = True
    queue_z: Tensor
    queue_h: Tensor
    pointers: Tensor

    def __init__(
        self,
        model: TransferNetwork,
        num_classes: int,
        queue: int = 40,
        momentum: float = 0.999,
        temperature: float = 0.07,
    ):
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.key = frozen_copy(model)
        self.register_buffer("queue_z", F.normalize(torch.randn(num_classes, queue, PROJECTION), dim=2))
        width = model.student.embedding_dim + 1
        self.register_buffer("queue_h", F.normalize(torch.randn(num_classes, queue, width), dim=2))
        self.register_buffer("pointers", torch.zeros(num_classes, dtype=torch.int64))

    def setup(self, model: TransferNetwork, source: TransferNetwork, loader: Iterable[Batch]) -> None:
        self.key.load_state_dict(model.state_dict())

    def loss(self, step: Step) -> tuple[Tensor, Numbers]:
        labels = step.batch.labels
        output = step.run()
        assert output.projection is not None and step.second_view is not None
        with torch.no_grad():
            self.key.train(step.model.training)
            keys = self.key(step.second_view(), step.draws)
            key_z = F.normalize(keys.projection, dim=1)
            key_h = F.normalize(with_one(keys.embedding), dim=1)
        classifier = step.model.student.fc
        rows = F.normalize(torch.cat([classifier.weight, classifier.bias[:, None]], 1), dim=1)[labels]
        query = F.normalize(output.projection, dim=1)
        # The queues change below, before gradients are taken.
        contrast_z = contrast(query, key_z, self.queue_z.clone(), labels, self.temperature)
        contrast_y = contrast(rows, key_h, self.queue_h.clone(), labels, self.temperature)
        with torch.no_grad():
            everyone = step.gather(labels)
            places = self._places(everyone)
            enqueue(self.queue_z, step.gather(key_z), everyone, places)
            enqueue(self.queue_h, step.gather(key_h), everyone, places)
            self.pointers += torch.bincount(everyone, minlength=len(self.pointers))
            self.pointers %= self.queue_z.shape[1]
        entropy = F.cross_entropy(output.logits, labels)
        return entropy + contrast_z + contrast_y, {
            "contrast_z": contrast_z.detach(),
            "contrast_y": contrast_y.detach(),
        }

    def _places(self, labels: Tensor) -> Tensor:
        return queue_places(self.pointers, labels, self.queue_z.shape[1])

    @torch.no_grad()
    def on_step_end(self, model: TransferNetwork) -> None:
        for own, theirs in zip(self.key.parameters(), model.parameters(), strict=True):
            own.lerp_(theirs, 1 - self.momentum)


def with_one(features: Tensor) -> Tensor:
    """(B, d) -> (B, d + 1): the last entry meets the classifier's bias."""
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def contrast(anchors: Tensor, keys: Tensor, queue: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL of the target (1 / (K + 1) at the own key and the K queued ones of the class) and the softmax over all keys.

    Args:
        anchors, keys: normalised, (B, d), row by row of one image.
        queue: (classes, K, d), normalised.
    """
    classes, size, width = queue.shape
    own = (anchors * keys).sum(1, keepdim=True)
    logits = torch.cat([own, anchors @ queue.reshape(-1, width).T], 1) / temperature
    positive = F.one_hot(labels, classes).repeat_interleave(size, 1)
    target = torch.cat([torch.ones_like(positive[:, :1]), positive], 1) / (size + 1)
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean")


def queue_places(pointers: Tensor, labels: Tensor, size: int) -> Tensor:
    """Places in the class's queue for keys of these labels, in order, from the class's pointer on, wrapping around;
    -1 for keys that later ones of the same class would overwrite."""
    counts = torch.bincount(labels, minlength=len(pointers))
    same = labels[:, None] == labels[None, :]
    order = same.tril(-1).sum(1)
    places = (pointers[labels] + order) % size
    return torch.where(order >= counts[labels] - size, places, -1)


def enqueue(queue: Tensor, keys: Tensor, labels: Tensor, places: Tensor) -> None:
    """queue[label, place] = key, in place, for places that are not -1."""
    kept = places >= 0
    queue[labels[kept], places[kept]] = keys[kept].to(queue.dtype)


class RecordedOutputs:
    """Outputs of convolutions in one forward pass: `maps`, in the order of the layers."""

    def __init__(self, layers: list[nn.Conv2d]):
        self.layers = layers
        self.maps: list[Tensor] = []

    def __enter__(self) -> "RecordedOutputs":
        self.handles = [layer.register_forward_hook(lambda m, i, out: self.maps.append(out)) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def last_convs(student: AdaSkipResNet) -> list[nn.Conv2d]:
    """The last convolution of each stage's last residual branch."""
    return [conv_norm_pairs(stage.blocks[-1])[-1][0] for stage in student.stages]
