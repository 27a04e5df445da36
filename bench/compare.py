#!/usr/bin/env python3
"""fastattn beside the installed peers: the same as ``python -m fastattn bench``, with all its options.

bench/compare.py --threads 1,2 --json bench/results/<machine>.json --plot bench/results/<machine>.png
"""

import sys

from fastattn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
