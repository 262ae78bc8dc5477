"""Run the ``fastkd`` command: ``python -m fastkd``."""

import sys

from fastkd.cli import main

sys.exit(main())
