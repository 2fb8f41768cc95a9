# SPDX-License-Identifier: Apache-2.0
"""The hardware-aware dynamic sparse tree of Parallel Prompt Decoding (arXiv 2405.18628, section 4).

A node of the tree is a candidate token with s' = 1..n prompts behind it; the root always has n.
Where the last accepted node had s, the next tree may be s deep: the state of a Markov chain. With
``acc[d-1, r]`` the chance that the candidate of rank r at depth d is right, a node is accepted with
the product of its path, and is the *last* accepted with that product less those of its children:

  v_s = 1 + sum over nodes of P(accepted)                tokens per step in state s
  M[s' | s] = sum of P(last) over the nodes with s' prompts
  tau = sum_s pi_s v_s,   pi the stationary law of M

A step that accepts nothing ends at the root, whose n prompts are there: it leads to state n. (A
chain with one more state for it, worth nothing, counts a step that is never taken.)

``SparseTrees.build`` finds the trees of the largest tau for a number of rows. The trade between
candidates and prompts couples the states, so it is a Markov decision process with tau as average
reward, solved by policy iteration (Howard, 1960): a prompt is worth what its state is worth over
the one below, ``P(last) (h_{s'} - h_{s'-1})``, and the best numbers of prompts under a budget are a
knapsack, solved exactly. Candidates are the largest products, as many as pay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np

from jaxdec.drafting.static_tree import StaticTree, greedy_tree
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptTree:
  """Candidates and how many prompts hang behind each; ``prompts[0]`` are the root's."""

  candidates: StaticTree
  prompts: tuple[int, ...]

  def __post_init__(self):
    if len(self.prompts) != self.candidates.num_nodes or min(self.prompts) < 1:
      raise UserError(
        f"a tree of {self.candidates.num_nodes} nodes needs as many numbers of prompts, each at "
        f"least 1, got {self.prompts}"
      )

  def accepted(self, accuracy: np.ndarray) -> np.ndarray:
    """``[M]`` chance that each node is accepted, the root's 1."""
    paths = ((), *self.candidates.paths)
    return np.array([np.prod([accuracy[d, r] for d, r in enumerate(p)]) for p in paths])

  def last(self, accuracy: np.ndarray) -> np.ndarray:
    """``[M]`` chance that each node is the last one accepted; they sum to 1."""
    accepted = self.accepted(accuracy)
    last = accepted.copy()
    np.subtract.at(last, self.candidates.parent[1:], accepted[1:])
    return last


@dataclasses.dataclass(frozen=True)
class SparseTrees:
  """One ``PromptTree`` for each state s = 1..n; tree s is at most s deep."""

  trees: tuple[PromptTree, ...]

  def __post_init__(self):
    n = len(self.trees)
    for s, tree in enumerate(self.trees, 1):
      if tree.candidates.max_depth > s or max(tree.prompts) > n or tree.prompts[0] != n:
        raise UserError(
          f"the tree of state {s} of {n} must be at most {s} deep, with at most {n} prompts behind "
          f"a node and {n} behind the root"
        )

  @property
  def num_nodes(self) -> int:
    """M, the candidates of the largest tree, root included."""
    return max(t.candidates.num_nodes for t in self.trees)

  @property
  def max_depth(self) -> int:
    return max(t.candidates.max_depth for t in self.trees)

  def rows(self, ensemble: int = 1) -> int:
    """Rows of a verify pass: candidates and prompts, each padded to the largest tree's."""
    return self.num_nodes + ensemble * max(sum(t.prompts) for t in self.trees)

  @classmethod
  def of(cls, trees: Iterable[tuple[Iterable, Iterable[int]]]) -> SparseTrees:
    """From the candidates' paths and the numbers of prompts of each state."""
    made = [PromptTree(StaticTree.from_paths(paths), tuple(n)) for paths, n in trees]
    return cls(tuple(made))

  @classmethod
  def full(cls, candidates: StaticTree, num_prompts: int) -> SparseTrees:
    """The same candidates in each state, as deep as it allows, all prompts behind every node."""
    cut = [
      StaticTree.from_paths([p for p in candidates.paths if len(p) <= s])
      for s in range(1, num_prompts + 1)
    ]
    return cls(tuple(PromptTree(c, (num_prompts,) * c.num_nodes) for c in cut))

  @classmethod
  def build(
    cls, accuracy: np.ndarray, rows: int, num_prompts: int, ensemble: int = 1
  ) -> SparseTrees:
    """The trees of the largest tau that fit ``rows`` rows a pass.

    Args:
      accuracy: ``[D >= num_prompts, R]``, as for ``greedy_tree``.

    Raises:
      UserError: fewer rows than the root and its prompts, or than one candidate with one prompt.
    """
    least = 1 + ensemble * num_prompts + 1 + ensemble
    if rows < least:
      raise UserError(
        f"a sparse tree with {num_prompts} prompts of {ensemble} members needs at least {least} "
        f"rows, got {rows}"
      )
    best, best_tau = None, -1.0
    for nodes in range(2, rows):
      budget = (rows - nodes) // ensemble
      if budget < num_prompts + nodes - 1:
        break
      trees = _improve(np.asarray(accuracy, np.float64), nodes, budget, num_prompts)
      tau = stationary(trees, accuracy)
      if tau > best_tau + 1e-12:
        best, best_tau = trees, tau
    return best

  @functools.lru_cache(maxsize=8)  # noqa: B019 (frozen, and few)
  def tables(self, ensemble: int = 1) -> dict[str, np.ndarray]:
    """Trees and probes as arrays by state, ``[n, M]`` and ``[n, R]``, padded.

    Padding nodes are invalid children of the root; padding rows form groups of their own."""
    m = self.num_nodes
    r = ensemble * max(sum(t.prompts) for t in self.trees)
    out = {
      name: np.zeros((len(self.trees), m), np.int32) for name in ("parent", "depth", "rank")
    } | {name: np.zeros((len(self.trees), r), np.int32) for name in ("anchor", "offset", "member")}
    out["valid"] = np.zeros((len(self.trees), m), bool)
    out["depth"][:] = 1
    out["offset"][:], out["member"][:] = len(self.trees), ensemble
    for s, tree in enumerate(self.trees):
      n, shape = tree.candidates.num_nodes, tree.candidates
      for name in ("parent", "depth", "rank"):
        out[name][s, :n] = getattr(shape, name)
      out["valid"][s, :n] = True
      listed = [
        (i, node, e)
        for i in range(1, len(self.trees) + 1)
        for node, count in enumerate(tree.prompts)
        if i <= count
        for e in range(ensemble)
      ]
      for row, (i, node, e) in enumerate(listed):
        out["anchor"][s, row], out["offset"][s, row], out["member"][s, row] = node, i, e
    return out


