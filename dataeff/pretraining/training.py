"""The one training loop of all self-supervised tasks: stages of epochs, resumable, on any number of workers.

A task says what its stages train and what a mini-batch costs; order, draws, optimisers, learning rates, gradients that
are not finite and checkpoints are here. Every draw is a function of (seed, stage, mini-batch, place in the
global batch).
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataeff.core.runtime import Runtime
from dataeff.data import uniform_draws
from dataeff.data.subsets import IntArray
from dataeff.nn.workers import share_batch_norm
from dataeff.pretraining.networks import Normalise
from dataeff.pretraining.pool import Pool, map_blocks
from dataeff.pretraining.settings import TrainingConfig
from dataeff.pretraining.task import Images

MAX_BAD_STEPS = 10


class PoolBatch(NamedTuple):
    """This worker's part of a mini-batch: positions in the pool int64 (b,), images (b, C, H, W), draws (b, D)."""

    indices: IntArray
    images: Tensor
    draws: Tensor


class Update(NamedTuple):
    """One step of one network's optimiser: what to minimise, and numbers to report."""

    network: str
    loss: Tensor
    reported: dict[str, Tensor]


class Stage(ABC):
    """One kind of training on one pool.

    Attributes:
        networks: what is trained; each has an optimiser of its own.
        members: int64, positions in the pool of the images that are trained on.
        draws: uniform numbers an image.
    """

    draws = 0

    def __init__(self, settings: TrainingConfig, networks: Mapping[str, nn.Module], context: "Context") -> None:
        self.settings, self.networks, self.context = settings, dict(networks), context
        self.members: IntArray = np.arange(len(context.pool))

    @property
    def batch_size(self) -> int:
        """Images in a mini-batch over all workers: at most all, and an equal part for every worker."""
        workers = self.context.runtime.world_size
        size = min(self.settings.batch, len(self.members)) // workers * workers
        if size < 2:
            raise ValueError(
                f"{len(self.members)} images on {workers} workers are too few; pretraining needs 2 or more"
            )
        return size

    @property
    def iterations(self) -> int:
        """Mini-batches in an epoch; the incomplete last one is left out."""
        return len(self.members) // self.batch_size

    def begin(self) -> None:  # noqa: B027 - optional
        """The stage starts; not called when a run goes on within it."""

    def begin_epoch(self, epoch: int) -> Sequence[nn.Parameter]:
        """An epoch starts; parameters that it has initialised anew, so that the optimiser forgets their past."""
        return ()

    def order(self, epoch: int) -> IntArray:
        """Positions in the pool of an epoch's images: `iterations` times `batch_size` of them."""
        order: IntArray = self.context.generator(epoch).permutation(self.members)
        return order

    @abstractmethod
    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        """What a mini-batch changes; `networks` are to be called, in training mode. An update is applied before the
        next one is asked for."""

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """An epoch is over: further numbers to report, equal on every worker."""
        return {}

    def finish(self) -> None:  # noqa: B027 - optional
        """The stage is over."""

    def state(self) -> dict[str, Any]:
        """What must be kept besides weights and optimisers."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Go on from `state()`."""


class Context(NamedTuple):
    """Where a stage runs: its pool, its workers, and the seed and number that its draws come from."""

    pool: Pool
    runtime: Runtime
    seed: int
    stage: int = 0

    def generator(self, *numbers: int) -> np.random.Generator:
        """A generator for one purpose of this stage."""
        return np.random.default_rng([self.seed, self.stage, *numbers])

    def uniform(self, iteration: int, places: IntArray, count: int) -> Tensor:
        """Uniform numbers (len(places), count) of places in the global mini-batch, float32."""
        draws = uniform_draws(self.seed, iteration, places, count, stream=self.stage + 1)
        return torch.from_numpy(draws).float()

    def own_share(self, count: int) -> IntArray:
        """This worker's contiguous share of `count` rows."""
        return np.array_split(np.arange(count), self.runtime.world_size)[self.runtime.rank]

    def gather_shares(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, from every worker's share of them."""
        whole = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=self.runtime.device)
        whole[torch.from_numpy(self.own_share(count)).to(whole.device)] = rows.to(whole.device)
        return self.runtime.all_reduce(whole)


