# SPDX-License-Identifier: Apache-2.0
"""How far rounding alone moves a loss curve: one device against itself, parameters changed by 1e-7.

Command:   python -m experiments.lasp2.rounding            (a minute; prints)
Expected:  README.md beside this file.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from experiments.lasp2.config import get_config
from jaxdec.training import MeshConfig

STEPS, CHANGE = 20, 1e-7


def curves(preset: str) -> np.ndarray:
  """Losses ``[2, STEPS]``: of the run, and of the same with every parameter times 1 + 1e-7 z."""
  recipe = get_config(preset)
  trainer = dataclasses.replace(recipe.trainer, mesh=MeshConfig(), progress=False)
  trainer = dataclasses.replace(recipe, trainer=trainer, eval_batches=0).make_trainer()
  batches = [next(trainer._data) for _ in range(STEPS)]
  step, found = trainer.compile(batches[0]), []
  for change in (0.0, CHANGE):
    state, key = trainer.init_state(), jax.random.key(9)
    params = jax.tree.map(
      lambda x, c=change, k=key: x * (1 + c * jax.random.normal(k, x.shape)), state.params
    )
    state, losses = dataclasses.replace(state, params=params), []
    for batch in batches:
      with trainer._context():
        state, metrics = step(state, {}, trainer.place_batch(batch))
      losses.append(float(metrics["loss"]))
    found.append(losses)
  return np.array(found)


def main() -> None:
  for preset in ("tiny-basic", "tiny-retention", "tiny-gla", "tiny-gdn"):
    first, second = curves(preset)
    apart = np.abs(first - second)
    print(f"{preset}: {apart[0]:.1e} at the first step, at most {apart.max():.1e} in {STEPS}")


if __name__ == "__main__":
  main()
