"""SimCLR: NT-Xent with the negatives of all workers, and the contrastive score of an image.

Source: spec initial_pools_active_learning, section 2.2 c.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.core.runtime import Runtime
from dataeff.data import uniform_draws
from dataeff.nn.workers import gather_over_workers
from dataeff.pretraining.networks import build_encoder
from dataeff.pretraining.pool import image_keys
from dataeff.pretraining.settings import SimCLRConfig
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update
from dataeff.pretraining.views import CONTRAST_DRAWS, SCORE_DRAWS, contrast_view, score_copies

EPSILON = 1e-8
SCORE_STREAM = 1_000


def unit(z: Tensor) -> Tensor:
    """Rows of (B, D) at length 1, in float32; a row of zeros stays one."""
    return F.normalize(z.float(), dim=1, eps=EPSILON)


def nt_xent(first: Tensor, second: Tensor, temperature: float, runtime: Runtime | None = None) -> Tensor:
    """Normalised temperature-scaled cross-entropy of two views, both as anchors, over the batch of all workers.

    l(i, j) = -log(exp(sim(z_i, z_j) / T) / sum over m != i of exp(sim(z_i, z_m) / T)), sim the cosine.

    Args:
        first, second: embeddings (n, D) of the two views of the same images, of any length.
        temperature: T.
        runtime: whose workers share the batch; None: this process alone.

    Returns:
        Scalar: the mean over this worker's 2 n anchors.

    Raises:
        ValueError: one image in all, which has no negatives.

    Example::

        loss = nt_xent(encoder(view_1), encoder(view_2), temperature=0.1)
    """
    count = len(first)
    workers, rank = (1, 0) if runtime is None else (runtime.world_size, runtime.rank)
    if count * workers < 2:
        raise ValueError(f"NT-Xent needs at least 2 images in a batch, got {count * workers}: there are no negatives")
    first, second = unit(first), unit(second)
    everyone = torch.cat([gather_over_workers(first, runtime), gather_over_workers(second, runtime)])
    own = torch.arange(count, device=first.device) + rank * count
    total = count * workers
    itself, positive = torch.cat([own, own + total]), torch.cat([own + total, own])
    logits = torch.cat([first, second]) @ everyone.T / temperature
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, positive)


def score_with_negatives(anchor: Tensor, copies: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(1 / A) sum over copies a of -log(e^p_a / (e^p_a + sum over negatives of e^(sim / T))), p_a = sim / T.

    Args:
        anchor: unit embeddings (B, D) of the images.
        copies: unit embeddings (A, B, D) of their augmented copies.
        negatives: (A, B, R) sim / T of each copy with the reference images, -inf where one is no negative.
        temperature: T.

    Returns:
        (B,).
    """
    positive = (anchor * copies).sum(2) / temperature
    everything = torch.cat([positive[:, :, None], negatives], 2)
    return (everything.logsumexp(2) - positive).mean(0)


def score_single_pair(anchor: Tensor, copies: Tensor, temperature: float) -> Tensor:
    """The published score, for comparison: no negatives, so that it is 0 up to rounding (float32, |s| < 1e-6).

    Args:
        anchor, copies: as for `score_with_negatives`.
    """
    # As the released script computes it: the anchor's similarity with itself, 1 / T, is subtracted for safety.
    shifted = (anchor * copies).sum(2) / temperature - (anchor * anchor).sum(1) / temperature
    return (shifted.exp().log() - shifted).mean(0)


class SimCLR(PretextModule):
    """Encoder and projection, trained so that two views of an image lie close to each other.

    Attributes:
        references: unit embeddings (R, D) of the images that serve as negatives of the score.
        reference_keys: int64 (R,) their contents, so that an image is no negative of itself.
        score_seed: int64, of the copies' draws.
    """

    references: Tensor
    reference_keys: Tensor
    score_seed: Tensor

    def __init__(self, config: SimCLRConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        self.config = config
        self.encoder = build_encoder(config.encoder, image_shape[0])
        self.register_buffer("references", torch.empty(0, self.encoder.proj_dim))
        self.register_buffer("reference_keys", torch.empty(0, dtype=torch.int64))
        self.register_buffer("score_seed", torch.zeros((), dtype=torch.int64))

    def stages(self, context: Context) -> list[Stage]:
        return [SimCLRStage(self, context)]

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> unit embeddings (B, D)."""
        return unit(self.encoder(self.normalise(x)))

    def sample_features(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def sample_losses(self, x: Tensor) -> Tensor:
        keys = image_keys(x)
        draws = torch.from_numpy(uniform_draws(int(self.score_seed), 0, keys, SCORE_DRAWS, SCORE_STREAM))
        copies = torch.stack([self.embed(copy) for copy in score_copies(x, draws.to(x), self.config.views)])
        anchor, temperature = self.embed(x), self.config.temperature
        if self.config.score == "single_pair":
            return score_single_pair(anchor, copies, temperature)
        itself = torch.from_numpy(keys).to(x.device)[:, None] == self.reference_keys
        # One reference more than is used, so that images among the references have as many negatives as the others.
        spare = torch.zeros_like(itself)
        spare[:, -1] = ~itself.any(1) & (len(self.references) > 1)
        similarity = copies @ self.references.T / temperature
        negatives = similarity.masked_fill(itself | spare, float("-inf"))
        return score_with_negatives(anchor, copies, negatives, temperature)

    @torch.no_grad()
    def choose_references(self, context: Context) -> None:
        """Embed the fixed seeded set of images that serve as negatives."""
        self.eval()
        count = min(self.config.references + 1, len(context.pool))
        chosen = context.generator(SCORE_STREAM).permutation(len(context.pool))[:count]
        blocks = list(context.pool.blocks(chosen))
        self.references = torch.cat([self.embed(block.to(self.device)) for block in blocks])
        keys = [torch.from_numpy(image_keys(block)) for block in blocks]
        self.reference_keys = torch.cat(keys).to(self.device)
        self.score_seed.fill_(context.seed)


class TwoViews(nn.Module):
    """What SimCLR trains: both views of a batch in one pass, so that BatchNorm sees them together."""

    def __init__(self, task: SimCLR) -> None:
        super().__init__()
        self.normalise, self.encoder = task.normalise, task.encoder

    def forward(self, views: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(self.normalise(views))
        return embeddings


class SimCLRStage(Stage):
    """Contrastive training; the references of the score are embedded at its end."""

    draws = 2 * CONTRAST_DRAWS

    def __init__(self, task: SimCLR, context: Context) -> None:
        super().__init__(task.config, {"encoder": TwoViews(task)}, context)
        self.task, self.config = task, task.config

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        views = [contrast_view(batch.images, draws, self.config.views) for draws in batch.draws.chunk(2, 1)]
        first, second = networks["encoder"](torch.cat(views)).chunk(2)
        loss = nt_xent(first, second, self.config.temperature, self.context.runtime)
        yield Update("encoder", loss, {"loss": loss})

    def finish(self) -> None:
        self.task.choose_references(self.context)
