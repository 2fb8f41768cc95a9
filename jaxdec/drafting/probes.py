# SPDX-License-Identifier: Apache-2.0
"""Drafters that ride in the target's own pass, on rows hung behind the nodes of the tree.

A probe row of offset i behind node a stands at the position of a plus i and sees what a sees, a
itself, and the probes of smaller offsets of its own group (same node, same member), never those of
others; no node ever sees a probe. At its end the target's state guesses the token ``i + 1`` places
after a, so the probes of the last accepted node hold the drafts of depth i = 1..K of the next tree.
Verification and drafting are one pass. Probes come after all nodes, so the commit, which picks
accepted nodes, never meets one, and nothing of them enters the cache.

In training a text is such a tree too: its tokens are a chain of nodes over an empty state, and any
of its slots may carry probes. One function (``ProbeDrafter.run``) serves both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.trained import Example, TrainedDrafter, label_weights, last_accepted
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from jaxdec.mixers import GatedDeltaConfig
from jaxdec.mixers.base import Topology, gather_nodes
from jaxdec.models.decoder import Decoder, DecoderOutput, unstack_layers

BEFORE = -1  # the anchor that is the last token of the state


@struct.dataclass
class Probes:
  """Rows behind nodes, R of them.

  Attributes:
    anchor: the node each row hangs behind; ``BEFORE``: the last token of the target's state.
    offset: 1..K. Rows are ordered by it.
    member: rows of one anchor and one member form a group; a group has one row of each offset.
    counts: how many rows have offset 1, 2, ..., K, where that is known at trace time.
    linked: a row sees those of smaller offsets of its group; False: none but itself.
  """

  anchor: Int[Array, "B R"]
  offset: Int[Array, "B R"]
  member: Int[Array, "B R"]
  counts: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
  linked: bool = struct.field(pytree_node=False, default=True)

  @classmethod
  def hang(
    cls, anchors: Int[Array, "B A"], layout: tuple[tuple[int, int], ...], linked: bool = True
  ) -> Probes:
    """Behind each of A anchors a row for each ``(offset, member)`` of the layout, which ascends."""
    batch, count = anchors.shape
    offset, member = np.repeat(np.array(layout, np.int32).reshape(-1, 2).T, count, axis=1)
    counts = tuple(int(n) for n in np.bincount(offset)[1:])
    return cls(
      jnp.tile(anchors, (1, len(layout))),
      jnp.broadcast_to(offset, (batch, offset.size)),
      jnp.broadcast_to(member, (batch, member.size)),
      counts,
      linked,
    )

  def extend(self, nodes: Topology) -> Topology:
    """The topology of the nodes and, behind them, these rows."""
    inside = self.anchor >= 0
    index = jnp.maximum(self.anchor, 0)
    base = jnp.where(inside, jnp.take_along_axis(nodes.depth, index, axis=1), -1)
    above = gather_nodes(nodes.ancestors, index) & inside[..., None]  # [B,R,M]

    def equal(x):
      return x[:, :, None] == x[:, None, :]

    group = equal(self.anchor) & equal(self.member)
    order = jnp.greater_equal if self.linked else jnp.equal
    group = group & order(self.offset[:, :, None], self.offset[:, None, :])
    below = jnp.zeros((*nodes.ancestors.shape[:2], self.anchor.shape[1]), bool)
    ancestors = jnp.concatenate(
      [
        jnp.concatenate([nodes.ancestors, below], axis=2),
        jnp.concatenate([above, group], axis=2),
      ],
      axis=1,
    )
    return Topology(jnp.concatenate([nodes.depth, base + self.offset], axis=1), ancestors)


@struct.dataclass
class ProbedTree(Tree):
  """A tree of nodes, all of which may be accepted where valid, and the probes behind them."""

  probes: Probes | None = None


@struct.dataclass
class ProbeState:
  """Final states of the last accepted node's probes; offsets beyond ``available`` had none."""

  hidden: Float[Array, "B K E D"]
  available: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeDrafter(TrainedDrafter):
  """Base of drafters made of probe rows; ``num_heads`` is K, the number of offsets.

  The first drafts come from one more pass, of K rows, after the prompt.

  Attributes:
    anchors: slots of a text that carry probes in a training step, drawn anew each time among those
      that may be learned (evaluation: evenly spaced ones). None: all slots, K T more rows.
  """

  share_head: ClassVar[bool] = True  # all logits are the target's own
  linked = True  # see Probes; a field where a drafter lets one choose

  anchors: int | None = 64

  def __post_init__(self):
    if self.vocabulary is not None:
      raise UserError(
        f"{self.name} drafts with the target's own head and takes no draft vocabulary; "
        "leave vocabulary=None"
      )
    if self.anchors is not None and self.anchors < 1:
      raise UserError(f"anchors must be at least 1, or None for all slots, got {self.anchors}")
    super().__post_init__()

  # Subclasses implement these.

  @property
  def members(self) -> int:
    """E: groups behind one anchor in decoding."""
    return 1

  def rows(
    self, params: Params, layer: int, x: Float[Array, "B _ D"], probes: Probes, before: Any
  ) -> Float[Array, "B _ D"] | None:
    """Probe rows that start at ``layer``: the next ones in the order of ``probes``, or None.

    ``x`` is the layer's input: the nodes and the probes there already. ``before``: features of the
    state's last token (``capture``), where probes hang behind it."""
    raise NotImplementedError

  def around(self, params: Params, nodes: int) -> contextlib.AbstractContextManager:
    """What is in force while the target runs over ``nodes`` nodes and the probes behind them."""
    return contextlib.nullcontext()

  def head(self, params, target, depth, states):
    """Mean over the members of the target's own logits: ``[...,E,D] -> [...,V]``."""
    logits = target.model.apply({"params": target.params}, states, method="unembed")
    return jnp.mean(logits, axis=-2)

  def first(self, params, state: ProbeState, context: Context):
    logits = self.head(params, context.target, 1, state.hidden)  # every depth at once
    return logits[:, 0], logits

  def step(self, params, state, context: Context):
    # A probe's guess doesn't depend on the path: its logits serve the whole level.
    return lambda logits, level, tokens, parents: (logits[:, level][:, None], logits)

  # One pass of the target over nodes and probes.

  def run(
    self,
    params: Params,
    model: Decoder,
    target_params: Params,
    state: Any,
    tokens: Int[Array, "B M"],
    nodes: Topology,
    probes: Probes,
    before: tuple[Float[Array, "B D"], ...] = (),
  ) -> DecoderOutput:
    """The target over M nodes and R probes; ``hidden [B,M+R,D]``, no logits."""
    whole, m = probes.extend(nodes), tokens.shape[1]

    def insert(layer, x, topology):
      new = self.rows(params, layer, x, probes, before)
      if new is None:
        return x, topology
      x = jnp.concatenate([x, new.astype(x.dtype)], axis=1)
      n = x.shape[1]
      return x, Topology(whole.depth[:, :n], whole.ancestors[:, :n, :n])

    with self.around(params, m):
      return model.apply(
        {"params": target_params}, tokens, state, nodes, method="verify", logits=False,
        insert=insert,
      )  # fmt: skip

  # Decoding.

  def layout(self) -> tuple[tuple[int, int], ...]:
    """``(offset, member)`` of the rows behind one anchor in decoding."""
    return tuple((i, e) for i in range(1, self.num_heads + 1) for e in range(self.members))

  def probes(self, tree: Tree) -> Probes:
    """What hangs in a tree: here a whole layout behind every node."""
    batch, m = tree.tokens.shape
    anchors = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), (batch, m))
    return Probes.hang(anchors, self.layout(), self.linked)

  def behind_last(self, tree: Tree) -> Probes:
    """A layout behind the last valid node of a chain alone."""
    last = jnp.sum(tree.valid, axis=1, keepdims=True, dtype=jnp.int32) - 1
    return Probes.hang(last, self.layout(), self.linked)

  def propose(self, params, state, context: Context, rng):
    tree, state = super().propose(params, state, context, rng)
    valid = tree.valid & (tree.depth <= state.available[:, None])
    return self._probed(tree.replace(valid=valid)), state

  def _probed(self, tree: Tree) -> ProbedTree:
    fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(Tree)}
    return ProbedTree(**fields, probes=self.probes(tree))

  def verify(self, params, tree: ProbedTree, context: Context):
    target = context.target
    out = self.run(
      params, target.model, target.params, target.state, tree.tokens, tree.topology, tree.probes
    )
    nodes = out.hidden[:, : tree.tokens.shape[1]]  # the head is the dearest part: no row too many
    logits = target.model.apply({"params": target.params}, nodes, method="unembed")
    return dataclasses.replace(out, logits=logits)

  def init_state(self, batch: int, capacity: int) -> ProbeState:
    shape = (batch, self.num_heads, self.members, self.dim)
    return ProbeState(jnp.zeros(shape, self.dtype), jnp.zeros(batch, jnp.int32))

  def start(self, params, state, prompt, output, target: Target):
    batch = prompt.root.shape[0]
    probes = Probes.hang(jnp.full((batch, 1), BEFORE, jnp.int32), self.layout(), self.linked)
    at = 0 if output.hidden.shape[1] == 1 else prompt.lengths - 1
    before = tuple(x[jnp.arange(batch), at] for x in output.features)
    # The root's row is not needed, but a pass of no nodes is nothing that mixers know.
    root = Topology(jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch, 1, 1), bool))
    out = self.run(
      params, target.model, target.params, target.state, prompt.root[:, None], root, probes, before
    )
    return self._read(state, probes, out.hidden[:, 1:], jnp.full(batch, BEFORE), True)

  def observe(self, params, state, tree: ProbedTree, accepted, output, context):
    nodes = jnp.arange(tree.tokens.shape[1], dtype=jnp.int32)[None]
    last = last_accepted(jnp.broadcast_to(nodes, tree.tokens.shape), accepted.path, accepted.count)
    hidden = output.hidden[:, tree.tokens.shape[1] :]
    return self._read(state, tree.probes, hidden, last, accepted.count > 0)

  def _read(self, state, probes: Probes, hidden, anchor: Int[Array, "B"], where) -> ProbeState:
    """The state of the probes behind ``anchor``; rows that are not ``where`` keep their own."""
    here = probes.anchor == anchor[:, None]  # [B,R]
    wanted = [(i, e) for i in range(1, self.num_heads + 1) for e in range(self.members)]
    offset, member = (np.array(x)[:, None] for x in zip(*wanted))
    match = here[:, None] & (probes.offset[:, None] == offset) & (probes.member[:, None] == member)
    found = jnp.any(match, axis=2)  # [B, K E]
    picked = gather_nodes(hidden, jnp.argmax(match, axis=2)).reshape(state.hidden.shape)
    found = found.reshape(-1, self.num_heads, self.members)[..., 0]
    new = ProbeState(picked.astype(state.hidden.dtype), jnp.sum(found, axis=1, dtype=jnp.int32))
    where = jnp.broadcast_to(jnp.asarray(where), anchor.shape)
    return jax.tree.map(
      lambda x, y: jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, state
    )

  # Training.

  def training_layout(self) -> tuple[tuple[int, int], ...]:
    """``(offset, member)`` of the rows behind one anchor in training."""
    return self.layout()

  def forced(
    self, params: Params, target: Target, batch: Any, slots: Int[Array, "B A"]
  ) -> dict[tuple[int, int], Float[Array, "B A D"]]:
    """Final states of the probes behind the given slots of a text, by offset and member."""
    model, target_params = unrolled(target)
    check_trainable(self.name, model)
    layout = self.training_layout()
    out = self.run(
      params, model, target_params, model.init_state(batch["tokens"].shape[0], 1),
      batch["tokens"], text_topology(batch), Probes.hang(slots, layout, self.linked),
    )  # fmt: skip
    hidden = out.hidden[:, batch["tokens"].shape[1] :].reshape(
      slots.shape[0], len(layout), slots.shape[1], -1
    )
    return {key: hidden[:, i].astype(self.dtype) for i, key in enumerate(layout)}

  def states(
    self,
    hidden: dict[tuple[int, int], Float[Array, "B A D"]],
    depth: int,
    target: Target,
    batch: Any,
    slots: Int[Array, "B A"],
  ) -> Any:
    """What ``head`` reads at ``depth`` in training: the probes of that offset, ``[B,A,E,D]``."""
    return jnp.stack([hidden[depth, e] for e in range(self.members)], axis=2)

  def examples(self, params, target, output, batch, rng=None):
    tokens = batch["tokens"]
    length = tokens.shape[1]
    if length < self.num_heads + 2:
      raise UserError(
        f"sequences of {length} tokens are too short to train {self.num_heads} draft depths; use "
        f"at least {self.num_heads + 2}"
      )
    slots = self._slots_of(batch, rng)
    hidden = self.forced(params, target, batch, slots)
    for k in range(1, self.num_heads + 1):
      weights = jnp.pad(label_weights(batch, k, prefix=True), ((0, 0), (0, 1 + k)))
      at = jnp.minimum(slots + k, length - 2)  # beyond it the weight is 0
      yield Example(
        k,
        self.states(hidden, k, target, batch, slots),
        jnp.take_along_axis(tokens, at + 1, axis=1),
        None,  # from the states: slots lie anywhere
        gather_nodes(output.hidden, at),
        jnp.take_along_axis(weights, slots, axis=1),
      )

  def learnable(self, batch: Any) -> Float[Array, "B _"]:
    """Which slots have a label at depth 1."""
    return label_weights(batch, 1, prefix=True)

  def _slots_of(self, batch: Any, rng: jax.Array | None) -> Int[Array, "B A"]:
    """The slots that carry probes in a training step; the same ones for the same ``rng``."""
    rows, length = batch["tokens"].shape
    count = length - 2  # slots that have a label at depth 1
    if self.anchors is None or self.anchors >= count:
      return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (rows, count))
    if rng is None:
      even = np.linspace(0, count - 1, self.anchors).astype(np.int32)
      return jnp.broadcast_to(jnp.asarray(even), (rows, self.anchors))
    score = jax.random.uniform(rng, (rows, count)) + self.learnable(batch)
    return jnp.sort(jax.lax.top_k(score, self.anchors)[1], axis=1)


