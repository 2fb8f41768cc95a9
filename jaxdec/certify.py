# SPDX-License-Identifier: Apache-2.0
"""The losslessness certificate of (target, drafter, rule, sampler).

Four parts, each with its own verdict:

* *equality*: plain and speculative decoding of the same prompts with the same seeds, greedy and
  sampled, compared token for token;
* *distribution*: many independent speculative generations of one prompt against the target's exact
  next-token laws, by chi-square. Given the context, the counts of next tokens are multinomial
  with the law of that context, so the statistics of all contexts add up, degrees of freedom too;
  cells whose expected count is below 5 are merged;
* *negative control*: the same draws against the law of another temperature. A test that passes
  this too has no power, and the certificate says so instead of "lossless";
* *gaps*: every emitted token is teacher-forced through the plain path, and its score (logit, or
  log-probability plus noise) may fall short of the best one by rounding only. In low precision,
  where a verify pass rounds otherwise than a decode step, this stands in for equality.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding import Rule, Sampler, generate, get_rule
from jaxdec.decoding.sampling import gumbel, position_keys, request_keys
from jaxdec.drafting.base import Drafter
from jaxdec.errors import UserError

# Rejecting a right program once in ten thousand certificates.
ALPHA = 1e-4
MIN_EXPECTED = 5.0
CONTROL = 1.3  # factor on the temperature of the law that must be refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyConfig:
  """How much evidence.

  Attributes:
    sampler: the law of the sampled parts; greedy decoding is checked besides.
    rule: acceptance rule. ``match`` promises equal tokens, ``ratio`` an equal distribution.
    max_new_tokens: per prompt, in the equality part.
    draws: generations of the distribution test.
    depth: tokens of each of them; the first comes from the prefill, the others from verify passes.
    batch_size: generations run together.
    seed: of everything.
  """

  sampler: Sampler = Sampler(temperature=1.0)  # noqa: RUF009 (frozen)
  rule: str | Rule = "match"
  max_new_tokens: int = 64
  draws: int = 4096
  depth: int = 4
  batch_size: int = 128
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class ChiSquare:
  """A chi-square test: ``p_value`` is the chance of a worse fit if the law is right."""

  statistic: float
  degrees: int
  p_value: float
  contexts: int
  draws: int


def chi_square(counts: Mapping[Any, np.ndarray], laws: Mapping[Any, np.ndarray]) -> ChiSquare:
  """Tests counts ``[V]`` of next tokens against the laws ``[V]`` of their contexts, all together.

  Cells with an expected count below 5 are merged, smallest first; contexts left with one cell say
  nothing. A token of probability zero gives ``p_value`` 0 at once.
  """
  from scipy import stats

  statistic, degrees, used, draws = 0.0, 0, 0, 0
  for context, observed in counts.items():
    law = np.asarray(laws[context], np.float64)
    law = law / law.sum()
    if np.any(observed[law == 0] > 0):
      return ChiSquare(float("inf"), 1, 0.0, len(counts), int(sum(map(np.sum, counts.values()))))
    got, expected = _merge(np.asarray(observed, np.float64), law * observed.sum())
    if len(got) < 2:
      continue
    statistic += float(np.sum((got - expected) ** 2 / expected))
    degrees += len(got) - 1
    used += 1
    draws += int(observed.sum())
  p_value = float(stats.chi2.sf(statistic, degrees)) if degrees else 1.0
  return ChiSquare(statistic, degrees, p_value, used, draws)


def _merge(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Cells of expected count >= 5: large ones as they are, the others pooled, smallest first."""
  observed, expected = observed[expected > 0], expected[expected > 0]
  order = np.argsort(expected, kind="stable")
  observed, expected = observed[order], expected[order]
  small = int(np.searchsorted(expected, MIN_EXPECTED))
  # Pool all small cells; where even their sum is small, take in the next larger ones.
  while 0 < small < len(expected) and expected[:small].sum() < MIN_EXPECTED:
    small += 1
  if small == 0:
    return observed, expected
  pool = np.array([observed[:small].sum()]), np.array([expected[:small].sum()])
  return np.concatenate([pool[0], observed[small:]]), np.concatenate([pool[1], expected[small:]])


