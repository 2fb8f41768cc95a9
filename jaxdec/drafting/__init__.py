# SPDX-License-Identifier: Apache-2.0
"""Who guesses: the drafter contract, draft trees, and the built-in drafters by name."""

from jaxdec.drafting.aded import Aded
from jaxdec.drafting.aggressive import Aggressive
from jaxdec.drafting.base import Accepted, Context, Drafter, Prompt, Target, TargetOutput
from jaxdec.drafting.budget import choose_budget
from jaxdec.drafting.chimera import Chimera
from jaxdec.drafting.clover import Clover2
from jaxdec.drafting.clover1 import Clover
from jaxdec.drafting.combined import Combined
from jaxdec.drafting.datastore import Datastore
from jaxdec.drafting.dflash import DFlash
from jaxdec.drafting.dovetail import Dovetail
from jaxdec.drafting.draft_model import DraftModel
from jaxdec.drafting.dspark import DSpark
from jaxdec.drafting.dynamic_exit import DynamicExit
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.dyspec import DySpec
from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.early_exit import EarlyExit
from jaxdec.drafting.falcon import Falcon
from jaxdec.drafting.flash_vlm import Flash
from jaxdec.drafting.fspad import Fspad
from jaxdec.drafting.hass import Hass
from jaxdec.drafting.hidden_transfer import HiddenTransfer
from jaxdec.drafting.hydra import Hydra, HydraPlusPlus
from jaxdec.drafting.jacobi import Jacobi
from jaxdec.drafting.kinds import KINDS
from jaxdec.drafting.lexical_units import LexicalUnits
from jaxdec.drafting.lookahead import Lookahead
from jaxdec.drafting.masked_mtp import MaskedMTP
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.merge import merge_paths
from jaxdec.drafting.mtp import Mtp, MtpModules
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.peagle import PEagle
from jaxdec.drafting.pearl import Pearl
from jaxdec.drafting.ppd import PPD
from jaxdec.drafting.ppd_tree import SparseTrees
from jaxdec.drafting.prompt_lookup import PromptLookup
from jaxdec.drafting.registry import get, names, register
from jaxdec.drafting.rsd import RsdC, RsdS
from jaxdec.drafting.selection import argmax, top_k
from jaxdec.drafting.sequoia import Sequoia, best_tree, fastest_tree, measure_acceptance
from jaxdec.drafting.sjd import SpeculativeJacobi
from jaxdec.drafting.source import Candidates, Source
from jaxdec.drafting.specdec import SpecDec
from jaxdec.drafting.specvlm import SpecVLM
from jaxdec.drafting.static_tree import StaticTree, expected_tokens, greedy_tree
from jaxdec.drafting.stop_early import StopEarly
from jaxdec.drafting.suffix import Suffix
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.drafting.tree import Tree, chain
from jaxdec.drafting.vispec import ViSpec
from jaxdec.drafting.vocabulary import DraftVocabulary

register("none", lambda: None)
register("draft_model", DraftModel)
register("specdec", SpecDec)
register("pearl", Pearl)
register("rsd_c", RsdC)
register("rsd_s", RsdS)
register("dyspec", DySpec)
register("sequoia", Sequoia)
register("early_exit", EarlyExit)
register("del", DynamicExit)
register("prompt_lookup", PromptLookup)
register("token_recycling", TokenRecycling)
register("suffix", Suffix)
register("combined", Combined)
register("aded", Aded)
register("aggressive", Aggressive)
register("jacobi", Jacobi)
register("lookahead", Lookahead)
register("sjd", SpeculativeJacobi)
register("lexical_units", LexicalUnits.from_name)
for _kind in KINDS.values():
  register(_kind.name, _kind.from_name)

__all__ = [
  "KINDS",
  "PPD",
  "Accepted",
  "Aded",
  "Aggressive",
  "Candidates",
  "Chimera",
  "Clover",
  "Clover2",
  "Combined",
  "Context",
  "DFlash",
  "DSpark",
  "Datastore",
  "Dovetail",
  "DraftModel",
  "DraftVocabulary",
  "Drafter",
  "DySpec",
  "DynamicExit",
  "DynamicTree",
  "Eagle",
  "Eagle3",
  "EarlyExit",
  "Falcon",
  "Flash",
  "Fspad",
  "Hass",
  "HiddenTransfer",
  "Hydra",
  "HydraPlusPlus",
  "Jacobi",
  "LexicalUnits",
  "Lookahead",
  "MaskedMTP",
  "Medusa",
  "Mtp",
  "MtpModules",
  "PEagle",
  "Pearl",
  "Prompt",
  "PromptLookup",
  "RsdC",
  "RsdS",
  "Sequoia",
  "Source",
  "SparseTrees",
  "SpecDec",
  "SpecVLM",
  "SpeculativeJacobi",
  "StaticTree",
  "StopEarly",
  "Suffix",
  "Target",
  "TargetOutput",
  "Term",
  "TokenRecycling",
  "TrainedDrafter",
  "Tree",
  "ViSpec",
  "argmax",
  "best_tree",
  "chain",
  "choose_budget",
  "expected_tokens",
  "fastest_tree",
  "get",
  "greedy_tree",
  "measure_acceptance",
  "merge_paths",
  "names",
  "register",
  "top_k",
]
