"""`python -m benchmarks.codegen`."""

import sys

from .command import main

sys.exit(main())
