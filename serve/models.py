"""What is served: a network or a cascade under a version, and how its tensors, wishes and answers look over HTTP."""

import base64
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.core.artifact import Prediction, Predictor, SegmentedPrediction, Segmenter
from dataeff.metrics.curve import pick_point
from dataeff.nn.cascade import CascadePrediction
from serve.cascade import Calibrated, Cascade
from serve.drift import DriftAlarm
from serve.limits import RequestError, Wishes, check_fraction
from serve.protocol import TensorSpec

TOP = 5
MODEL_WISHES = ("budget", "timeout_s", "version")
CASCADE_WISHES = (*MODEL_WISHES, "accuracy_goal", "cost_goal", "max_stage")

PredictRows = Callable[[Tensor, Tensor], Awaitable[Prediction]]


@dataclass
class ServedModel:
    """A network behind HTTP; `predict` answers rows: float32 [B, C, H, W] and float64 [B] multiply-adds allowed."""

    predictor: Predictor
    predict: PredictRows
    close: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None

    wishes: ClassVar[tuple[str, ...]] = MODEL_WISHES

    @property
    def full_macs(self) -> float:
        return self.predictor.card.cost["full_macs"]

    @property
    def segments(self) -> bool:
        """Whether its predictions have the class of every pixel."""
        return isinstance(self.predictor, Segmenter)

    def inputs(self) -> list[TensorSpec]:
        channels, height, width = self.predictor.input_shape
        shapes = {"FP32": (-1, channels, height, width)}
        if channels in (1, 3):
            shapes = {"UINT8": (-1, channels, -1, -1)} | shapes
        images = "UINT8: raw pixels, preprocessed here; FP32: already preprocessed"
        return [TensorSpec("images", shapes, description=images), *self.preferences()]

    def preferences(self) -> list[TensorSpec]:
        text = "for each image, a fraction (0, 1] of the full network's multiply-adds"
        return [_preference("budget", text)]

    def outputs(self) -> list[TensorSpec]:
        return [
            TensorSpec("probabilities", {"FP32": (-1, len(self.predictor.card.classes))}),
            TensorSpec("label", {"INT64": (-1,)}),
            TensorSpec("macs", {"FP64": (-1,)}, description="multiply-adds spent on each image"),
            TensorSpec("path", {"BOOL": (-1, len(self.predictor.path_names))}, description="which optional blocks ran"),
            *self._class_map(),
        ]

    def _class_map(self) -> list[TensorSpec]:
        if not isinstance(self.predictor, Segmenter):
            return []
        shape = (-1, *self.predictor.map_shape)
        return [TensorSpec("class_map", {"UINT8": shape}, description="the class of every pixel")]

    def settings(self, wishes: Wishes) -> Tensor:
        """One row of the second argument of `predict`."""
        return torch.tensor(math.inf if wishes.budget is None else wishes.budget * self.full_macs, dtype=torch.float64)

    def settings_of_rows(self, inputs: Mapping[str, NDArray[Any]], rows: int) -> Tensor:
        """The second argument of `predict` for the preferences in an inference request."""
        asked = {spec.name: inputs[spec.name] for spec in self.preferences() if spec.name in inputs}
        for name, values in asked.items():
            if len(values) != rows:
                raise RequestError(400, f"input {name!r} has {len(values)} values for {rows} images; send one for each")
            for value in (values.min(), values.max()):
                check_fraction(name, float(value))
        if not asked:
            return self.settings(Wishes()).expand(rows, *self.settings(Wishes()).shape)
        columns = zip(*(values.tolist() for values in asked.values()), strict=True)
        return torch.stack([self.settings(Wishes(**dict(zip(asked, row, strict=True)))) for row in columns])

    def stats(self) -> dict[str, Any]:
        """What `/stats` shows of this model at this replica."""
        return {}

    def arrays(self, prediction: Prediction) -> dict[str, tuple[str, NDArray[Any]]]:
        """The outputs of an inference request: datatype and array by name."""
        arrays: dict[str, tuple[str, NDArray[Any]]] = {
            "probabilities": ("FP32", prediction.probabilities.numpy()),
            "label": ("INT64", prediction.probabilities.argmax(1).numpy()),
            "macs": ("FP64", prediction.macs.numpy()),
            "path": ("BOOL", prediction.path.numpy()),
        }
        if isinstance(prediction, SegmentedPrediction):
            arrays["class_map"] = ("UINT8", prediction.class_map.numpy())
        return arrays

    def describe(self, prediction: Prediction) -> dict[str, Any]:
        """The answer of `/predict` for a prediction of one image."""
        ran = prediction.path[0].tolist()
        return self.describe_class(prediction) | {
            "blocks": {"executed": sum(ran), "total": len(ran)},
            "path": [name for name, executed in zip(self.predictor.path_names, ran, strict=True) if executed],
        }

    def describe_map(self, prediction: SegmentedPrediction) -> dict[str, Any]:
        """The answer of `/segment` for a prediction of one image."""
        class_map, path = prediction.class_map[0].numpy(), prediction.path[0]
        png = BytesIO()
        PIL.Image.fromarray(class_map).save(png, "PNG")
        pixels = np.bincount(class_map.ravel(), minlength=len(self.predictor.card.classes)) / class_map.size
        return {
            "class_map": base64.b64encode(png.getvalue()).decode(),
            "classes": [
                {"label": label, "class": name, "share": share}
                for label, (name, share) in enumerate(zip(self.predictor.card.classes, pixels.tolist(), strict=True))
                if share
            ],
            "active_share": float(path.double().mean()) if len(path) else 1.0,
            **self._spent(prediction),
        }

    def _spent(self, prediction: Prediction) -> dict[str, float]:
        macs = prediction.macs[0].item()
        return {"macs": macs, "full_macs": self.full_macs, "reduction": 1 - macs / self.full_macs}

    def describe_class(self, prediction: Prediction) -> dict[str, Any]:
        classes = self.predictor.card.classes
        top = prediction.probabilities[0].topk(min(TOP, len(classes)))
        ranked = [
            {"label": label, "class": classes[label], "probability": probability}
            for probability, label in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        return ranked[0] | {"top": ranked} | self._spent(prediction)


@dataclass
class ServedCascade(ServedModel):
    """A cascade behind HTTP; the second argument of `predict` is float64 [B, A], each image's thresholds."""

    alarm: DriftAlarm = field(default_factory=lambda: DriftAlarm(Calibrated()))

    wishes: ClassVar[tuple[str, ...]] = CASCADE_WISHES

    @property
    def cascade(self) -> Cascade:
        assert hasattr(self.predictor, "thresholds")
        return self.predictor  # type: ignore[return-value]

    def preferences(self) -> list[TensorSpec]:
        goal = "for each image, the accuracy wanted: the cheapest point of the calibration curve that reaches it"
        return [*super().preferences(), _preference("accuracy_goal", goal)]

    def outputs(self) -> list[TensorSpec]:
        stages = len(self.cascade.costs)
        return [
            *super().outputs(),
            TensorSpec("stage", {"INT64": (-1,)}, description=f"which stage answered, 1 to {stages}"),
            TensorSpec(
                "score",
                {"FP64": (-1, len(self.cascade.thresholds))},
                description="uncertainty of each stage's answer, -1 where it was not asked",
            ),
        ]

    def settings(self, wishes: Wishes) -> Tensor:
        thresholds = list(self.cascade.thresholds)
        if wishes.accuracy_goal is not None or wishes.cost_goal is not None:
            if not self.cascade.curve:
                message = "this cascade has no calibration curve; leave accuracy_goal and cost_goal out, or fit it"
                raise RequestError(400, message)
            chosen = pick_point(self.cascade.curve, wishes.accuracy_goal, wishes.cost_goal).thresholds
            thresholds[: len(chosen)] = chosen
        last = self._last_stage(wishes)
        return torch.tensor([*thresholds[:last], *[math.inf] * (len(thresholds) - last)], dtype=torch.float64)

    def _last_stage(self, wishes: Wishes) -> int:
        """How many stages may pass an image on."""
        costs, asked = self.cascade.costs, len(self.cascade.thresholds)
        last = asked if wishes.allow_human else min(asked, len(costs) - 1)
        if wishes.max_stage is not None:
            if wishes.max_stage > len(costs):
                raise RequestError(400, f"max_stage = {wishes.max_stage}; this cascade has stages 1 to {len(costs)}")
            last = wishes.max_stage - 1
        if wishes.budget is not None:
            allowed = wishes.budget * self.full_macs * (1 + 1e-9)
            affordable = sum(total <= allowed for total in np.cumsum(costs))
            last = min(last, max(affordable, 1) - 1) if affordable < len(costs) else last
        return last

    def arrays(self, prediction: Prediction) -> dict[str, tuple[str, NDArray[Any]]]:
        assert isinstance(prediction, CascadePrediction)
        return super().arrays(prediction) | {
            "stage": ("INT64", prediction.stage.numpy() + 1),
            "score": ("FP64", prediction.score.nan_to_num(nan=-1.0).numpy()),
        }

    def describe(self, prediction: Prediction) -> dict[str, Any]:
        assert isinstance(prediction, CascadePrediction)
        cascade, stage = self.cascade, int(prediction.stage[0])
        asked = list(zip(prediction.score[0].tolist(), prediction.entropy[0].tolist(), strict=True))[: stage + 1]
        path = [
            {"model": cascade.names[number], "uncertainty": score, "entropy": entropy, "idk": number < stage}
            for number, (score, entropy) in enumerate(asked)
        ]
        if stage == prediction.score.shape[1]:  # the last stage has no add-on
            path.append({"model": cascade.names[stage], "uncertainty": None, "entropy": None, "idk": False})
        path[-1]["idk"] = bool(prediction.idk[0] or prediction.stopped[0])
        return self.describe_class(prediction) | {
            "stage": stage + 1,
            "model": cascade.names[stage],
            "uncertainty": path[-1]["uncertainty"],
            "path": path,
            "relative_cost": prediction.macs[0].item() / cascade.costs[-1],
            "degraded": bool(prediction.stopped[0]),
        }

    def observe(self, prediction: CascadePrediction, thresholds: Tensor) -> None:
        """Note a batch for the drift alarm: those of its images that were answered as the cascade is set."""
        if not self.alarm.calibrated.idk_rates:
            return
        own = torch.tensor(list(self.cascade.thresholds), dtype=torch.float64)
        machine = min(len(own), len(self.cascade.costs) - 1)
        usual = (thresholds[:, :machine] == own[:machine]).all(1)
        passed = prediction.score[usual] > own  # not asked: NaN, which is above nothing
        self.alarm.add(passed.numpy(), prediction.entropy[usual].numpy())

    def stats(self) -> dict[str, Any]:
        return {"stages": list(self.cascade.names), "drift": self.alarm.alarm(), "add_ons": self.alarm.check()}


def _preference(name: str, text: str) -> TensorSpec:
    return TensorSpec(name, {"FP64": (-1,), "FP32": (-1,)}, optional=True, description=text)
