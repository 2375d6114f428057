"""Random cells and the random-cell ensemble: equal cost, separate training, a combiner alone, attacks end to end."""

from typing import Any

import numpy as np
import pytest
import torch

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Preprocess, TrainStream, open_splits
from dataeff.nas.experiment_robustness import RobustnessConfig, RobustnessExperiment, genotypes
from dataeff.nas.genotype import GENOTYPES, PRIMITIVES
from dataeff.nas.network import CellNetwork
from dataeff.nas.random_cells import RandomCellEnsemble, check_split, member_iterations, random_cells

TINY: dict[str, Any] = {
    "network": "ensemble", "cells": 6, "channels": 4, "ensemble": {"cells": [3, 2, 1], "hidden": 16},
    "aux_weight": 0.4, "drop_path": 0.2, "cutout": 2, "augment": "shift", "report_every": 3,
    "stage": {"iterations": 12, "batch": 32, "lr": 0.05},
    "images": 8, "chunk": 8, "budget": {"steps": 2, "alpha": 0.02, "restarts": 1}, "attacks": ["pgd"],
}  # fmt: skip


def make(data: str = "digits?labels=256", **changes: Any) -> RobustnessExperiment:
    return RobustnessExperiment(parse_config(RobustnessConfig, merge(TINY, changes)), data, Runtime("cpu"))


def ensemble_of(experiment: RobustnessExperiment) -> RandomCellEnsemble:
    assert isinstance(experiment.model, RandomCellEnsemble)
    return experiment.model


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """First parts of the names of what differs: members.0, combiner.1, ..."""
    return {
        ".".join(name.split(".")[: 2 if name.startswith("members") else 1])
        for name, value in model.state_dict().items()
        if not torch.equal(before[name], value)
    }


def test_a_random_cell_takes_two_different_predecessors_and_every_operation_but_none() -> None:
    drawn = [random_cells(seed) for seed in range(60)]
    operations, nodes = set(), []
    for genotype in drawn:
        for cell in (genotype.normal, genotype.reduce):
            operations |= {name for name, _ in cell}
            nodes += [(cell[2 * n][1], cell[2 * n + 1][1]) for n in range(4)]
    assert operations == set(PRIMITIVES) - {"none"}
    assert all(first != second for first, second in nodes)
    assert len({genotype.model_dump_json() for genotype in drawn}) == 60


def test_members_have_cells_of_their_own_and_repeats_others() -> None:
    config = parse_config(RobustnessConfig, TINY)
    again = parse_config(RobustnessConfig, merge(TINY, {"seed": 1}))
    found = [genotype.model_dump_json() for genotype in genotypes(config) + genotypes(again)]
    assert len(set(found)) == 6
    assert genotypes(config) == genotypes(config)
    assert random_cells(3).model_dump_json() not in [random_cells(3, member).model_dump_json() for member in range(3)]


def test_reductions_stand_at_one_and_two_thirds_and_a_single_cell_halves_once() -> None:
    def side_behind(cells: int) -> list[int]:
        network = CellNetwork(GENOTYPES["darts_v2"], 4, 10, cells, 1, side=16)
        sides: list[int] = []
        for cell in network.cells:
            cell.register_forward_hook(lambda _module, _inputs, out: sides.append(out.shape[2]))
        network(torch.zeros(2, 1, 16, 16))
        return sides

    assert side_behind(1) == [8]
    assert side_behind(2) == [8, 4]
    assert side_behind(3) == [16, 8, 4]


@pytest.mark.parametrize(("total", "cells"), [(600, (12, 6, 2)), (100, (3, 2, 1)), (7, (5, 2, 1))])
def test_epochs_are_shared_out_by_cells_and_cost_together_what_one_network_costs(total: int, cells: Any) -> None:
    shares = member_iterations(total, cells)
    assert sum(shares) == total
    assert all(abs(n - total * c / sum(cells)) < 1 for n, c in zip(shares, cells, strict=True))
    if total == 600:
        assert shares == [360, 180, 60]


@pytest.mark.parametrize("cells", [[3, 2, 2], [3, 2], [6, 0]])
def test_members_that_are_not_together_as_deep_as_the_target_are_refused(cells: list[int]) -> None:
    with pytest.raises(ValueError, match="cells = 6"):
        check_split(cells, 6)
    with pytest.raises(ValueError, match=r"ensemble.cells = .* all together cells = 6"):
        parse_config(RobustnessConfig, merge(TINY, {"ensemble": {"cells": cells}}))


