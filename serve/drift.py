"""A drift alarm: answers of now against what the calibration set gave."""

import logging
import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.cascade import Calibrated

logger = logging.getLogger("ray.serve")

WINDOW = 1000
LEAST = 200
# Beyond what sampling alone does (standard errors): shifts that nobody minds, of a rate and of a mean in deviations.
STANDARD_ERRORS = 4.0
RATE_SLACK = 0.05
ENTROPY_SLACK = 0.25

Floats = NDArray[np.float64]


class DriftAlarm:
    """IDK rates and mean entropies of the last answers against the calibration set's; silent if there is none.

    Rates are shares of all images that each add-on passes on; entropies are of the images that reach it.
    """

    def __init__(self, calibrated: Calibrated, window: int = WINDOW, least: int = LEAST) -> None:
        self.calibrated = calibrated
        self.added = 0
        self._least = least
        self._reported = False
        self._seen: deque[Floats] = deque(maxlen=window)

    def add(self, passed: NDArray[np.bool_], entropy: Floats) -> None:
        """Note images: which add-ons passed each on, and the entropy each saw, NaN where not asked; [B, A] both."""
        self._seen.extend(np.stack([passed, entropy], axis=1))
        self.added += len(passed)

    def check(self) -> list[dict[str, Any]]:
        """For each add-on `idk_rate` and `entropy`, each with `now`, `low` and `high`; `now` is None without images."""
        known = self.calibrated
        seen = np.stack(list(self._seen)) if self._seen else np.empty((0, 2, len(known.idk_rates)))
        return [
            {
                "idk_rate": _band(seen[:, 0, number], rate, math.sqrt(rate * (1 - rate)), RATE_SLACK),
                "entropy": _band(
                    seen[:, 1, number], known.entropy_mean[number], known.entropy_sd[number], ENTROPY_SLACK * sd
                ),
            }
            for number, (rate, sd) in enumerate(zip(known.idk_rates, known.entropy_sd, strict=True))
        ]

    def alarm(self) -> bool:
        """Something is outside its band, with enough images to tell."""
        if len(self._seen) < self._least:
            return False
        found = [band for add_on in self.check() for band in add_on.values() if band["now"] is not None]
        return any(not band["low"] <= band["now"] <= band["high"] for band in found)

    def report(self, version: str) -> bool:
        """`alarm`, with a line in the log whenever it begins or ends."""
        alarm = self.alarm()
        if alarm != self._reported:
            extra = {"version": version, "add_ons": self.check()}
            logger.warning("drift %s", "begins" if alarm else "ends", extra=extra)
        self._reported = alarm
        return alarm


def _band(values: Floats, mean: float, sd: float, slack: float) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    spread = STANDARD_ERRORS * sd / math.sqrt(max(len(values), 1)) + slack
    return {"now": float(values.mean()) if len(values) else None, "low": mean - spread, "high": mean + spread}
