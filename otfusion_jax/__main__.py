"""Makes `python -m otfusion_jax <command>` run the command line."""

import sys

from otfusion_jax.cli.main import main

sys.exit(main())
