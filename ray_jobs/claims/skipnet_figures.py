"""Figures of SkipNet's runs: what `ray_jobs.claims.skipnet` measures."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataeff.core.artifact import read_artifact
from dataeff.core.config import merge, parse_config, read_yaml
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, Preprocess, eval_batches, open_splits
from dataeff.dynamic.skipnet import analysis
from dataeff.dynamic.skipnet.experiment import SkipNetConfig, SkipNetExperiment, build_network
from dataeff.dynamic.skipnet.model import SkipNet, build_skipnet
from dataeff.metrics.cost import count_macs
from ray_jobs.claims import Result, Results, Run


def accuracy(results: Results, run: Run) -> float:
    return results[run.name].metrics["test_accuracy"]


def executed_share(results: Results, run: Run) -> float:
    return results[run.name].metrics["test_executed_share"]


def reduction(results: Results, run: Run) -> float:
    return results[run.name].metrics["test_reduction"]


def largest_rise(results: Results, ascending: list[Run]) -> float:
    shares = [executed_share(results, run) for run in ascending]
    return float(max(np.diff(shares)))


def seconds_per_iteration(*finished: Result, repeats: int = 5, iterations: int = 20) -> list[float]:
    """Median training time of a mini-batch in the last stage of each run, in seconds.

    The runs are trained anew for a few mini-batches in turn, because times taken at different moments of a busy machine
    do not compare. Processor time, where there is no GPU, leaves out what other programs take.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs have warned already
        experiments = []
        for result in finished:
            settings = merge(result.summary["config"], {"report_every": iterations})
            experiment = SkipNetExperiment(parse_config(SkipNetConfig, settings), result.summary["data"], Runtime())
            experiment.step()  # warms up; stage 2 also begins with an evaluation
            experiments.append(experiment)
        seconds = np.empty((repeats, len(experiments)))
        for repeat in range(repeats):
            for column, experiment in enumerate(experiments):
                started = clock()
                experiment.step()
                trained = clock()
                experiment.evaluate("val")  # each step ends with one
                seconds[repeat, column] = (trained - started) - (clock() - trained)
    return [float(median) / iterations for median in np.median(seconds, axis=0)]


def analyses(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(result.folder / "analysis.json")
    return found


def trained(result: Result) -> tuple[SkipNet, ImageSource, Preprocess]:
    """The network of a run, the test split and its preprocessing."""
    artifact = read_artifact(result.artifact)
    config = parse_config(SkipNetConfig, artifact.config)
    model = build_network(config, len(artifact.card.classes), artifact.card.input_shape[0])
    model.load_state_dict(artifact.state)
    source = open_splits(result.summary["data"]).test
    return model.eval(), source, Preprocess.from_dict(artifact.card.preprocess)


@torch.no_grad()
def profile_of(model: SkipNet, source: ImageSource, preprocess: Preprocess, mode: str) -> analysis.Profile:
    return analysis.collect((model(batch.images, mode=mode), batch) for batch in eval_batches(source, preprocess, 256))


def correct_images(model: SkipNet, source: ImageSource, preprocess: Preprocess, mode: str) -> NDArray[np.bool_]:
    """Which test images are classified correctly, in the order of `source`."""
    profile = profile_of(model, source, preprocess, mode)
    correct = np.empty(len(source), dtype=bool)
    correct[profile.indices] = profile.labels == profile.predicted
    return correct


def class_skips(result: Result, reduce: Callable[[NDArray[np.int64]], Any]) -> NDArray[np.float64]:
    """Skipped blocks of each class on the test split, [K]."""
    model, source, preprocess = trained(result)
    profile = profile_of(model, source, preprocess, "hard")
    classes = np.unique(profile.labels)
    return np.array([reduce(profile.skipped_count[profile.labels == k]) for k in classes], dtype=float)


def easy_and_hard(result: Result, prefix: str) -> dict[str, float]:
    model, source, preprocess = trained(result)
    profile = profile_of(model, source, preprocess, "hard")
    correct, hard = profile.labels == profile.predicted, source.flags["hard"][profile.indices]
    executed = profile.executed_count
    return {
        f"{prefix}_easy_more_accurate": float(correct[~hard].mean() - correct[hard].mean()),
        f"{prefix}_hard_executes_more": float(executed[hard].mean() - executed[~hard].mean()),
    }


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Rank correlation of two vectors, ties sharing their mean rank; NaN where one is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    ranks = [[(values < value).sum() + (values <= value).sum() for value in values] for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def measure_gate_costs() -> dict[str, float]:
    """Multiply-adds of the gates, counted by hooks on a forward pass, against the block that each decides, largest
    over positions with an unchanged shape; totals at half of the blocks skipped, linear and LSTM layers included."""
    shape = (3, 32, 32)
    measured, totals = {}, {}
    for gate in ("ffgate1", "ffgate2", "rnn"):
        model = build_skipnet(38, 10, gate, widths=(16, 32, 64)).eval()  # type: ignore[arg-type]
        costs = model.costs(*shape[1:])
        ratios = []
        counted = _gate_macs_by_position(model, shape)
        for position, block in enumerate(model.blocks[1:]):
            if not block.changes_shape:
                ratios.append(counted[position] / float(costs.blocks[position]))
        measured[f"{gate}_share_of_block"] = max(ratios)
        totals[gate] = float(costs.minimum + costs.gate_linear.sum() + 0.5 * costs.blocks.sum())
    base = build_skipnet(38, 10, "none", widths=(16, 32, 64))
    hooked = count_macs(base, shape, mode="full").conv
    return measured | {
        "ffgate1_over_rnn_total": totals["ffgate1"] / totals["rnn"],
        "ffgate2_over_rnn_total": totals["ffgate2"] / totals["rnn"],
        "full_count_error": abs(base.costs(*shape[1:]).full / hooked - 1),
    }


def _gate_macs_by_position(model: SkipNet, shape: tuple[int, int, int]) -> list[float]:
    """Multiply-adds of every gate on one image. Layers of an RNN gate that all positions share count once a call."""
    by_module = count_macs(model, shape, mode="hard").by_module
    if isinstance(model.gates, torch.nn.ModuleList):
        return [
            sum(
                macs
                for name, macs in by_module.items()
                if name.startswith(f"gates.{position}.") and not name.endswith("output")
            )
            for position in range(model.num_gates)
        ]
    gates = {name: macs for name, macs in by_module.items() if name.startswith("gates.")}
    own = [name for name in gates if name.split(".")[-1].isdigit()]
    shared = sum(macs for name, macs in gates.items() if name not in own) / model.num_gates
    return [gates[name] + shared for name in sorted(own, key=lambda name: int(name.split(".")[-1]))]
