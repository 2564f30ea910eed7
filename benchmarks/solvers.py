"""All that is measured of the solvers: make peers; SDE_DIFFUSION_DATA=FOLDER python benchmarks/solvers.py [TABLE ...].

Each table is a module beside this one, with its own options; without names all of them run, for some hours on one
thread. They print markdown and draw the pictures of docs/solvers.md. What times anything wants an idle machine.
"""

import argparse
import time
from collections.abc import Callable

import adaptive
import auto
import calibrated
import deterministic
import engine
import image_solvers
import orders
import overhead
import peers
import stochastic

TABLES: dict[str, Callable[[], None]] = {
    "orders": orders.run,
    "peers": peers.run,
    "deterministic": deterministic.run,
    "auto": auto.run,
    "calibrated": calibrated.run,
    "stochastic": stochastic.run,
    "adaptive": adaptive.run,
    "overhead": overhead.run,
    "engine": engine.run,
    "images": image_solvers.run,
}


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE", help=", ".join(TABLES))
    for name in parser.parse_args().tables or TABLES:
        started = time.perf_counter()
        print(f"\n## {name}\n", flush=True)
        TABLES[name]()
        print(f"\n{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
