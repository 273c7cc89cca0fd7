"""Makes `python -m experiments <study>` run the command line."""

import sys

from experiments.cli import main

sys.exit(main())
