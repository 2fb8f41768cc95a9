# SPDX-License-Identifier: Apache-2.0
"""Drafters that read an image as a few vectors, on a synthetic image before the tiny target."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, batch_of, init, loss_of, randomized, replace, target
from universal import PATHS, Universal

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import prefix as compressors
from jaxdec.drafting.base import Context, Prompt, Target, TargetOutput
from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.flash_vlm import Flash
from jaxdec.drafting.prefix_drafter import IMAGE_COUNT, IMAGE_START, IMAGE_VALUES
from jaxdec.drafting.specvlm import SpecVLM
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.vispec import STAGE_2, ViSpec
from jaxdec.errors import UserError
from jaxdec.models import Prefix
from pallas_kernels.testing import COMPILE_ONCE

DIM, N = 32, 12
START, COUNT = 3, 9  # the image of most tests; the batch is padded to N
BY_HEART = {"objective": "hard", "rollouts": 3, "noise": 0.0}


@pytest.mark.slow
class TestSpecVLM(Universal):
  kind = SpecVLM
  overfit_options = BY_HEART


@pytest.mark.slow
class TestViSpec(Universal):
  kind = ViSpec
  overfit_options = BY_HEART


@pytest.mark.slow
class TestFlash(Universal):
  kind = Flash
  options = {"num_latents": 4}  # noqa: RUF012
  overfit_options = {"objective": "hard", "noise": 0.0}  # noqa: RUF012


CASES = {
  "specvlm_gate": (SpecVLM, {"coarse": 4}),
  "specvlm_mix": (SpecVLM, {"compression": "mix"}),
  "specvlm_concat": (SpecVLM, {"compression": "concat"}),
  "vispec": (ViSpec, {"num_queries": 3}),
  "flash": (Flash, {"num_latents": 4}),
}
# What 9 image tokens become; the gate: any of its branches.
LEFT = {
  "specvlm_gate": {0, 2, 3},
  "specvlm_mix": {3},
  "specvlm_concat": {1 + 1 + 3 + 2},
  "vispec": {2},
  "flash": {4},
}


def cases(*quick):
  """All of them, but for those named only in the slow suite: most of it is compiling."""
  return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@functools.cache
def image(rows=1, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(rows, N, DIM)).astype(np.float32)


@functools.cache
def made(case, **options):
  kind, more = CASES[case]
  drafter = kind.for_target(target().model.config, **{"num_heads": 3, **more, **options})
  return drafter, randomized(init(drafter, target()), scale=0.5)


def images(batch, start=START, count=COUNT, values=None):
  """The batch, with an image in each row; ``count`` 0 in rows of text."""
  rows = batch["tokens"].shape[0]
  values = image(rows) if values is None else values
  return {
    **batch,
    IMAGE_VALUES: jnp.asarray(values),
    IMAGE_START: jnp.broadcast_to(jnp.asarray(start, jnp.int32), (rows,)),
    IMAGE_COUNT: jnp.broadcast_to(jnp.asarray(count, jnp.int32), (rows,)),
  }


once = functools.partial(jax.jit, compiler_options=COMPILE_ONCE)


@once
def _see(params, tokens, embeddings):
  out = target().model.apply({"params": params}, tokens, embeddings=embeddings)
  return TargetOutput(out.hidden, (), out.logits)


def see(batch) -> TargetOutput:
  """The target over a batch with images."""
  prefix = Prefix(batch[IMAGE_VALUES], batch[IMAGE_START], batch[IMAGE_COUNT])
  positions = jnp.arange(batch["tokens"].shape[1])[None]
  return _see(target().params, batch["tokens"], prefix.embeddings(positions))


@functools.partial(once, static_argnums=0)
def train_logits(drafter, params, output, batch):
  t = target()
  return [
    drafter.head(params, t, e.depth, e.states)
    for e in drafter.examples(params, t, output, batch, None)
  ]


@functools.partial(once, static_argnums=0)
def examples(drafter, params, output, batch, rng=None):
  return list(drafter.examples(params, target(), output, batch, rng))


@functools.partial(once, static_argnums=(0, 4))
def serve(drafter, params, output, text, depths, lengths, prefix):
  """State after the prompts, and logits of every depth with the text's own tokens fed."""
  t, rows = target(), jnp.arange(text.shape[0])
  root = text[rows, lengths]
  state = drafter.init_state(text.shape[0], 64)
  state = drafter.start(params, state, Prompt(text, lengths, root, prefix), output, t)
  context = Context(root=root, length=lengths, history=text, target=t, sampler=None)
  logits, carry = drafter.first(params, state, context)
  step, out = drafter.step(params, state, context), [logits]
  for level in range(1, depths):
    logits, carry = step(carry, level, text[rows, lengths + level][:, None], np.zeros(1, np.int32))
    out.append(logits[:, 0])
  return state, out