class PretextModule(nn.Module, ABC):
    """A task's networks and, once trained, its answers; see `PretextTask`.

    Its state_dict is everything that answering needs. Buffers whose length comes from the pool start empty and take the
    length of the state that is loaded.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.normalise = Normalise(image_shape[0])

    @abstractmethod
    def stages(self, context: Context) -> list[Stage]:
        """The stages that train this task, in order."""

    @abstractmethod
    def sample_losses(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> the task's loss of each, (B,), in evaluation mode."""

    @abstractmethod
    def sample_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> embeddings (B, D), in evaluation mode."""

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalise by the pool's channel statistics (C,)."""
        self.normalise.set(mean, std)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def loss_per_sample(self, images: Images) -> NDArray[np.float64]:
        """(N,); see `PretextTask`."""
        return self.answer(images, lambda x: self.sample_losses(x).double()).astype(np.float64)

    def features(self, images: Images) -> NDArray[np.float32]:
        """(N, D); see `PretextTask`."""
        return self.answer(images, lambda x: self.sample_features(x).float()).astype(np.float32)

    def answer(self, images: Images, function: Any) -> NDArray[np.generic]:
        """`function` of all images in evaluation mode, a block at a time."""
        self.eval()
        return map_blocks(images, function, self.device)

    def pool_features(self, context: Context) -> NDArray[np.float32]:
        """Features of a whole pool, every worker computing its share."""
        self.eval()
        share = context.own_share(len(context.pool))
        with torch.no_grad():
            parts = [self.sample_features(x.to(self.device)).float() for x in context.pool.blocks(share)]
            if not parts:
                parts = [self.sample_features(context.pool.read([0]).to(self.device)).float()[:0]]
        whole: NDArray[np.float32] = context.gather_shares(torch.cat(parts), len(context.pool)).cpu().numpy()
        return whole

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load a state_dict, with buffers of whatever length it has."""
        for name, buffer in list(self.named_buffers()):
            if name in state and state[name].shape != buffer.shape:
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, torch.empty_like(state[name], device=buffer.device))
        self.load_state_dict(dict(state))


@contextmanager
def initial_weights(*numbers: int) -> Iterator[None]:
    """PyTorch's global generator, seeded from `numbers` for a while and then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        yield


