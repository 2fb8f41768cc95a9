# SPDX-License-Identifier: Apache-2.0
"""How a step's time splits between drafter and target, measured by running the two apart."""

from __future__ import annotations

import time

import jax
import numpy as np

from jaxdec.decoding import loop
from jaxdec.decoding.executables import Executable

STEPS = 24  # the median over these passes; the first two are warm-up


def _draft(carry, params, draft_params, request, *, model, drafter, sampler):
  _, tree, draft = loop.propose(carry, params, draft_params, request, model, drafter, sampler)
  return tree, draft


def _verify(carry, tree, params, draft_params, request, *, model, drafter, sampler, rule):
  context = loop.make_context(carry, params, request, model, sampler)
  out = drafter.verify(draft_params, tree, context)
  verdict = rule(tree, out.logits, sampler, request.keys, carry.length)
  state = model.apply(
    {"params": params}, carry.state, out.pending, verdict.path, verdict.count, method="commit"
  )
  return state, verdict


_draft_executable = Executable("profile_draft", _draft)
_verify_executable = Executable("profile_verify", _verify)
_step_executable = Executable("profile_step", loop._decode, donate=(0,))


def shares(
  carry: loop.Carry, params, draft_params, request: loop.Request, *, model, drafter, sampler, rule
) -> float:
  """The drafter's fraction of a step: proposing, against verifying and committing.

  Both parts run as their own programs on the carries of a few real steps, so dispatch costs enter
  both alike; medians are taken.
  """
  static = dict(model=model, drafter=drafter, sampler=sampler)
  draft_times, verify_times = [], []
  stopped = np.zeros(carry.root.shape, bool)
  for step in range(1, STEPS + 1):
    tree, _ = _draft_executable(carry, params, draft_params, request, **static)
    jax.block_until_ready(tree)
    t0 = time.perf_counter()
    jax.block_until_ready(_draft_executable(carry, params, draft_params, request, **static))
    t1 = time.perf_counter()
    jax.block_until_ready(
      _verify_executable(carry, tree, params, draft_params, request, **static, rule=rule)
    )
    t2 = time.perf_counter()
    draft_times.append(t1 - t0)
    verify_times.append(t2 - t1)
    carry = _step_executable(
      carry, params, draft_params, request, np.int32(step), stopped, **static, rule=rule
    )
    if bool(np.all(np.asarray(carry.done))):
      break
  draft, verify = (float(np.median(t[min(2, len(t) - 1) :])) for t in (draft_times, verify_times))
  return draft / (draft + verify)