def transitions(trees: SparseTrees, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """``M [n,n]``, row s the law of the next state, and ``v [n]``, tokens of a step in state s."""
  n = len(trees.trees)
  matrix, value = np.zeros((n, n)), np.zeros(n)
  for s, tree in enumerate(trees.trees):
    np.add.at(matrix[s], np.array(tree.prompts) - 1, tree.last(accuracy))
    value[s] = tree.accepted(accuracy).sum()
  return matrix, value


def _evaluate(trees: SparseTrees, accuracy: np.ndarray) -> tuple[float, np.ndarray]:
  """Average reward and relative values: ``h + tau = v + M h``, ``h_n = 0``.

  State n can be reached from anywhere (nothing accepted) unless some draft is never wrong; a speck
  of it keeps the chain of such a table in one piece."""
  matrix, value = transitions(trees, accuracy)
  n = len(value)
  speck = 1e-9
  matrix = (1 - speck) * matrix
  matrix[:, -1] += speck
  system = np.eye(n) - matrix
  system[:, -1] = 1.0  # the column of h_n = 0 holds tau
  solution = np.linalg.solve(system, value)
  tau = float(solution[-1])
  return tau, np.concatenate([solution[:-1], [0.0]])


def stationary(trees: SparseTrees, accuracy: np.ndarray) -> float:
  """tau, expected tokens per step in the long run, the target's own token included."""
  return _evaluate(trees, np.asarray(accuracy, np.float64))[0]


def _allocate(gain: np.ndarray, budget: int) -> tuple[int, ...]:
  """Numbers of prompts, one to n a node, of the largest total gain within the budget.

  ``gain [M, n]`` of giving a node 1..n prompts; the first node takes n."""
  m, n = gain.shape
  spare = budget - n - (m - 1)  # beyond one each
  table = np.zeros(spare + 1)
  choices = []
  for node in range(1, m):
    options = np.full((n, spare + 1), -np.inf)
    for extra in range(min(n, spare + 1)):
      options[extra, extra:] = gain[node, extra] + table[: spare + 1 - extra]
    choices.append(np.argmax(options, axis=0))
    table = np.max(options, axis=0)
  prompts = []
  for choice in reversed(choices):
    extra = int(choice[spare])
    prompts.append(1 + extra)
    spare -= extra
  return (n, *reversed(prompts))


def _improve(accuracy: np.ndarray, nodes: int, budget: int, n: int) -> SparseTrees:
  """Policy iteration over trees of up to ``nodes`` candidates and ``budget`` prompts."""

  def actions(s):
    sizes = range(1, nodes + 1)
    shapes = dict.fromkeys(greedy_tree(accuracy[:n], m, max_depth=s) for m in sizes)
    return [shape for shape in shapes if n + shape.num_nodes - 1 <= budget]

  shapes = [actions(s) for s in range(1, n + 1)]
  value = np.arange(n, dtype=np.float64)  # deeper is better, to begin with
  best, best_tau = None, -np.inf
  for _ in range(50):
    trees = []
    for options in shapes:
      scored = []
      for shape in options:
        full = PromptTree(shape, (n,) * shape.num_nodes)
        prompts = _allocate(full.last(accuracy)[:, None] * value[None], budget)
        tree = PromptTree(shape, prompts)
        worth = full.accepted(accuracy).sum()
        worth += float(full.last(accuracy) @ value[np.array(prompts) - 1])
        scored.append((worth, len(scored), tree))
      trees.append(max(scored, key=lambda x: (x[0], -x[1]))[2])
    candidate = SparseTrees(tuple(trees))
    tau, value = _evaluate(candidate, accuracy)
    if tau <= best_tau + 1e-12:
      return best
    best, best_tau = candidate, tau
  return best


def choose_rows(
  accuracy: np.ndarray,
  budgets: Iterable[int],
  latency: Callable[[int], float],
  num_prompts: int,
  ensemble: int = 1,
) -> tuple[int, SparseTrees]:
  """The budget of rows, and its trees, of the largest ``tau(rows) / latency(rows)``.

  ``latency(rows)``: seconds of a step with as many rows, as measured on the machine that decodes.
  """
  scored = []
  for rows in budgets:
    trees = SparseTrees.build(accuracy, rows, num_prompts, ensemble)
    scored.append((stationary(trees, accuracy) / latency(rows), rows, trees))
  if not scored:
    raise UserError("choose_rows needs at least one budget")
  _, rows, trees = max(scored, key=lambda x: (x[0], -x[1]))
  return rows, trees
