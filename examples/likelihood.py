"""Bits/dim of test images, with both standard errors: python examples/likelihood.py --count 64.

Without --workdir, of the model that ships with the package; --help lists the other flags.
"""

import sys

from sde_diffusion.cli import main

sys.exit(main(["likelihood", *sys.argv[1:]]))
