# SPDX-License-Identifier: Apache-2.0
"""VocabTrim (arXiv 2506.22694): a drafter whose LM head knows only the tokens that come up.

  S = the k most frequent tokens of a calibration text,   W_trim = W[:, S],   draft id i is S[i]

Without any training. The drafter reads ``k D`` instead of ``V D`` weights a draft; a token outside
S is never drafted, which changes the speed and not the output. Sampled drafts have a law q that is
normalised over S, so rule ``ratio`` stays exact too.

``trim`` cuts any drafter: heads of its own are sliced (the ``vocabulary`` of a ``TrainedDrafter``),
a draft model gets a sliced head, and so does a drafter that reads its target's head: that one is
handed a target whose LM head is the slice, to draft with (verification keeps the whole one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context, Drafter, Params, Target
from jaxdec.drafting.draft_model import DraftModel
from jaxdec.drafting.trained import TrainedDrafter, lm_head_kernel, soft_cap
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError
from jaxdec.mixers.norms import Dense
from jaxdec.models.decoder import Decoder


def token_counts(texts: Iterable[Sequence[int]], vocab_size: int) -> np.ndarray:
  """How often each token comes up, ``[V]``; ``texts`` are token ids.

  The paper's calibration texts, best first: written by the target, by the drafter, plain corpus.
  """
  counts = np.zeros(vocab_size, np.int64)
  for text in texts:
    counts += np.bincount(np.asarray(text, np.int64), minlength=vocab_size)
  return counts


def written_counts(model: Decoder, params: Params, prompts: Sequence[Any], **options) -> np.ndarray:
  """``token_counts`` of what a decoder (the target, or a draft model) writes after ``prompts``.

  ``options``: keywords of ``jaxdec.decoding.generate``.
  """
  from jaxdec.decoding import generate

  out = generate(model, params, prompts, **options)
  return token_counts(out.tokens, model.config.vocab_size)


def frequent(counts: Sequence[int], size: int, keep: Iterable[int] = ()) -> DraftVocabulary:
  """The tokens ``keep`` (end of sequence, control tokens) and the most frequent ones, ``size`` in
  all; of equally frequent tokens the lower id.

  Raises:
    UserError: ``size`` is beyond 1..V, or smaller than ``keep``.
  """
  counts, keep = np.asarray(counts, np.float64), sorted(set(keep))
  if not max(len(keep), 1) <= size <= len(counts):
    raise UserError(
      f"a trimmed vocabulary has {max(len(keep), 1)} (tokens to keep) to {len(counts)} (all) "
      f"tokens, got size={size}"
    )
  counts[keep] = np.inf
  return DraftVocabulary.most_frequent(counts, size)


class TrimmedDecoder(Decoder):
  """A decoder whose LM head has the columns of ``vocabulary`` only, as parameter ``trimmed_head``.

  Logits are as long as ever; those of other tokens are ``-inf``.
  """

  vocabulary: DraftVocabulary | None = None

  def setup(self):
    super().setup()
    self.trimmed_head = Dense(
      len(self.vocabulary.ids), ("embed", "vocab"), False, self.dtype, self.param_dtype
    )

  def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    logits = soft_cap(self.trimmed_head(hidden).astype(jnp.float32), self.config.logit_cap)
    kept = self.vocabulary.t2d
    if kept.all():
      return logits
    # Tokens outside point at a column of -inf: a gather, which XLA:CPU runs faster than a scatter.
    column = np.where(kept, np.cumsum(kept) - 1, len(self.vocabulary.ids))
    outside = jnp.full((*logits.shape[:-1], 1), -jnp.inf)
    return jnp.take(jnp.concatenate([logits, outside], axis=-1), column, axis=-1)


def trim_decoder(model: Decoder, vocabulary: DraftVocabulary) -> TrimmedDecoder:
  """The module; its parameters are the model's and those of ``sliced_head``."""
  names = ("config", "dtype", "param_dtype", "layout", "remat", "sequence")
  return TrimmedDecoder(**{n: getattr(model, n) for n in names}, vocabulary=vocabulary)


