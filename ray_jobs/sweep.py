"""A sweep: what to search, for which objectives, and the Optuna study that is its memory."""

import json
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, model_validator
from ray.tune.search import Searcher

from dataeff.core.config import Choice, Config, Range, nearest, parse_config, read_yaml

SWEEPS = Path(__file__).parent / "sweeps"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Family(Config):
    """What a sweep says about one method."""

    method: str
    space: dict[str, Any] = Field(description="settings to search: {low, high[, log][, integer]} or {choices}")
    set: dict[str, Any] = Field(default_factory=dict, description="settings that every trial has")
    shared: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="setting -> settings of a run trained once, whose artifact's path it takes"
    )
    references: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name -> settings of a run to compare with, such as the base network"
    )


class Sweep(Config):
    """A search, as written in `ray_jobs/sweeps/NAME.yaml`: over the settings of one method, or over several families
    (a method each) at once."""

    method: str | None = None
    space: dict[str, Any] = Field(default_factory=dict, description="see Family")
    set: dict[str, Any] = Field(default_factory=dict, description="see Family")
    shared: dict[str, dict[str, Any]] = Field(default_factory=dict, description="see Family")
    references: dict[str, dict[str, Any]] = Field(default_factory=dict, description="see Family")
    families: dict[str, Family] = Field(default_factory=dict, description="instead of the five fields above")
    objectives: dict[str, Literal["maximize", "minimize"]] = Field(
        min_length=1,
        description="metrics of the last step and their directions; the first is the one a scheduler prunes by",
    )
    accuracy_tolerance: float = Field(
        0.005, ge=0, le=1, description="how far below the best reference a chosen trial may be"
    )
    sampler: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    scheduler: Literal["asha", "median"] | None = Field(None, description="stops poor trials early; one objective only")
    trial: Literal["in_process", "ray_train"] = Field(
        "in_process", description="a Tune worker, or a Ray Train run of its own"
    )
    cpus: int = Field(1, ge=1, description="CPUs of a trial, or of each of its workers")
    gpus: float = Field(0, ge=0, description="GPUs of a trial, or of each of its workers")
    workers: int = Field(1, ge=1, description="workers of a trial (ray_train)")
    trials: int = Field(12, ge=1, description="how many, unless --trials says")

    @model_validator(mode="after")
    def _one_form(self) -> "Sweep":
        own = self.method is not None
        if own == bool(self.families):
            raise ValueError("give either method and space, or families")
        if self.families and (self.space or self.set or self.shared or self.references):
            raise ValueError("space, set, shared and references belong into each of the families")
        if self.families and self.sampler == "grid":
            raise ValueError("sampler grid cannot search several families; use tpe, nsga2 or random")
        return self

    @property
    def members(self) -> dict[str, Family]:
        """Family -> its part of the sweep; a sweep of one method is one family of that name."""
        if self.families:
            return self.families
        assert self.method is not None
        own = {name: getattr(self, name) for name in ("method", "space", "set", "shared", "references")}
        return {self.method: Family(**own)}


def read_sweep(name_or_file: str, method: str | None) -> Sweep:
    """A shipped sweep by name, or one from a YAML file.

    Args:
        method: the method that the user named; None for a sweep of several families.

    Raises:
        ValueError: unknown name (lists the known ones), a wrong field, or a sweep of another method.
        FileNotFoundError: no such file.
    """
    known = {path.stem: path for path in SWEEPS.glob("*.yaml")}
    is_file = name_or_file.endswith((".yaml", ".yml"))
    if name_or_file not in known and not is_file:
        raise ValueError(f"unknown sweep {name_or_file!r} ({nearest(name_or_file, known)})")
    sweep = parse_config(Sweep, read_yaml(known.get(name_or_file, name_or_file)), f"sweep {name_or_file}")
    if method is not None and sweep.method != method:
        whose = f"method {sweep.method!r}" if sweep.method else f"several families ({', '.join(sweep.families)})"
        raise ValueError(
            f"sweep {name_or_file} is of {whose}, not {method!r}; leave the method out or name the right one"
        )
    if sweep.scheduler and len(sweep.objectives) > 1:
        raise ValueError(f"sweep {name_or_file}: a scheduler needs a single objective, found {len(sweep.objectives)}")
    return sweep


def distributions(space: dict[str, Range | Choice]) -> dict[str, BaseDistribution]:
    """A checked search space in Optuna's terms."""
    found: dict[str, BaseDistribution] = {}
    for name, dimension in space.items():
        if isinstance(dimension, Choice):
            found[name] = CategoricalDistribution([_storable(value) for value in dimension.values])
        elif dimension.integer:
            found[name] = IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            found[name] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return found


