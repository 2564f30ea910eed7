"""Train a config, or go on with its run: python examples/train.py --config=configs/demo.py --workdir=runs/demo."""

import sys

from sde_diffusion.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
