# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and result folders: how a run is told to people and programs."""

from __future__ import annotations

from jaxdec.report.folders import numbered
from jaxdec.report.machine import describe, versions
from jaxdec.report.tables import Column, Table, plain

__all__ = ["Column", "Table", "describe", "numbered", "plain", "versions"]
