# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets of every mixer kind, and drafters that know (or don't know) the answer."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.drafting.base import Drafter
from jaxdec.drafting.tree import chain
from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig
from jaxdec.models import Decoder, DecoderConfig, LayerConfig, MLPConfig
from tests.decoding.trees import random_tree

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
WINDOW = dataclasses.replace(ATTENTION, window=5)
LINEAR = LinearAttentionConfig(num_heads=2, head_dim=8)
GLA = LinearAttentionConfig(num_heads=2, head_dim=8, decay="channel", gate_rank=4)
DELTA = GatedDeltaConfig(num_heads=1, num_v_heads=2, head_dim=8)
MIXERS = {
  "attention": (ATTENTION,),
  "linear": (LINEAR,),
  "hybrid": (LINEAR, WINDOW),
  "recurrent": (GLA, DELTA, WINDOW),
}


@functools.cache
def target(
  kind: str = "attention", vocab: int = 13, seed: int = 0, max_length: int = 160, eos: tuple = ()
):
  """``model, params``; weights are scaled up so that the next token really depends on the text."""
  layers = tuple(LayerConfig(mixer, MLPConfig(16)) for mixer in MIXERS[kind])
  config = DecoderConfig(
    vocab_size=vocab, dim=16, layers=layers, max_length=max_length, eos_ids=eos
  )
  model = Decoder(config)
  init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32)))["params"])
  params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, init(jax.random.key(seed)))
  return model, params


@dataclasses.dataclass(frozen=True)
class Scripted(Drafter):
  """Drafts from a script, ``drafter_params [B, S]``: the text it believes in, prompt included.

  ``chain`` proposes the script; ``wrong`` everything but the script; ``tree`` a random tree whose
  tokens are the script's or random ones, in equal parts, with duplicate siblings.
  """

  kind: Literal["chain", "wrong", "tree"] = "chain"
  drafts: int = 3
  depth: int = 3
  vocab: int = 13

  name: ClassVar[str] = "scripted"

  @property
  def num_nodes(self):
    return self.drafts + 1

  @property
  def max_depth(self):
    return self.depth if self.kind == "tree" else self.drafts

  def propose(self, params, state, context, rng):
    at = context.length[:, None] + 1 + jnp.arange(max(self.drafts, self.depth))
    script = jnp.take_along_axis(params, jnp.minimum(at, params.shape[1] - 1), axis=1)
    if self.kind != "tree":
      shift = 1 if self.kind == "wrong" else 0
      return chain(context.root, (script[:, : self.drafts] + shift) % self.vocab), state
    keys = jax.random.split(rng, 3)
    shape = (context.root.shape[0], self.drafts)
    tree = random_tree(keys[0], context.root, jnp.zeros(shape, jnp.int32), self.depth)
    true = jnp.take_along_axis(script, tree.depth[:, 1:] - 1, axis=1)
    random = jax.random.randint(keys[1], shape, 0, self.vocab)
    tokens = jnp.where(jax.random.bernoulli(keys[2], 0.5, shape), true, random)
    return tree.replace(tokens=tree.tokens.at[:, 1:].set(tokens)), state


def script(prompts, generation, width: int = 192) -> jnp.ndarray:
  """Prompts with what was generated after them, as the parameters of ``Scripted``."""
  out = np.zeros((len(prompts), width), np.int32)
  for i, (prompt, new) in enumerate(zip(prompts, generation.tokens)):
    out[i, : len(prompt) + len(new)] = [*prompt, *new]
  return jnp.asarray(out)


class Letters:
  """A tokenizer: token i is the i-th letter."""

  vocab = "abcdefghijklmnopqrstuvwxyz"

  def encode(self, text):
    return [self.vocab.index(c) for c in text]

  def decode(self, tokens):
    return "".join(self.vocab[t] for t in tokens)
