# SPDX-License-Identifier: Apache-2.0
"""Records what transformers computes on the tiny checkpoints of ``tests/models/parity_cases.py``.

Run with the ``compare`` extra installed: ``python tests/data/make_parity.py``. Writes one
``tests/data/parity/<case>.npz`` a case: configuration, tensor shapes and checksum, tokens,
logits, and the greedy continuation with the smallest gap between its two best logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import parity_cases as cases


def build(name: str, seed: int):
  """The case as a transformers model in float32, weights by the recipe."""
  import torch
  import transformers

  torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
  kind, arguments = cases.CASES[name]
  config = getattr(transformers, kind)(**json.loads(json.dumps(arguments)))
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  model = model.float().eval()
  state = model.state_dict()
  if config.tie_word_embeddings:
    state.pop("lm_head.weight")
  shapes = {n: tuple(t.shape) for n, t in state.items()}
  tensors = cases.checkpoint(shapes, seed=seed, gemma="Gemma" in kind)
  model.load_state_dict({n: torch.from_numpy(a) for n, a in tensors.items()}, strict=False)
  model.tie_weights()
  return model, tensors


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
  """Logits [B, T, V] of whole sequences."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


def greedy(model, tokens: np.ndarray, new_tokens: int) -> tuple[np.ndarray, float]:
  """Continuation [B, new] by ``generate``, and the smallest top-2 gap along it."""
  import torch

  ids = torch.from_numpy(tokens.astype(np.int64))
  out = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    max_new_tokens=new_tokens,
  ).numpy()
  scores = np.sort(logits_of(model, out)[:, tokens.shape[1] - 1 : -1], axis=-1)
  return out[:, tokens.shape[1] :].astype(np.int32), float(
    (scores[..., -1] - scores[..., -2]).min()
  )


def record(name: str) -> None:
  """Writes one case, with the first seed whose continuation can't flip by rounding."""
  import torch
  import transformers

  for seed in range(20):
    model, tensors = build(name, seed)
    tokens = cases.prompts(seed)
    continuation, gap = greedy(model, tokens, cases.NEW_TOKENS)
    # A gap far above float32 error, and text that isn't one token for ever.
    if gap > 1e-3 and all(len(set(row)) >= 8 for row in continuation.tolist()):
      break
  else:
    raise RuntimeError(f"no seed below 20 gives {name} a clear continuation")
  cases.RECORDED.mkdir(parents=True, exist_ok=True)
  config = model.config.to_dict()
  np.savez_compressed(
    cases.RECORDED / f"{name}.npz",
    config=json.dumps(config),
    shapes=json.dumps({n: a.shape for n, a in tensors.items()}),
    checksum=cases.checksum(tensors),
    seed=seed,
    tokens=tokens,
    logits=logits_of(model, tokens),
    continuation=continuation,
    gap=gap,
    made_with=f"torch {torch.__version__}, transformers {transformers.__version__}",
  )
  size = (cases.RECORDED / f"{name}.npz").stat().st_size
  print(f"{name}: seed {seed}, smallest gap {gap:.4f}, {size / 1000:.0f} kB")


if __name__ == "__main__":
  for case in sys.argv[1:] or cases.CASES:
    record(case)