@pytest.mark.parametrize("case", cases("vispec", "flash"))
def test_image_in_training_equals_image_in_use(case):
  """Slots kept in place behind a mask, or side by side in a cache: the same logits; its length is
  what the compressor left."""
  drafter, params = made(case)
  text = np.random.default_rng(1).integers(0, VOCAB, 22)
  # As in a prompt: what comes before the answer is no label, and is the question.
  mask = [0] * (START + COUNT + 2) + [1] * (22 - START - COUNT - 2)
  batch = images(batch_of([text], loss_mask=[mask]))
  output = see(batch)
  trained = train_logits(drafter, params, output, batch)
  slot = START + COUNT + 1  # the prompt's last token
  prefix = Prefix(*(batch[k] for k in (IMAGE_VALUES, IMAGE_START, IMAGE_COUNT)))
  lengths = jnp.asarray([slot + 1])
  state, served = serve(drafter, params, output, jnp.asarray([text]), 3, lengths, prefix)
  for depth in range(3):
    np.testing.assert_allclose(served[depth][0], trained[depth][0, slot], atol=3e-5)
  left = int(state.caches[0].length[0]) - (slot + 1 - COUNT)
  assert left in LEFT[case], left
  assert int(state.offset[0]) == COUNT - left


@pytest.mark.parametrize("case", cases("vispec"))
def test_lossless_with_images(case):
  """Whatever the drafter makes of the images, the target's text stays what it is; rows with and
  without one; an image first, and one last but one."""
  drafter, params = made(case, tree=StaticTree.from_paths(PATHS))
  rng, t = np.random.default_rng(2), target()
  prompts = [rng.integers(0, VOCAB, n).tolist() for n in (15, 6, 10)]
  values = image(2, seed=5)
  prefix = [(2, values[0, :7]), None, (0, values[1, :9])]
  options = dict(max_new_tokens=12, stop=None, seed=3, prefix=prefix, sampler=Sampler(1.0))
  expected = generate(t.model, t.params, prompts, **options)
  out = generate(t.model, t.params, prompts, drafter=drafter, drafter_params=params, **options)
  assert out.tokens == expected.tokens


def test_the_target_reads_the_image():
  """Its text depends on the embeddings, and is that of one pass over them (chunked prefill)."""
  t, rng = target(), np.random.default_rng(2)
  prompt = rng.integers(0, VOCAB, 15).tolist()
  prefix = [(2, image()[0, :7])]
  text = generate(t.model, t.params, [prompt], max_new_tokens=6, stop=None, prefix=prefix)
  assert text.tokens != generate(t.model, t.params, [prompt], max_new_tokens=6, stop=None).tokens
  again = generate(
    t.model, t.params, [prompt], max_new_tokens=6, stop=None, prefix=prefix, prefill_chunk=4
  )
  assert again.tokens == text.tokens
  tokens = np.asarray([prompt + text.tokens[0][:-1]])
  logits = see(images(batch_of(tokens), start=2, count=7)).logits[0, 14:]
  np.testing.assert_array_equal(jnp.argmax(logits, -1), text.tokens[0])
  # The ids under an image don't matter.
  other = [*prompt[:2], *[0] * 7, *prompt[9:]]
  same = generate(t.model, t.params, [other], max_new_tokens=6, stop=None, prefix=prefix)
  assert same.tokens == text.tokens


def test_requests_without_images_compile_nothing_new():
  from jaxdec.decoding.executables import compilations

  t = target()
  run = functools.partial(generate, t.model, t.params, [[1, 2, 3]], max_new_tokens=2, stop=None)
  first = run()
  before = compilations()
  assert run(prefix=[None]).tokens == first.tokens
  assert compilations() == before


