"""What a run ran on: versions, hardware, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

VERSIONS = ("kvgraft", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


class Hardware(BaseModel):
    """The machine of a run; ``cpus`` are those that this process may use, ``memory_gb`` the machine's."""

    model_config = ConfigDict(extra="forbid")

    platform: str
    processor: str
    cpus: int
    memory_gb: float
    accelerators: list[str]


class Environment(BaseModel):
    """What a run ran on.

    Attributes:
        git_commit: of the checkout that kvgraft runs from, ``-dirty`` behind it where files were changed; None where
            it is installed from a package.
    """

    model_config = ConfigDict(extra="forbid")

    versions: dict[str, str]
    hardware: Hardware
    git_commit: str | None


def describe_environment() -> Environment:
    """This process's environment."""
    return Environment(
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in VERSIONS if _installed(name)},
        },
        hardware=Hardware(
            platform=platform.platform(),
            processor=_processor(),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
            accelerators=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        ),
        git_commit=_git_commit(),
    )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The processor's name; ``platform.processor`` knows only its family on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_commit() -> str | None:
    # A package in somebody's virtual environment lies in their checkout too, but is not part of it.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
