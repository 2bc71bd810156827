"""``python -m kvgraft``, as ``accelerate launch -m kvgraft`` needs it."""

from kvgraft.cli import main

main()
