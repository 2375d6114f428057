"""Batches that are spread over workers, seen as one: means, embeddings and batch statistics of all of them.

With gradients averaged over workers afterwards, a loss that uses these has the gradient that one process with the whole
batch would give it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dataeff.core.runtime import Runtime


class _MeanOverWorkers(torch.autograd.Function):
    """Mean over workers, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runtime: Runtime) -> Tensor:  # type: ignore[override]
        ctx.runtime = runtime
        return runtime.all_reduce(x.detach().clone()) / runtime.world_size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.runtime.all_reduce(gradient.clone()) / ctx.runtime.world_size, None


def mean_over_workers(x: Tensor, runtime: Runtime | None) -> Tensor:
    """Mean of `x` over the workers, with its gradient; None: this process alone."""
    if runtime is None or runtime.world_size == 1:
        return x
    mean: Tensor = _MeanOverWorkers.apply(x, runtime)
    return mean


class _GatherOverWorkers(torch.autograd.Function):
    """Every worker's rows; backwards, the sum of what all workers' losses ask of the own ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runtime: Runtime) -> Tensor:  # type: ignore[override]
        ctx.runtime, ctx.own = runtime, slice(runtime.rank * len(x), (runtime.rank + 1) * len(x))
        rows = x.new_zeros(runtime.world_size * len(x), *x.shape[1:])
        rows[ctx.own] = x.detach()
        return runtime.all_reduce(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.runtime.all_reduce(gradient.clone())[ctx.own], None


def gather_over_workers(x: Tensor, runtime: Runtime | None) -> Tensor:
    """The rows of all workers (W * n, ...) in the order of ranks, from this worker's (n, ...), with their gradient."""
    if runtime is None or runtime.world_size == 1:
        return x
    rows: Tensor = _GatherOverWorkers.apply(x, runtime)
    return rows


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of all workers' images, on any device (PyTorch's own needs a GPU)."""

    runtime: Runtime

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = mean_over_workers(values.mean((0, 2, 3)), self.runtime)
        centred = values - mean[:, None, None]
        variance = mean_over_workers(centred.square().mean((0, 2, 3)), self.runtime)
        count = x.numel() // x.shape[1] * self.runtime.world_size
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_norm(network: nn.Module, runtime: Runtime) -> None:
    """Let every BatchNorm of `network` use the whole batch's statistics, where there are several workers."""
    if runtime.world_size == 1:
        return
    for module in network.modules():
        for name, layer in module.named_children():
            if type(layer) is nn.BatchNorm2d:
                shared = SharedBatchNorm2d(layer.num_features, layer.eps, layer.momentum)
                shared.load_state_dict(layer.state_dict())
                shared.runtime = runtime
                setattr(module, name, shared)
