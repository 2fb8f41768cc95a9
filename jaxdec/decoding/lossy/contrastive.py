# SPDX-License-Identifier: Apache-2.0
"""Contrastive decoding: what a strong pass knows better than a weak one.

With the next-token logits z_s of the strong pass and z_w of the weak one,

  z = (1 + beta) z_s - beta z_w,   tokens with z_s < max z_s + log(alpha) removed,

and the sampler draws from z. The law is not the strong model's, except at beta = alpha = 0; at
beta = 0 it is the strong model's cut to ``min_p = alpha``.

The weak pass is any model of the same vocabulary, any parameters, any prompts:

* USCD (arXiv 2409.05923): the same model reads a lame prompt, such as the instructions without
  their examples; the contrast acts only where the strong law is uncertain. Its measure here is the
  standard deviation of the probabilities over the vocabulary, below a threshold (``spread``).
* SCMoE (arXiv 2405.14507): the same mixture of experts with other routing, by default alpha = 0.1
  and beta = 0.5. The decoder of this package has no experts to route between, so no routing is
  offered: give a model that computes the weak pass (``weak_model``), with the same or other
  parameters (``weak_params``).

Each pass has a state of its own; the weak one never touches the strong one's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.lossy import common
from jaxdec.decoding.request import TextCodec
from jaxdec.decoding.sampling import Sampler
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Contrasted:
  """Attributes:

  tokens: new token ids of each prompt, ending with the stop token if one was met.
  text: their text; None without a tokenizer.
  passes: passes after the prompts, of each of the two models.
  """

  tokens: list[list[int]]
  text: list[str] | None
  passes: int


def generate_contrastive(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  weak_model: Decoder | None = None,
  weak_params: Any = None,
  weak_prompts: Any = None,
  beta: float = 0.5,
  alpha: float = 0.1,
  spread: float | None = None,
  sampler: Sampler = Sampler(),  # noqa: B008
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Contrasted:
  """Decodes from the contrast of a strong and a weak pass.

  Args:
    model, params, prompts, max_new_tokens, sampler, stop, seed, tokenizer, prefill_chunk: the
      strong pass, as of ``generate`` (``stop``: ids only). Every mixer kind is served.
    weak_model, weak_params, weak_prompts: what of the weak pass differs from the strong one; at
      least one of them.
    beta: strength >= 0. alpha: in [0, 1]; tokens less than ``alpha`` times as likely as the best
      one are removed, 0 removes none.
    spread: contrast only where the standard deviation of the strong probabilities is below it,
      else the plain strong law; None: everywhere.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  if not 0 <= beta < float("inf"):
    raise UserError(f"beta must be a finite number >= 0, got {beta}")
  if not 0 <= alpha <= 1:
    raise UserError(f"alpha must lie in [0, 1], got {alpha}; 0 removes no token")
  if spread is not None and not spread >= 0:
    raise UserError(f"spread must be a number >= 0, got {spread}; None contrasts everywhere")
  if weak_model is None and weak_params is None and weak_prompts is None:
    raise UserError(
      "the weak pass equals the strong one; give weak_model, weak_params or weak_prompts"
    )
  if weak_model is not None and weak_params is None and weak_model.config != model.config:
    raise UserError("weak_model has another configuration than the model; give weak_params")
  if weak_prompts is not None and (
    isinstance(weak_prompts, str) or len(weak_prompts) != len(prompts)
  ):
    raise UserError(
      f"weak_prompts must hold one prompt for each of the {len(prompts)} prompts, got "
      f"{weak_prompts if isinstance(weak_prompts, str) else len(weak_prompts)}"
    )
  weak_model = model if weak_model is None else weak_model
  weak_params = params if weak_params is None else weak_params
  if weak_model.config.vocab_size != model.config.vocab_size:
    raise UserError(
      f"the weak model has a vocabulary of {weak_model.config.vocab_size} tokens, the strong one "
      f"of {model.config.vocab_size}; both must come from the same tokenizer"
    )
  options = dict(
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    stop=stop,
    seed=seed,
    tokenizer=tokenizer,
    prefill_chunk=prefill_chunk,
  )
  strong = common.read(model, params, prompts, **options)
  weak = common.read(
    weak_model, weak_params, prompts if weak_prompts is None else weak_prompts, **options
  )
  out, count, passes = _run(
    (params, weak_params),
    (strong.state, weak.state),
    (strong.hidden, weak.hidden),
    (strong.lengths, weak.lengths),
    strong.keys,
    strong.stop,
    np.float32([beta, alpha, np.inf if spread is None else spread]),
    models=(model, weak_model),
    sampler=sampler,
    budget=int(max_new_tokens),
  )
  tokens = [row[:n].tolist() for row, n in zip(*jax.device_get((out, count)))]
  return Contrasted(tokens, common.decode_all(tokenizer, tokens), int(passes))


def contrast(
  strong: Float[Array, "*B V"], weak: Float[Array, "*B V"], beta, alpha, spread=np.inf
) -> Float[Array, "*B V"]:
  """The logits of the module's docstring; removed tokens are -inf."""
  z = (1 + beta) * strong - beta * weak
  z = jnp.where(strong >= jnp.max(strong, -1, keepdims=True) + jnp.log(alpha), z, -jnp.inf)
  unsure = jnp.std(jax.nn.softmax(strong), axis=-1, keepdims=True) < spread
  return jnp.where(unsure, z, strong)


def _contrastive(
  params, states, hidden, lengths, keys, stop, rule, *, models, sampler: Sampler, budget: int
):
  def draw(c):
    """The next token of every row, written: out, count, done, token."""
    _, logits, out, count, done, step = c
    token = sampler.draw(contrast(*logits, *rule), keys, lengths[0] + step)
    out = out.at[:, step].set(token)
    count = count + ~done
    return out, count, done | common.is_stop(token, stop), token

  def step(c):
    states, _, _, _, _, i = c
    out, count, done, token = draw(c)
    new = [
      common.extend(m, p, s, token, jnp.where(done, -1, n + i))
      for m, p, s, n in zip(models, params, states, lengths)
    ]
    states, logits = zip(*new)
    return states, logits, out, count, done, i + 1

  batch = lengths[0].shape[0]
  c = (
    states,
    tuple(common.unembed(m, p, h) for m, p, h in zip(models, params, hidden)),
    jnp.zeros((batch, budget), jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, bool),
    jnp.int32(0),
  )
  c = jax.lax.while_loop(lambda c: (c[-1] < budget - 1) & ~jnp.all(c[-2]), step, c)
  out, count, *_ = draw(c)  # the budget's last token; nobody needs what would follow
  return out, count, c[-1]


_run = Executable("contrastive", _contrastive)
