"""The same as ``python -m fastattn bench``."""

import sys

from fastattn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
