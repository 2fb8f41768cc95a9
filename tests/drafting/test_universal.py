# SPDX-License-Identifier: Apache-2.0
"""The first four drafters under the tests that hold for all."""

from __future__ import annotations

from universal import Universal

from jaxdec.drafting import Eagle3, Hydra, HydraPlusPlus, Medusa


class TestMedusa(Universal):
  kind = Medusa


class TestHydra(Universal):
  kind = Hydra


class TestHydraPlusPlus(Universal):
  kind = HydraPlusPlus
  options = {"dropout": 0.0}  # noqa: RUF012


class TestEagle3(Universal):
  kind = Eagle3
