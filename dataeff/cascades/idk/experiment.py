"""IDK cascades as an Experiment: score the stages, fit the add-ons on held-out images, export one artifact.

Source: spec idk_cascades. The models are never trained; `stages` names finished artifacts, or tables of their answers
(`python -m ray_jobs.score`), which save scoring them again in every run.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from dataeff.cascades.idk import analysis
from dataeff.cascades.idk.artifact import AddOn, CalibrationRecord, CascadeSpec, EmbeddedStage, stage_state
from dataeff.cascades.idk.calibration import warn_of_leakage
from dataeff.cascades.idk.cascade import CascadeReport, Tally, ask, check_tables, correct_matrix, exit_stages
from dataeff.cascades.idk.fit import CurvePoint, FitConfig, FittedCascade, fit_cascade
from dataeff.cascades.idk.predictor import CascadePredictor, load_cascade
from dataeff.cascades.idk.search import Ints
from dataeff.cascades.idk.stages import Source, collect, describe, open_source, score_chunks
from dataeff.cascades.idk.uncertainty import IDKClassifier, entropy
from dataeff.core.artifact import Artifact, Card, save_artifact, versions
from dataeff.core.config import ExperimentConfig
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, open_splits, stratified_split, stratified_subset
from dataeff.data.scores import Scores


class IdkConfig(ExperimentConfig, FitConfig):
    """Settings of a cascade (spec idk_cascades sections 4 and 9)."""

    stages: tuple[str, ...] = Field(
        min_length=1, description="the models, cheapest first: folders of artifacts, or Parquet files of their scores"
    )
    order: str | None = Field(
        None, description="which of `stages` to use, by number: 1-3 for the first, then the third; none: all"
    )
    costs: tuple[float, ...] | None = Field(
        None, description="of `stages`, in one unit; none: multiply-adds from the artifacts"
    )
    human_cost: float | None = Field(
        None, ge=0, description="adds a person behind the last model; cost of an intervention, in the unit of `costs`"
    )
    calibration: Literal["val", "train"] = Field(
        "val", description="which split the add-ons are fitted on; train: only if the models have not seen it"
    )
    calibration_fraction: float = Field(
        0.5, gt=0, le=1, description="of that split; the rest of val is what val_* metrics are measured on"
    )
    calibration_size: int | None = Field(None, ge=1, description="at most so many images (25,600 in the source)")
    compare: bool = Field(False, description="also fit and test the ten other methods (comparison.json, .png)")

    @field_validator("stages")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Path(path).absolute()) for path in value)

    @model_validator(mode="after")
    def _fits(self) -> "IdkConfig":
        parts = self.order.split("-") if self.order else []
        numbers = [int(part) if part.isdecimal() else 0 for part in parts]
        if any(not 1 <= number <= len(self.stages) for number in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"order = {self.order!r} must be different numbers from 1 to {len(self.stages)} (the stages given), "
                "such as 1-2"
            )
        if self.costs is not None:
            if len(self.costs) != len(self.stages):
                raise ValueError(f"costs needs {len(self.stages)} numbers, one a stage, got {len(self.costs)}")
            if not all(cost >= 0 for cost in self.costs):
                raise ValueError(f"costs = {list(self.costs)} must be at least 0")
        return self

    @property
    def chosen(self) -> list[int]:
        """Positions in `stages` of the cascade's models, in order."""
        return [int(part) - 1 for part in self.order.split("-")] if self.order else list(range(len(self.stages)))


