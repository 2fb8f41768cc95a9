# SPDX-License-Identifier: Apache-2.0
"""``jaxdec plan``: mistakes are one sentence; what needs libtpu is in test_plan_aot.py."""

from __future__ import annotations

import pytest

from jaxdec.errors import UserError
from jaxdec.parallel.plan import parse, plan
from pallas_kernels import _aot
from tests.cli.command import assert_sentence, run_jaxdec

CONFIG = "experiments/plan/config.py:tiny"


@pytest.mark.parametrize(
  ("args", "says"),
  [
    ((CONFIG, "--topology", "v5q:4x4x4"), "did you mean 'v5p'?"),
    ((CONFIG, "--topology", "v5e:3x3"), "near shapes are"),
    (("missing.py", "--topology", "v5e:2x2"), "does not exist"),
    ((CONFIG, "--topology", "v5e:2x2", "--price", "-1"), "--price must be positive"),
    ((CONFIG,), "--topology"),
  ],
)
def test_mistakes_are_answered_before_jax_is_loaded(args, says):
  outcome = run_jaxdec("plan", *args)
  assert_sentence(outcome, says)
  assert outcome.heavy == []


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(_aot, "available", lambda: False)
  with pytest.raises(UserError, match=r"pip install 'jaxdec\[aot\]'"):
    parse("v5e:2x2").devices()


def test_an_unknown_step():
  with pytest.raises(UserError, match="did you mean 'decode'"):
    plan(None, "v5e:2x2", step="decoding")
