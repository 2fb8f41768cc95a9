# SPDX-License-Identifier: Apache-2.0
"""Every drafter that is distilled, by name: one line here makes it known everywhere."""

from __future__ import annotations

from jaxdec.drafting.clover import Clover2
from jaxdec.drafting.clover1 import Clover
from jaxdec.drafting.dflash import DFlash
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.hydra import Hydra, HydraPlusPlus
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.trained import TrainedDrafter

_ALL: tuple[type[TrainedDrafter], ...] = (
  Medusa,
  Hydra,
  HydraPlusPlus,
  Eagle3,
  DFlash,
  Clover,
  Clover2,
)

KINDS: dict[str, type[TrainedDrafter]] = {kind.name: kind for kind in _ALL}
