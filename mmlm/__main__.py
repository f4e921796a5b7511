"""``python -m mmlm``."""

import sys

from mmlm.cli import main

sys.exit(main())
