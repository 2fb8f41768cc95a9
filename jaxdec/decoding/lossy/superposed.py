# SPDX-License-Identifier: Apache-2.0
"""Superposed Decoding (arXiv 2405.18400): k drafts of a prompt from one pass per step.

The model reads the average of the drafts' last tokens, and n-gram counts tell which next token
belongs to which draft. With the drafts' scores S_i, gamma = softmax(S), embeddings E,

  x = sum_i gamma_i E[token_i],   pi = softmax(logits / tau), cut to its m best tokens,
  log f_i(v) = (1 - alpha) log pi(v) + alpha log g_i(v),
  g_i(v) = sum_n lambda_n P_n(v | last n tokens of draft i),

and the k best of ``S_i + log f_i(v)`` are the next drafts. A draft whose n-grams know none of the m
tokens gets ``(1 - alpha) log pi(v) - 200``. The result approximates k likely texts; one draft with
alpha = 0 is greedy decoding. Drafts drift apart from what the model would say after 10 or 20
tokens, and the state holds superpositions: neither is of use for decoding on.

Not settled by the paper, chosen here: the first step goes by pi alone, for one draft (nothing tells
drafts apart yet); stop tokens are treated as in beam search, and texts ordered by S.
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
from jaxdec.decoding.lossy.hypotheses import Hypotheses, unpack
from jaxdec.decoding.lossy.ngrams import NGrams
from jaxdec.decoding.request import TextCodec
from jaxdec.drafting.selection import top_k
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder

UNSUPPORTED = -200.0


@dataclasses.dataclass(frozen=True)
class Superposed:
  """Drafts of each prompt, best first.

  Attributes:
    tokens: new token ids, ending with the stop token if one was met.
    scores: S, not log-probabilities of the model.
    text: None without a tokenizer.
    passes: model passes after the prompts, shared by the drafts.
  """

  tokens: list[list[list[int]]]
  scores: list[list[float]]
  text: list[list[str]] | None
  passes: int


def generate_superposed(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int = 10,
  drafts: int = 3,
  ngrams: NGrams | None = None,
  alpha: float = 0.54,
  weights: tuple[float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12),
  temperature: float = 0.06,
  top: int = 9,
  stop: Any = ...,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Superposed:
  """Several short drafts of each prompt for the passes of one.

  Args:
    model, params, prompts, max_new_tokens, stop, tokenizer, prefill_chunk: as of ``generate``
      (``stop``: ids only). Every mixer kind is served.
    drafts: k.
    ngrams: counts of text like the drafts (``build_ngrams``); None takes alpha = 0.
    alpha: their weight, in [0, 1]. weights: lambda, for contexts of 1, 2, ... tokens.
    temperature: tau > 0. top: m, at least ``drafts``.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  if not 0 <= alpha <= 1:
    raise UserError(f"alpha must lie in [0, 1], got {alpha}")
  if not 0 < temperature < float("inf"):
    raise UserError(f"temperature must be a finite number > 0, got {temperature}")
  if not 1 <= drafts <= top <= model.config.vocab_size:
    raise UserError(
      f"1 <= drafts <= top <= vocabulary must hold, got drafts {drafts}, top {top}, vocabulary "
      f"{model.config.vocab_size}"
    )
  if ngrams is not None and len(weights) != len(ngrams.grams):
    raise UserError(
      f"weights has {len(weights)} entries, ngrams has contexts of 1 to {len(ngrams.grams)} tokens"
    )
  if ngrams is None:
    ngrams, weights, alpha = NGrams((), ()), (), 0.0
  r = common.read(
    model,
    params,
    prompts,
    max_new_tokens=max_new_tokens,
    stop=stop,
    tokenizer=tokenizer,
    prefill_chunk=prefill_chunk,
  )
  tail = np.full((len(r.prompts), len(weights)), -1, np.int32)  # -1: in no n-gram
  for row, prompt in zip(tail, r.prompts):
    n = min(len(prompt), len(weights))
    row[len(row) - n :] = prompt[len(prompt) - n :]
  pool, passes = _run(
    params,
    r.state,
    r.hidden,
    r.lengths,
    r.stop,
    jnp.asarray(tail),
    ngrams,
    np.float32(weights),
    np.float32(alpha),
    np.float32(temperature),
    model=model,
    drafts=int(drafts),
    top=int(top),
    budget=int(max_new_tokens),
  )
  found = unpack(pool)
  tokens = [[text for *_, text in row] for row in found]
  scores = [[score for _, score, _ in row] for row in found]
  return Superposed(tokens, scores, common.decode_all(tokenizer, tokens), int(passes))


def interpolate(
  log_pi: Float[Array, "*B m"], g: Float[Array, "*B m"], alpha
) -> Float[Array, "*B m"]:
  """``log f`` of the module's docstring; alpha = 0 is ``log pi``, whatever the n-grams say."""
  model = (1 - alpha) * log_pi
  known = jnp.any(g > 0, axis=-1, keepdims=True)
  return jnp.where(
    alpha == 0, log_pi, jnp.where(known, model + alpha * jnp.log(g), model + UNSUPPORTED)
  )


def _superposed(
  params,
  state,
  hidden,
  lengths,
  stop,
  tail,
  ngrams: NGrams,
  weights,
  alpha,
  temperature,
  *,
  model: Decoder,
  drafts: int,
  top: int,
  budget: int,
):
  batch = lengths.shape[0]
  rows = jnp.arange(batch)[:, None]
  rank = lambda score, length: score  # noqa: E731

  def choose(c):
    """The next drafts, their tails and last tokens."""
    _, logits, h, tails, step = c
    value, ids = top_k(logits, top)
    log_pi = jax.nn.log_softmax(value / temperature)[:, None]
    tokens = jnp.broadcast_to(ids[:, None], (batch, drafts, top))
    log_f = interpolate(log_pi, ngrams(tails, tokens, weights), alpha)
    score = h.score[..., None] + jnp.where(step == 0, log_pi, log_f)
    h, parent, token = h.grow(score, score, ids, stop, step, rank)
    tails = jnp.concatenate([tails[rows, parent], token[..., None]], axis=-1)[..., 1:]
    return h, tails, token

  def step(c):
    state, *_, i = c
    h, tails, token = choose(c)
    # Rows without a draft are done; the weights must be numbers all the same.
    score = jnp.where(jnp.any(h.alive, 1, keepdims=True), h.score, 0.0)
    each = model.apply({"params": params}, token, method="embed")
    mixed = jnp.einsum("bk,bkd->bd", jax.nn.softmax(score), each.astype(jnp.float32))
    position = jnp.where(h.done, -1, lengths + i)[:, None]
    out = model.apply(
      {"params": params},
      token[:, :1],
      state,
      position,
      method="extend",
      embeddings=(mixed[:, None].astype(each.dtype), jnp.ones((batch, 1), bool)),
    )
    return out.state, out.logits[:, 0], h, tails, i + 1

  tails = jnp.broadcast_to(tail[:, None], (batch, drafts, tail.shape[1]))
  start = Hypotheses.start(batch, drafts, budget)
  c = (state, common.unembed(model, params, hidden), start, tails, jnp.int32(0))
  c = jax.lax.while_loop(lambda c: (c[-1] < budget - 1) & ~jnp.all(c[2].done), step, c)
  h, *_ = choose(c)  # the budget's last token; nobody needs what would follow
  return h.close(rank), c[-1]


_run = Executable("superposed", _superposed)
