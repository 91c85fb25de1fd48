"""`python tools/bench NAME...`, from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose modules would be found as `cache`, `store`, ...
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from tools.bench.command import main

    sys.exit(main(sys.argv[1:]))
