"""The variational bound of 64 test images in bits/dim with its errors, and a histogram: python examples/bound.py.

By default from 64 of the 1000 terms, a few minutes on a CPU; called again it goes on with the images that are left.
Without --workdir, of the model that ships with the package; --help lists the other flags.
"""

import sys

from sde_diffusion.cli import main

sys.exit(main(["bound", "--count=64", "--terms=64", *sys.argv[1:]]))
