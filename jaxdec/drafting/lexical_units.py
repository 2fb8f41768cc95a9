# SPDX-License-Identifier: Apache-2.0
"""Lexical Unit Decoding (arXiv 2405.15208): a model that answers placeholders with what comes next.

The model itself is tuned (``jaxdec.training.tasks.lexical``): behind a text it reads PAD tokens,
and at the i-th of them says the token i places further on, where the model is sure of it. What is
tuned is the target; this drafter has no parameters:

  text x_1 .. x_t, PAD, .., PAD   ->   x_{t+1} (from x_t), x_{t+2}, .., x_{t+k}

By default those are drafts, behind every node of the tree hang k - 1 PADs of its own, and the
output is the tuned model's own under any lossless rule. That is ``masked_mtp`` without anything
learned beside the model. The paper's decoding is ``confidence=0.9`` with rule ``unverified_lossy``:
a draft is made as long as its probability and those of all drafts before it reach ``confidence``,
and what is drafted is emitted, so a pass reads the tokens of the last one and k - 1 PADs: 2k - 1
rows.

Decided here: a draft equal to the token before it ends the run of confident ones; a text is cut
into units from the left, and a unit takes all the sure tokens it may.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.base import Context, Target
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.probes import ProbeDrafter, Probes
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError

UNIT = "unit_offset"  # in a batch: what ``unit_offsets`` says of its tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LexicalUnits(ProbeDrafter):
  """Attributes:

  pad: id of the token the model was tuned to see ahead with; one that no text has.
  num_heads: k - 1, PADs behind a text; units have k tokens at most.
  confidence: draft only what is at least so probable; None: everything.
  """

  name: ClassVar[str] = "lexical_units"
  trained: ClassVar[bool] = False

  pad: int
  num_heads: int = 3
  confidence: float | None = None
  objective: Objective = "hard"
  normalize: str = "global"

  def __post_init__(self):
    if not 0 <= self.pad < self.vocab_size:
      raise UserError(f"pad must be a token of the vocabulary of {self.vocab_size}, got {self.pad}")
    if self.confidence is not None:
      if not self.confidence > 0:
        raise UserError(f"confidence must be positive, got {self.confidence}; None drafts all")
      if self.shape != StaticTree.chain(self.shape.max_depth):
        raise UserError("confident drafts are a chain; leave tree or confidence out")
    super().__post_init__()

  @classmethod
  def from_name(cls, config=None, **options):
    if config is None or "pad" not in options:
      raise UserError(
        "drafter 'lexical_units' belongs to a model tuned with placeholders; build it with "
        "config=<the model's configuration> and pad=<its placeholder token>"
      )
    return cls.for_target(config, **options)

  @property
  def takes_trees(self) -> bool:
    return self.confidence is None

  def init_boxed(self, rng, target):
    return {}

  # The pass: a PAD is an ordinary token of the model.

  def run(self, params, model, target_params, *args, **kwargs):
    pad = embed(Target(model, target_params, None), jnp.full((1, 1), self.pad), self.dtype)
    return super().run(pad[0, 0], model, target_params, *args, **kwargs)

  def rows(self, params, layer, x, probes: Probes, before):
    return None if layer else jnp.broadcast_to(params, (*probes.anchor.shape, params.shape[-1]))

  def probes(self, tree):
    # Whatever is confident will be the end of the text where it isn't verified.
    return super().probes(tree) if self.confidence is None else self.behind_last(tree)

  def propose(self, params, state, context: Context, rng):
    tree, state = super().propose(params, state, context, rng)
    if self.confidence is None:
      return tree, state
    p = jax.nn.softmax(self.head(params, context.target, 1, state.hidden), axis=-1)
    drafts, before = tree.tokens[:, 1:], tree.tokens[:, :-1]
    sure = jnp.take_along_axis(p, drafts[..., None], axis=-1)[..., 0] >= self.confidence
    run = jnp.cumprod(sure & (drafts != before), axis=1).astype(bool)
    tree = tree.replace(valid=tree.valid.at[:, 1:].set(tree.valid[:, 1:] & run))
    return tree.replace(probes=self.probes(tree)), state

  # Training: of the labels behind a text only those of the unit that begins there.

  def learnable(self, batch):
    slots = super().learnable(batch)
    return slots if UNIT not in batch else slots * (batch[UNIT][:, 2:] == 1)

  def examples(self, params, target, output, batch, rng=None):
    slots = self._slots_of(batch, rng)
    for example in super().examples(params, target, output, batch, rng):
      weights = example.weights
      if UNIT in batch:
        label = jnp.minimum(slots + 1 + example.depth, batch["tokens"].shape[1] - 1)
        offset = jnp.take_along_axis(batch[UNIT], label, axis=1)
        weights = weights * (offset == example.depth)
      yield example.replace(weights=weights)


def unit_offsets(sure: Bool[Array, "B T"], size: int) -> Int[Array, "B T"]:
  """Each token's place in its lexical unit; 0 begins one.

  A unit is a token and the sure tokens after it, up to ``size`` tokens.

  Args:
    sure: whether the model, given the text before a token, is sure of it; False where a document
      begins.
  """

  def place(before, sure):
    here = jnp.where(sure & (before + 1 < size), before + 1, 0)
    return here, here

  start = jnp.zeros(sure.shape[0], jnp.int32)
  return jax.lax.scan(place, start, sure.T)[1].T
