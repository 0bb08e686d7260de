"""``python -m vmnet.lab.guest``: put the guest's image into the cache. A lab has no way to the package sources."""

import sys

from vmnet.lab.errors import LabError
from vmnet.lab.guest.image import guest_image


def main() -> None:
    """Entry point."""
    try:
        image = guest_image(lambda step: print(step, file=sys.stderr))
    except LabError as error:
        sys.exit(f"{error}{f'; {error.next_step}' if error.next_step else ''}")
    print(f"Linux {image.kernel_release}: {image.kernel.parent}")


if __name__ == "__main__":
    main()
