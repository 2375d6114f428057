"""The labelling loop as an experiment (spec initial_pools section 2.1): one step is one cycle.

A cycle takes the labels of the images that were asked for, trains a classifier on all that is labelled, measures it and
asks for the next images. Whatever a cycle draws is a function of the seed and of the state at its start, so a run that
is killed in the middle of a cycle begins it again and asks for the same images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dataeff.active.classifier import Committee, accuracy_of, answers_of, train_member
from dataeff.active.diagnostics import area_under_curve, class_histogram
from dataeff.active.initial import PoolScores, choose_pool
from dataeff.active.oracle import Oracle, listed, with_labels, without_labels
from dataeff.active.pools import check_budget
from dataeff.active.predictor import CommitteePredictor
from dataeff.active.record import plot_asked, write_record
from dataeff.active.request import Situation, choose_next
from dataeff.active.settings import ActiveConfig
from dataeff.active.study import write_study
from dataeff.core.artifact import Artifact, Card, Predictor, save_artifact, versions
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, Preprocess, Splits, open_splits, stratified_subset
from dataeff.data.spec import parse_spec
from dataeff.data.subsets import IntArray
from dataeff.metrics.cost import count_macs, parameters
from dataeff.supervised import mix


class ActiveExperiment(Experiment):
    """Pool-based active learning.

    The pool U is the training split of the data; V is cut off it before anything else, by the seed, and so is the same
    for all pools and queries of a seed. Indices are positions in the training split throughout. Labels come from the
    oracle alone.

    Attributes:
        batches: images labelled in each cycle so far, int64 arrays.
        pending: images asked for and not labelled yet.
        records: what each cycle measured: plain numbers and lists.

    Raises:
        ValueError: no validation images, a budget larger than the pool, splits that overlap; and, while stepping,
            `LabelsNeeded` for images that people have not labelled yet.
    """

    method: ClassVar[str] = "active"
    config_schema: ClassVar[type[ExperimentConfig]] = ActiveConfig
    config: ActiveConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, ActiveConfig)
        self.config = config
        self.splits = open_splits(with_seed(data, config.seed))
        if not len(self.splits.val):
            raise ValueError(f"{data}: no validation images; leave val=0 out, or give more images")
        check_budget(config.budget, len(self.splits.train))
        self._names = check_disjoint(self.splits)
        self.test = _limited(self.splits.test, config.test_images)
        self.oracle = Oracle(self.splits.train.labels)
        self.pool = without_labels(self.splits.train)
        self.preprocess = Preprocess.fit(self.pool)
        self.num_classes = len(self.splits.classes)
        self.committee = self._fresh_committee(0)
        self.batches: list[IntArray] = []
        self.pending: IntArray | None = None
        self.records: list[dict[str, Any]] = []
        self.pool_scores: PoolScores | None = None
        self.stopped = False

    def _fresh_committee(self, cycle: int) -> Committee:
        config, channels = self.config, self.splits.image_shape[0]
        seed = mix(config.seed, cycle)
        return Committee.fresh(
            config.members, config.classifier.encoder, config.dropout_p, self.num_classes, channels, seed
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.steps_done if self.stopped else self.config.cycles + 1

    @property
    def labelled(self) -> IntArray:
        """Indices of all labelled images, in the order they were labelled."""
        return np.concatenate(self.batches) if self.batches else np.empty(0, np.int64)

    @property
    def unlabelled(self) -> IntArray:
        """Indices of the images that nobody has labelled, ascending."""
        return np.setdiff1d(np.arange(len(self.pool)), self.labelled)

    def train_step(self, step: int) -> Mapping[str, float]:
        if self.pending is None:
            self.pending = self._agreed(self._choose_pool())
        self.oracle.label(self.pending)
        self.batches.append(self.pending)
        val_accuracy = self._train(step)
        self._check_invariants()
        metrics = self._measure(step, val_accuracy)
        self.stopped = (
            step == self.config.cycles
            or not len(self.unlabelled)
            or (self.config.target_accuracy is not None and val_accuracy >= self.config.target_accuracy)
        )
        self.pending = None if self.stopped else self._agreed(self._choose_next(step))
        return metrics

    def _choose_pool(self) -> IntArray:
        chosen, self.pool_scores = choose_pool(
            self.config, self.pool, self.num_classes, self.splits.fingerprint, self.runtime
        )
        return chosen

    def _choose_next(self, cycle: int) -> IntArray:
        now = Situation(cycle, self.committee, self.pool, self.labelled, self.unlabelled, self.preprocess, self.runtime)
        return choose_next(self.config, now)

    def _agreed(self, indices: IntArray) -> IntArray:
        """The main worker's choice, on every worker."""
        shared = torch.from_numpy(indices).to(self.runtime.device)
        return self.runtime.all_reduce(shared if self.runtime.is_main else torch.zeros_like(shared)).cpu().numpy()

    def _train(self, cycle: int) -> float:
        """Train on all that is labelled; mean validation accuracy of the members."""
        if self.config.reinit_each_cycle or cycle == 0:
            self.committee = self._fresh_committee(cycle)
        indices = self.labelled
        source = with_labels(self.pool, indices, self.oracle.known(indices))
        seed = mix(self.seed, cycle)
        accuracies = [
            train_member(
                member,
                self.config.classifier,
                source,
                self.splits.val,
                self.preprocess,
                self.runtime,
                seed if number == 0 else mix(seed, number),
            )
            for number, member in enumerate(self.committee)
        ]
        return float(np.mean(accuracies))

    def _check_invariants(self) -> None:
        """Section 2.1: L is unique, disjoint from V, as large as the budgets say, and all that the oracle told.

        Raises:
            AssertionError: one of them is broken.
        """
        labelled = self.labelled
        unique, counts = np.unique(labelled, return_counts=True)
        if counts.max() > 1:
            raise AssertionError(f"labelled twice: {listed(unique[counts > 1])}")
        wanted = min(self.config.budget + (len(self.batches) - 1) * self.config.k, len(self.pool))
        if len(labelled) != wanted:
            raise AssertionError(f"{len(labelled)} labelled images after {len(self.batches)} cycles, not {wanted}")
        if len(labelled) != self.oracle.n_calls or not self.oracle.told[labelled].all():
            raise AssertionError(f"the oracle told {self.oracle.n_calls} labels for {len(labelled)} labelled images")
        shared = [index for index in labelled.tolist() if self.pool.describe(index) in self._names]
        if shared:
            raise AssertionError(f"labelled images of the validation split: {shared}")

    def _measure(self, cycle: int, val_accuracy: float) -> dict[str, float]:
        """Metrics of the cycle; a record of them is kept."""
        answers = answers_of(self.committee, self.test, self.preprocess, self.runtime)
        right = answers.probabilities.argmax(axis=2) == self.test.labels
        per_class = [
            float(right[:, self.test.labels == label].mean()) if (self.test.labels == label).any() else float("nan")
            for label in range(self.num_classes)
        ]
        labels = self.oracle.known(self.labelled)
        histogram = class_histogram(np.arange(len(labels)), labels, self.num_classes)
        record = {
            "cycle": cycle,
            "n_labelled": len(labels),
            "val_accuracy": val_accuracy,
            "test_accuracy": float(right.mean()),
            "class_accuracy": per_class,
            "class_counts": histogram.counts.tolist(),
        }
        self.records.append(record)
        metrics = {
            "val_accuracy": val_accuracy,
            "test_accuracy": record["test_accuracy"],
            "n_labelled": float(len(labels)),
            "labelled_share": len(labels) / len(self.pool),
            "class_variation": histogram.variation,
            "missing_classes": float(len(histogram.missing)),
            **{f"{name}_area": self._area(f"{name}_accuracy") for name in ("val", "test")},
        }
        if len(self.committee) > 1:
            averaged = answers.mean.argmax(axis=1) == self.test.labels
            metrics["test_accuracy_averaged"] = float(averaged.mean())
        return metrics

    def _area(self, name: str) -> float:
        """Area under a curve so far, in the curve's unit."""
        counts, values = (np.array([record[key] for record in self.records]) for key in ("n_labelled", name))
        return float(area_under_curve(counts, values))

    # --- results ----------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy of the committee's mean prediction and multiply-adds; of split "train" on what is labelled."""
        indices = self.labelled
        sources: dict[str, ImageSource] = {
            "train": with_labels(self.pool, indices, self.oracle.known(indices)),
            "val": self.splits.val,
            "test": self.test,
        }
        accuracy = accuracy_of(self.committee, sources[split], self.preprocess, self.runtime)
        return {"accuracy": accuracy, "macs": self._macs()}

    def _macs(self) -> float:
        channels = self.splits.image_shape[0]
        return count_macs(self.committee, (channels, *self.preprocess.size)).conv

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "network": self._signature(),
            "batches": [torch.from_numpy(batch) for batch in self.batches],
            "pending": None if self.pending is None else torch.from_numpy(self.pending),
            "records": self.records,
            "stopped": self.stopped,
            "oracle": self.oracle.state_dict(),
            "pool_scores": None if self.pool_scores is None else self.pool_scores.state_dict(),
            "committee": self.committee.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["network"] != self._signature():
            raise ValueError(f"the checkpoint is of another run: {state['network']}, this is {self._signature()}")
        super().load_state_dict(state)
        self.batches = [batch.numpy() for batch in state["batches"]]
        self.pending = None if state["pending"] is None else state["pending"].numpy()
        self.records = [dict(record) for record in state["records"]]
        self.stopped = bool(state["stopped"])
        self.oracle.load_state_dict(state["oracle"])
        self.pool_scores = None if state["pool_scores"] is None else PoolScores.from_state(state["pool_scores"])
        self.committee.load_state_dict(state["committee"])
        self.runtime.place(self.committee)

    def _signature(self) -> str:
        """What a checkpoint must agree with."""
        encoder = self.config.classifier.encoder
        shape = "x".join(map(str, self.splits.image_shape))
        return (
            f"pool {self.config.pool} of {len(self.pool)} images, query {self.config.query}, {len(self.committee)} "
            f"{encoder.kind} of width {encoder.width}, {self.num_classes} classes, input {shape}"
        )

    def export(self, directory: str | Path) -> None:
        """Evaluate the last classifier on the test split (on all ranks) and write it (on the main rank)."""
        self.runtime.place(self.committee)
        metrics = self.evaluate("test")
        if not self.runtime.is_main:
            return
        card = Card(
            method=self.method,
            classes=list(self.splits.classes),
            input_shape=(self.splits.image_shape[0], *self.preprocess.size),
            preprocess=self.preprocess.to_dict(),
            metrics={"test_accuracy": metrics["accuracy"], "test_macs": metrics["macs"]},
            cost={"macs": metrics["macs"], "full_macs": metrics["macs"], "params": parameters(self.committee)},
            data={"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            versions=versions(),
        )
        save_artifact(directory, card, self.config, self.committee.state_dict())

    def plots(self, directory: str | Path) -> None:
        """`active.json` (indices and measurements of every cycle) and pictures of the images that were asked for."""
        write_record(Path(directory) / "active.json", len(self.pool), self.batches, self.records, self.splits.classes)
        plot_asked(Path(directory) / "asked.png", self.splits, self.batches)

    @classmethod
    def compare(cls, runs: Sequence[Path], directory: Path) -> None:
        """See `write_study`."""
        write_study(runs, directory)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(ActiveConfig, artifact.config, "artifact config.yaml")
        card = artifact.card
        committee = Committee.fresh(
            config.members, config.classifier.encoder, config.dropout_p, len(card.classes), card.input_shape[0], 0
        )
        committee.load_state_dict(artifact.state)
        return CommitteePredictor(card, device, committee)


def with_seed(data: str, seed: int) -> str:
    """`data` with its cuts drawn by `seed`, unless it names a seed itself."""
    if "seed" in parse_spec(data).given:
        return data
    return f"{data}{'&' if '?' in data else '?'}seed={seed}"


def check_disjoint(splits: Splits) -> frozenset[str]:
    """The names of the validation images, none of which is in the pool.

    Raises:
        ValueError: an image of the pool is in the validation or the test split, too.
    """
    sources = {name: getattr(splits, name) for name in ("train", "val", "test")}
    names = {name: {source.describe(i) for i in range(len(source))} for name, source in sources.items()}
    for other in ("val", "test"):
        shared = sorted(names["train"] & names[other])
        if shared:
            raise ValueError(f"{len(shared)} images are in the pool and in the {other} split, such as {shared[0]}")
    return frozenset(names["val"])


def _limited(source: ImageSource, count: int | None) -> ImageSource:
    """`count` images with every class's share, the same for all seeds."""
    if count is None or count >= len(source):
        return source
    return source.subset(stratified_subset(source.labels, count, 0))