@pytest.mark.parametrize(
  ("prefix", "message"),
  [
    ([None, None], "prefix has 2 entries for 1 prompts"),
    ([(0, np.zeros((2, 5)))], r"must hold embeddings \[n, 32\], got an array of shape \(2, 5\)"),
    ([(2, np.zeros((2, 32)))], "stands for the tokens 2..3 of its prompt, which has 3"),
    ([3], "must be None or"),
  ],
)
def test_bad_prefixes_are_one_sentence(prefix, message):
  t = target()
  with pytest.raises(UserError, match=message):
    generate(t.model, t.params, [[1, 2, 3]], max_new_tokens=2, prefix=prefix)


def test_vispec_starts_as_eagle_on_text():
  """W_i = [I | 0]: the same parameters give EAGLE's logits."""
  t, drafter = target(), ViSpec.for_target(target().model.config, num_heads=2)
  params = init(drafter, t)
  eagle = Eagle.for_target(t.model.config, num_heads=2)
  batch = batch_of(np.random.default_rng(0).integers(0, VOCAB, (2, 12)))
  output = see(images(batch, count=0))
  ours = train_logits(drafter, params, output, batch)
  theirs = train_logits(eagle, {k: params[k] for k in ("fc", "blocks_0")}, output, batch)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)
  # A row of text in a batch of images is a row of text.
  mixed = train_logits(drafter, params, output, images(batch, count=0))
  for a, b in zip(mixed, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_vispec_image_reaches_later_text_only():
  """The global vector is added after the image, and nothing of the image before it."""
  drafter, params = made("vispec")
  batch = images(batch_of([np.random.default_rng(4).integers(0, VOCAB, 22)]))
  output = see(batch)
  other = {**batch, IMAGE_VALUES: 2 * batch[IMAGE_VALUES]}  # the same target, another image
  a, b = (train_logits(drafter, params, output, x)[0][0] for x in (batch, other))
  before = START - 1  # slot t is fed token t + 1
  np.testing.assert_array_equal(a[:before], b[:before])
  assert np.all(np.max(np.abs(a - b)[START + COUNT :], axis=-1) > 1e-4)


def test_compressors_see_no_order():
  """Resampler and latents give the same for permuted tokens; padding changes nothing."""
  x, order = jnp.asarray(image()[:, :COUNT]), np.random.default_rng(3).permutation(COUNT)
  count = jnp.asarray([COUNT])
  padded = jnp.concatenate([x, jnp.full((1, 4, DIM), 7.0)], axis=1)

  @functools.partial(once, static_argnums=0)
  def run(module):
    params = randomized(module.init(jax.random.key(0), x, count)["params"])
    return [module.apply({"params": params}, y, count) for y in (x, x[:, order], padded)]

  for module in (compressors.Resampler(3, 4), compressors.Latents(3)):
    out, permuted, longer = run(module)
    np.testing.assert_allclose(out.values, permuted.values, atol=1e-6)
    np.testing.assert_allclose(out.values, longer.values, atol=1e-6)
    assert out.count.tolist() == [3]


def test_pooling_pruning_convolution_by_hand():
  x, count = jnp.asarray(image(2)), jnp.asarray([9, 0])

  @functools.partial(once, static_argnums=0)
  def apply(module, rng=None):
    params = module.init(jax.random.key(0), x, count).get("params", {})
    return module.apply({"params": params}, x, count, rng)

  for ratio, left in ((3, 3), (4, 3), (20, 1)):
    out = apply(compressors.Pooling(ratio))
    assert out.count.tolist() == [left, 0]
    for j in range(left):
      group = x[0, j * ratio : min((j + 1) * ratio, 9)]
      np.testing.assert_allclose(out.values[0, j], jnp.mean(group, 0), rtol=1e-5, atol=1e-6)
  pooled, convolved = (apply(m(3)) for m in (compressors.Pooling, compressors.Convolution))
  np.testing.assert_allclose(convolved.values[0, :3], pooled.values[0, :3], rtol=1e-5, atol=1e-6)
  for rng in (None, jax.random.key(1)):
    out = apply(compressors.Pruning(3), rng)
    assert out.count.tolist() == [3, 0]
    rows = [int(np.argmax(np.all(np.isclose(x[0], v), axis=-1))) for v in out.values[0, :3]]
    assert rows == sorted(set(rows)) and max(rows) < 9
    if rng is None:
      assert rows == [1, 4, 7]


def test_gate_follows_the_question_and_learns():
  """One branch of five, the text-only one included; gradients reach the gate and its branch."""
  x, count = jnp.asarray(image()), jnp.asarray([9])
  module = compressors.Elastic("gate", 3, 20, 2, 4)
  question = jnp.zeros((1, DIM))
  params = nn.unbox(once(module.init)(jax.random.key(0), x, count, question)["params"])

  @once
  def choose(bias):
    chosen = {**params, "gate": {**params["gate"], "bias": bias}}
    return module.apply({"params": chosen}, x, count, question)

  singles = [compressors.Pruning(20), compressors.Pooling(20), compressors.Convolution(3)]
  own = [{}, {}, {"params": params["convolution"]}]
  alone = once(lambda: [m.apply(p, x, count) for m, p in zip(singles, own)])()
  outs = [choose(5.0 * jnp.eye(5)[branch]) for branch in range(5)]
  counts = [int(out.count[0]) for out in outs]
  assert counts == [1, 1, 3, 2, 0]
  for n, out, expected in zip(counts, outs, alone):
    np.testing.assert_allclose(out.values[0, :n], expected.values[0, :n], atol=1e-6)

  def value(params):
    out = module.apply({"params": params}, x, count, jnp.ones((1, DIM)), jax.random.key(2))
    return jnp.sum(out.values)  # not its square: the text-only branch gives zeros

  grads = once(jax.grad(value))(params)
  assert np.any(grads["gate"]["kernel"])


def test_flash_labels_move_with_the_offset():
  """On a target whose state is a function of position, offset j at slot t learns position t + j."""
  drafter, params = made("flash", noise=0.0)
  batch = batch_of([np.arange(12) % VOCAB])
  hidden = jnp.broadcast_to(jnp.arange(12.0)[None, :, None], (1, 12, DIM))
  output = TargetOutput(hidden, (), None)
  for example in examples(drafter, params, output, batch):
    k, slots = example.depth, example.labels.shape[1]
    np.testing.assert_array_equal(example.hidden[0, :, 0], np.arange(slots) + k)
    np.testing.assert_array_equal(example.labels[0], (np.arange(slots) + k + 1) % VOCAB)
    assert example.states.shape == (1, slots, DIM)


def test_vispec_second_stage():
  """Passes have the first depth's labels, the second reads what the first predicted, and its
  gradient flows through; the loss is 20 TV + 0.1 ListMLE, a mean over both."""
  drafter, params = made("vispec", noise=0.0, **STAGE_2)
  batch = images(batch_of([np.random.default_rng(4).integers(0, VOCAB, 20)]))
  output, t, rng = see(batch), target(), jax.random.key(0)
  first, second = examples(drafter, params, output, batch, rng)
  assert (first.depth, second.depth) == (1, 1)
  np.testing.assert_array_equal(first.labels, second.labels)
  # The second pass alone: what the first predicted, as features (where all slots have a token).
  predicted = jnp.pad(first.states, ((0, 0), (0, 1), (0, 0)))
  features = jnp.concatenate([output.hidden[:, :1], predicted], axis=1)
  alone = replace(drafter, mtp_steps=0)
  again = examples(alone, params, output.replace(hidden=features), batch, rng)[0]
  np.testing.assert_allclose(second.states, again.states, atol=1e-5)
  loss, metrics = loss_of(drafter, params, t, output, batch, rng)
  np.testing.assert_allclose(loss, jnp.mean(metrics["depth_loss"]), rtol=1e-5)


@pytest.mark.parametrize("case", cases("specvlm_gate"))
def test_images_are_trained_and_no_labels(case):
  """Gradients reach the compressor; slots whose tokens are the image's have no weight, and the
  target's gets none."""
  drafter, params = made(case)
  batch = images(batch_of([np.random.default_rng(4).integers(0, VOCAB, 22)]))
  output = see(batch)
  for example in examples(drafter, params, output, batch):
    counted = np.flatnonzero(example.weights[0])
    fed = [t + i for t in counted for i in range(1, example.depth + 2)]
    assert len(counted) and not any(START <= i < START + COUNT for i in fed)

  @once
  def grads(params, frozen):
    t = Target(target().model, frozen, None)
    return jax.grad(lambda p: drafter.loss(p, t, output, batch, jax.random.key(1))[0])(params)

  out = grads(params, target().params)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(out))
  name = {"vispec": "adaptor", "flash": "latents"}.get(case, "compressor")
  assert any(np.any(g) for g in jax.tree.leaves(out[name]))
