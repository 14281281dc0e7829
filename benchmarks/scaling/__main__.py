"""`python -m benchmarks.scaling`."""

import sys

from . import main

sys.exit(main())
