"""`python -m bitsmith` is the `bitsmith` command."""

import sys

from bitsmith.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
