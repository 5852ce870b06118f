"""``python -m kleash.cli``: the ``kleash`` command without its script."""

import sys

from kleash.cli.main import main

sys.exit(main())
