"""The variational bound of test images in bits/dim, with both standard errors: python examples/bound.py --count 64.

By default from 64 of the 1000 terms, a few minutes on a CPU. Without --workdir, of the model that ships with the
package; --help lists the other flags.
"""

import sys

from sde_diffusion.cli import main

sys.exit(main(["bound", "--terms=64", *sys.argv[1:]]))
