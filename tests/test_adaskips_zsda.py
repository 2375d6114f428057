"""Zero-shot domain adaptation: the two regularisers, all combinations, and labels of the target that nobody reads."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.dynamic.adaskips import zsda
from dataeff.dynamic.adaskips.adaptation import ADDATrainer, UniformPriorRegularizer, evaluate_zsda
from dataeff.dynamic.adaskips.hosts import SmallResNet
from dataeff.dynamic.adaskips.model import AdaSkipResNet
from dataeff.dynamic.adaskips.network import TransferNetwork
from dataeff.dynamic.adaskips.zsda import ADAPTATION, ZsdaConfig, ZsdaExperiment
from tests.experiment_helpers import answers, finish, same

PLAIN = {"skips": "standard", "skip_weights": "ones", "module_bn": False}
TINY: dict[str, Any] = {
    "network": "small",
    "widths": [4, 4, 8, 8],
    "blocks": [1, 2, 1, 1],
    "size": 16,
    "augment": "none",
    "report_every": 2,
    "training": {"iterations": 4, "batch": 32},
    "adaptation": {"iterations": 4, "batch": 16, "lr": 0.001},
}
COMBINATIONS = list(itertools.product([False, True], repeat=3))


def make(data: str = "rendered-digits", **changes: Any) -> ZsdaExperiment:
    return ZsdaExperiment(parse_config(ZsdaConfig, merge(TINY, changes)), data, Runtime("cpu"))


def identity(gradient: torch.Tensor) -> torch.Tensor:
    return gradient


def test_the_prior_discriminator_and_the_encoder_have_the_losses_of_section_2_7() -> None:
    prior = UniformPriorRegularizer(6)
    z, u = torch.randn(5, 6), torch.rand(5, 6) * 2 - 1
    on_z, on_u = torch.sigmoid(prior.discriminator(z)), torch.sigmoid(prior.discriminator(u))
    torch.testing.assert_close(prior.discriminator_loss(z, u), -on_u.log().mean() - (1 - on_z).log().mean())
    torch.testing.assert_close(prior.encoder_loss(z), -on_z.log().mean())


def test_the_prior_is_uniform_on_minus_a_to_a() -> None:
    prior = UniformPriorRegularizer(4, bound=3.0)
    seen = []
    prior.discriminator.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    prior.step(torch.zeros(2000, 4), torch.rand(2000, 4), identity)
    u = seen[0]
    assert u.min() > -3 and u.max() < 3 and u.std().item() == pytest.approx(3 / math.sqrt(3), rel=0.05)


def test_features_that_follow_the_encoder_loss_cannot_be_told_from_the_prior_any_more() -> None:
    torch.manual_seed(0)
    prior = UniformPriorRegularizer(2, lr=3e-3)
    shift = torch.nn.Parameter(torch.tensor([2.5, -2.5]))
    optimizer = torch.optim.Adam([shift], 0.02)
    right = []
    for _ in range(400):
        z = torch.rand(128, 2) * 2 - 1 + shift
        right.append(float(prior.step(z, torch.rand(128, 2), identity)))
        optimizer.zero_grad()
        prior.encoder_loss(z).backward()
        optimizer.step()
    assert max(right[:60]) > 0.95 and np.mean(right[-50:]) < 0.7
    assert shift.abs().max() < 1.0


def test_addas_discriminator_and_encoder_have_inverted_labels() -> None:
    torch.manual_seed(0)
    student = AdaSkipResNet.from_pretrained(SmallResNet((4, 4, 4, 6), (1, 1, 1, 1), 3, 1), 3)
    trainer = ADDATrainer(TransferNetwork(student))
    source, target = torch.randn(4, 6), torch.randn(4, 6)
    logits_s, logits_t = trainer.discriminator(source), trainer.discriminator(target)
    one, zero = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    expected = (F.cross_entropy(logits_s, one) + F.cross_entropy(logits_t, zero)) / 2
    torch.testing.assert_close(trainer.discriminator_loss(source, target), expected)
    torch.testing.assert_close(trainer.encoder_loss(target), F.cross_entropy(logits_t, one))
    with pytest.raises(ValueError, match="as many images of both domains, got 4 of the source and 3"):
        trainer.discriminator_loss(source, target[:3])


def test_a_discriminator_that_teaches_nothing_stops_the_adaptation() -> None:
    student = AdaSkipResNet.from_pretrained(SmallResNet((4, 4, 4, 6), (1, 1, 1, 1), 3, 1), 3)
    trainer = ADDATrainer(TransferNetwork(student), patience=3)
    for loss in (0.0, math.log(2), 0.4, 0.0, 0.0):
        trainer.watch(loss)
    assert not trainer.stopped
    with pytest.warns(UserWarning, match="close to 0: it tells the domains apart"):
        trainer.watch(0.0)
    assert trainer.stopped
    experiment = make(adda=True, adda_patience=1)
    finish_training = experiment.step, experiment.step
    for step in finish_training:
        step()
    experiment.begin_stage(ADAPTATION)
    experiment.adversary.idle = 10**6
    before = {name: value.clone() for name, value in experiment.model.named_parameters()}
    experiment.adversary.watch = lambda loss: None  # type: ignore[method-assign]
    experiment.step()
    assert same(before, dict(experiment.model.named_parameters()))


@pytest.mark.parametrize(("prior", "adda", "skips"), COMBINATIONS)
def test_all_eight_combinations_train_and_resume_bit_for_bit(prior: bool, adda: bool, skips: bool) -> None:
    changes: dict[str, Any] = {"uniform_prior": prior, "adda": adda, **({} if skips else PLAIN)}
    undisturbed = make(**changes)
    rows = finish(undisturbed)
    assert len(rows) == (4 if adda else 2)
    assert ("train_prior_accuracy" in rows[-1]) == prior and ("train_domain_accuracy" in rows[-1]) == adda
    interrupted, fresh = make(**changes), make(**changes)
    for _ in range(len(rows) - 1):
        interrupted.step()
    fresh.load_state_dict(interrupted.state_dict())
    assert finish(fresh) == rows[-1:]
    assert same(fresh.model.state_dict(), undisturbed.model.state_dict())
    assert same(fresh.adversary.state_dict(), undisturbed.adversary.state_dict())
    assert same(fresh.prior.state_dict(), undisturbed.prior.state_dict())


@pytest.mark.parametrize(("prior", "adda", "skips"), [(True, True, True), (False, False, False), (False, True, False)])
def test_labels_of_the_target_change_nothing_but_the_score(
    prior: bool, adda: bool, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"uniform_prior": prior, "adda": adda, **({} if skips else PLAIN)}
    honest = make(**changes)
    rows = finish(honest)
    open_splits = zsda.open_splits

    def permuted(text: str) -> Any:
        splits = open_splits(text)
        if text.startswith("digits"):
            for source in (splits.train, splits.val, splits.test):
                source.labels = np.random.default_rng(0).permutation(source.labels)
        return splits

    monkeypatch.setattr(zsda, "open_splits", permuted)
    blind = make(**changes)
    blind_rows = finish(blind)
    assert same(honest.model.state_dict(), blind.model.state_dict())
    for row, other in zip(rows, blind_rows, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("val_")} == {
            k: v for k, v in other.items() if not k.startswith("val_")
        }
    assert honest.evaluate("test")["loss"] != blind.evaluate("test")["loss"]


def test_the_upper_bound_trains_on_the_target_and_everything_else_on_the_source() -> None:
    assert len(make().splits.train) == 540 and len(make(target_only=True).splits.train) == 1131
    assert len(make().splits.test) == 540  # the target's
    finish(make(target_only=True))


def test_adaptation_moves_the_target_encoder_and_keeps_source_encoder_and_classifier() -> None:
    experiment = make(adda=True)
    experiment.step(), experiment.step()
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    experiment.step()
    now = experiment.model.state_dict()
    assert not torch.equal(now["student.conv1.weight"], before["student.conv1.weight"])
    assert torch.equal(now["student.fc.weight"], before["student.fc.weight"])
    source = experiment.adversary.source.state_dict()
    assert torch.equal(source["student.conv1.weight"], before["student.conv1.weight"])


def test_the_artifact_answers_for_the_target(tmp_path: Path) -> None:
    experiment = make(adda=True)
    finish(experiment)
    predictor, _, _ = answers(experiment, tmp_path / "artifact")
    assert predictor.card.data["name"] == "rendered-digits -> digits"
    domains = [zsda.open_splits(name).fingerprint for name in ("rendered-digits", "digits")]
    assert experiment.data_fingerprint == predictor.card.data["fingerprint"] not in domains


def test_both_domains_are_scored() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 3).float()

    def batch(labels: list[int]) -> Batch:
        return Batch(torch.zeros(len(labels), 1, 4, 4), torch.tensor(labels), torch.arange(len(labels)))

    scores = evaluate_zsda(Constant(), [batch([0, 0]), batch([1, 0])], [batch([1, 0, 2, 2])])
    assert scores == {"source_accuracy": 0.75, "target_accuracy": 0.25}


def test_rgb_domains_become_grey_and_say_so(tmp_path: Path) -> None:
    from PIL import Image

    for label in range(10):
        for name in range(6):
            path = tmp_path / "train" / str(label) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (25 * label, 0, 0)).save(path)
    with pytest.warns(UserWarning, match="RGB images are converted to grey"):
        splits = zsda.open_grey(f"folder:{tmp_path}?val=0.2", 16)
    assert splits.image_shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "letters"}, "the domains differ in their classes"),
        ({"target_only": True, "adda": True}, "target_only is the upper bound"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
