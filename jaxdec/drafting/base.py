# SPDX-License-Identifier: Apache-2.0
"""The drafter contract: who guesses.

A drafter is a hashable frozen dataclass (its configuration) whose methods are pure functions of
arrays, so the whole decode loop compiles once per (batch, M, capacity). The loop calls

  ``start`` once after prefill, then per step ``propose`` -> (verify pass) -> ``observe``.

Three families fit: drafters with parameters of their own (heads, small models), drafters that run
part of the target (``context.target``), and drafters that ride in the verify pass through probe
nodes (``valid=False``, outputs handed to ``observe``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.tree import Tree
from jaxdec.models.config import Capture

Params = Any
DraftState = Any


@struct.dataclass
class Target:
  """The model that decides, as a drafter may use it."""

  model: Any = struct.field(pytree_node=False)  # jaxdec.models.Decoder
  params: Params
  state: Any  # DecoderState: what the target has read so far


@struct.dataclass
class TargetOutput:
  """What the target computed over T positions (prompt) or M nodes (verify pass).

  Attributes:
    hidden: post-final-norm hidden states, the input of the LM head.
    features: what ``drafter.capture`` asked for, one array each.
    logits: next-token logits; None for the prompt (only its last row is computed).
  """

  hidden: Float[Array, "B T D"]
  features: tuple[Float[Array, "B T D"], ...] = ()
  logits: Float[Array, "B T V"] | None = None


@struct.dataclass
class Prompt:
  """Prompts after prefill. ``tokens`` is right-padded; ``root`` is the first generated token.

  ``prefix``: embeddings the target read in place of a span of tokens (``jaxdec.models.Prefix``).
  """

  tokens: Int[Array, "B T"]
  lengths: Int[Array, "B"]
  root: Int[Array, "B"]
  prefix: Any = None


@struct.dataclass
class Context:
  """What ``propose`` may look at.

  Attributes:
    root: last emitted token; not in the cache yet. It sits at absolute position ``length``.
    length: number of tokens in the target's state (prompt and emitted tokens, root excluded).
    history: all tokens so far, root included: ``history[b, :length[b] + 1]`` is valid.
    target: module, parameters and state of the target.
    sampler: the sampling law (temperature etc.); static.
    keys: per-row request keys; noise for position t is keyed by ``fold_in(keys[b], t)``.
  """

  root: Int[Array, "B"]
  length: Int[Array, "B"]
  history: Int[Array, "B S"]
  target: Target
  sampler: Any = struct.field(pytree_node=False)
  keys: Any = None


@struct.dataclass
class Accepted:
  """Outcome of one verify pass.

  Attributes:
    path: node ids of the accepted path, root first; entries beyond ``count`` repeat the last one.
    count: nodes kept, root included (accepted drafts + 1); 0 for rows that had already finished.
    next_token: token drawn from the target after the path (correction or bonus): the next root.
    tokens: emitted this step, ``tokens[b, :count[b]]`` valid: drafts on the path, then next_token.
  """

  path: Int[Array, "B P"]
  count: Int[Array, "B"]
  next_token: Int[Array, "B"]
  tokens: Int[Array, "B P"]


class Drafter:
  """Base class: a parameterless, stateless drafter. Subclasses are frozen dataclasses.

  Attributes (properties or fields of subclasses):
    name: registry name.
    num_nodes: M, nodes per verify pass, root included (static).
    max_depth: D, deepest node (static).
    capture: layer inputs the target must record for ``start``/``observe`` (static); a plain tuple,
      or ``jaxdec.models.Capture`` where they should be normed.
    needs_prompt_hidden: ask prefill for hidden states/features of the whole prompt.
    trained: True when ``init_params`` returns parameters that must be trained.
    may_pass: the drafter sometimes has nothing to propose, and ``has_draft`` says when: such steps
      run as plain decoding, at the price of one token instead of M. Only for drafters that learn
      nothing from ``observe``, which plain steps skip.
  """

  name: ClassVar[str] = "drafter"
  trained: ClassVar[bool] = False
  needs_prompt_hidden: bool = False
  may_pass: ClassVar[bool] = False

  @property
  def num_nodes(self) -> int:
    raise NotImplementedError

  @property
  def max_depth(self) -> int:
    return self.num_nodes - 1

  @property
  def capture(self) -> Capture | tuple[int, ...]:
    return ()

  def init_params(self, rng: jax.Array, target: Target | None = None) -> Params:
    """Fresh parameters; ``target`` for drafters that start from the target's weights."""
    return {}

  def init_state(self, batch: int, capacity: int) -> DraftState:
    """State before any prompt was read; ``capacity`` bounds absolute positions."""
    return ()

  def start(
    self, params: Params, state: DraftState, prompt: Prompt, output: TargetOutput, target: Target
  ) -> DraftState:
    """Reads the prompt.

    ``output.hidden`` is ``[B,T,D]`` when ``needs_prompt_hidden``, else the last
    valid position of each row, ``[B,1,D]`` (features alike)."""
    return state

  def propose(
    self, params: Params, state: DraftState, context: Context, rng: jax.Array
  ) -> tuple[Tree, DraftState]:
    """One tree per row, ``context.root`` at node 0."""
    raise NotImplementedError

  def verify(self, params: Params, tree: Tree, context: Context) -> Any:
    """The target's pass over the tree: a ``DecoderOutput`` whose rows are nodes, state untouched.

    Drafters that ride in this pass override it, to put learned embeddings or states at probe nodes.
    Logits, and pending states, of all other nodes must stay what they are without the drafter: that
    alone is what makes its output the target's.
    """
    target = context.target
    return target.model.apply(
      {"params": target.params},
      tree.tokens,
      target.state,
      tree.topology,
      method="verify",
      capture=self.capture,
    )

  def observe(
    self,
    params: Params,
    state: DraftState,
    tree: Tree,
    accepted: Accepted,
    output: TargetOutput,
    context: Context,
  ) -> DraftState:
    """Learns from the verify pass.

    ``output`` rows are tree nodes (``[B,M,...]``); ``context`` is the one
    ``propose`` saw (so ``context.length`` is the position of the root)."""
    return state

  def has_draft(self, params: Params, state: DraftState, context: Context) -> Bool[Array, "B"]:
    """Where ``may_pass``: which rows ``propose`` would give a draft."""
    raise NotImplementedError
