"""Which kubectl the lab uses: the machine's own, else the one that was installed from PyPI beside this interpreter."""

import os
import shutil
import sys
from pathlib import Path

from vmnet.lab.errors import LabError


def find() -> Path:
    """Path of the program. Raises LabError."""
    found = shutil.which("kubectl")
    if found:
        return Path(found)
    packaged = Path(sys.executable).parent / "kubectl"
    if os.access(packaged, os.X_OK):
        return packaged
    raise LabError("no kubectl on this machine", "install it with: pip install 'vmnet[lab]'")
