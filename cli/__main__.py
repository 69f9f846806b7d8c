"""`python -m loracle.cli`."""

from . import main

main()
