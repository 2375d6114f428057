"""AdaSkips' experiment: stages, modes, methods, resuming, artifacts, two workers, and settings that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.dynamic.adaskips.experiment import PRETRAINING, TRANSFER, AdaSkipsConfig, AdaSkipsExperiment
from dataeff.dynamic.adaskips.finetune import BiTuning
from dataeff.dynamic.adaskips.predictor import AdaSkipsPredictor
from tests.experiment_helpers import answers, finish, same
from tests.worker_helpers import on_two_workers

DATA = "digits?size=16&rate=20"
TINY: dict[str, Any] = {
    "network": "small",
    "widths": [4, 4, 8, 8],
    "blocks": [1, 2, 1, 1],
    "source": "letters",
    "augment": "shift",
    "report_every": 2,
    "pretraining": {"iterations": 4, "batch": 32, "lr": 0.05},
    "transfer": {"iterations": 4, "batch": 16, "lr": 0.05},
}
PLAIN = {"skips": "standard", "skip_weights": "ones", "module_bn": False}
METHODS = ["vanilla", "lwf", "bss", "delta", "co_tuning", "stoch_norm", "bi_tuning"]


def make(data: str = DATA, **changes: Any) -> AdaSkipsExperiment:
    return AdaSkipsExperiment(parse_config(AdaSkipsConfig, merge(TINY, changes)), data, Runtime("cpu"))


def state(experiment: AdaSkipsExperiment) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in experiment.model.state_dict().items()}


def moved(experiment: AdaSkipsExperiment, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in experiment.model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skips", [True, False])
def test_every_method_trains_with_and_without_skips_and_resumes_bit_for_bit(method: str, skips: bool) -> None:
    changes: dict[str, Any] = {"finetune_method": method, "mode": "finetune", "bi_tuning_queue": 3}
    if not skips:
        changes |= PLAIN
    undisturbed = make(**changes)
    rows = finish(undisturbed)
    assert all(np.isfinite(row["train_loss"]) for row in rows) and len(rows) == 4
    for step in (1, 2, 3):
        if step != 3 and method != "bi_tuning":
            continue  # stage 1 is the same for all
        interrupted, fresh = make(**changes), make(**changes)
        for _ in range(step):
            interrupted.step()
        fresh.load_state_dict(interrupted.state_dict())
        assert finish(fresh) == rows[step:]
        assert same(fresh.model.state_dict(), undisturbed.model.state_dict())
        assert same(fresh.fine_tune.state_dict(), undisturbed.fine_tune.state_dict())


def test_stage_1_pretrains_the_plain_network_and_leaves_the_new_parts_alone() -> None:
    experiment = make()
    before = state(experiment)
    rows = [experiment.step(), experiment.step()]
    assert "val_source_accuracy" in rows[0] and "val_accuracy" not in rows[0]
    changed = moved(experiment, before)
    assert "student.conv1.weight" in changed and "source_head.weight" in changed
    assert not any(part in name.split(".") for name in changed for part in ("hyper", "module_bn", "fc"))


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_stage_2_trains_the_new_parts_and_the_backbone_only_where_it_is_not_frozen(mode: str) -> None:
    experiment = make(mode=mode)
    experiment.step(), experiment.step()
    before = state(experiment)
    row = experiment.step()
    assert row["stage"] == 2 and "val_accuracy" in row
    changed = moved(experiment, before)
    assert {"student.fc.weight", "student.layer1.module_bn.weight"} <= changed
    assert any("hyper" in name for name in changed)
    assert ("student.conv1.weight" in changed) == ("student.bn1.running_mean" in changed) == (mode == "finetune")
    assert "source_head.weight" not in changed


def test_mode_scratch_trains_everything_in_one_stage() -> None:
    experiment = make(mode="scratch", source=None)
    before = state(experiment)
    assert experiment.total_steps == 2 and experiment.step()["stage"] == 2
    assert {"student.conv1.weight", "student.fc.weight"} <= moved(experiment, before)


def test_the_backbone_learns_at_a_tenth_of_the_rate_but_with_bi_tuning() -> None:
    for method, scale in (("vanilla", 0.1), ("bi_tuning", 1.0)):
        experiment = make(mode="finetune", finetune_method=method)
        experiment.prepare_stage(TRANSFER)
        groups = list(experiment.parameter_groups(TRANSFER))
        assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, scale]
    experiment = make(mode="finetune", backbone_lr=0.3)
    experiment.prepare_stage(TRANSFER)
    assert list(experiment.parameter_groups(TRANSFER))[1]["lr_scale"] == 0.3
    experiment.prepare_stage(PRETRAINING)
    assert all("lr_scale" not in group for group in experiment.parameter_groups(PRETRAINING))


def test_delta_has_no_weight_decay_besides_its_own_terms() -> None:
    experiment = make(mode="finetune", finetune_method="delta")
    experiment.prepare_stage(TRANSFER)
    assert {group["weight_decay"] for group in experiment.parameter_groups(TRANSFER)} == {0.0}


def test_weights_of_a_pretraining_run_give_the_same_transfer_as_both_stages_in_one(tmp_path: Path) -> None:
    whole = make()
    whole.step(), whole.step()
    source = make(transfer={"iterations": 0})
    finish(source)
    source.export(tmp_path / "artifact")
    shared = make(source=None, weights=str(tmp_path / "artifact"), finetune_method="lwf")
    assert shared.total_steps == 2
    for name, value in shared.model.state_dict().items():
        parts = name.split(".")
        if not {"hyper", "module_bn", "fc"} & set(parts):
            assert torch.equal(value, whole.model.state_dict()[name]), name
    finish(shared)


def test_weights_may_be_any_state_dict_file_of_the_network(tmp_path: Path) -> None:
    from dataeff.dynamic.adaskips.hosts import SmallResNet

    host = SmallResNet(TINY["widths"], TINY["blocks"], 7, 1)
    torch.save(host.state_dict(), tmp_path / "host.pth")
    experiment = make(source=None, weights=str(tmp_path / "host.pth"))
    loaded = experiment.model.state_dict()["student.layer1.0.conv1.weight"]
    assert torch.equal(loaded, host.state_dict()["layer1.0.conv1.weight"])
    assert experiment.model.source_head is not None and experiment.model.source_head.out_features == 7
    state = host.state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("fc")}, tmp_path / "body.pth")
    with pytest.raises(ValueError, match="needs the source classifier"):
        make(source=None, weights=str(tmp_path / "body.pth"), finetune_method="co_tuning")


@pytest.mark.parametrize("changes", [{}, {"skip_weights": "random"}, PLAIN, {"sparsity_tau": 0.5}])
def test_the_artifact_answers_as_the_network_was_evaluated(changes: dict[str, Any], tmp_path: Path) -> None:
    experiment = make(**changes)
    finish(experiment)
    draws = changes.get("skip_weights") == "random"  # others for each image in the evaluation
    predictor, images, prediction = answers(experiment, tmp_path / "artifact", as_evaluated=not draws)
    assert isinstance(predictor, AdaSkipsPredictor)
    assert prediction.path.shape == (len(images), len(predictor.path_names))
    if not draws:
        assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"])
    matrices = predictor.skip_matrices(images[:3])
    assert {name: tuple(m.shape) for name, m in matrices.items()}["module 2"] == (3, 2, 2)
    half = torch.full((len(images),), predictor.card.cost["full_macs"] * 0.6, dtype=torch.float64)
    if not changes:
        cheap = predictor.predict(images, half)
        assert (cheap.macs <= half).all() and cheap.macs.mean() < prediction.macs.mean()


def test_mean_skip_weights_of_the_training_images_are_remembered() -> None:
    experiment = make()
    finish(experiment)
    images = experiment.preprocess(experiment.splits.train.images(np.arange(len(experiment.splits.train))))
    with torch.no_grad():
        weights = experiment.model.eval().student.skip_weights(images)
    for stage, values in zip(experiment.model.student.stages, weights, strict=True):
        assert stage.hyper is not None
        torch.testing.assert_close(stage.hyper.mean_weights, values.mean(0), rtol=1e-4, atol=1e-5)


def test_random_weights_belong_to_place_and_image_not_to_the_number_of_workers() -> None:
    experiment = make(skip_weights="random")
    whole = experiment.draws(TRANSFER, 3, 16, 5)
    halves = []
    for rank in (0, 1):
        experiment.runtime = type("Half", (Runtime,), {"rank": property(lambda self, rank=rank: rank)})("cpu")
        halves.append(experiment.draws(TRANSFER, 3, 8, 5))
    assert torch.equal(torch.cat(halves), whole)
    experiment.runtime = Runtime("cpu")
    first = experiment.evaluate("val")
    assert experiment.evaluate("val") == first


def test_the_figures_of_a_run_are_heat_maps_beside_their_numbers(tmp_path: Path) -> None:
    import json

    experiment = make()
    finish(experiment)
    experiment.plots(tmp_path)
    assert (tmp_path / "skip_weights.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert [len(numbers["modules"][str(m)]["mean"]) for m in (1, 2, 3, 4)] == [1, 3, 1, 1]
    assert all(std > 0 for module in numbers["modules"].values() for std in module["std"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "scratch"}, "mode 'scratch' takes no pretrained weights: leave source out"),
        ({"source": None}, "needs one of source, weights or download=true, got none"),
        ({"weights": "x"}, "got source and weights"),
        ({"mode": "scratch", "source": None, "finetune_method": "delta"}, "needs a pretrained network"),
        ({"finetune_method": "stoch_norm"}, "needs norms that learn"),
        ({"modules": [1, 1]}, "different numbers from 1 to 4"),
        ({"blocks": [1, 0, 1, 1]}, "at least one channel and one block"),
        ({"sparsity_tau": 2}, "sparsity_tau = 2 is not allowed"),
        ({"source": "leters"}, "did you mean 'letters'"),
        ({"source": "letters?size=8"}, r"images of \(1, 8, 8\)"),
        ({"sync_bn": True}, "sync_bn needs GPUs"),
        ({"mode": "finetune", "finetune_method": "stoch_norm", "sync_bn": True}, "leave sync_bn out"),
        ({"normalize": "imagenet"}, "channels=3"),
        ({"source": None, "download": True}, "torchvision has no weights of the network 'small'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_checkpoint_of_another_network_is_refused_before_loading() -> None:
    with pytest.raises(ValueError, match="another network: .*small widths"):
        make().load_state_dict(make(blocks=[1, 1, 1, 1]).state_dict())


def no_batch_statistics(experiment: AdaSkipsExperiment) -> None:
    """Norms that do not depend on the batch, so that halves and whole are comparable."""
    train = experiment.train_mode

    def train_mode(stage: int) -> None:
        train(stage)
        for module in experiment.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    experiment.train_mode = train_mode  # type: ignore[method-assign]
    if isinstance(experiment.fine_tune, BiTuning):
        key = experiment.fine_tune.key
        key.train = lambda mode=True: nn.Module.train(key, False)  # type: ignore[method-assign]


TWO_WORKERS = {"mode": "finetune", "bi_tuning_queue": 3, "report_every": 4}


WORKED = ("vanilla", "bi_tuning")


def trained_states(method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of the network, and that of the method of fine-tuning."""
    experiment = make(finetune_method=method, **TWO_WORKERS)
    no_batch_statistics(experiment)
    finish(experiment)
    return experiment.model.state_dict(), experiment.fine_tune.state_dict()


def all_trained_states() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return {method: trained_states(method) for method in WORKED}


@pytest.mark.slow
def test_two_workers_with_half_the_batch_take_the_steps_of_one() -> None:
    two = on_two_workers(all_trained_states)[0]
    for method in WORKED:
        (theirs, their_method), (model, fine_tune) = two[method], trained_states(method)
        for name, value in model.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
        for name, value in fine_tune.items():
            torch.testing.assert_close(their_method[name], value, rtol=1e-3, atol=1e-4)