def _storable(value: Any) -> Any:
    """A choice as Optuna can store it: lists as JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def _restored(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


class _Grid(optuna.samplers.GridSampler):
    """Optuna's grid ends `Study.optimize` when it is complete; here the number of trials ends the search, and there is
    no such loop to end."""

    def after_trial(self, *arguments: Any) -> None:
        pass


def make_sampler(name: str, space: dict[str, Range | Choice], seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of a sweep.

    Raises:
        ValueError: a grid over a range.
    """
    if name == "grid":
        ranges = [key for key, dimension in space.items() if not isinstance(dimension, Choice)]
        if ranges:
            raise ValueError(f"sampler grid: {', '.join(ranges)} must be {{choices: [...]}}")
        grid = {key: item.values for key, item in space.items() if isinstance(item, Choice)}
        stored = {key: [_storable(value) for value in values] for key, values in grid.items()}
        return _Grid(stored, seed=seed)
    kinds = {
        "tpe": optuna.samplers.TPESampler,
        "nsga2": optuna.samplers.NSGAIISampler,
        "random": optuna.samplers.RandomSampler,
    }
    sampler: optuna.samplers.BaseSampler = kinds[name](seed=seed)
    return sampler


def open_study(out: Path, sweep: Sweep) -> optuna.Study:
    """The sweep's study in `OUT/study.db`, begun or found there; `optuna-dashboard sqlite:///OUT/study.db` shows it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'study.db'}",
        study_name="sweep",
        directions=list(sweep.objectives.values()),
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(sweep.objectives))
    return study


def searching_study(out: Path, sweep: Sweep, space: dict[str, Range | Choice], seed: int) -> optuna.Study:
    """The sweep's study with its sampler, which after a resume does not draw again what it has drawn before."""
    study = open_study(out, sweep)
    # A grid's seed decides which combination is number n of the study; the others need new numbers.
    drawn = 0 if sweep.sampler == "grid" else len(study.trials)
    study.sampler = make_sampler(sweep.sampler, space, seed + drawn)
    return study


def ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=ENDED)


class StudySearch(Searcher):
    """Ray Tune's searcher over an Optuna study on disk; `spaces` holds the settings of each family.

    Ray's own OptunaSearch keeps in memory which study trial belongs to which Tune trial, so a killed sweep leaves
    trials that nobody ends. Here the study is the only memory: trials that were running when the process died are
    handed out again first, with their number and parameters, and go on in their own folder.
    """

    def __init__(
        self, study: optuna.Study, spaces: dict[str, dict[str, BaseDistribution]], objectives: dict[str, str]
    ) -> None:
        modes = ["max" if direction == "maximize" else "min" for direction in objectives.values()]
        super().__init__(metric=list(objectives), mode=modes)  # type: ignore[arg-type]  # lists are allowed
        self.study = study
        self.spaces = spaces
        self.objectives = objectives
        if len(spaces) > 1 and not study.trials:  # every family once before the sampler chooses among them
            for family in spaces:
                study.enqueue_trial({"family": family})
        self.interrupted = [trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))]
        self.numbers: dict[str, int] = {}
        self.lock = threading.Lock()

    def suggest(self, trial_id: str) -> dict[str, Any]:
        with self.lock:
            if self.interrupted:
                number = self.interrupted.pop(0)
                trial = optuna.trial.Trial(self.study, self.study.trials[number]._trial_id)
            else:
                # Samplers that draw settings together must know them all; with families they depend on the family.
                single = next(iter(self.spaces.values())) if len(self.spaces) == 1 else None
                trial = self.study.ask(fixed_distributions=single)
            self.numbers[trial_id] = trial.number
            return {"number": trial.number, **self._draw(trial)}

    def _draw(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """A family and its settings; what the study has of them already (a kill may have left some out) stays."""
        if len(self.spaces) == 1:
            family, prefix = next(iter(self.spaces)), ""
        else:
            family = trial.suggest_categorical("family", list(self.spaces))
            prefix = f"{family}."
        space = self.spaces[family]
        params = {name: _restored(trial._suggest(prefix + name, space[name])) for name in space}
        return {"family": family, "params": params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if len(self.objectives) == 1 and next(iter(self.objectives)) in result:
            trial = optuna.trial.Trial(self.study, self.study.trials[self.numbers[trial_id]]._trial_id)
            step = int(result["step"])
            if step not in self.study.trials[self.numbers[trial_id]].intermediate_values:
                trial.report(float(result[next(iter(self.objectives))]), step)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers[trial_id]
        if error or not result or any(name not in result for name in self.objectives):
            self.study.tell(number, state=TrialState.FAIL)
            return
        self.on_trial_result(trial_id, result)  # a scheduler that stops a trial at a result keeps it to itself
        if result["step"] < result["total_steps"]:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, [float(result[name]) for name in self.objectives])

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is on disk."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("lock", "study")}