def sliced_head(model: Decoder, params: Params, vocabulary: DraftVocabulary) -> Params:
  """``{"kernel": W[:, S]}`` in the dtype of the parameters."""
  kernel = lm_head_kernel(Target(model, params, None))[:, vocabulary.ids]
  return {"kernel": kernel.astype(jax.tree.leaves(params)[0].dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabTrim(Drafter):
  """A drafter that reads its target's LM head, given a slice of it instead.

  Its parameters: ``{"drafter": those of the drafter, "head": the slice}``; made by ``trim``.
  """

  drafter: Drafter
  vocabulary: DraftVocabulary

  name: ClassVar[str] = "vocab_trim"
  trained: ClassVar[bool] = True

  # What the loop asks of a drafter, passed through.
  num_nodes = property(lambda self: self.drafter.num_nodes)
  max_depth = property(lambda self: self.drafter.max_depth)
  capture = property(lambda self: self.drafter.capture)
  needs_prompt_hidden = property(lambda self: self.drafter.needs_prompt_hidden)
  may_pass = property(lambda self: self.drafter.may_pass)

  def _drafting(self, params: Params, context: Context) -> Context:
    target = context.target
    model = trim_decoder(target.model, self.vocabulary)
    with_slice = {**target.params, "trimmed_head": params["head"]}
    return context.replace(target=Target(model, with_slice, target.state))

  def init_params(self, rng, target=None):
    inner = self.drafter.init_params(rng, target)
    return {"drafter": inner, "head": sliced_head(target.model, target.params, self.vocabulary)}

  def init_state(self, batch, capacity):
    return self.drafter.init_state(batch, capacity)

  def start(self, params, state, prompt, output, target):
    return self.drafter.start(params["drafter"], state, prompt, output, target)

  def propose(self, params, state, context, rng):
    return self.drafter.propose(params["drafter"], state, self._drafting(params, context), rng)

  def verify(self, params, tree, context):
    return self.drafter.verify(params["drafter"], tree, context)

  def observe(self, params, state, tree, accepted, output, context):
    context = self._drafting(params, context)
    return self.drafter.observe(params["drafter"], state, tree, accepted, output, context)

  def has_draft(self, params, state, context):
    return self.drafter.has_draft(params["drafter"], state, self._drafting(params, context))


def trim(
  drafter: Drafter, params: Params, target: Target, vocabulary: DraftVocabulary
) -> tuple[Drafter, Params]:
  """The drafter with its LM head cut to ``vocabulary`` (target ids), and its parameters.

  Raises:
    UserError: the vocabulary is of another size, or holds tokens the drafter can't draft now.
  """
  if vocabulary.vocab_size != target.model.config.vocab_size:
    raise UserError(
      f"the trimmed vocabulary is a subset of {vocabulary.vocab_size} tokens, but the target has "
      f"{target.model.config.vocab_size}"
    )
  if isinstance(drafter, DraftModel):
    model = trim_decoder(drafter.model, vocabulary)
    head = sliced_head(drafter.model, params, vocabulary)
    rest = {name: x for name, x in params.items() if name != "head"}
    return dataclasses.replace(drafter, model=model), {**rest, "trimmed_head": head}
  columns = _columns(getattr(drafter, "vocabulary", None), vocabulary)
  if shares_head(drafter, params):
    if getattr(drafter, "vocabulary", None) is not None:  # the slice says it all
      drafter = dataclasses.replace(drafter, vocabulary=None)
    head = sliced_head(target.model, target.params, vocabulary)
    trimmed = VocabTrim(drafter=drafter, vocabulary=vocabulary)
    return trimmed, {"drafter": params or {}, "head": head}
  sliced = jax.tree_util.tree_map_with_path(
    lambda path, x: x[..., columns] if _in_head(path) else x, params
  )
  return dataclasses.replace(drafter, vocabulary=vocabulary), sliced


def _columns(has: DraftVocabulary | None, wanted: DraftVocabulary) -> np.ndarray:
  """Where the head of a drafter with vocabulary ``has`` (None: all tokens) holds ``wanted``."""
  if has is None:
    return wanted.ids
  missing = np.setdiff1d(wanted.ids, has.ids)
  if missing.size:
    raise UserError(
      f"the drafter's own vocabulary of {len(has.ids)} tokens lacks {missing.size} of the tokens "
      f"to keep, {missing[0]} among them; keep a subset of it"
    )
  return np.searchsorted(has.ids, wanted.ids)


def shares_head(drafter: Drafter, params: Params) -> bool:
  """Whether the drafter drafts with its target's LM head rather than one of its own."""
  if not isinstance(drafter, TrainedDrafter) or getattr(drafter, "share_head", False):
    return True
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  return not any(_in_head(path) for path, _ in paths)


def _in_head(path) -> bool:
  """Kernels and biases of LM heads: all drafters with heads of their own name them so."""
  names = [getattr(key, "key", "") for key in path]
  return len(names) > 1 and (names[-2] == "lm_head" or names[-2].startswith("head_"))


def draft_bytes(drafter: Drafter, params: Params, target: Target) -> int:
  """Bytes of weights that one draft reads: the drafter's, with the LM head it reads; of embedding
  tables nothing but a row is read."""
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  if isinstance(drafter, DraftModel):
    tied = drafter.model.config.tie_embeddings and "trimmed_head" not in params
    table = jax.tree.leaves(params["embed"])
    return size - (0 if tied else sum(x.size * x.dtype.itemsize for x in table))
  if not isinstance(drafter, VocabTrim) and shares_head(drafter, params):
    dtype = jax.tree.leaves(target.params)[0].dtype
    size += target.model.config.dim * target.model.config.vocab_size * dtype.itemsize
  return size


def memory_bound_speedup(tokens_per_step: float, draft_length: int, byte_ratio: float) -> float:
  """``tau / (c gamma + 1)`` (MBSU): the speed-up if time were bytes read.

  ``byte_ratio`` c: ``draft_bytes`` over the bytes of the target; gamma: drafts a round.
  """
  return tokens_per_step / (byte_ratio * draft_length + 1.0)
