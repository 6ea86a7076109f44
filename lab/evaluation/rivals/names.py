# SPDX-License-Identifier: Apache-2.0
"""The names of published rivals, of baselines of our own and of controls, for those who need no torch."""

CONTROL_TITLES = {
    "random": "random tokens (control)",
    "stride": "even grid of tokens (control)",
}
RIVAL_TITLES = {
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "vtw": "VTW",
    "sparsevlm": "SparseVLM",
    "visionzip": "VisionZip",
    "divprune": "DivPrune",
    "cdpruner": "CDPruner",
    "ivc-prune": "IVC-Prune",
    "vscan": "VScan",
    "mmtok": "MMTok",
    "dart": "DART",
    "vispruner": "VisPruner",
    "holov": "HoloV",
    "scope": "SCOPE",
    "fopru": "FoPru",
    "vflowopt": "VFlowOpt",
    "btp": "BTP",
    "ptp": "PTP",
    "lvlm-csp": "LVLM_CSP",
    "covipal": "CoViPAL (trained here)",
    "divprune-attention": "DivPrune, then attention (ours)",
    "novelty": "neighbour novelty (ours)",
}
ONLY = "the only one"  # the configuration of what has none to choose from
CHOOSERS = {**CONTROL_TITLES, **RIVAL_TITLES}  # all that only the transformers runner can do
