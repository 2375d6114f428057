"""What every command shares: one clear line for a user's mistake, and settings from a preset, a file and `--set`."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dataeff.core.config import merge, nearest, parse_overrides, read_yaml
from dataeff.core.registry import METHODS, get_method
from dataeff.data import open_splits

CONFIGS = Path(__file__).parent / "configs"


class UserError(Exception):
    """A failure that the user can mend; its text says how."""


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a user's mistake ends in one line on stderr and exit status 2.

    Set DATAEFF_TRACEBACK=1 to see where an error comes from.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("DATAEFF_TRACEBACK"):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """An exception as one sentence for people."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        advice = {
            errno.ENOSPC: "; free some space or choose another --out or --storage",
            errno.EDQUOT: "; free some space or choose another --out or --storage",
            errno.EFBIG: "; raise the file size limit or choose another --out or --storage",
            errno.EACCES: "; choose a folder that you may write to",
            errno.EROFS: "; choose a folder that you may write to",
            errno.ENOTDIR: "; a part of this path is a file, choose another folder",
        }.get(error.errno or 0, "")
        return f"{where}{error.strerror}{advice}"
    return " ".join(str(error).split()) or type(error).__name__


def check_data(methods: Iterable[str], data: str) -> None:
    """Open the data as each method does, so that a mistake in it shows before a cluster is asked for anything."""
    for opener in {get_method(method).data_opener() or open_splits for method in methods}:
        opener(data)


def add_folder_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """`--out` with `--resume` and `--overwrite`; `what` the folder holds, such as "run"."""
    parser.add_argument("--out", required=True, type=Path, help=f"folder of the {what}")
    parser.add_argument("--resume", action="store_true", help=f"go on with the {what} in --out")
    parser.add_argument("--overwrite", action="store_true", help=f"replace the {what} in --out")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="a shipped preset (cpu, gpu, paper, ...) or a YAML file"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")


def read_settings(method: str, config: str | None, overrides: Sequence[str], default_preset: str) -> dict[str, Any]:
    """The settings that differ from a method's defaults: a preset or file, with `--set` laid over it.

    Raises:
        ValueError: no such preset, or a malformed override.
        FileNotFoundError: no such file.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} ({nearest(method, METHODS)})")
    presets = {path.stem: path for path in (CONFIGS / method).glob("*.yaml")}
    name = config or default_preset
    if name in presets:
        base = read_yaml(presets[name])
    elif config and (config.endswith((".yaml", ".yml")) or os.sep in config):
        base = read_yaml(config)
    elif config:
        raise ValueError(f"--config {config!r}: no such preset ({nearest(config, presets)}) and not a YAML file")
    else:
        base = {}
    return merge(base, parse_overrides(overrides))