class PretextTrainer:
    """Trains a task on a pool; a step is an epoch of a stage.

    Args:
        task: freshly built.
        signature: what a checkpoint must agree with, besides the pool.
        images: the pool.
        seed: of order and draws.
        runtime: device and workers; every worker has the whole pool.

    Raises:
        ValueError: a pool that `Pool` refuses, or of fewer than two images a worker.
    """

    def __init__(
        self, task: PretextModule, signature: str, images: Images, seed: int, runtime: Runtime | None = None
    ) -> None:
        self.task = task
        self.runtime = runtime or Runtime()
        self.pool = Pool(images)
        if self.pool.image_shape != task.image_shape or not len(self.pool):
            raise ValueError(
                f"{len(self.pool)} images of shape {self.pool.image_shape}, the task needs {task.image_shape}"
            )
        self.signature = f"{signature}, seed {seed}, pool {self.pool.fingerprint()}"
        task.set_statistics(*self.pool.statistics())
        share_batch_norm(task, self.runtime)
        self.runtime.place(task)
        self.stages = [stage for stage in task.stages(Context(self.pool, self.runtime, seed)) if stage.settings.epochs]
        for stage in self.stages:
            _ = stage.batch_size  # refuses a pool that is too small before anything is trained
        self.steps_done = 0
        self.bad_steps = 0
        self.current = -1
        self.wrapped: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @property
    def total_steps(self) -> int:
        """Epochs of all stages."""
        return sum(stage.settings.epochs for stage in self.stages)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.total_steps

    def step(self) -> dict[str, float]:
        """Train for one epoch and return its metrics, equal on every worker."""
        number, epoch = self._place(self.steps_done)
        stage = self.stages[number]
        if self.current != number:
            stage.begin()
            self._enter(number)
        for parameter in stage.begin_epoch(epoch):
            for optimizer in self.optimizers.values():
                optimizer.state.pop(parameter, None)
        for network in self.wrapped.values():
            network.train()
        sums = self._train_epoch(stage, epoch)
        self.task.eval()
        metrics = {"stage": number + 1.0, **self._averages(sums), **stage.end_epoch(epoch)}
        self.steps_done += 1
        if epoch + 1 == stage.settings.epochs:
            stage.finish()
        return metrics

    def _place(self, step: int) -> tuple[int, int]:
        """Stage of a step, and its epoch."""
        for number, stage in enumerate(self.stages):
            if step < stage.settings.epochs:
                return number, step
            step -= stage.settings.epochs
        raise ValueError(f"the training of {self.total_steps} epochs is finished")

    def _enter(self, number: int) -> None:
        stage = self.stages[number]
        self.current = number
        self.wrapped = {name: self.runtime.wrap_model(network) for name, network in stage.networks.items()}
        self.optimizers = {name: _optimizer(stage.settings, network) for name, network in stage.networks.items()}

    def _train_epoch(self, stage: Stage, epoch: int) -> dict[str, list[Tensor]]:
        size, part = stage.batch_size, stage.batch_size // self.runtime.world_size
        places = np.arange(self.runtime.rank * part, (self.runtime.rank + 1) * part)
        order = stage.order(epoch)
        reported: dict[str, list[Tensor]] = {}
        requests = [order[within * size + places] for within in range(stage.iterations)]
        read = self.pool.read_each(requests, self.runtime.options.loader_workers)
        for iteration, (indices, pixels) in enumerate(zip(requests, read, strict=True), epoch * stage.iterations):
            images = self.runtime.to_device(pixels)
            draws = stage.context.uniform(iteration, places, stage.draws).to(self.runtime.device)
            lr = stage.settings.lr_at(iteration / (stage.settings.epochs * stage.iterations))
            for update in stage.updates(PoolBatch(indices, images, draws), self.wrapped):
                self._apply(update, lr, f"stage {self.current + 1}, mini-batch {iteration}")
                for name, value in update.reported.items():
                    reported.setdefault(name, []).append(value.detach().double())
        return reported

    def _apply(self, update: Update, lr: float, where: str) -> None:
        optimizer = self.optimizers[update.network]
        optimizer.zero_grad(set_to_none=True)
        update.loss.backward()
        # Averaged gradients are the same on every worker, so every worker takes the same decision.
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], math.inf)
        if bool(torch.isfinite(norm)):
            self.bad_steps = 0
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            return
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"{where}: the loss or its gradient was not finite {MAX_BAD_STEPS} times in a row; use a smaller lr"
            )
        warnings.warn(f"{where}: gradient not finite, mini-batch skipped", stacklevel=2)

    def _averages(self, reported: Mapping[str, list[Tensor]]) -> dict[str, float]:
        if not reported:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in reported.values()])
        means = self.runtime.all_reduce(means) / self.runtime.world_size
        return {f"train_{name}": value for name, value in zip(reported, means.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors and plain values."""
        entered = self.current >= 0
        return {
            "steps_done": self.steps_done,
            "signature": self.signature,
            "task": self.task.state_dict(),
            "current": self.current,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "stage": self.stages[self.current].state() if entered else {},
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it belongs to another task, configuration, seed or pool.
        """
        if state["signature"] != self.signature:
            raise ValueError(f"the checkpoint is of another pretraining: {state['signature']}, not {self.signature}")
        self.task.restore(state["task"])
        self.steps_done, self.bad_steps = int(state["steps_done"]), int(state["bad_steps"])
        if state["current"] >= 0:
            self._enter(int(state["current"]))
            self.stages[self.current].load_state(state["stage"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])

    def result(self) -> PretextModule:
        """The trained task, in evaluation mode."""
        return self.task.eval()


def _optimizer(settings: TrainingConfig, network: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(
        parameters, lr=settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay
    )
