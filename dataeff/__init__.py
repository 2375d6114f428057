"""dataeff: data- and compute-efficient vision. The library part; it never needs Ray."""

from dataeff.core.artifact import Prediction, Predictor, load
from dataeff.core.run import train

__all__ = ["Prediction", "Predictor", "load", "train"]
__version__ = "0.1.0"
