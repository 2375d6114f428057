"""How robust a trained network is: its accuracy under a list of attacks, chunk by chunk, and what to make of it.

Source: spec nas_adversarial_robustness sections 2.2, 2.3, 2.6, 4 and 9.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataeff.data import ImageSource
from dataeff.metrics.robustness import harmonic_robustness_score, topk_correct
from dataeff.nas.attacks import attack, scaled
from dataeff.nas.threat import AttackConfig, NormalizedModel, Space, check_labels, clip, frozen, read_pixels

__all__ = ["NormalizedModel", "RobustnessEvaluator", "RobustnessReport", "masking_flags", "masking_probes"]

CLEAN, CLAMP_ONLY = "clean", "clamp_only"


@dataclass(frozen=True)
class RobustnessReport:
    """Accuracies of one network on one set of images, percent.

    Attributes:
        clean: top-k accuracy without attack.
        per_attack: top-k accuracy under each attack, by the attack's name in the evaluation.
        hrs: of `clean` and `per_attack["pgd"]`; None without an attack of that name.
        params_m: parameters in millions, without an auxiliary head.
        topk: k.
        space: of all attacks.
        clamp_only: top-k accuracy when inputs are only clamped to [0, 1], eps 0; None in space `pixel`.
        n: images.
        top1: top-1 accuracies, by name, `clean` included.
        settings: of each attack.
        flags: `degenerate`: clean and PGD accuracy are 0, so that HRS is 0 by definition. `autopgd_topk_incomparable`:
            AutoPGD attacks only images that are top-1 right, so that its top-k accuracy for k > 1 is not on the scale
            of the others: read `top1`.
    """

    clean: float
    per_attack: dict[str, float]
    hrs: float | None
    params_m: float
    topk: int
    space: Space
    clamp_only: float | None
    n: int
    top1: dict[str, float]
    settings: dict[str, dict[str, Any]]
    flags: dict[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RobustnessReport":
        """The inverse of `to_dict`."""
        return cls(**values)


def merge_reports(reports: Sequence[RobustnessReport]) -> RobustnessReport:
    """One report out of several of the same network and images, with different attacks.

    Raises:
        ValueError: no reports, or reports that differ in anything but their attacks.
    """
    if not reports:
        raise ValueError("no reports to merge")
    first = reports[0]
    for other in reports[1:]:
        for name in ("clean", "params_m", "topk", "space", "clamp_only", "n"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"the reports differ in {name}: {getattr(first, name)} and {getattr(other, name)}; merge only "
                    "those of one network on the same images"
                )
    settings = {name: values for report in reports for name, values in report.settings.items()}
    per_attack = {name: value for report in reports for name, value in report.per_attack.items()}
    top1 = {name: value for report in reports for name, value in report.top1.items()}
    return _make_report(first, settings, per_attack, top1)


class RobustnessEvaluator:
    """Attacks every image of a set with every attack, a chunk of images at a time; can stop and go on anywhere.

    The result is a function of the network, the images and the attacks: random starts belong to (seed, attack, image,
    restart), and batches and interruptions do not enter (a network's own rounding may depend on the batch's size).

    Args:
        model: the network with its normalisation. In space `model_input` the attack sees the network alone.
        attacks: by name; in a sequence each has its own name, `fgsm`, `pgd`, ... All of one space. Names of the study:
            HRS reads the one called `pgd`.
        topk: k of the accuracy: 5 for ImageNet, else 1.
        images: what is attacked.
        size: (height, width) cut from the images' centres, the network's input; None: as they are.
        batch_size: images of a chunk.
        device: where it runs; the networks are moved there.
        surrogate: makes the attacks in place of `model`, which only answers (a transfer attack); space `pixel` only.

    Raises:
        ValueError: no images, no attacks or two of one name; attacks of two spaces; a bad topk or batch_size.

    Example::

        evaluator = RobustnessEvaluator(NormalizedModel(network, mean, std), standard_attacks(), images=splits.test)
        while not evaluator.done:
            evaluator.step()                    # evaluator.state_dict() may be saved here
        evaluator.report().hrs
    """

    def __init__(
        self,
        model: NormalizedModel,
        attacks: Sequence[AttackConfig] | Mapping[str, AttackConfig],
        topk: int = 1,
        *,
        images: ImageSource,
        size: tuple[int, int] | None = None,
        batch_size: int = 100,
        device: str | torch.device = "cpu",
        surrogate: NormalizedModel | None = None,
    ) -> None:
        self.attacks = _named(attacks)
        self.space: Space = _common_space(self.attacks)
        if surrogate is not None and self.space != "pixel":
            raise ValueError("a transfer attack needs space pixel: the surrogate has a normalisation of its own")
        if topk < 1 or batch_size < 1:
            raise ValueError(f"topk = {topk} and batch_size = {batch_size} must be at least 1")
        if not len(images):
            raise ValueError("no images to attack")
        self.model = model.to(device)
        self.surrogate = None if surrogate is None else surrogate.to(device)
        self.topk, self.images, self.size, self.batch_size, self.device = topk, images, size, batch_size, device
        self.tallies = {name: _Tally() for name in self._items()}

    # --- running --------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Chunks of the whole evaluation."""
        return len(self.tallies) * -(-len(self.images) // self.batch_size)

    @property
    def done(self) -> bool:
        return self.current is None

    @property
    def current(self) -> str | None:
        """The attack that `step` goes on with (or `clean`, `clamp_only`); None at the end."""
        return next((name for name, tally in self.tallies.items() if tally.seen < len(self.images)), None)

    def step(self) -> str:
        """Do the next chunk, and say of which attack.

        Raises:
            GradientMaskingError: a chunk without a gradient to follow.
            RuntimeError: the evaluation is done.
        """
        name = self.current
        if name is None:
            raise RuntimeError("the evaluation is done; read report()")
        tally = self.tallies[name]
        indices = torch.arange(tally.seen, min(tally.seen + self.batch_size, len(self.images)))
        logits, y = self._answer(name, indices)
        tally.right += int(topk_correct(logits, y, self.topk).sum())
        tally.right_top1 += int(topk_correct(logits, y, 1).sum())
        tally.seen += len(indices)
        return name

    def evaluate(self) -> RobustnessReport:
        """All that is left, then the report."""
        while not self.done:
            self.step()
        return self.report()

    def report(self) -> RobustnessReport:
        """
        Raises:
            RuntimeError: the evaluation is not done.
        """
        if not self.done:
            raise RuntimeError(f"the evaluation is at {self.current!r}; call step() until done")
        count = len(self.images)
        top_k = {name: 100 * tally.right / count for name, tally in self.tallies.items()}
        top_1 = {name: 100 * tally.right_top1 / count for name, tally in self.tallies.items()}
        bare = RobustnessReport(
            clean=top_k[CLEAN],
            per_attack={},
            hrs=None,
            params_m=million_parameters(self.model),
            topk=self.topk,
            space=self.space,
            clamp_only=top_k.get(CLAMP_ONLY),
            n=count,
            top1={},
            settings={},
        )
        settings = {name: cfg.model_dump() for name, cfg in self.attacks.items()}
        return _make_report(bare, settings, {name: top_k[name] for name in self.attacks}, top_1)

    # --- state ----------------------------------------------------------------------------------------------------

    @cached_property
    def signature(self) -> str:
        """What a saved state must agree with: weights, images, attacks, k. Read once, at the first use."""
        digest = hashlib.sha256()
        for network in (self.model, self.surrogate):
            if network is not None:
                for buffer in (network.mean, network.std, *network.state_dict().values()):
                    digest.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        labels = hashlib.sha256(np.ascontiguousarray(self.images.labels).tobytes()).hexdigest()[:16]
        settings = {name: cfg.model_dump() for name, cfg in self.attacks.items()}
        return f"top-{self.topk}, {len(self.images)} images {labels}, weights {digest.hexdigest()[:16]}, {settings}"

    def state_dict(self) -> dict[str, Any]:
        """How many images of each attack are done and right; random starts need no state."""
        return {"signature": self.signature, "tallies": {name: asdict(t) for name, t in self.tallies.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the batch size may be another.

        Raises:
            ValueError: the state is of another network, other images or other attacks.
        """
        if state["signature"] != self.signature:
            raise ValueError(f"the state is of another evaluation: {state['signature']}, this is {self.signature}")
        self.tallies = {name: _Tally(**state["tallies"][name]) for name in self._items()}

    # --- one chunk ------------------------------------------------------------------------------------------------

    def _items(self) -> list[str]:
        return [CLEAN, *([CLAMP_ONLY] if self.space == "model_input" else []), *self.attacks]

    def _answer(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a chunk as the item `name` has changed it, and labels."""
        x, y = read_pixels(self.images, indices, self.size, self.device)
        network: nn.Module = self.model
        with torch.no_grad():
            if self.space == "model_input":
                network, x = self.model.model, self.model.normalize(x)
            if name == CLAMP_ONLY:
                x = clip(x)
            elif name != CLEAN:
                x = attack(self.surrogate or network, x, y, self.attacks[name], indices)
            with frozen(network):
                logits: Tensor = network(x)
        check_labels(logits, y)
        return logits, y


@dataclass
class _Tally:
    """Of one attack: images done, and how many were right."""

    seen: int = 0
    right: int = 0
    right_top1: int = 0


def _named(attacks: Sequence[AttackConfig] | Mapping[str, AttackConfig]) -> dict[str, AttackConfig]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    else:
        named = {cfg.name: cfg for cfg in attacks}
        if len(named) < len(attacks):
            raise ValueError(f"two attacks of one name in {[cfg.name for cfg in attacks]}; give a mapping with names")
    if not named or {CLEAN, CLAMP_ONLY} & set(named):
        raise ValueError(f"attacks must be at least one, none called clean or clamp_only; got {list(named)}")
    return named


def _common_space(attacks: Mapping[str, AttackConfig]) -> Space:
    spaces = {cfg.space for cfg in attacks.values()}
    if len(spaces) > 1:
        raise ValueError("all attacks of an evaluation must be of one space, pixel or model_input; evaluate twice")
    return spaces.pop()


def _make_report(
    bare: RobustnessReport,
    settings: dict[str, dict[str, Any]],
    per_attack: dict[str, float],
    top1: dict[str, float],
) -> RobustnessReport:
    """`bare`, with attacks and what follows from them."""
    pgd = per_attack.get("pgd")
    flags = {
        "degenerate": pgd is not None and bare.clean + pgd == 0,
        "autopgd_topk_incomparable": bare.topk > 1 and any(values["name"] == "apgd" for values in settings.values()),
    }
    hrs = None if pgd is None else harmonic_robustness_score(bare.clean, pgd)
    values = {name: getattr(bare, name) for name in ("clean", "params_m", "topk", "space", "clamp_only", "n")}
    return RobustnessReport(**values, per_attack=per_attack, hrs=hrs, top1=top1, settings=settings, flags=flags)


def million_parameters(model: nn.Module) -> float:
    """Parameters in millions, frozen ones too, an auxiliary head's left out."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name.split(".")) / 1e6


# --- gradient masking -------------------------------------------------------------------------------------------------


def masking_probes(pgd: AttackConfig) -> dict[str, AttackConfig]:
    """What to evaluate beside `pgd` to see whether a network hides its gradient; read by `masking_flags`."""
    return {
        "pgd": pgd,
        "noise": AttackConfig(name="noise", eps=pgd.eps, space=pgd.space, seed=pgd.seed),
        "pgd_large_eps": scaled(pgd, 0.5),
        "pgd_more_steps": AttackConfig(**{**pgd.model_dump(), "steps": 5 * pgd.steps}),
        "pgd_more_restarts": AttackConfig(**{**pgd.model_dump(), "restarts": pgd.restarts + 4}),
    }


def masking_flags(
    report: RobustnessReport, num_classes: int, transfer: RobustnessReport | None = None, tolerance: float = 1.0
) -> dict[str, bool]:
    """Signs that the accuracy under PGD is an artefact of a hidden gradient; a sound evaluation has none.

    Args:
        report: of `masking_probes`.
        transfer: the same attack `pgd` made on a surrogate.
        tolerance: points of noise allowed.

    Returns:
        large_eps_above_chance: PGD with eps 0.5 leaves more than 100 k / K % (plus twice the tolerance).
        noise_stronger, transfer_stronger: what sees no gradient of the network fools it more often than PGD.
        more_steps_weaker, more_restarts_weaker: more effort helps the defender.
    """
    found = report.per_attack
    bound = found["pgd"] + tolerance
    flags = {
        "large_eps_above_chance": found["pgd_large_eps"] > 100 * report.topk / num_classes + 2 * tolerance,
        "noise_stronger": found["noise"] < found["pgd"] - tolerance,
        "more_steps_weaker": found["pgd_more_steps"] > bound,
        "more_restarts_weaker": found["pgd_more_restarts"] > bound,
    }
    if transfer is not None:
        flags["transfer_stronger"] = transfer.per_attack["pgd"] < found["pgd"] - tolerance
    return flags
