"""python -m sde_diffusion COMMAND: see sde_diffusion/cli.py."""

import sys

from sde_diffusion.cli import main

sys.exit(main(sys.argv[1:]))
