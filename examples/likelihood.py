"""Bits/dim of 64 test images with their errors, and a histogram: python examples/likelihood.py --count=256.

Called again it goes on with the images that are left. Without --workdir, of the model that ships with the package;
--help lists the other flags.
"""

import sys

from sde_diffusion.cli import main

sys.exit(main(["likelihood", "--count=64", *sys.argv[1:]]))
