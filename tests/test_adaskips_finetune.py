"""The fine-tuning methods: every term against a hand-computed case, and what each remembers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataeff.data import Batch
from dataeff.dynamic.adaskips import finetune
from dataeff.dynamic.adaskips.finetune import (
    DELTA,
    BatchSpectralShrinkage,
    BiTuning,
    CoTuning,
    LearningWithoutForgetting,
    Step,
    StochasticNormalization,
    StochNorm2d,
    VanillaFineTune,
)
from dataeff.dynamic.adaskips.hosts import SmallResNet
from dataeff.dynamic.adaskips.model import AdaSkipConfig, AdaSkipResNet
from dataeff.dynamic.adaskips.network import TransferNetwork, frozen_copy

CLASSES, SOURCE, COUNT = 3, 5, 12


def network(projector=False, **options):
    torch.manual_seed(0)
    host = SmallResNet((4, 4, 8, 8), (1, 2, 1, 1), SOURCE, 1)
    student = AdaSkipResNet.from_pretrained(host, CLASSES, cfg=AdaSkipConfig(**options))
    return TransferNetwork(student, nn.Linear(8, SOURCE), nn.Linear(8, finetune.PROJECTION) if projector else None)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(COUNT, 1, 16, 16, generator=generator)
    return Batch(images, torch.arange(COUNT) % CLASSES, torch.arange(COUNT))


def step(model, data=None, **options):
    return Step(model, model, data or batch(), **options)


def cross_entropy(model):
    return F.cross_entropy(model(batch().images).logits, batch().labels)


def test_vanilla_is_cross_entropy():
    model = network()
    torch.testing.assert_close(VanillaFineTune().loss(step(model))[0], cross_entropy(model))


def test_lwf_adds_four_times_the_kl_of_the_recorded_to_the_present_source_answers_at_temperature_3():
    model = network().eval()
    method = LearningWithoutForgetting(COUNT, SOURCE)
    method.setup(model, frozen_copy(model), [batch()])
    torch.testing.assert_close(method.recorded, model(batch().images, plain=True).logits)
    total, parts = method.loss(step(model))
    p = (method.recorded / 3).softmax(1)
    q = (model(batch().images).source_logits / 3).softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(parts["lwf"], kl)
    torch.testing.assert_close(total, cross_entropy(model) + 4 * kl)


def test_lwf_keeps_what_was_recorded_before_training():
    model = network().eval()
    method = LearningWithoutForgetting(COUNT, SOURCE)
    method.setup(model, frozen_copy(model), [batch()])
    before = method.recorded.clone()
    nn.init.zeros_(model.source_head.weight)
    method.loss(step(model))
    assert torch.equal(method.recorded, before)


def test_bss_penalises_the_smallest_squared_singular_values():
    features = torch.diag(torch.tensor([3.0, 0.5, 2.0]))
    assert finetune.spectral_penalty(features, 1).item() == pytest.approx(0.25, abs=1e-4)
    assert finetune.spectral_penalty(features, 2).item() == pytest.approx(4.25, abs=1e-4)
    assert finetune.spectral_penalty(features, 99).item() == pytest.approx(13.25, abs=1e-4)
    model = network().eval()
    total, _ = BatchSpectralShrinkage(0.5, 2).loss(step(model))
    expected = cross_entropy(model) + 0.5 * finetune.spectral_penalty(model(batch().images).embedding, 2)
    torch.testing.assert_close(total, expected)


def test_bss_has_finite_gradients_for_features_of_low_rank():
    features = torch.ones(6, 4, requires_grad=True)
    finetune.spectral_penalty(features, 3).backward()
    assert torch.isfinite(features.grad).all()


def test_bss_leaves_a_mini_batch_out_whose_decomposition_fails(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    model = network().eval()
    with pytest.warns(UserWarning, match="did not converge"):
        total, _ = BatchSpectralShrinkage().loss(step(model))
    torch.testing.assert_close(total, cross_entropy(model))


def test_delta_weights_map_distances_by_channel_attention_over_layers():
    now, before = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    now[0, 0, 0] = torch.tensor([1.0, 2.0])
    now[1, 1, 0, 0] = 4.0
    attention = torch.tensor([0.25, 0.75])
    one_layer = 2 / 2 * (0.25 * 5 + 0.75 * 16) / 2
    assert finetune.behaviour_distance([now], [before], [attention]).item() == pytest.approx(one_layer)
    two = finetune.behaviour_distance([now, now], [before, before], [attention, attention])
    assert two.item() == pytest.approx(2 * one_layer)


def test_delta_attention_is_a_softmax_of_z_scores_over_five_and_uniform_without_spread():
    increases = torch.tensor([0.0, 1.0, 5.0])
    z = (increases - 2) / math.sqrt(7)
    torch.testing.assert_close(finetune.channel_attention(increases), (z / 5).softmax(0))
    assert torch.equal(finetune.channel_attention(torch.full((4,), 0.3)), torch.full((4,), 0.25))


def test_delta_finds_the_filters_that_matter_and_leaves_the_source_as_it_was():
    model = network().eval()
    method = DELTA(model, CLASSES)
    source = frozen_copy(model)
    last = finetune.last_convs(source.student)[3]
    with torch.no_grad():
        last.weight[2:] = 0  # filters that do nothing: zeroing them costs nothing
    before = {name: value.clone() for name, value in source.state_dict().items()}
    method.setup(model, source, [batch()])
    attention = method.attention3
    assert attention.sum().item() == pytest.approx(1.0) and attention.argmax() < 2
    assert torch.equal(attention[2:], attention[2].expand(6))
    assert all(torch.equal(before[name], value) for name, value in method.source.state_dict().items())


def test_delta_adds_half_of_distance_and_squared_classifier():
    model = network().eval()
    method = DELTA(model, CLASSES, weight=0.1)
    method.setup(model, frozen_copy(model), [batch()])
    head = sum(p.square().sum() for p in model.student.fc.parameters())
    total, parts = method.loss(step(model))
    torch.testing.assert_close(total, cross_entropy(model) + 0.1 * (parts["delta"] + 0.5 * head))
    assert parts["delta"] > 0  # skips and module norms have moved the maps
    plain = network(skips="standard", weights="ones", module_bn=False).eval()
    method = DELTA(plain, CLASSES)
    method.setup(plain, frozen_copy(plain), [batch()])
    assert method.loss(step(plain))[1]["delta"].item() == pytest.approx(0, abs=1e-9)


def test_co_tuning_relates_classes_by_the_mean_source_answer():
    probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 2])
    with pytest.warns(UserWarning, match=r"classes \[1\] have no images"):
        relationship = finetune.class_relationship(probabilities, labels, 3)
    torch.testing.assert_close(relationship, torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]))


def test_co_tuning_adds_the_cross_entropy_of_the_source_head_to_the_related_classes():
    model = network().eval()
    method = CoTuning(CLASSES, SOURCE)
    method.setup(model, frozen_copy(model), [batch()])
    answers = model(batch().images, plain=True).logits.softmax(1)
    torch.testing.assert_close(method.relationship[1], answers[batch().labels == 1].mean(0))
    output = model(batch().images)
    soft = -(method.relationship[batch().labels] * output.source_logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method.loss(step(model))[0], cross_entropy(model) + 2.3 * soft)


def test_stochnorm_normalises_the_chosen_channels_by_the_batch_and_the_others_by_running_statistics():
    norm = StochNorm2d(2).train()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    x = torch.randn(5, 2, 3, 3)
    norm.by_batch = torch.tensor([True, False])
    y = norm(x)
    torch.testing.assert_close(y[:, 0], F.batch_norm(x, None, None, training=True)[:, 0])
    torch.testing.assert_close(y[:, 1], (x[:, 1] - 2) / math.sqrt(9 + norm.eps))
    torch.testing.assert_close(norm.running_mean, 0.9 * torch.tensor([1.0, 2.0]) + 0.1 * x.mean((0, 2, 3)))
    reference = nn.BatchNorm2d(2).eval()
    reference.load_state_dict(norm.state_dict())
    assert torch.equal(norm.eval()(x), reference(x))


def test_stochnorm_changes_the_pretrained_norms_only_and_draws_every_channel():
    model = network().train()
    finetune.use_stochastic_norms(model.student)
    assert type(model.student.bn1) is StochNorm2d and type(model.student.stages[1].blocks[0].bn1) is StochNorm2d
    assert type(model.student.stages[0].module_bn) is nn.BatchNorm2d
    assert type(model.student.stages[0].hyper.features[1]) is nn.BatchNorm2d
    asked = []

    def uniform(count):
        asked.append(count)
        return torch.zeros(count)

    everything_by_batch, _ = StochasticNormalization(0.5).loss(step(model, uniform=uniform))
    norms = [module for module in model.modules() if isinstance(module, StochNorm2d)]
    assert asked == [sum(norm.num_features for norm in norms)] and all(norm.by_batch is None for norm in norms)
    torch.testing.assert_close(everything_by_batch, cross_entropy(model))


def test_a_contrast_is_the_kl_of_shared_target_mass_and_the_softmax():
    queue = F.normalize(torch.randn(2, 3, 4), dim=2)
    anchors, keys = (F.normalize(torch.randn(2, 4), dim=1) for _ in range(2))
    labels = torch.tensor([1, 0])
    expected = 0.0
    for anchor, key, label in zip(anchors, keys, labels.tolist(), strict=True):
        positives = torch.cat([key[None], queue[label]]) @ anchor / 0.07
        negatives = queue[1 - label] @ anchor / 0.07
        log_sum = torch.cat([positives, negatives]).logsumexp(0)
        expected += sum(0.25 * (math.log(0.25) - (value - log_sum)) for value in positives) / 2
    torch.testing.assert_close(finetune.contrast(anchors, keys, queue, labels, 0.07), expected)


def test_keys_fill_the_queue_of_their_class_and_wrap_around():
    pointers = torch.tensor([2, 0])
    labels = torch.tensor([0, 1, 0, 0, 1])
    assert finetune.queue_places(pointers, labels, 3).tolist() == [2, 0, 0, 1, 1]
    many = finetune.queue_places(pointers, torch.zeros(5, dtype=torch.int64), 3)
    assert many.tolist() == [-1, -1, 1, 2, 0]  # the first two would be overwritten by the last two
    queue = torch.zeros(2, 3, 1)
    finetune.enqueue(queue, torch.arange(1.0, 6.0)[:, None], labels, torch.tensor([2, 0, 0, 1, 1]))
    assert queue[0, :, 0].tolist() == [3, 4, 1] and queue[1, :, 0].tolist() == [2, 5, 0]


@pytest.mark.parametrize("skips", [True, False])
def test_bi_tuning_contrasts_queries_and_classifier_rows_against_the_keys_of_a_momentum_copy(skips):
    options = {} if skips else {"skips": "standard", "weights": "ones", "module_bn": False}
    model = network(projector=True, **options).eval()
    method = BiTuning(model, CLASSES, queue=4, momentum=0.9)
    method.setup(model, frozen_copy(model), [batch()])
    z_queue, h_queue = method.queue_z.clone(), method.queue_h.clone()
    second = batch().images.flip(3)
    labels = batch().labels
    total, parts = method.loss(step(model, second_view=lambda: second))
    output, keys = model(batch().images), model(second)
    query, key = (F.normalize(out.projection, dim=1) for out in (output, keys))
    contrast_z = finetune.contrast(query, key, z_queue, labels, 0.07)
    classifier = F.normalize(torch.cat([model.student.fc.weight, model.student.fc.bias[:, None]], 1), dim=1)[labels]
    key_h = F.normalize(torch.cat([keys.embedding, torch.ones(COUNT, 1)], 1), dim=1)
    contrast_y = finetune.contrast(classifier, key_h, h_queue, labels, 0.07)
    torch.testing.assert_close(total, cross_entropy(model) + contrast_z + contrast_y, rtol=1e-4, atol=1e-5)
    assert set(parts) == {"contrast_z", "contrast_y"}
    total.backward()
    assert model.projector.weight.grad.abs().sum() > 0
    for label in range(CLASSES):  # four images of each class fill its queue of four
        torch.testing.assert_close(method.queue_z[label], key[labels == label])
        torch.testing.assert_close(method.queue_h[label], key_h[labels == label])
    assert method.pointers.tolist() == [0, 0, 0]


def test_the_momentum_copy_follows_the_network_hypernetworks_included():
    model = network(projector=True)
    method = BiTuning(model, CLASSES, momentum=0.75)
    before = {name: value.clone() for name, value in method.key.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    method.on_step_end(model)
    assert any("hyper" in name for name in before)
    for name, value in method.key.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.25)
        assert not value.requires_grad
