# SPDX-License-Identifier: Apache-2.0
"""A language model ready to use: decoder, parameters and tokenizer behind one small facade.

Paths and configurations are checked before JAX is imported, so a wrong one is reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdec.errors import UserError
from jaxdec.io.folders import open_model
from jaxdec.io.tokenizers import Tokenizer, load_tokenizer

TINY = Path(__file__).parent / "assets" / "tiny_python"


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A decoder with its parameters and tokenizer.

  Attributes:
    model: the ``jaxdec.models.Decoder`` (unrolled layout).
    params: its parameters, unboxed.
    tokenizer: None for a model used with token ids only.
  """

  model: Any
  params: Any
  tokenizer: Tokenizer | None = None

  @property
  def config(self) -> Any:
    """The ``DecoderConfig``."""
    return self.model.config

  def __call__(self, tokens: Any) -> Any:
    """Next-token logits: int ``[B, T]`` to float32 ``[B, T, V]``.

    Raises:
      UserError: tokens of another rank or type, outside the vocabulary, or over the model's limit.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if not isinstance(tokens, jax.core.Tracer):
      tokens = np.asarray(tokens)
      self._check(tokens)
    return _forward()(self.model, self.params, jnp.asarray(tokens, jnp.int32))

  def _check(self, tokens: Any) -> None:
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or 0 in tokens.shape:
      raise UserError(
        "tokens must be integers of shape [B, T] with B and T at least 1, got "
        f"{tokens.dtype.name} of shape {tokens.shape}"
      )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= self.config.vocab_size:
      raise UserError(
        f"token id {low if low < 0 else high} is outside the vocabulary of "
        f"{self.config.vocab_size} tokens; was it encoded with another tokenizer?"
      )
    if tokens.shape[1] > self.config.max_length:
      raise UserError(
        f"the sequences have {tokens.shape[1]} tokens, over the model's limit of "
        f"{self.config.max_length}; shorten them"
      )

  def generate(
    self,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    drafter: Any = None,
    drafter_params: Any = None,
    rule: Any = "match",
    stop: Any = ...,
    seed: int | Sequence[int] = 0,
    stream: Callable[[Any], None] | None = None,
    **options: Any,
  ) -> Any:
    """Continues prompts; a drafter changes the speed, not the tokens.

    Args:
      prompts: texts or token-id lists, of any lengths.
      max_new_tokens: never exceeded.
      temperature: 0 is greedy. top_k, top_p, min_p: filters of the law.
      drafter: None, a built-in name, the folder of a distilled run, of a draft head in a layout of
        ``jaxdec.io.drafters``, of a datastore or of a small decoder, another ``LM`` with the same
        vocabulary, or a ``Drafter`` (with ``drafter_params`` if it has parameters). ``"auto"``:
        what ``jaxdec.tuner`` finds fastest here, measured on the first call for a batch size and
        law (it compiles a dozen programs), plain decoding included.
      rule: verification rule; ``match`` is exact for every drafter.
      stop: ``...`` the model's EOS ids; ids or strings are added to them; None never stops early.
      seed: row i draws from ``fold_in(seed, i)``; a list gives each row its own.
      stream: called with each piece of output as it comes.
      options: the other keywords of ``jaxdec.decoding.generate_stream``.

    Returns:
      ``Generation``: ``tokens`` (new ids per prompt), ``text``, ``stats``.

    Raises:
      UserError: a mistake in any argument, before anything is compiled.
    """
    from jaxdec.decoding import Sampler, generate

    sampler = Sampler(temperature, top_k, top_p, min_p)
    if isinstance(drafter, str) and drafter == "auto":
      from jaxdec.decoding.request import parse_prompts
      from jaxdec.tuner import auto

      if rule != "match":
        raise UserError(
          f"drafter='auto' chooses among drafters for rule 'match', got rule={rule!r}; leave rule "
          "out, or name a drafter"
        )
      tuned = auto(self, parse_prompts(prompts, self.config, self.tokenizer), sampler)
      found, params = tuned.drafter, tuned.params
    else:
      found, params = self.drafter(drafter)
    return generate(
      self.model,
      self.params,
      prompts,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      drafter=found,
      drafter_params=params if drafter_params is None else drafter_params,
      rule=rule,
      stop=stop,
      seed=seed,
      stream=stream,
      tokenizer=self.tokenizer,
      **options,
    )

  def drafter(self, spec: Any) -> tuple[Any, Any]:
    """The drafter meant by ``spec`` (see ``generate``) and its parameters, None where it has none.

    Raises:
      UserError: unknown name, a folder that holds no drafter, or a drafter for another target.
    """
    from jaxdec.drafting import DraftModel, Target, get
    from jaxdec.drafting.checkpoint import CONFIG_FILE, load_drafter
    from jaxdec.drafting.kinds import KINDS
    from jaxdec.io.drafters import find_layout, read_drafter

    if isinstance(spec, str) and spec == "auto":
      raise UserError("'auto' is chosen for given prompts: by generate and bench; name a drafter")
    if isinstance(spec, LM):
      return DraftModel(model=spec.model), spec.params
    if not isinstance(spec, str | os.PathLike):
      return get(spec), None
    folder = Path(spec).expanduser()
    if spec in KINDS:
      folder = TINY / "drafters" / str(spec)
      if not folder.is_dir():
        raise UserError(
          f"no trained {spec!r} drafter comes with this installation; distill one "
          f"(jaxdec distill) and give its folder"
        )
    elif not folder.is_dir():
      if os.sep in str(spec) or folder.exists():
        raise UserError(f"drafter folder '{spec}' does not exist; give a distilled run's folder")
      return get(str(spec)), None
    if (folder / "datastore.json").is_file():
      from jaxdec.io.datastore import load_datastore

      return load_datastore(folder, self.tokenizer, self.config.vocab_size)
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
      if find_layout(folder) is not None:
        return read_drafter(folder, self.config, params=self.params)
      return self.drafter(load(folder, dtype=self.model.dtype, need_tokenizer=False))
    return load_drafter(folder, Target(self.model, self.params, None))

  def save(self, folder: str | os.PathLike, **options: Any) -> Path:
    """Writes the model in Hugging Face layout; ``options`` as in ``jaxdec.io.save_checkpoint``."""
    from jaxdec.io.huggingface import save_checkpoint

    options.setdefault("tokenizer", self.tokenizer)
    return save_checkpoint(folder, self.config, self.params, **options)


@functools.cache
def _forward() -> Callable:
  import jax

  def forward(model, params, tokens):
    return model.apply({"params": params}, tokens).logits

  return jax.jit(forward, static_argnums=0)


def load(
  folder: str | os.PathLike,
  dtype: Any = None,
  mesh: Any = None,
  *,
  need_tokenizer: bool = True,
) -> LM:
  """A model from a local folder in Hugging Face layout; the network is never touched.

  Args:
    folder: config.json, safetensors (single or sharded), tokenizer.json.
    dtype: of parameters and computation (``float32``, ``bfloat16``, ``float16``); None: the file's.
    mesh: devices to lay the parameters on, straight from the file.
    need_tokenizer: False accepts a folder without tokenizer.json.

  Raises:
    UserError: anything wrong with the folder, its configuration, its tensors or its tokenizer.
  """
  opened = open_model(folder)
  tokenizer = None
  if need_tokenizer or (opened.path / "tokenizer.json").is_file():
    tokenizer = load_tokenizer(
      opened.path,
      model_vocab_size=opened.fields.get("vocab_size"),
      eos_ids=opened.eos_ids,
      bos_id=opened.bos_id,
    )
  from jaxdec.io.huggingface import load_checkpoint, parse_dtype
  from jaxdec.models import Decoder
  from jaxdec.parallel.sequence import SequenceConfig

  config, params = load_checkpoint(opened, dtype, mesh)
  if tokenizer is not None:
    # The file names a BOS id even where its tokenizer puts none in front; ours means "in front".
    eos_ids = tokenizer.eos_ids or config.eos_ids
    config = dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=eos_ids)
  compute = parse_dtype(dtype) or params["final_norm"]["scale"].dtype
  # On several devices layers run in shard_map: XLA can partition no Pallas kernel.
  sequence = SequenceConfig() if mesh is not None and mesh.size > 1 else None
  return LM(Decoder(config, dtype=compute, sequence=sequence), params, tokenizer)


def save(lm: LM, folder: str | os.PathLike, **options: Any) -> Path:
  """Writes ``lm`` as a Hugging Face folder that transformers loads; parameters bit for bit."""
  return lm.save(folder, **options)


def tiny(dtype: Any = "float32") -> LM:
  """The small Python model that comes with the package."""
  if not (TINY / "config.json").is_file():
    raise UserError(
      "this installation lacks the embedded model (jaxdec/assets/tiny_python); install the "
      "package again or load a folder with jaxdec.load"
    )
  return load(TINY, dtype=dtype)
