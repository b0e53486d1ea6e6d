#!/usr/bin/env python3
"""The one door to the host: sets ComfyUI up, starts it with this pack, runs workflows, tests and scripts on it.

Standard library only, so that it runs before anything is installed. `python3 tools/host.py --help` lists the commands.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("tools/host.py needs Python 3.10 or newer; this is %d.%d." % sys.version_info[:2])

from hostlib.cli import main
from hostlib.process import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
