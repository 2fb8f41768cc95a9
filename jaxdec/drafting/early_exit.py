# SPDX-License-Identifier: Apache-2.0
"""Self-speculation by early exit (LayerSkip, arXiv 2404.16710): the target's first layers draft.

A draft is what the LM head makes of the residual stream after E of the L layers:

  draft_i = argmax W_lm norm(h^E(x_0 .. x_i))

No parameters are added. The drafts' states and keys of the first E layers are those that the
verify pass would compute, so it begins at layer E: a round of d drafts runs ``d E + L`` layers and
``d + 1`` LM heads. The target's cache is read, never written: drafted keys live beside it until
verification has decided.

A target drafts well this way only if it was trained for it (``LanguageModel(early_exit=...)``).
Layers must be softmax attention: a recurrent layer's verify pass needs all nodes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context, Drafter, Target
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree, chain
from jaxdec.errors import UserError
from jaxdec.mixers.attention import AttentionConfig, KVPending, heads_first
from jaxdec.models.decoder import DecoderOutput

Exit = int | Int[Array, ""]  # known at compile time, or chosen while decoding


@struct.dataclass
class Fed:
  """What the draft passes computed of M nodes.

  ``stream[l]``: their states after l layers, right for ``l <= E``; ``pending[l]``: their keys and
  values in layer l, right for ``l < E``. Both are as long as the deepest exit allows.
  """

  stream: tuple[Float[Array, "B M D"], ...]
  pending: tuple[KVPending, ...]


@struct.dataclass
class EarlyExitTree(Tree):
  """A chain whose nodes have been through the first ``exit`` layers already."""

  fed: Fed | None = None
  exit: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(Drafter):
  """A chain of ``num_drafts`` tokens from the target's first ``exit`` layers.

  Attributes:
    exit: E; None: a quarter of the layers, rounded up (LayerSkip's 8 of 32).
    num_drafts: d (LayerSkip: 6).
    draws: ``shared``: at temperature > 0 drafts are drawn with the noise the target will use at
      that position; ``greedy``: the argmax. Either way the output is the target's.
  """

  exit: int | None = None
  num_drafts: int = 6
  draws: Literal["greedy", "shared"] = "shared"

  name: ClassVar[str] = "early_exit"

  def __post_init__(self):
    if self.num_drafts < 1 or self.draws not in ("greedy", "shared"):
      raise UserError(
        "early_exit needs num_drafts >= 1 and draws 'greedy' or 'shared', got "
        f"{self.num_drafts} and {self.draws!r}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  def propose(self, params, state, context: Context, rng):
    num_layers = check_layers(context.target)
    exit = -(-num_layers // 4) if self.exit is None else self.exit
    if not 1 <= exit <= num_layers:
      raise UserError(f"exit must lie in 1..{num_layers}, the target's layers, got {exit}")
    draw = drawing(context, self.draws)
    return speculate(context, exit, exit, self.num_drafts, self.num_drafts, draw), state

  def verify(self, params, tree: EarlyExitTree, context: Context) -> DecoderOutput:
    return verify_from_exit(tree, context)


def check_layers(target: Target) -> int:
  """The number of layers.

  Raises:
    UserError: a layer whose verify pass can't begin with states drafted one by one.
  """
  for i, layer in enumerate(target.model.config.layers):
    if not isinstance(layer.mixer, AttentionConfig):
      raise UserError(
        f"early exit needs softmax attention in every layer, but layer {i} of the target is a "
        f"{type(layer.mixer).__name__}; use another drafter"
      )
  return target.model.config.num_layers


def drawing(context: Context, draws: str) -> Callable[[Array, Array], Array]:
  """How a token is made of logits ``[B,*T,V]`` for positions ``[B,*T]``."""
  if context.sampler.greedy or draws == "greedy":
    return lambda logits, position: argmax(logits)
  return lambda logits, position: context.sampler.draw(logits, context.keys, position)


def exit_logits(target: Target, stream: Float[Array, "... D"]) -> Float[Array, "... V"]:
  """The LM head on the residual stream of any depth, through the final norm."""

  def head(model, x):
    return model.unembed(model.final_norm(x))

  return target.model.apply({"params": target.params}, stream, method=head)


def speculate(
  context: Context,
  exit: Exit,
  deepest: int,
  drafts: Exit,
  room: int,
  draw: Callable[[Array, Array], Array],
  threshold: Float[Array, ""] | None = None,
) -> EarlyExitTree:
  """Drafts ``drafts`` tokens with ``exit`` layers.

  Args:
    exit, drafts: may be traced; ``deepest`` and ``room`` bound them.
    draw: see ``drawing``.
    threshold: a row stops after a draft whose top-1 probability lies below it; None: never.

  Returns:
    A chain of ``room`` drafts, valid as far as they were made. All valid nodes were fed through the
    exit's layers, the last draft included (it needs no LM head).
  """
  target, batch = context.target, context.root.shape[0]
  config, dtype = target.model.config, target.model.dtype
  nodes = room + 1
  shape = (batch, nodes, config.dim)
  fed = Fed(
    tuple(jnp.zeros(shape, dtype) for _ in range(deepest + 1)),
    tuple(
      KVPending(*(jnp.zeros((*s.k.shape[:2], nodes, s.k.shape[3]), s.k.dtype),) * 2)
      for s in target.state.layers[:deepest]
    ),
  )
  tokens = jnp.zeros((batch, nodes), jnp.int32).at[:, 0].set(context.root)

  def feed(c):
    node, count, tokens, alive, valid, fed = c
    token = jax.lax.dynamic_slice_in_dim(tokens, node, 1, axis=1)
    x = target.model.apply({"params": target.params}, token, method="embed")
    stream, pending = [x], []
    for i in range(deepest):
      x, k, v = _if(i < exit, _run_layer(target, i), _skip, x, fed.pending[i], node)
      stream.append(x)
      pending.append(KVPending(k, v))
    fed = Fed(
      tuple(_put(all_, x, node, 1) for all_, x in zip(fed.stream, stream)),
      tuple(
        KVPending(_put(old.k, new.k, node, 2), _put(old.v, new.v, node, 2))
        for old, new in zip(fed.pending, pending)
      ),
    )

    def sample(x):
      logits = exit_logits(target, x)
      token = draw(logits, (context.length + node + 1)[:, None])
      sure = alive
      if threshold is not None:
        sure = alive & (top_probability(logits)[:, 0] >= threshold)
      return token, sure

    going = jnp.any(alive) & (node < drafts)
    token, sure = jax.lax.cond(going, sample, lambda x: (token, alive), x)
    tokens = jnp.where(going, _put(tokens, token, jnp.minimum(node + 1, room), 1), tokens)
    new = alive[:, None] & (jnp.arange(1, nodes) == node + 1) & going
    return node + 1, count + going, tokens, sure, valid | new, fed

  start = (
    jnp.int32(0),
    jnp.int32(1),
    tokens,
    jnp.ones(batch, bool),
    jnp.zeros((batch, room), bool),
    fed,
  )
  *_, tokens, _, valid, fed = jax.lax.while_loop(lambda c: c[0] < c[1], feed, start)
  tree = chain(context.root, tokens[:, 1:], valid)
  fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
  return EarlyExitTree(**fields, fed=fed, exit=exit)


def verify_from_exit(
  tree: EarlyExitTree, context: Context, features: tuple[int, ...] = ()
) -> DecoderOutput:
  """The target's pass over a chain from the exit's layer on.

  Args:
    features: the residual stream after these numbers of layers is returned too.
  """
  target, topology = context.target, tree.topology
  fed, deepest = tree.fed, len(tree.fed.pending)
  x, stream, pending = fed.stream[deepest], [fed.stream[0]], []

  def run(i):
    def verify(model, x):
      return model.layers[i].verify(x, target.state.layers[i], topology)

    return lambda x: target.model.apply({"params": target.params}, x, method=verify)

  for i in range(target.model.config.num_layers):
    if i < deepest:
      # Below the exit the stream is what drafting left; ``x`` waits at the exit's depth.
      x, p = _if(i < tree.exit, lambda x, i=i: (x, fed.pending[i]), run(i), x)
      stream.append(jnp.where(i < tree.exit, fed.stream[i + 1], x))
    else:
      x, p = run(i)(x)
      stream.append(x)
    pending.append(p)

  def finish(model, x):
    hidden = model.final_norm(x)
    return model.unembed(hidden), hidden

  logits, hidden = target.model.apply({"params": target.params}, x, method=finish)
  return DecoderOutput(logits, hidden, tuple(stream[i] for i in features), pending=tuple(pending))


def first_nodes(tree: EarlyExitTree, width: int) -> EarlyExitTree:
  """The chain's first ``width`` nodes, root included."""
  nodes = lambda x: x[:, :width]  # noqa: E731
  return tree.replace(
    **{name: nodes(getattr(tree, name)) for name in ("tokens", "parent", "depth", "valid")},
    max_depth=width - 1,
    fed=Fed(
      tuple(map(nodes, tree.fed.stream)),
      tuple(KVPending(p.k[:, :, :width], p.v[:, :, :width]) for p in tree.fed.pending),
    ),
  )


def top_probability(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
  """The largest entry of the softmax."""
  return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def round_cost(num_layers: int, exit: Any, drafts: Any, head: float = 0.0) -> Any:
  """Layers run in a round of ``drafts`` drafts: ``d (E + head) + L + head``.

  ``head``: what a pass of the LM head costs, in layers; 0 is DEL's own count (arXiv 2504.05598).
  Tokens per step over this number is the objective that exits and lengths are compared by.
  """
  return drafts * (exit + head) + num_layers + head


def _run_layer(target: Target, i: int):
  """Node ``node`` alone through layer i, over the cache and the nodes fed before it."""

  def run(model, x, fed, node):
    layer, state = model.layers[i], target.state.layers[i]
    mixer, config = layer.mixer, layer.config.mixer
    h, nodes = layer.normed(x), jnp.arange(fed.k.shape[2])
    positions = state.length[:, None] + node
    q, k, v = mixer._project(h, positions)
    k, v = (heads_first(y).astype(fed.k.dtype) for y in (k, v))
    seen = nodes <= node
    if config.window is not None:
      seen &= nodes > node - config.window
    among: Bool[Array, "B 1 M"] = jnp.broadcast_to(seen, (x.shape[0], 1, nodes.shape[0]))
    keys, values = _put(fed.k, k, node, 2), _put(fed.v, v, node, 2)
    out = mixer._attend_state(q, keys, values, state, positions, among)
    return layer._finish(x, mixer._output(out, h)), k, v

  return lambda *args: target.model.apply({"params": target.params}, *args, method=run)


def _skip(x, fed, node):
  return x, fed.k[:, :, :1], fed.v[:, :, :1]


def _put(buffer, rows, at, axis):
  return jax.lax.dynamic_update_slice_in_dim(buffer, rows.astype(buffer.dtype), at, axis)


def _if(condition: Any, run, skip, *args):
  """``lax.cond``, decided at once where the condition is a bool."""
  if isinstance(condition, bool):
    return (run if condition else skip)(*args)
  return jax.lax.cond(condition, run, skip, *args)
