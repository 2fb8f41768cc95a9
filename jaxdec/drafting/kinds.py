# SPDX-License-Identifier: Apache-2.0
"""Every drafter that is distilled, by name: one line here makes it known everywhere."""

from __future__ import annotations

from jaxdec.drafting.chimera import Chimera
from jaxdec.drafting.clover import Clover2
from jaxdec.drafting.clover1 import Clover
from jaxdec.drafting.dflash import DFlash
from jaxdec.drafting.dovetail import Dovetail
from jaxdec.drafting.dspark import DSpark
from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.falcon import Falcon
from jaxdec.drafting.flash_vlm import Flash
from jaxdec.drafting.fspad import Fspad
from jaxdec.drafting.hass import Hass
from jaxdec.drafting.hidden_transfer import HiddenTransfer
from jaxdec.drafting.hydra import Hydra, HydraPlusPlus
from jaxdec.drafting.masked_mtp import MaskedMTP
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.mtp import Mtp, MtpModules
from jaxdec.drafting.peagle import PEagle
from jaxdec.drafting.ppd import PPD
from jaxdec.drafting.specvlm import SpecVLM
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.drafting.vispec import ViSpec

_ALL: tuple[type[TrainedDrafter], ...] = (
  Medusa,
  Hydra,
  HydraPlusPlus,
  Eagle,
  Eagle3,
  PEagle,
  Dovetail,
  Mtp,
  MtpModules,
  Fspad,
  Hass,
  DFlash,
  DSpark,
  Chimera,
  Falcon,
  Clover,
  Clover2,
  PPD,
  MaskedMTP,
  HiddenTransfer,
  SpecVLM,
  ViSpec,
  Flash,
)

KINDS: dict[str, type[TrainedDrafter]] = {kind.name: kind for kind in _ALL}
