"""python -m sde_diffusion train|sample|likelihood."""

import sys

from sde_diffusion.cli import main

sys.exit(main(sys.argv[1:]))
