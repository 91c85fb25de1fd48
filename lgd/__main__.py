"""`python -m lgd VERB`."""

import sys

from lgd.cli import main

sys.exit(main())
