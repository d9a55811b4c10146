"""`python -m fedhpc`."""

import sys

from fedhpc.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
