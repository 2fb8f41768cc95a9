# SPDX-License-Identifier: Apache-2.0
"""LayerSkip's training recipe (arXiv 2404.16710): a model whose early layers can speak.

Early-exit loss: the one LM head reads the stream after layers l = 0 .. L-2 too, and

  loss = sum_l e_l CE_l / sum_l e_l
  e_l = scale (0 + .. + l),   e_{L-1} = L - 1 + scale (0 + .. + L-2)

over the last layer and a few others, drawn anew each step (the paper rotates through them, which
needs the number of the step; a draw visits them as often). Layer dropout: a text leaves out layer l
with probability ``p_l = dropout (2^{l / (L-1)} - 1)``, for fine-tuning constant over time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class LayerSkip:
  """Attributes:

  scale: weight of the early exits against the last layer (the paper: 0.1 to 1).
  exits: early exits that a step trains.
  dropout: largest rate, the last layer's.
  """

  scale: float = 0.2
  exits: int = 1
  dropout: float = 0.0

  def __post_init__(self):
    if self.scale < 0 or self.exits < 1 or not 0 <= self.dropout < 1:
      raise UserError(
        "layer_skip needs scale >= 0, exits >= 1 and dropout in [0, 1), got "
        f"{self.scale}, {self.exits} and {self.dropout}"
      )

  def weights(self, num_layers: int) -> np.ndarray:
    """``e_l`` of the streams after each layer, ``[L]``."""
    sums = np.cumsum(np.arange(num_layers, dtype=np.float64))
    last = num_layers - 1 + self.scale * sums[num_layers - 2]
    return np.append(self.scale * sums[:-1], last)

  def drop_rates(self, num_layers: int) -> np.ndarray:
    """``p_l``, ``[L]``."""
    return self.dropout * (2 ** (np.arange(num_layers) / max(num_layers - 1, 1)) - 1)

  def keep(self, rng: jax.Array, num_layers: int, batch: int) -> Bool[Array, "L B"] | None:
    """Which layers each text goes through; None: all."""
    if not self.dropout:
      return None
    rates = jnp.asarray(self.drop_rates(num_layers), jnp.float32)
    return jax.random.uniform(rng, (num_layers, batch)) >= rates[:, None]

  def draw(
    self, rng: jax.Array, num_layers: int
  ) -> tuple[Int[Array, "J"], Float[Array, "J"], Float[Array, ""]]:
    """Layers after which this step exits, their shares of the loss, and the last layer's.

    Layers of weight 0 (the first) are not drawn.

    Raises:
      UserError: the model has fewer exits.
    """
    if not 1 <= self.exits <= num_layers - 2:
      raise UserError(
        f"layer_skip draws {self.exits} exits a step, but a model of {num_layers} layers has "
        f"{max(num_layers - 2, 0)}; use fewer"
      )
    weights = jnp.asarray(self.weights(num_layers), jnp.float32)
    chosen = 1 + jax.random.permutation(rng, num_layers - 2)[: self.exits]
    total = jnp.sum(weights[chosen]) + weights[-1]
    return chosen, weights[chosen] / total, weights[-1] / total
