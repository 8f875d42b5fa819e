"""`python -m flexsp`, also what torchrun starts."""

import sys

from flexsp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
