"""``python -m vmnet_dns zone.toml``."""

import sys

from vmnet_dns.server import main

if __name__ == "__main__":
    sys.exit(main())
