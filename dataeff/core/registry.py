"""Methods by name. A method is imported only when it is asked for."""

from pkgutil import resolve_name

from dataeff.core.config import nearest
from dataeff.core.experiment import Experiment

METHODS: dict[str, str] = {
    "deepmoe": "dataeff.dynamic.deepmoe.experiment:DeepMoEExperiment",
    "deepmoe_segmentation": "dataeff.dynamic.deepmoe.segmentation:SegmentationExperiment",
    "act": "dataeff.dynamic.halting.experiment:ActExperiment",
    "active": "dataeff.active.experiment:ActiveExperiment",
    "adaskips": "dataeff.dynamic.adaskips.experiment:AdaSkipsExperiment",
    "adaskips_zsda": "dataeff.dynamic.adaskips.zsda:ZsdaExperiment",
    "lccl": "dataeff.dynamic.lccl.experiment:LcclExperiment",
    "nas_search": "dataeff.nas.experiment_search:NasSearchExperiment",
    "nas_train": "dataeff.nas.experiment_train:NasTrainExperiment",
    "pretrain": "dataeff.pretraining.experiment:PretrainExperiment",
    "pruning": "dataeff.dynamic.pruning.experiment:PruningExperiment",
    "robustness": "dataeff.nas.experiment_robustness:RobustnessExperiment",
    "sact": "dataeff.dynamic.halting.experiment:SactExperiment",
    "hydranet": "dataeff.dynamic.hydranet.experiment:HydraNetExperiment",
    "idk": "dataeff.cascades.idk.experiment:IdkExperiment",
    "skipnet": "dataeff.dynamic.skipnet.experiment:SkipNetExperiment",
}


def get_method(name: str) -> type[Experiment]:
    """The Experiment class registered as `name`.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r} ({nearest(name, METHODS)})")
    method: type[Experiment] = resolve_name(METHODS[name])
    return method
