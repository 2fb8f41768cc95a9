# SPDX-License-Identifier: Apache-2.0
"""Parallel Prompt Decoding: prompts, ensembles."""

from __future__ import annotations

from probing import Probing

from jaxdec.drafting.ppd import PPD


class TestPPD(Probing):
  kind = PPD