def test_both_arms_have_equally_many_cells() -> None:
    ensemble, single = make(), make(network="random")
    assert isinstance(single.model, CellNetwork)
    assert sum(len(member.cells) for member in ensemble.members) == len(single.model.cells) == 6


def test_each_stage_trains_one_member_and_the_last_the_combiner_alone() -> None:
    experiment = make()
    model = ensemble_of(experiment)
    stages = experiment.stages
    assert [stage.iterations for stage in stages] == [6, 4, 2, 2 * (256 // 32)]  # the combiner: 2 epochs
    assert stages[-1].lr == 0.025 and stages[-1].momentum == 0.9
    moved: dict[float, set[str]] = {}
    for _ in range(experiment.training_steps):
        before = copied(model)
        stage = experiment.step()["stage"]
        moved[stage] = moved.get(stage, set()) | changed(before, model)
    assert moved == {1: {"members.0"}, 2: {"members.1"}, 3: {"members.2"}, 4: {"combiner"}}


def test_the_combiner_is_two_linear_layers_with_batch_norm_and_a_last_linear_layer() -> None:
    combiner = ensemble_of(make()).combiner
    names = [type(layer).__name__ for layer in combiner]
    assert names == ["Linear", "BatchNorm1d", "Linear", "BatchNorm1d", "Linear"]
    assert [layer.in_features for layer in combiner if isinstance(layer, torch.nn.Linear)] == [30, 16, 16]


def test_the_gradient_of_the_ensembles_loss_reaches_the_image_through_every_member() -> None:
    model = ensemble_of(make()).eval()
    x = torch.rand(4, 1, 8, 8)
    for alone in range(3):
        hooks = [
            member.register_forward_hook(lambda _module, _inputs, out: out.detach())
            for number, member in enumerate(model.members)
            if number != alone
        ]
        image = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model(image), torch.arange(4)).backward()
        for hook in hooks:
            hook.remove()
        assert image.grad is not None and bool(image.grad.abs().flatten(1).sum(1).gt(0).all())


def test_attacks_meet_the_whole_ensemble_whose_members_stay_frozen() -> None:
    experiment = make()
    while experiment.steps_done < experiment.training_steps:
        experiment.step()
    before = copied(experiment.model)
    row = [experiment.step() for _ in range(experiment.total_steps - experiment.steps_done)][-1]
    assert changed(before, experiment.model) == set()
    assert 0 <= row["pgd"] <= row["clean"] <= 100
    assert row["params"] == sum(parameter.numel() for parameter in experiment.model.parameters())


def test_an_incomplete_last_batch_never_reaches_the_combiners_batch_norm() -> None:
    splits = open_splits("digits?labels=33")  # 33 images: a last batch of one
    stream = TrainStream(splits.train, Preprocess.fit(splits.train), Augment("none"), 32, seed=0)
    assert {len(next(stream).images) for _ in range(4)} == {32}
    experiment = make("digits?labels=33", stage={"iterations": 3})
    rows = [experiment.step() for _ in range(experiment.training_steps)]
    assert all(np.isfinite(row["train_loss"]) for row in rows)


class ManyWorkers(Runtime):
    """Says that there are sixteen workers."""

    @property
    def world_size(self) -> int:
        return 16


def test_a_batch_of_one_image_for_each_worker_is_refused() -> None:
    config = parse_config(RobustnessConfig, merge(TINY, {"stage": {"batch": 16}}))
    with pytest.raises(ValueError, match=r"stage.batch = 16.*at least 2 images on each of 16 workers"):
        RobustnessExperiment(config, "digits?labels=256", ManyWorkers("cpu"))


def test_twelve_six_and_two_cells_are_of_the_published_size() -> None:
    sizes = []
    for seed in range(12):
        config = RobustnessConfig(seed=seed, network="ensemble")
        with torch.device("meta"):
            networks = [
                CellNetwork(genotype, 36, 10, cells)
                for genotype, cells in zip(genotypes(config), (12, 6, 2), strict=True)
            ]
        sizes.append(sum(p.numel() for network in networks for p in network.parameters()) / 1e6)
    assert np.mean(sizes) == pytest.approx(2.74, abs=0.3)
    assert np.std(sizes, ddof=1) == pytest.approx(0.25, abs=0.2)
