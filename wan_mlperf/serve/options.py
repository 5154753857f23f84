"""The server's own options from the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
import socket
from dataclasses import dataclass
from pathlib import Path

from wan_mlperf.errors import BadInput
from wan_mlperf.files import writable_folder
from wan_mlperf.inputs import paths
from wan_mlperf.inputs.text import read_text
from wan_mlperf.serve import server
from wan_mlperf.serve.wanted import Policy


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where videos are kept, the token, which videos may be asked for, and how many jobs may wait."""

    folder: Path
    latents: Path | None
    token: str | None
    policy: Policy
    most_waiting: int
    drain_s: float


def check(options: argparse.Namespace) -> Options:
    """Check the options that do not need the model. Raises BadInput."""
    if options.any_workload and options.recipe_workload:
        raise BadInput("--any-workload with --recipe-workload; allowed: one of them")
    if not 1 <= options.most_waiting <= 1_000_000:
        raise BadInput(f"--most-waiting: {options.most_waiting} is not allowed; allowed: 1 to 1,000,000")
    if not 0 <= options.drain <= 3600:
        raise BadInput(f"--drain: {options.drain} is not allowed; allowed: 0 to 3600 s")
    latents = None
    if options.latents is not None:
        if not paths.is_folder(Path(options.latents), what="--latents"):
            raise BadInput(f"--latents: {options.latents!r} is not a folder; allowed: a folder of tensor files")
        latents = Path(options.latents).resolve()
    token = read_token(options.token_file) if options.token_file is not None else None
    return Options(
        folder=writable_folder(Path(options.folder), what="folder"),
        latents=latents,
        token=token,
        policy="any" if options.any_workload else "recipe" if options.recipe_workload else "fixed",
        most_waiting=options.most_waiting,
        drain_s=options.drain,
    )


def take_port(options: argparse.Namespace) -> socket.socket:
    """Bind the port, on rank 0. Raises BadInput."""
    if not 0 <= options.port <= 65535:
        raise BadInput(f"--port: {options.port} is not allowed; allowed: 0 to 65535")
    return server.bind(options.host, options.port)


def read_token(file: str) -> str:
    """Read a token. Raises BadInput; the token itself is never printed."""
    token = read_text(file, what="--token-file", allowed="a file with one line").strip()
    if not (token and token.isascii() and token.isprintable()) or " " in token or len(token) > 1000:
        raise BadInput(f"--token-file: {file!r} does not hold one line of 1 to 1000 printable ASCII characters without spaces")
    return token
