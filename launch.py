"""Training's front door in a checkout; `gpt2-jax train` is the same.

    python launch.py --config=configs/small.py[:RECIPE] [--workdir=DIR] [--config.SECTION.KEY=VALUE …]

The same command again continues a run that was stopped or killed. On several hosts it is started on
each; where no cluster is found, with --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import sys
import time

BEGAN = time.monotonic()  # imports take a second

from gpt2_jax.cli.train import main, parse_flags, use_huge_pages  # noqa: E402, F401

if __name__ == '__main__':
  use_huge_pages()
  sys.exit(main(sys.argv, BEGAN))
