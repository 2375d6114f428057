"""Precision and compilation are the runtime's; a method does not know about them."""

import platform
import resource
import shutil

import pytest
import torch

from dataeff.core.config import parse_config
from dataeff.core.runtime import Runtime, RuntimeConfig
from dataeff.dynamic.skipnet.experiment import SkipNetConfig, SkipNetExperiment

TINY = {
    "depth": 8, "widths": [4, 8, 16], "augment": "none", "report_every": 4, "gate_bias_init": 0.5,
    "stage1": {"iterations": 4, "batch": 32, "lr": 0.01}, "stage2": {"iterations": 4, "batch": 32},
}  # fmt: skip


def losses(options: RuntimeConfig) -> list[float]:
    experiment = SkipNetExperiment(parse_config(SkipNetConfig, TINY), "digits", Runtime("cpu", options))
    return [experiment.step()["train_loss"] for _ in range(experiment.total_steps)]


def test_bfloat16_trains_close_to_float32_and_is_not_the_same_arithmetic() -> None:
    exact, rounded = losses(RuntimeConfig()), losses(RuntimeConfig(precision="bf16"))
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert rounded != exact


def test_bfloat16_leaves_the_weights_in_float32() -> None:
    experiment = SkipNetExperiment(
        parse_config(SkipNetConfig, TINY), "digits", Runtime("cpu", RuntimeConfig(precision="bf16"))
    )
    experiment.step()
    assert {value.dtype for value in experiment.model.parameters()} == {torch.float32}


def test_a_gpu_that_is_not_there_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is visible"):
        Runtime("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        Runtime("cpu", RuntimeConfig(compile=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which decides by itself")
def test_memory_that_was_freed_is_taken_again_without_the_kernel() -> None:
    Runtime("cpu")

    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(page_faults() for _ in range(6)) < 100  # of 32,768 pages; the first rounds still find their places