def text_topology(batch: Any) -> Topology:
  """Packed texts as trees: every token a node whose ancestors are the tokens before it."""
  segments, positions = batch["segment_ids"], batch["positions"]
  t = segments.shape[1]
  same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
  causal: Bool[Array, "T T"] = jnp.tril(jnp.ones((t, t), bool))
  return Topology(positions, (same & causal) | jnp.eye(t, dtype=bool))


def unrolled(target: Target) -> tuple[Decoder, Params]:
  """Model and parameters in the layout that decodes."""
  model, params = target.model, target.params
  if model.layout == "unrolled":
    return model, params
  return model.clone(layout="unrolled"), unstack_layers(params, model.config)


def check_trainable(name: str, model: Decoder) -> None:
  """Raises UserError where a text with probes can't be differentiated through."""
  if any(isinstance(layer.mixer, GatedDeltaConfig) for layer in model.config.layers):
    raise UserError(
      f"{name} can't be trained for a target with gated-delta layers, whose tree pass has no "
      "gradient; use a drafter with heads of its own, such as 'hydra'"
    )
  mesh = jax.sharding.get_abstract_mesh()
  if model.sequence is not None and not mesh.empty and mesh.shape.get("seq", 1) > 1:
    raise UserError(
      f"{name} is trained on whole sequences, but the mesh splits them {mesh.shape['seq']} ways; "
      "use seq=1"
    )
