"""`python -m fedhpc`."""

import sys

from fedhpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
