"""How robust a network of the zoo is when it is trained normally, as the method `robustness`: training, then attacks.

Source: spec nas_adversarial_robustness sections 2.5, 2.6, 3 and 5. No adversarial example is ever trained on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import WEIGHTS, Artifact, Predictor, read_artifact, save_artifact
from dataeff.core.config import Config, ExperimentConfig, parse_config
from dataeff.core.run import replace_text
from dataeff.core.runtime import Runtime
from dataeff.data import Batch, ImageSource, Preprocess
from dataeff.metrics.cost import count_macs
from dataeff.nas import figures_robustness
from dataeff.nas.attackable import AttackableNetwork
from dataeff.nas.attacks import eps_sweep
from dataeff.nas.experiment_train import EvaluationConfig, EvaluationExperiment, NasTrainConfig, trained_network
from dataeff.nas.genotype import Genotype, named_genotype
from dataeff.nas.inference import cell_predictor
from dataeff.nas.network import CellNetwork
from dataeff.nas.random_cells import (
    EnsembleSettings,
    RandomCellEnsemble,
    check_split,
    member_iterations,
    random_cells,
)
from dataeff.nas.robustness import (
    NormalizedModel,
    RobustnessEvaluator,
    RobustnessReport,
    masking_flags,
    masking_probes,
)
from dataeff.nas.threat import AttackConfig, AttackName, Space
from dataeff.nas.zoo import entry
from dataeff.supervised import Answers, StageConfig

REPORT = "report.json"


class Budget(Config):
    """What every attack may do; defaults: spec section 4."""

    eps: float = Field(8 / 255, ge=0, description="largest change of a value, in units of `space`")
    alpha: float = Field(2 / 255, gt=0, description="step of pgd and bim")
    ffgsm_alpha: float = Field(10 / 255, gt=0, description="step of ffgsm")
    steps: int = Field(10, ge=1, le=100_000, description="iterations of pgd, bim and apgd")
    restarts: int = Field(10, ge=1, le=10_000, description="random starts of apgd")
    space: Space = Field("pixel", description="pixel, or model_input: eps in normalised units, as the source's code")

    def attack(self, name: AttackName, seed: int) -> AttackConfig:
        """The attack `name` with this budget."""
        restarts = self.restarts if name == "apgd" else 1
        return AttackConfig(**{**self.model_dump(), "name": name, "restarts": restarts, "seed": seed})


class RobustnessConfig(EvaluationConfig):
    """Settings of `robustness`: which network, how it is trained (as `nas_train` does), how it is attacked."""

    network: str = Field("resnet18", description="name in the zoo, such as vgg16_bn, darts, random or ensemble")
    width: float = Field(1.0, gt=0, le=8, description="factor of channels, of networks that are not made of cells")
    depth: float = Field(1.0, gt=0, le=8, description="factor of repeats, of networks that are not made of cells")
    ensemble: EnsembleSettings = EnsembleSettings()
    trained: str | None = Field(
        None, description="artifact of robustness, nas_train or nas_search that is attacked as it is, without training"
    )
    attacks: tuple[AttackName, ...] = Field(("fgsm", "ffgsm", "pgd", "apgd"), min_length=1)
    budget: Budget = Budget()
    sweep_eps: tuple[float, ...] = Field((), description="pgd at these budgets too, in 255ths, such as 0.5, 1, 2, 4, 8")
    masking: bool = Field(False, description="look for signs of a hidden gradient, by noise and by stronger pgd")
    surrogate: str | None = Field(None, description="artifact whose gradients the attacks follow: a transfer attack")
    topk: int = Field(1, ge=1, description="k of all accuracies: 5 for ImageNet")
    images: int | None = Field(None, ge=1, description="test images that are attacked, evenly spaced; none: all")
    chunk: int = Field(100, ge=1, description="images in a step of the attacks")

    @field_validator("network")
    @classmethod
    def _known(cls, value: str) -> str:
        entry(value)
        return value

    @field_validator("trained", "surrogate")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).absolute())

    @model_validator(mode="after")
    def _consistent(self) -> "RobustnessConfig":
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks = {list(self.attacks)}: each can be named once")
        if self.masking and self.budget.eps == 0:
            raise ValueError("masking compares stronger attacks with pgd: budget.eps must be above 0")
        if self.trained is None:
            self._check_training()
        self.attack_list()  # the attacks' own checks
        return self

    def _check_training(self) -> None:
        found = entry(self.network)
        if found.arm:
            raise ValueError(
                f"network {self.network} has no published definition here: search one with nas_search arm={found.arm} "
                "and give its artifact as trained"
            )
        if not self.stage.iterations:
            raise ValueError("stage.iterations must be at least 1: there is nothing to train; or give trained")
        if self.network == "ensemble":
            check_split(self.ensemble.cells, self.cells)

    def attack_list(self) -> dict[str, AttackConfig]:
        """Every attack by its name in the report."""
        named: dict[str, AttackConfig] = {name: self.budget.attack(name, self.seed) for name in self.attacks}
        pgd = self.budget.attack("pgd", self.seed)
        if self.masking:
            named = {**named, **masking_probes(pgd)}
        if self.sweep_eps:
            named |= eps_sweep([pgd], [eps / 255 for eps in self.sweep_eps])
        return named


def genotypes(config: RobustnessConfig) -> list[Genotype]:
    """The cells of a network that is made of cells, one pair for each member of an ensemble."""
    if config.network == "ensemble":
        return [random_cells(config.seed, member) for member in range(len(config.ensemble.cells))]
    if config.network == "random":
        return [random_cells(config.seed)]
    name = entry(config.network).genotype
    return [] if name is None else [named_genotype(name)]


def make_network(
    config: RobustnessConfig, num_classes: int, shape: tuple[int, int, int], auxiliary: bool = False
) -> nn.Module:
    """The network that a config names.

    Args:
        shape: of an image, (channels, height, width).
        auxiliary: cells get their auxiliary tower.
    """
    channels, side = shape[0], min(shape[1:])
    build = entry(config.network).build
    if build is not None:
        return build(num_classes, channels, config.stem, config.width, config.depth)
    depths = config.ensemble.cells if config.network == "ensemble" else (config.cells,)
    networks = [
        CellNetwork(genotype, config.channels, num_classes, cells, channels, config.stem, auxiliary, side)
        for genotype, cells in zip(genotypes(config), depths, strict=True)
    ]
    if config.network == "ensemble":
        return RandomCellEnsemble(networks, num_classes, config.ensemble.hidden)
    return networks[0]


def rebuild(artifact: Artifact) -> tuple[nn.Module, RobustnessConfig | NasTrainConfig]:
    """The network of an artifact in evaluation mode, differentiable, and its config.

    Raises:
        ValueError: an artifact of another method.
    """
    if artifact.card.method == "nas_train":
        return trained_network(artifact)
    if artifact.card.method != "robustness":
        raise ValueError(
            f"an artifact of {artifact.card.method} has no network to attack; give one of robustness, nas_train or "
            "nas_search"
        )
    config = parse_config(RobustnessConfig, artifact.config, "artifact config.yaml")
    model = make_network(config, len(artifact.card.classes), artifact.card.input_shape)
    model.load_state_dict(artifact.state)
    return model.eval(), config


class RobustnessExperiment(EvaluationExperiment):
    """Trains one network, each member of an ensemble and its combiner in a stage of its own, and then attacks it.

    A step is `report_every` mini-batches of training, then a chunk of images under one attack. Attack by attack, rows
    hold the accuracies that are complete, percent. All workers compute the same attacks: networks are what runs in
    parallel.
    """

    method: ClassVar[str] = "robustness"
    config_schema: ClassVar[type[ExperimentConfig]] = RobustnessConfig
    config: RobustnessConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        assert isinstance(config, RobustnessConfig)
        self.artifact = None if config.trained is None else read_artifact(config.trained)
        super().__init__(config, data, runtime)
        if self.artifact is not None and list(self.artifact.card.classes) != list(self.splits.classes):
            raise ValueError(
                f"trained {config.trained}: its classes are {self.artifact.card.classes}, those of {data} are "
                f"{list(self.splits.classes)}"
            )
        if config.topk > self.num_classes:
            raise ValueError(f"topk = {config.topk}: {data} has {self.num_classes} classes")
        self.evaluator: RobustnessEvaluator | None = None

    # --- the network and its training -----------------------------------------------------------------------------

    def fit_preprocess(self) -> Preprocess:
        if self.artifact is None:
            return super().fit_preprocess()
        return Preprocess.from_dict(self.artifact.card.preprocess)

    def build_model(self) -> nn.Module:
        shape = (self.in_channels, self.height, self.width)
        if self.artifact is None:
            model = make_network(self.config, self.num_classes, shape, self.config.aux_weight > 0)
        else:
            model, found = rebuild(self.artifact)
            if isinstance(found, RobustnessConfig):
                self.config = self.config.model_copy(update={"network": found.network})
        self.macs = count_macs(model.eval(), shape).total
        return model

    @property
    def members(self) -> list[CellNetwork]:
        """Of an ensemble."""
        return list(self.model.members) if isinstance(self.model, RandomCellEnsemble) else []  # type: ignore[arg-type]

    def stage_settings(self) -> Sequence[StageConfig]:
        if self.artifact is not None:
            return []
        if not self.members:
            return [self.config.stage]
        stage, ensemble = self.config.stage, self.config.ensemble
        if stage.batch < 2 * self.runtime.world_size:
            raise ValueError(
                f"stage.batch = {stage.batch}: the combiner's batch norm needs at least 2 images on each of "
                f"{self.runtime.world_size} workers"
            )
        epoch = max(1, len(self.splits.train) // stage.batch)
        combiner = {"iterations": ensemble.epochs * epoch, "lr": ensemble.lr, "warmup_iterations": 0}
        shares = member_iterations(stage.iterations, ensemble.cells)
        return [*(stage.model_copy(update={"iterations": n}) for n in shares), stage.model_copy(update=combiner)]

    def learning(self, stage: int) -> nn.Module:
        """The part of the network that a stage trains."""
        members = self.members
        if not members:
            return self.model
        assert isinstance(self.model, RandomCellEnsemble)
        return members[stage] if stage < len(members) else self.model.combiner

    def prepare_stage(self, stage: int) -> None:
        self.model.requires_grad_(False)
        self.learning(stage).requires_grad_(True)

    def train_mode(self, stage: int) -> None:
        self.network.eval()
        self.learning(stage).train()

    def drop_sites(self, stage: int) -> tuple[int, int] | None:
        part = self.learning(stage)
        return part.drop_sites if isinstance(part, CellNetwork) else None

    def both_logits(self, images: Tensor, keep: Tensor | None, stage: int) -> tuple[Tensor, Tensor | None]:
        if self.members:
            member = stage if stage < len(self.members) else None
            logits, auxiliary = self.network(images, keep, both=True, member=member)
            return logits, auxiliary
        if isinstance(self.model, CellNetwork):
            return super().both_logits(images, keep, stage)
        return self.network(images), None

    def answer(self, batch: Batch) -> Answers:
        """Of the member in training, while there is one."""
        if 0 <= self.optimizer_stage < len(self.members):
            return self.answers(self.members[self.optimizer_stage](batch.images))
        return super().answer(batch)

    def signature(self) -> str:
        config = self.config
        if self.artifact is not None:
            return f"artifact with weights {self.artifact.card.files[WEIGHTS]}, {self.input_signature()}"
        cells = " ".join(genotype.model_dump_json() for genotype in genotypes(config))
        size = f"{config.cells} cells, C {config.channels}" if cells else f"width {config.width}, depth {config.depth}"
        where = f", {config.ensemble}" if config.network == "ensemble" else ""
        return f"{config.network}{where} {cells}, {size}, {config.stem} stem, {self.input_signature()}"

    def served_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())  # an ensemble's members are frozen

    # --- the attacks ----------------------------------------------------------------------------------------------

    @property
    def training_steps(self) -> int:
        return super().total_steps

    @property
    def total_steps(self) -> int:
        items = 1 + len(self.config.attack_list()) + (self.config.budget.space == "model_input")
        return self.training_steps + items * -(-len(self.attacked_images()) // self.config.chunk)

    def attacked_images(self) -> ImageSource:
        """The test images that are attacked."""
        return self.splits.test.spread(self.config.images)

    def train_step(self, step: int) -> Mapping[str, float]:
        if step < self.training_steps:
            return super().train_step(step)
        if self.evaluator is None:
            self.evaluator = self._make_evaluator()
        self.evaluator.step()
        return self.robust_accuracies()

    def _make_evaluator(self) -> RobustnessEvaluator:
        self.runtime.sync_buffers(self.model)
        preprocess, surrogate = self.preprocess, None
        if self.config.surrogate is not None:
            artifact = read_artifact(self.config.surrogate)
            other = Preprocess.from_dict(artifact.card.preprocess)
            surrogate = NormalizedModel(rebuild(artifact)[0], other.mean, other.std).eval()
        return RobustnessEvaluator(
            NormalizedModel(self.model, preprocess.mean, preprocess.std).eval(),
            self.config.attack_list(),
            self.config.topk,
            images=self.attacked_images(),
            size=preprocess.size,
            batch_size=self.config.chunk,
            device=self.runtime.device,
            surrogate=surrogate,
        )

    def robust_accuracies(self) -> dict[str, float]:
        """Percent, of every attack that is complete; with HRS at the end."""
        assert self.evaluator is not None
        count = len(self.evaluator.images)
        complete = {
            name: 100 * tally.right / count for name, tally in self.evaluator.tallies.items() if tally.seen == count
        }
        hrs = self.evaluator.report().hrs if self.evaluator.done else None
        return {**complete, **({} if hrs is None else {"hrs": hrs}), "params": float(self.served_parameters())}

    def evaluate(self, split: str) -> dict[str, float]:
        """As ever; on the test split with what the attacks have found."""
        metrics = super().evaluate(split)
        return metrics | self.robust_accuracies() if split == "test" and self.evaluator is not None else metrics

    def report(self) -> RobustnessReport:
        """
        Raises:
            RuntimeError: the attacks are not done.
        """
        if self.evaluator is None:
            raise RuntimeError("the attacks have not begun; take all steps first")
        return self.evaluator.report()

    # --- state and results ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "evaluation": None if self.evaluator is None else self.evaluator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["evaluation"] is not None:
            self.evaluator = self._make_evaluator()
            self.evaluator.load_state_dict(state["evaluation"])

    def export(self, directory: str | Path) -> None:
        """The artifact; one that was given is written again, its card with what was found."""
        super().export(directory)
        if self.artifact is not None and self.runtime.is_main:
            found = read_artifact(directory)
            card = self.artifact.card.model_copy(update={"metrics": found.card.metrics, "cost": found.card.cost})
            save_artifact(directory, card, rebuild(self.artifact)[1], self.artifact.state)

    def plots(self, directory: str | Path) -> None:
        """`report.json`."""
        report = self.report()
        found = {
            "network": self.config.network,
            "group": entry(self.config.network).group,
            "data": self.splits.name,
            "seed": self.seed,
            "report": report.to_dict(),
            "masking": masking_flags(report, self.num_classes) if self.config.masking else None,
            "genotypes": [] if self.artifact else [g.model_dump(mode="json") for g in genotypes(self.config)],
        }
        replace_text(Path(directory) / REPORT, json.dumps(found, indent=2) + "\n")

    @classmethod
    def compare(cls, runs: Sequence[Path], directory: Path) -> None:
        """The study's table and figures."""
        figures_robustness.write_study([run / REPORT for run in runs if (run / REPORT).is_file()], directory)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        return cell_predictor(rebuild(artifact)[0], artifact.card, device)

    @classmethod
    def load_attackable(cls, artifact: Artifact, device: str) -> AttackableNetwork:
        """The network of an artifact of this method, as serving attacks it."""
        model, config = rebuild(artifact)
        assert isinstance(config, RobustnessConfig)
        return AttackableNetwork(artifact.card, model, genotypes(config), device)
