"""Draw samples and write a picture: python examples/sample.py --solver ode.

Without --workdir, from the model that ships with the package; --help lists the solvers and the other flags.
"""

import sys

from sde_diffusion.cli import main

sys.exit(main(["sample", *sys.argv[1:]]))
