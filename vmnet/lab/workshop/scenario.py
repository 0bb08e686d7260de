"""All sections, in their order."""

from collections.abc import Sequence
from typing import Final

from vmnet.lab.workshop.life_cycle import LIFE_CYCLE
from vmnet.lab.workshop.pods import PODS
from vmnet.lab.workshop.policies import POLICIES
from vmnet.lab.workshop.services import SERVICES
from vmnet.lab.workshop.steps import Section

SECTIONS: Final[Sequence[Section]] = (*PODS, *SERVICES, *POLICIES, *LIFE_CYCLE)
