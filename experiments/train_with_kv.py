"""The guide's training script: ``python experiments/train_with_kv.py RECIPE`` is ``kvgraft train RECIPE``."""

import sys

from kvgraft.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
