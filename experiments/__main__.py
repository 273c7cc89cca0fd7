"""Makes `python -m experiments <study>` run the command line."""

import sys
import warnings

import otfusion_jax as otf
from experiments.cli import main

# What an average is without statistics of its own is measured, beside what it is with them.
warnings.simplefilter("ignore", otf.StatisticsWarning)
sys.exit(main())
