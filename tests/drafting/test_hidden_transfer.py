# SPDX-License-Identifier: Apache-2.0
"""Hidden Transfer: pseudo states in the upper layers."""

from __future__ import annotations

from probing import Probing

from jaxdec.drafting.hidden_transfer import HiddenTransfer


class TestHiddenTransfer(Probing):
  kind = HiddenTransfer
  options = {"anchors": None, "layers": (1, 1, 2)}  # noqa: RUF012
