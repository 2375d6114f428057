"""python -m ray_jobs.demo: the main job from images to an HTTP endpoint, on the embedded digits, in a few minutes."""

import argparse
import io
import json
import logging
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import torch

import dataeff
from dataeff.core.run import SUMMARY
from dataeff.data import ImageSource, open_splits
from ray_jobs import report, train, tune
from ray_jobs.cli import UserError, run_command
from ray_jobs.cluster import free_port
from ray_jobs.training import elapsed

DATA = "digits"
TRIALS = 6
REQUESTS = 240  # test images sent over HTTP


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    out = args.out

    def job(name: str, *overrides: str) -> dict[str, Any]:
        print(f"\n== {name}", flush=True)
        settings = [word for override in overrides for word in ("--set", override)]
        common = ["skipnet", "--data", DATA, "--out", str(out / name), "--config", "digits", "--overwrite"]
        return train.main([*common, "--workers", "2", *settings])

    summaries = {
        "base ResNet": job("base", "arm=base", "gate=none"),
        "SkipNet SP": job("sp", "arm=sp"),
        "SkipNet SP + HRL": job("hrl", f"start_from={out / 'sp' / 'artifact'}"),
    }
    print(f"\n== sweep over alpha, {TRIALS} Optuna trials", flush=True)
    front = tune.main(
        ["skipnet", "--sweep", "skipnet_alpha", "--data", DATA, "--out", str(out / "sweep"), "--config", "digits"]
        + ["--trials", str(TRIALS), "--set", f"start_from={out / 'sp' / 'artifact'}", "--set", "report_every=100"]
        + ["--reference", str(out / "base"), "--overwrite"]
    )
    artifact = out / "sweep" / front["artifact"]
    chosen = json.loads((artifact.parent / SUMMARY).read_text(encoding="utf-8"))
    summaries[f"chosen (trial {front['chosen']})"] = chosen
    print("\n== serving the chosen network over HTTP", flush=True)
    checked, seconds = serve_and_check(artifact, open_splits(DATA).test)
    print()
    page = report.main([str(out), "--title", "dataeff demo: SkipNet on digits"])
    print_table(summaries)
    print(
        f"HTTP: {checked} test images, every answer equal to the offline prediction, {checked / seconds:.0f} images/s"
    )
    print(f"report: {page.absolute()}")
    print(f"the whole demo took {elapsed(started)}")


def serve_and_check(artifact: Path, images: ImageSource) -> tuple[int, float]:
    """Serve an artifact, send images as PNGs, and compare each answer with the offline prediction.

    Returns:
        the number of images, and the seconds that the requests took.

    Raises:
        UserError: an answer differs.
    """
    from ray import serve

    from serve.app import model

    rows = range(min(REQUESTS, len(images)))
    pictures = [PIL.Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images.images(rows)]
    predictor = dataeff.load(artifact)
    with torch.inference_mode():
        offline = predictor.predict(predictor.preprocess(pictures))
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(
            model({"artifact": str(artifact)}), name="demo", route_prefix="/", logging_config={"log_level": "ERROR"}
        )
        url = f"http://127.0.0.1:{port}/predict"
        started = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda picture: post(url, picture), pictures))
        seconds = time.perf_counter() - started
    finally:
        serve.delete("demo")
    for number, answer in enumerate(answers):
        label, macs = int(offline.probabilities[number].argmax()), float(offline.macs[number])
        if answer["label"] != label or answer["macs"] != macs:
            raise UserError(
                f"test image {number}: HTTP says class {answer['label']}, offline {label}; please report this"
            )
    return len(answers), seconds


def post(url: str, picture: PIL.Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    request = urllib.request.Request(url, buffer.getvalue(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        loaded: dict[str, Any] = json.load(answer)
    return loaded


def print_table(summaries: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'network':22s} {'test accuracy':>13s} {'multiply-adds':>14s} {'saved':>7s} {'blocks run':>11s}")
    for name, summary in summaries.items():
        metrics = summary["metrics"]
        print(
            f"{name:22s} {metrics['test_accuracy']:13.2%} {metrics['test_macs']:14,.0f}"
            f" {metrics['test_reduction']:7.1%} {metrics['test_executed_share']:11.1%}"
        )


if __name__ == "__main__":
    run_command(main)
