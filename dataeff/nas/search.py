"""What all searchers share: the protocol, and alternating gradient steps on two halves of the training images.

Source: spec ss_pcp_darts sections 2.3, 2.5 and 2.6.
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, ImageSource, Preprocess, Splits, TrainStream, eval_batches
from dataeff.nas.architecture import Architecture
from dataeff.nas.settings import Phase, SearchSettings
from dataeff.supervised import EVAL_BATCH, mix


@dataclass(frozen=True)
class SearchTask:
    """The images that an architecture is searched on, and where.

    Attributes:
        pool: what is halved for the search.
        splits: labelled images that found networks are trained and judged on.
    """

    pool: ImageSource
    splits: Splits
    preprocess: Preprocess
    runtime: Runtime
    seed: int

    @property
    def num_classes(self) -> int:
        return len(self.splits.classes)

    @property
    def in_channels(self) -> int:
        return self.splits.image_shape[0]

    @property
    def side(self) -> int:
        return min(self.preprocess.size)

    def halves(self, limit: int | None) -> tuple[ImageSource, ImageSource]:
        """Disjoint halves of (`limit` of) the pool, for weights and for the architecture. No label is read.

        Raises:
            ValueError: a half is empty.
        """
        order = np.random.default_rng([self.seed, 5]).permutation(len(self.pool))[:limit]
        half = len(order) // 2
        if not half:
            raise ValueError(f"{self.splits.name}: {len(order)} training image(s) cannot be halved for the search")
        return self.pool.subset(order[: len(order) - half]), self.pool.subset(order[len(order) - half :])


class Searcher(ABC):
    """Finds an architecture in `total_steps` steps."""

    def __init__(self, task: SearchTask, settings: SearchSettings) -> None:
        self.task, self.settings, self.runtime = task, settings, task.runtime
        self.history: list[dict[str, Any]] = []

    @property
    @abstractmethod
    def total_steps(self) -> int: ...

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Step number `step`; metrics that are equal on every worker."""

    @abstractmethod
    def architecture(self) -> Architecture:
        """What was found; also during the search."""

    def evaluate(self, split: str) -> dict[str, float]:
        """Of the super-network, where there is one."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = list(state["history"])


@dataclass(frozen=True)
class Moment:
    """A mini-batch of a search. `number` counts the mini-batches of the phase."""

    phase: int
    epoch: int
    number: int
    architecture: bool = False


class GradientSearch(Searcher):
    """Alternates an architecture step (on one half of the images) and a weight step (on the other).

    Only what a step learns requires a gradient in it. Gradients are averaged over workers. Where one is not finite,
    the phase ends there with the state before the epoch.
    """

    model: nn.Module
    labels_needed: ClassVar[bool] = True

    def __init__(self, task: SearchTask, settings: SearchSettings) -> None:
        super().__init__(task, settings)
        self.phases = settings.plan()
        self.weight_half, self.arch_half = task.halves(settings.search_images)
        if settings.batch % self.runtime.world_size:
            raise ValueError(f"batch = {settings.batch} must be a multiple of the {self.runtime.world_size} workers")
        self.phase = -1
        self.halted = False
        self.streams: dict[str, TrainStream] = {}
        self.begin(0)

    # --- what an arm says -------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, phase: int) -> nn.Module:
        """The super-network of a phase, with `arch_parameters()` and `weight_parameters()`."""

    @abstractmethod
    def loss(self, batch: Batch, moment: Moment) -> Tensor:
        """Loss of a mini-batch, for weights or for the architecture."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Answers in evaluation mode."""

    def arch_gradients(self, weight_batch: Batch, arch_batch: Batch, moment: Moment) -> list[Tensor]:
        """First order: the gradient of the loss on the architecture's half; 0 for a cell type that no cell has."""
        loss = self.loss(arch_batch, moment)
        return list(torch.autograd.grad(loss, self.arch_parameters, materialize_grads=True))

    def after_arch_step(self) -> None:
        """The architecture's optimiser has moved."""

    def end_phase(self) -> None:
        """A phase is done."""

    def describe_epoch(self) -> dict[str, float]:
        """Numbers of the architecture after an epoch."""
        return {}

    # --- phases and epochs ------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def current(self) -> Phase:
        return self.phases[self.phase]

    def begin(self, phase: int) -> None:
        """A new super-network and new optimisers: every phase starts from nothing."""
        self.close()
        self.phase, self.halted = phase, False
        torch.manual_seed(mix(self.task.seed, 11, phase))
        self.model = self.build(phase)
        self.runtime.place(self.model)
        self.weight_parameters: list[nn.Parameter] = self.model.weight_parameters()  # type: ignore[operator]
        self.arch_parameters: list[nn.Parameter] = self.model.arch_parameters()  # type: ignore[operator]
        settings = self.settings
        self.weight_optimizer = torch.optim.SGD(
            self.weight_parameters, lr=settings.w_lr, momentum=settings.w_momentum, weight_decay=settings.w_decay
        )
        self.arch_optimizer = torch.optim.Adam(
            self.arch_parameters, lr=settings.arch_lr, betas=settings.arch_betas, weight_decay=settings.arch_decay
        )

    def place_of(self, step: int) -> tuple[int, int]:
        """Phase and epoch of a step."""
        phase = 0
        while step >= self.phases[phase].epochs:
            step -= self.phases[phase].epochs
            phase += 1
        return phase, step

    def step(self, step: int) -> dict[str, float]:
        phase, epoch = self.place_of(step)
        if phase != self.phase:
            self.begin(phase)
        metrics = {"phase": float(phase + 1), "w_lr": self.weight_rate(epoch)}
        if not self.halted:
            before = copy.deepcopy(self._learned())
            losses = self._epoch(epoch)
            if losses is None:
                warnings.warn(
                    f"phase {phase + 1}, epoch {epoch + 1}: loss or gradient not finite; the phase ends with the state "
                    "before this epoch. Use a smaller w_lr or arch_lr, or bt_normalize",
                    stacklevel=2,
                )
                self._restore(before)
                self.halted = True
            else:
                metrics |= losses
        self.runtime.sync_buffers(self.model)
        metrics |= {f"val_{name}": value for name, value in self.evaluate("val").items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the architecture in between; the final one warns
            metrics |= self.describe_epoch()
            found = self.architecture().model_dump(mode="json")
        self.history.append({"phase": phase, "epoch": epoch, "architecture": found})
        if epoch == self.current.epochs - 1:
            self.close()
            self.end_phase()
        return metrics

    def weight_rate(self, epoch: int) -> float:
        """Cosine from w_lr to w_lr_min over the phase."""
        low, high = self.settings.w_lr_min, self.settings.w_lr
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * epoch / self.current.epochs))

    def _epoch(self, epoch: int) -> dict[str, float] | None:
        """Mean losses of an epoch; None when a gradient was not finite."""
        self.model.train()
        count = max(1, len(self.weight_half) // self.settings.batch)
        searches = self.current.arch_start <= epoch < self.current.arch_end
        self.weight_optimizer.param_groups[0]["lr"] = self.weight_rate(epoch)
        weight_batches = self._batches("weights", self.weight_half, epoch * count)
        arch_batches = self._batches("architecture", self.arch_half, epoch * count) if searches else None
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(epoch * count, (epoch + 1) * count):
            batch = next(weight_batches)
            moment = Moment(self.phase, epoch, number)
            if arch_batches is not None:
                found = self._arch_step(batch, next(arch_batches), moment)
                if found is None:
                    return None
            loss = self._weight_step(batch, moment)
            if loss is None:
                return None
            sums += torch.tensor([loss, 1.0], dtype=torch.float64)
        total = self.runtime.all_reduce(sums.to(self.runtime.device)).tolist()
        return {"search_loss": total[0] / total[1]}

    def _arch_step(self, weight_batch: Batch, arch_batch: Batch, moment: Moment) -> float | None:
        assert self.current.arch_start <= moment.epoch < self.current.arch_end, "no architecture step in the warm-up"
        moment = Moment(moment.phase, moment.epoch, moment.number, architecture=True)
        self._learn(self.arch_parameters)
        gradients = self.arch_gradients(weight_batch, arch_batch, moment)
        norm = self._apply(self.arch_optimizer, self.arch_parameters, gradients, math.inf)
        if norm is not None:
            self.after_arch_step()
        return norm

    def _weight_step(self, batch: Batch, moment: Moment) -> float | None:
        self._learn(self.weight_parameters)
        loss = self.loss(batch, moment)
        learning = [parameter for parameter in self.weight_parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, learning, allow_unused=True)
        used = [(p, g) for p, g in zip(learning, gradients, strict=True) if g is not None]
        parameters, known = [p for p, _ in used], [g for _, g in used]
        if self._apply(self.weight_optimizer, parameters, known, self.settings.grad_clip) is None:
            return None
        return float(loss.detach())

    def _learn(self, parameters: list[nn.Parameter]) -> None:
        """Only `parameters` require a gradient: no time goes into gradients that nobody reads."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def _apply(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor], clip: float
    ) -> float | None:
        """Average, clip and apply; the norm, or None if it is not finite (the same on every worker)."""
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        flat = self.runtime.all_reduce(flat) / self.runtime.world_size
        norm = float(flat.norm())
        if not math.isfinite(norm):
            return None
        if norm > clip:
            flat *= clip / norm
        optimizer.zero_grad(set_to_none=True)
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(piece.view(parameter.shape))
        optimizer.step()
        return norm

    # --- images -----------------------------------------------------------------------------------------------------

    def stream_preprocess(self) -> Preprocess:
        return self.task.preprocess

    def stream_augment(self) -> Augment:
        return Augment(self.settings.augment)

    def _batches(self, name: str, source: ImageSource, first: int) -> Iterator[Batch]:
        stream = self.streams.get(name)
        if stream is None or stream.iteration != first:
            if stream is not None:
                stream.close()
            stream = self.streams[name] = TrainStream(
                source,
                self.stream_preprocess(),
                self.stream_augment(),
                batch_size=self.settings.batch,
                seed=mix(self.task.seed, 13, self.phase, len(name)) % 2**31,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                start_iteration=first,
                workers=self.runtime.options.loader_workers,
            )
        return self.runtime.wrap_loader(stream)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        self.streams = {}

    def draws(self, moment: Moment, count: int, *shape: int) -> Tensor:
        """Uniform numbers (count, *shape) for this worker's part of the mini-batch, by place in the global batch."""
        key = mix(self.task.seed, 17, moment.phase, moment.number, int(moment.architecture))
        generator = torch.Generator().manual_seed(key)
        first = self.runtime.rank * count
        numbers = torch.rand(self.settings.batch, *shape, generator=generator)[first : first + count]
        return numbers.to(self.runtime.device)

    def autocast(self) -> torch.autocast:
        enabled = self.runtime.options.precision == "bf16"
        return torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy and loss of the super-network, on as many evenly spaced images as a half has at most."""
        if not self.labels_needed:
            return {}
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        runtime = self.runtime
        source: ImageSource = getattr(self.task.splits, split)
        source = source.subset(np.arange(0, len(source), -(-len(source) // len(self.weight_half))))
        batches = eval_batches(source, self.task.preprocess, EVAL_BATCH, runtime.rank, runtime.world_size)
        for batch in runtime.wrap_loader(batches):
            logits = self.logits(batch.images).float()
            right = (logits.argmax(1) == batch.labels).sum()
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            sums += torch.tensor([float(right), float(loss), len(batch.labels)], dtype=torch.float64)
        right_sum, loss_sum, count = runtime.all_reduce(sums.to(runtime.device)).tolist()
        return {"accuracy": right_sum / max(1, count), "loss": loss_sum / max(1, count)}

    # --- state ------------------------------------------------------------------------------------------------------

    def signature(self) -> str:
        """What a checkpoint must agree with."""
        return f"{self.settings.arm}, phases {self.phases}, C {self.settings.init_channels}"

    def _learned(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "signature": self.signature(),
            "phase": self.phase,
            "halted": self.halted,
            **self._learned(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["signature"] != self.signature():
            raise ValueError(
                f"the checkpoint is of another search: {state['signature']}, this run's is {self.signature()}"
            )
        super().load_state_dict(state)
        self.begin(int(state["phase"]))
        self.halted = bool(state["halted"])
        self._restore(state)