def certify(
  model: Any,
  params: Any,
  drafter: Drafter | None,
  drafter_params: Any,
  prompts: Sequence[Sequence[int]],
  config: CertifyConfig = CertifyConfig(),
  *,
  tick: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """The certificate as plain data: ``lossless`` is the verdict, ``reasons`` what speaks against it.

  Args:
    model, params: the target, in the layout that ``generate`` takes.
    prompts: token ids; the shortest one also serves the distribution test.

  Raises:
    UserError: no prompt, or draws below 100, which decide nothing.
  """
  if not prompts:
    raise UserError("nothing to verify with; give at least one prompt")
  if config.draws < 100:
    raise UserError(f"the distribution test needs at least 100 draws, got {config.draws}")
  rule = get_rule(config.rule)
  prompts = [list(p) for p in prompts]
  low = jnp.dtype(model.dtype).itemsize < 4
  decode = functools.partial(
    generate, model, params, stop=None, drafter=drafter, drafter_params=drafter_params, rule=rule
  )
  out: dict[str, Any] = {
    "dtype": jnp.dtype(model.dtype).name,
    "rule": rule.name,
    "sampler": dataclasses.asdict(config.sampler),
    "prompts": len(prompts),
    "max_new_tokens": config.max_new_tokens,
  }
  laws = {"greedy": dataclasses.replace(config.sampler, temperature=0.0)}
  if not config.sampler.greedy:
    laws["sampled"] = config.sampler
  for name, sampler in laws.items():
    tick(f"equality, {name}")
    out[name] = equality(
      model, params, decode, prompts, sampler, config, pathwise=rule.name == "match"
    )
  if not config.sampler.greedy:
    prompt = min(prompts, key=len)
    tick(f"distribution, {config.draws} draws")
    out["distribution"], out["control"] = distribution(model, params, decode, prompt, config)
  out["reasons"] = _reasons(out, rule, low)
  out["lossless"] = not out["reasons"]
  return out


def equality(model, params, decode, prompts, sampler, config, *, pathwise: bool) -> dict[str, Any]:
  """Plain against speculative, prompt by prompt, and the gap report of the speculative tokens."""
  same, first, differing = 0, None, []
  gaps: list[np.ndarray] = []
  scale = 0.0
  for i, prompt in enumerate(prompts):
    options = dict(max_new_tokens=config.max_new_tokens, sampler=sampler, seed=[config.seed + i])
    got = decode([prompt], **options).tokens[0]
    plain = generate(model, params, [prompt], stop=None, **options).tokens[0]
    same += got == plain
    if got != plain:
      at = next(j for j, (a, b) in enumerate(zip(got, plain)) if a != b)
      differing.append({"prompt": i, "position": at, "plain": plain[at], "speculative": got[at]})
      first = i if first is None else first
    if pathwise or sampler.greedy:
      gap, size = score_gaps(model, params, prompt, got, sampler, config.seed + i)
      gaps.append(gap)
      scale = max(scale, size)
  report: dict[str, Any] = {
    "identical": same, "of": len(prompts), "pathwise": pathwise or sampler.greedy,
    "differences": differing,
  }  # fmt: skip
  if gaps:
    allowed = tolerance(jnp.dtype(model.dtype), scale)
    every = np.concatenate(gaps)
    report["gaps"] = {
      "largest": float(every.max()), "allowed": allowed, "positions": int(every.size),
      "not_the_best": int((every > 0).sum()), "beyond_allowed": int((every > allowed).sum()),
    }  # fmt: skip
    for item in differing:
      item["gap"] = float(gaps[item["prompt"]][item["position"]])
  return report


def tolerance(dtype: Any, scale: float) -> float:
  """How far rounding may move two scores apart, as multiples of eps times the largest logit.

  2 in bfloat16 and float16, where sums are accumulated in float32 and the roundings of the stored
  values dominate; 64 in float32, where the sums themselves round.
  """
  ulps = 2 if dtype.itemsize < 4 else 64
  return float(ulps * jnp.finfo(dtype).eps * max(scale, 1.0))


def score_gaps(model, params, prompt, tokens, sampler, seed) -> tuple[np.ndarray, float]:
  """Best score minus score of the emitted token at each position, and the largest absolute logit.

  The scores are what ``Sampler.draw`` maximises, from one plain forward pass over the whole text.
  """
  text = [*prompt, *tokens]
  padded = -(-len(text) // 64) * 64
  row = np.zeros((1, padded), np.int32)
  row[0, : len(text)] = text
  scores, logits = _scores(
    params, jnp.asarray(row), request_keys([seed], 1), model=model, sampler=sampler
  )
  rows = slice(len(prompt) - 1, len(text) - 1)  # row t scores the token at t + 1
  scores, logits = np.asarray(scores)[0, rows], np.asarray(logits)[0, rows]
  chosen = scores[np.arange(len(tokens)), tokens]
  return scores.max(-1) - chosen, float(np.abs(logits).max())


@functools.partial(jax.jit, static_argnames=("model", "sampler"))
def _scores(params, tokens, keys, *, model, sampler):
  logits = model.apply({"params": params}, tokens).logits
  if sampler.greedy:
    return logits, logits
  positions = jnp.arange(1, tokens.shape[1] + 1)[None]
  noise = gumbel(position_keys(keys, positions), logits.shape[-1])
  return sampler.process(logits) + noise, logits


def distribution(model, params, decode, prompt, config) -> tuple[dict[str, Any], dict[str, Any]]:
  """The chi-square test of the emitted law, and its negative control."""
  drawn: list[list[int]] = []
  while len(drawn) < config.draws:
    # Whole batches: the last one is cut, so that one shape is compiled.
    seeds = [config.seed + 1_000_003 + len(drawn) + i for i in range(config.batch_size)]
    batch = decode(
      [prompt] * config.batch_size, max_new_tokens=config.depth, sampler=config.sampler, seed=seeds
    )
    drawn += batch.tokens
  drawn = drawn[: config.draws]
  counts = prefix_counts(drawn, model.config.vocab_size)
  right = exact_laws(model, params, prompt, list(counts), config.sampler)
  wrong = dataclasses.replace(config.sampler, temperature=config.sampler.temperature * CONTROL)
  control = exact_laws(model, params, prompt, list(counts), wrong)
  test, refused = chi_square(counts, right), chi_square(counts, control)
  return (
    {**dataclasses.asdict(test), "accepted": bool(test.p_value >= ALPHA), "alpha": ALPHA},
    {
      **dataclasses.asdict(refused), "rejected": bool(refused.p_value < ALPHA),
      "law": f"temperature {wrong.temperature:g}",
    },
  )  # fmt: skip


def prefix_counts(
  sequences: Sequence[Sequence[int]], vocab_size: int, least: int = 20
) -> dict[tuple[int, ...], np.ndarray]:
  """Counts of the next token after every prefix that was seen at least ``least`` times."""
  seen: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(
    collections.Counter
  )
  for tokens in sequences:
    for d, token in enumerate(tokens):
      seen[tuple(tokens[:d])][token] += 1
  out = {}
  for prefix, counter in seen.items():
    if sum(counter.values()) >= least:
      out[prefix] = np.zeros(vocab_size, np.int64)
      for token, count in counter.items():
        out[prefix][token] = count
  return out


def exact_laws(
  model, params, prompt, prefixes, sampler, batch: int = 32
) -> dict[tuple, np.ndarray]:
  """The target's next-token law ``[V]`` after prompt and prefix, one plain forward pass each."""
  longest = len(prompt) + max(map(len, prefixes))
  laws = {}
  for start in range(0, len(prefixes), batch):
    group = prefixes[start : start + batch]
    rows = np.zeros((batch, longest), np.int32)
    last = np.zeros(batch, np.int32)
    for i, prefix in enumerate(group):
      text = [*prompt, *prefix]
      rows[i, : len(text)] = text
      last[i] = len(text) - 1
    law = np.asarray(
      _laws(params, jnp.asarray(rows), jnp.asarray(last), model=model, sampler=sampler)
    )
    laws |= {prefix: law[i] for i, prefix in enumerate(group)}
  return laws


@functools.partial(jax.jit, static_argnames=("model", "sampler"))
def _laws(params, tokens, last, *, model, sampler):
  hidden = model.apply({"params": params}, tokens, logits=False).hidden
  hidden = hidden[jnp.arange(tokens.shape[0]), last]
  logits = model.apply({"params": params}, hidden, method="unembed")
  return jnp.exp(sampler.log_probs(logits))


def _reasons(out: Mapping[str, Any], rule: Rule, low: bool) -> list[str]:
  """What speaks against the word lossless, in full sentences; empty if nothing does."""
  reasons = []
  if not rule.lossless:
    reasons.append(f"rule {rule.name!r} promises no equal law")
  for name in ("greedy", "sampled"):
    part = out.get(name)
    if part is None or not part["pathwise"]:
      continue
    if part["identical"] < part["of"] and not low:
      lost = part["of"] - part["identical"]
      reasons.append(f"{name}: {lost} of {part['of']} outputs differ from plain decoding")
    if part["gaps"]["beyond_allowed"]:
      gaps = part["gaps"]
      reasons.append(
        f"{name}: {gaps['beyond_allowed']} of {gaps['positions']} tokens lie further below the "
        f"best score than rounding explains ({gaps['largest']:.3g}, {gaps['allowed']:.3g} allowed)"
      )
  if "distribution" in out:
    if not out["distribution"]["accepted"]:
      reasons.append(f"distribution: p = {out['distribution']['p_value']:.2g} is below {ALPHA:g}")
    if not out["control"]["rejected"]:
      reasons.append(
        f"the distribution test has no power here: it accepts {out['control']['law']} too; "
        "use more draws or a longer prompt file"
      )
  return reasons


def summary(out: Mapping[str, Any]) -> list[str]:
  """The certificate in a few lines, the verdict last."""
  lines = []
  for name in ("greedy", "sampled"):
    if name in out:
      part = out[name]
      if part["pathwise"]:
        lines.append(
          f"{name}: {part['identical']} of {part['of']} outputs identical to plain decoding"
        )
      if "gaps" in part:
        gaps = part["gaps"]
        lines.append(
          f"{name}: {gaps['not_the_best']} of {gaps['positions']} tokens are not the plain path's "
          f"best; largest gap {gaps['largest']:.2g}, rounding explains {gaps['allowed']:.2g}"
        )
  if "distribution" in out:
    test, control = out["distribution"], out["control"]
    lines.append(
      f"distribution: chi-square {test['statistic']:.1f} on {test['degrees']} degrees of freedom, "
      f"p = {test['p_value']:.3g} ({test['draws']} next tokens in {test['contexts']} contexts)"
    )
    lines.append(
      f"negative control, law of {control['law']}: p = {control['p_value']:.3g}, "
      + ("refused, as it must be" if control["rejected"] else "NOT refused")
    )
  verdict = "lossless" if out["lossless"] else "not certified: " + "; ".join(out["reasons"])
  return [*lines, f"verdict ({out['dtype']}, rule {out['rule']}): {verdict}"]
