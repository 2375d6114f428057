"""`fit_pretext`: pretraining in this process, for methods that need a trained task; the table of tasks."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dataeff.core.checkpoint import load_checkpoint, save_checkpoint
from dataeff.core.run import newest_checkpoint
from dataeff.core.runtime import Runtime
from dataeff.pretraining.deepcluster import DeepCluster
from dataeff.pretraining.inpainting import Inpainting
from dataeff.pretraining.pool import Pool
from dataeff.pretraining.rotation import Rotation
from dataeff.pretraining.scan import Scan
from dataeff.pretraining.settings import PretextConfig
from dataeff.pretraining.simclr import SimCLR
from dataeff.pretraining.task import Images
from dataeff.pretraining.training import PretextModule, PretextTrainer, initial_weights
from dataeff.pretraining.vae import VAE

TASKS: dict[str, Callable[..., PretextModule]] = {
    "simclr": SimCLR,
    "vae": VAE,
    "rotation": Rotation,
    "inpainting": Inpainting,
    "deepcluster": DeepCluster,
    "scan": Scan,
}

Progress = Callable[[Mapping[str, float], int], None]


def build_task(config: PretextConfig, image_shape: tuple[int, int, int], seed: int) -> PretextModule:
    """An untrained task for images (C, H, W); initial weights by `seed`.

    Raises:
        ValueError: settings that do not fit the images, or a clusterer whose number of clusters is left open.
    """
    with initial_weights(seed):
        return TASKS[config.task](config, image_shape)


def restore_task(
    config: PretextConfig, image_shape: tuple[int, int, int], state: Mapping[str, Tensor]
) -> PretextModule:
    """A trained task from its settings and `state_dict`, in evaluation mode on the CPU."""
    task = build_task(config, image_shape, 0)
    task.restore(state)
    Runtime("cpu").place(task)  # the memory layout of training, so that answers are the same bit for bit
    return task.eval()


def build_trainer(config: PretextConfig, images: Images, seed: int, runtime: Runtime | None = None) -> PretextTrainer:
    """A trainer at its beginning, for callers that advance and save it themselves."""
    task = build_task(config, Pool(images).image_shape, seed)
    return PretextTrainer(task, config.model_dump_json(), images, seed, runtime)


def fit_pretext(
    config: PretextConfig,
    images: Images,
    seed: int,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
) -> PretextModule:
    """Train a task on a pool of images without labels.

    Args:
        config: `SimCLRConfig`, `VAEConfig`, ... ; clusterers need `n_clusters` (see `with_clusters`).
        images: float32 in [0, 1] or uint8 (N, C, H, W), or a split of a data set.
        seed: with the other arguments, decides the result bit for bit (on the CPU).
        progress: called after every epoch with its metrics (and `step`, from 1) and the number of epochs.
        checkpoint: folder of this pretraining alone; the state is saved there after every epoch, and training goes on
            from what is there, to the same result as without an interruption.

    Returns:
        The trained task, which is a `PretextTask` (a `Clusterer` for deepcluster and scan) and an `nn.Module`: keep its
        `state_dict()` and rebuild it with `restore_task`.

    Raises:
        ValueError: images or settings that cannot be trained on, or a checkpoint of another pretraining.

    Example:
        >>> task = fit_pretext(VAEConfig(epochs=25), pool, seed=0)
        >>> hardest_first = np.argsort(-task.loss_per_sample(pool))
    """
    trainer = build_trainer(config, images, seed, runtime)
    folder = None if checkpoint is None else Path(checkpoint)
    found = None if folder is None else newest_checkpoint(folder)
    if found is not None:
        trainer.load_state_dict(load_checkpoint(found)["experiment"])
    while not trainer.finished:
        metrics = trainer.step()
        if folder is not None and trainer.runtime.is_main:
            _save(trainer, folder)
        if progress is not None:
            progress({"step": trainer.steps_done, **metrics}, trainer.total_steps)
    return trainer.result()


def _save(trainer: PretextTrainer, folder: Path) -> None:
    """Save the state, and drop older ones only when the new one is complete."""
    target = folder / f"step-{trainer.steps_done:06d}"
    target.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, {"experiment": trainer.state_dict()})
    for old in folder.iterdir():
        if old != target:
            shutil.rmtree(old)
