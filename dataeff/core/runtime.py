"""Where an experiment runs. A method touches devices, processes, precision and compilation only through a Runtime."""

import ctypes
import platform
import resource
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataeff.core.config import Config

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep up to a GiB of the memory that tensors freed (glibc; elsewhere nothing is done).

    glibc gives it back at once, and the kernel clears every page of it before the next tensor has it again: 259 instead
    of 182 ms for a forward pass of 64 images through a ResNet-110, a quarter of the time of training on some machines.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, 2**30)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it accepts


def set_up_process(threads: int) -> None:
    """`threads` for PyTorch's operators, and `keep_freed_memory`: for a process of networks that has no `Runtime`."""
    torch.set_num_threads(threads)
    keep_freed_memory()


class RuntimeConfig(Config):
    """Options of the machine, not of the method: results differ by rounding only."""

    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of forward passes; weights stay float32")
    compile: bool = Field(False, description="torch.compile the network")
    loader_workers: int = Field(0, ge=0, le=64, description="processes that decode images, per training worker")


class Runtime:
    """One process, or one rank of an initialised `torch.distributed` group.

    Args:
        device: "cpu", "cuda", "cuda:1"; None takes a GPU where there is one.
        options: precision, compilation, loader processes.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """

    def __init__(self, device: str | torch.device | None = None, options: RuntimeConfig | None = None) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device {device}: no GPU is visible to PyTorch here; leave the GPU option out to run on the CPU"
            )
        keep_freed_memory()
        self.options = options or RuntimeConfig()
        compiler = shutil.which("g++") or shutil.which("clang++")
        if self.options.compile and self.device.type == "cpu" and not compiler:
            raise ValueError("compile: torch.compile on the CPU needs a C++ compiler; install g++ or leave it out")

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def place(self, model: nn.Module) -> None:
        """Move `model` to the device, in the memory layout that convolutions are fastest in."""
        model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on CPUs

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Place `model` and return the module to call in training: compiled, in the chosen precision, and with
        gradients averaged over ranks. `model` itself keeps the weights and their names. Call it again when other
        parameters require a gradient than before."""
        self.place(model)
        if self.options.compile:
            model.compile()
        wrapped: nn.Module = model
        if self.world_size > 1 and any(parameter.requires_grad for parameter in model.parameters()):
            devices = [self.device] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return _Autocast(wrapped, self.device.type) if self.options.precision == "bf16" else wrapped

    def wrap_loader(self, loader: Iterable[T]) -> Iterator[T]:
        """Batches of `loader` with their tensors on the device."""
        for batch in loader:
            yield self.to_device(batch)

    def to_device(self, batch: Any) -> Any:
        """A tensor, or a named tuple of tensors, on the device; images in the layout of the network."""
        if isinstance(batch, Tensor):
            layout = torch.channels_last if batch.dim() == 4 else torch.preserve_format
            return batch.to(self.device, non_blocking=True, memory_format=layout)
        return type(batch)(*(self.to_device(part) for part in batch))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def peak_memory(self) -> int:
        """Most bytes so far: of this GPU that tensors took, or of main memory that this process had."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def sync_buffers(self, model: nn.Module) -> None:
        """Give every rank the main rank's buffers (BatchNorm statistics), so that all evaluate the same network."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


class _Autocast(nn.Module):
    def __init__(self, module: nn.Module, device_type: str) -> None:
        super().__init__()
        self.module = module
        self.device_type = device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.module(*args, **kwargs)