class IdkExperiment(Experiment):
    """Fits one cascade in a single step.

    Raises:
        ValueError: stages that do not fit the data or each other, or without a cost.
    """

    config_schema: ClassVar[type[ExperimentConfig]] = IdkConfig
    config: IdkConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, IdkConfig)
        self.config = config
        self.splits = open_splits(data)
        device = str(runtime.device)
        self.sources: list[Source] = [open_source(config.stages[i], self.splits, device) for i in config.chosen]
        self.names = _different([source.name for source in self.sources])
        self.costs = self._costs()
        self.calibration_indices, self.val_indices = self._draw()
        self.fitted: FittedCascade | None = None
        self.record: CalibrationRecord | None = None

    def _costs(self) -> list[float]:
        if self.config.costs is not None:
            return [self.config.costs[number] for number in self.config.chosen]
        unknown = [name for name, source in zip(self.names, self.sources, strict=True) if math.isnan(source.macs)]
        if unknown:
            raise ValueError(f"stage {unknown[0]} has no known cost: give costs=[...], one number a stage in one unit")
        return [source.macs for source in self.sources]

    def _draw(self) -> tuple[Ints, Ints]:
        """Positions of the calibration images in their split, and of the validation images in val."""
        config = self.config
        images = self._images(config.calibration)
        if not len(images):
            raise ValueError(f"{self.data}: no {config.calibration} images to calibrate on; leave val=0 out")
        rest, chosen = stratified_split(images.labels, config.calibration_fraction, self.seed)
        if config.calibration_size is not None and config.calibration_size < len(chosen):
            kept = stratified_subset(images.labels[chosen], config.calibration_size, self.seed)
            chosen = chosen[kept]
        if not len(chosen):
            raise ValueError(f"calibration_fraction = {config.calibration_fraction:g} leaves no calibration image")
        if config.calibration == "train":
            rest = np.arange(len(self.splits.val))
        return chosen, rest if len(rest) else chosen

    def _images(self, split: str) -> ImageSource:
        images: ImageSource = getattr(self.splits, split)
        return images

    @property
    def total_steps(self) -> int:
        return 1

    def train_step(self, step: int) -> Mapping[str, float]:
        config = self.config
        answers = self._collect(config.calibration, self.calibration_indices)
        labels = answers[0].labels
        tables = [torch.from_numpy(part.probabilities) for part in answers]
        self.fitted = fit_cascade(tables, labels, self.costs, config, config.human_cost, self.seed)
        self.record = self._record(tables)
        metrics = {f"calibration_{name}": value for name, value in self._metrics(self.fitted.report).items()}
        report, accuracies = self._measure("val")
        if len(self.splits.val):
            held_out = accuracies if self._val_is_held_out() else self._test_accuracies()
            for name, part, accuracy in zip(self.names, answers, held_out, strict=True):
                right = float((part.probabilities.argmax(1) == labels).mean())
                warn_of_leakage(name, right, len(labels), accuracy)
        return {
            "feasible": float(self.fitted.feasible),
            **metrics,
            **{f"val_{name}": value for name, value in self._metrics(report).items()},
        }

    def _val_is_held_out(self) -> bool:
        return self.config.calibration == "train" or self.val_indices is not self.calibration_indices

    def _test_accuracies(self) -> list[float]:
        """Of the stages' own cards; NaN, which warns of nothing, where a stage has none."""
        cards = [source.artifact.card.metrics if source.artifact else {} for source in self.sources]
        return [card.get("test_accuracy", math.nan) for card in cards]

    def _collect(self, split: str, indices: Ints) -> list[Scores]:
        return collect(self.sources, self._images(split), split, indices, self.runtime)

    def _record(self, tables: list[torch.Tensor]) -> CalibrationRecord:
        fitted = self.fitted
        assert fitted is not None
        scores = [ask(h, table)[1].numpy() for h, table in zip(fitted.idk, tables, strict=False)]
        stage = exit_stages(scores, [h.threshold for h in fitted.idk]) if scores else np.zeros(len(tables[0]), int)
        spread = []
        for number, _ in enumerate(fitted.idk):
            values = entropy(tables[number].double()).numpy()[stage >= number]
            spread.append((float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0))
        return CalibrationRecord(
            split=self.config.calibration,
            images=len(self.calibration_indices),
            indices=hashlib.sha256(self.calibration_indices.tobytes()).hexdigest(),
            goal=fitted.goal,
            feasible=fitted.feasible,
            accuracy=fitted.report.accuracy,
            idk_rates=tuple(fitted.report.idk_overall.tolist()),
            idk_level=tuple(np.nan_to_num(fitted.report.idk_level, nan=-1.0).tolist()),
            entropy_mean=tuple(mean for mean, _ in spread),
            entropy_sd=tuple(sd for _, sd in spread),
        )

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, expected cost (in the unit of `costs`), relative cost to the last model, IDK rate of every add-on
        (of all images), and multiply-adds where they are known. "val" leaves the calibration images out."""
        return self._metrics(self._measure(split)[0])

    def _measure(self, split: str) -> tuple[CascadeReport, list[float]]:
        """The cascade's report, and each model's own accuracy; chunk by chunk, so that any number of images passes."""
        fitted = self.fitted
        assert fitted is not None, "fit the cascade (one step) before it is evaluated"
        images = self._images(split)
        indices = self.val_indices if split == "val" else np.arange(len(images))
        if split == "val" and not len(self.splits.val):
            images, split = self._images(self.config.calibration), self.config.calibration
        models = len(self.sources) + (self.config.human_cost is not None)
        total = np.zeros(2 * models + 2 + len(self.sources))
        for chunk in score_chunks(self.sources, images, split, indices, self.runtime):
            tables = check_tables([torch.from_numpy(part.probabilities) for part in chunk], chunk[0].labels)
            correct = correct_matrix(tables, chunk[0].labels, self.config.human_cost is not None)
            scores = [ask(h, table)[1].numpy() for h, table in zip(fitted.idk, tables, strict=False)]
            stage = exit_stages(scores, [h.threshold for h in fitted.idk]) if scores else np.zeros(len(chunk[0]), int)
            own = correct[: len(self.sources)].sum(1)
            total += np.concatenate([Tally.of(stage, correct).to_array(), own])
        summed = self.runtime.all_reduce(torch.from_numpy(total)).numpy()
        report = Tally.from_array(summed[: 2 * models + 2].astype(np.int64)).report(self._all_costs)
        return report, (summed[2 * models + 2 :] / report.count).tolist()

    @property
    def _all_costs(self) -> list[float]:
        human = self.config.human_cost
        return [*self.costs, *([human] if human is not None else [])]

    def _metrics(self, report: CascadeReport) -> dict[str, float]:
        rates = {f"idk_rate_{number}": float(rate) for number, rate in enumerate(report.idk_overall, 1)}
        agreement = {f"correct_by_{number}": float(share) for number, share in enumerate(report.agreement, 1)}
        metrics = {"accuracy": report.accuracy, "cost": report.average_cost, **rates, **agreement}
        if not math.isnan(report.relative_cost):
            metrics["relative_cost"] = report.relative_cost
        if all(math.isfinite(source.macs) for source in self.sources):
            reached = report.reached[: len(self.sources)] / report.count
            spent = np.dot(reached, [source.macs for source in self.sources])
            metrics["macs"] = float(spent) + self._add_on_macs(reached)
        return metrics

    def _add_on_macs(self, reached: np.ndarray) -> float:
        assert self.fitted is not None
        return sum(h.macs * float(share) for h, share in zip(self.fitted.idk, reached, strict=False))

    # --- state and results ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        fitted = self.fitted
        state = {**super().state_dict(), "stages": [describe(source) for source in self.sources], "fitted": None}
        if fitted is None:
            return state
        assert self.record is not None
        report = {name: _plain(value) for name, value in vars(fitted.report).items()}
        state["fitted"] = {
            "idk": [h.state_dict() for h in fitted.idk],
            "goal": fitted.goal,
            "feasible": fitted.feasible,
            "report": report,
            "curve": [point.model_dump(mode="json") for point in fitted.curve],
            "cost_weight": fitted.cost_weight,
            "record": self.record.model_dump(mode="json"),
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["stages"] != [describe(source) for source in self.sources]:
            raise ValueError(f"the checkpoint is of other stages: {state['stages']}; begin a new run")
        super().load_state_dict(state)
        kept = state["fitted"]
        if kept is not None:
            self.fitted, self.record = _restore(kept, self.config, len(self.splits.classes))

    def export(self, directory: str | Path) -> None:
        """Measure on the test split (on all ranks) and write the artifact (on the main rank)."""
        metrics = self.evaluate("test")
        if not self.runtime.is_main:
            return
        fitted, record = self.fitted, self.record
        assert fitted is not None and record is not None
        artifacts = [source.artifact for source in self.sources]
        card = Card(
            method="idk",
            classes=list(self.splits.classes),
            input_shape=artifacts[0].card.input_shape if artifacts[0] else self.splits.image_shape,
            preprocess=artifacts[0].card.preprocess if artifacts[0] else {},
            metrics={f"test_{name}": value for name, value in metrics.items()},
            cost=self._card_cost(metrics),
            data={"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            versions=versions(),
        )
        spec = CascadeSpec(
            settings=self.config.model_dump(mode="json"),
            stages=tuple(self._embed(number) for number in range(len(self.sources))),
            add_ons=tuple(AddOn(kind=h.kind, feature=h.feature, hidden=self.config.nn_hidden) for h in fitted.idk),
            human_cost=self.config.human_cost,
            costs_are="given" if self.config.costs is not None else "multiply-adds",
            cost_weight=fitted.cost_weight,
            calibration=record,
            curve=tuple(fitted.curve),
        )
        save_artifact(directory, card, spec, stage_state(artifacts, fitted.idk))

    def _card_cost(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Without known multiply-adds, the given costs stand in their place."""
        fulls = [source.full_macs for source in self.sources]
        known = "macs" in metrics and all(map(math.isfinite, fulls))
        params = sum(source.artifact.card.cost.get("params", 0.0) for source in self.sources if source.artifact)
        assert self.fitted is not None
        own = sum(h.macs for h in self.fitted.idk)
        return {
            "macs": metrics["macs"] if known else metrics["cost"],
            "full_macs": sum(fulls) + own if known else sum(self.costs),
            "params": params,
        }

    def _embed(self, number: int) -> EmbeddedStage:
        source = self.sources[number]
        artifact = source.artifact
        return EmbeddedStage(
            name=self.names[number],
            cost=self.costs[number],
            full_macs=source.full_macs if math.isfinite(source.full_macs) else None,
            weights=describe(source).get("weights", ""),
            card=artifact.card.model_dump(mode="json") if artifact else None,
            config=artifact.config if artifact else None,
        )

    def plots(self, directory: str | Path) -> None:
        """The calibration curve with every single model as a point, entropies, agreement; on request the comparison."""
        directory, fitted = Path(directory), self.fitted
        assert fitted is not None
        test = self._collect("test", np.arange(len(self.splits.test)))
        tables = [torch.from_numpy(part.probabilities) for part in test]
        calibration = self._collect(self.config.calibration, self.calibration_indices)
        known = [torch.from_numpy(part.probabilities) for part in calibration]
        labels = test[0].labels
        analysis.plot_curve(fitted, tables, labels, self.names, self.costs, directory / "cascade_curve.png")
        analysis.plot_entropies(self.names, known, tables, directory / "entropies.png")
        if self.config.compare:
            if len(self.sources) != 2:
                warnings.warn("compare: is made for two stages, left out", stacklevel=2)
                return
            found = analysis.compare(known, calibration[0].labels, tables, labels, self.costs, self.config, self.seed)
            (directory / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            analysis.plot_comparison(found, directory / "comparison.png")

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str, networks: Sequence[int] | None = None) -> CascadePredictor:
        return load_cascade(artifact, device, networks)


def _restore(kept: Mapping[str, Any], config: IdkConfig, classes: int) -> tuple[FittedCascade, CalibrationRecord]:
    kind = config.kind if config.kind in ("prob", "entropy") else "cost"
    idk = []
    for state in kept["idk"]:
        h = IDKClassifier(kind, classes, config.feature, config.nn_hidden)  # type: ignore[arg-type]
        h.load_state_dict(state)
        idk.append(h.eval())
    report: dict[str, Any] = {
        name: np.array(value) if isinstance(value, list) else value for name, value in kept["report"].items()
    }
    fitted = FittedCascade(
        idk=idk,
        goal=kept["goal"],
        feasible=kept["feasible"],
        report=CascadeReport(**report),
        curve=[CurvePoint(**point) for point in kept["curve"]],
        cost_weight=kept["cost_weight"],
    )
    return fitted, CalibrationRecord(**kept["record"])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _different(names: list[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [f"{name} {number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]
