"""``python -m vmnet.cmd``: the ``vmnet`` command without an installed script."""

import sys

from vmnet.cmd.main import main

sys.exit(main())
