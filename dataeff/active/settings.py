"""What can be set in an active-learning run: initial pool, query, classifier, self-supervised tasks."""

from typing import Literal

from pydantic import Field, model_validator

from dataeff.active.classifier import ClassifierConfig
from dataeff.active.pools import CLUSTER_POOLS, LOSS_POOLS
from dataeff.active.queries import QUERIES
from dataeff.active.vaal import VaalConfig
from dataeff.core.config import Config, ExperimentConfig
from dataeff.pretraining.settings import TaskSettings

Pool = Literal["random", "vae", "simclr", "rotation", "inpainting", "kmeans", "scan", "deepcluster"]
Query = Literal["random", "lc", "me", "mm", "dbal", "coreset", "vaal", "ens_varr", "ens_lc", "ens_me", "ens_mm"]


class DbalConfig(Config):
    """DBAL: passes with dropout."""

    passes: int = Field(25, ge=2, le=1000, description="T_mc; 10 in older code")
    score: Literal["entropy", "bald"] = "entropy"
    dropout_p: float = Field(0.5, ge=0, lt=1, description="after the flatten; no other query has dropout")


class ActiveConfig(TaskSettings, ExperimentConfig):
    """Settings of one active-learning run (spec initial_pools section 9)."""

    pool: Pool = Field("random", description="how the first images are chosen")
    budget: int = Field(60, ge=1, description="B, images in the initial pool")
    allocation: Literal["equal", "proportional"] = Field("equal", description="of cluster pools: images of a cluster")
    n_clusters: int | None = Field(None, ge=2, description="K; None: the classes of the data; 20 for CIFAR-100")
    n_bins: Literal[1, 2, 5, 10] = Field(1, description="of loss pools: 1 takes the highest losses, more bin them")
    query: Query = Field("me", description="how the images of every later cycle are chosen")
    query_budget: int | None = Field(None, ge=1, description="k, images asked for in a cycle; None: as many as B")
    cycles: int = Field(4, ge=0, le=100_000, description="E, cycles after the initial pool")
    target_accuracy: float | None = Field(None, gt=0, le=1, description="on V: stop once it is reached")
    reinit_each_cycle: bool = Field(True, description="false: go on from the weights of the cycle before")
    ensemble_size: int = Field(3, ge=1, le=100, description="T, members of the ens_* queries")
    test_images: int | None = Field(None, ge=1, description="measure on so many test images only; None: on all")
    cache: str | None = Field(
        None, description="folder that keeps finished self-supervised results, shared by runs of the same data and seed"
    )
    kmeans_restarts: int = Field(4, ge=1, le=1000, description="of pool kmeans")
    memory_mb: float = Field(256.0, gt=0, description="bound of what core-set and k-means allocate, MiB")
    dbal: DbalConfig = DbalConfig()
    vaal: VaalConfig = VaalConfig()
    classifier: ClassifierConfig = ClassifierConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "ActiveConfig":
        if self.query == "dbal" and not self.dbal.dropout_p:
            raise ValueError("DBAL needs dropout_p > 0; set dbal.dropout_p, such as 0.5")
        if self.query == "ens_varr" and self.ensemble_size < 2:
            raise ValueError(f"ensemble_size = {self.ensemble_size}: ens_varr counts disagreement and needs at least 2")
        if self.classifier.encoder.dropout_p:
            raise ValueError("classifier.encoder.dropout_p: dropout is for query dbal only; set dbal.dropout_p instead")
        if self.n_bins > 1 and self.pool not in LOSS_POOLS:
            raise ValueError(f"n_bins = {self.n_bins} with pool {self.pool!r}: bins are for {', '.join(LOSS_POOLS)}")
        if self.allocation == "proportional" and self.pool not in CLUSTER_POOLS:
            raise ValueError(f"allocation with pool {self.pool!r}: it is for {', '.join(CLUSTER_POOLS)}")
        return self

    @property
    def k(self) -> int:
        """Images asked for in a cycle."""
        return self.query_budget or self.budget

    @property
    def members(self) -> int:
        """Classifiers trained in a cycle."""
        return self.ensemble_size if "ensemble" in QUERIES[self.query].needs else 1

    @property
    def dropout_p(self) -> float:
        """Of the classifier."""
        return self.dbal.dropout_p if self.query == "dbal" else 0.0
