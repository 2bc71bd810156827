"""The command line: one file for each command, which reads its arguments and calls one function."""

from __future__ import annotations

import errno
import logging
import os
import sys

from rich.logging import RichHandler

# isort: off
# Importing a command adds it to the app; this is their order in `kvgraft --help`.
from kvgraft.cli import (  # noqa: F401
    plan,
    cache,
    train,
    compare,
    evaluate,
    report,
    note,
    fit,
    graft,
    chat,
    ablate,
    cut,
    migrate,
)

# isort: on
from kvgraft.cli.shared import app, error_console


def main() -> None:
    """Entry point of ``kvgraft``: errors meant for users are printed without a traceback."""
    from kvgraft.errors import KVGraftError

    handler = RichHandler(console=error_console, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("kvgraft").setLevel(logging.INFO)
    # Warnings of transformers would cut through our bars; what matters of them comes back as an error.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # These two print their warnings themselves; our handler would print each once more.
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).propagate = False
    try:
        app()
    except KVGraftError as error:
        error_console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"error: {error}; make room and run the same command again, with --resume where it takes that"
        elif error.errno is None or error.filename is None:
            raise
        else:
            message = f"error: {error.filename}: {error.strerror}; give a place that can be read and written"
        error_console.print(message, style="red", highlight=False, soft_wrap=True)
        sys.exit(1)
