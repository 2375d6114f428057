"""The Runtime of a Ray Train worker."""

import ray.train.torch

from dataeff.core.runtime import Runtime, RuntimeConfig


class RayTrainRuntime(Runtime):
    """One Ray Train worker. Ray has set up the process group and chosen the device; the rest is `Runtime`'s."""

    def __init__(self, options: RuntimeConfig) -> None:
        super().__init__(ray.train.torch.get_device(), options)
