"""`lgd build-shards` as a job: `ray job submit --working-dir . -- python tools/build_shards.py ...`."""

import sys
from pathlib import Path

# A job runs from a checkout, where lgd need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lgd.cli import main

if __name__ == "__main__":
    sys.exit(main(["build-shards", *sys.argv[1:]]))
