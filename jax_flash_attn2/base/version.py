"""The package's version, for those below the door that has it as `__version__`."""

VERSION = "0.1.0"
