# SPDX-License-Identifier: Apache-2.0
"""The names of published rivals and of one baseline of our own, for those who need no torch."""

RIVAL_TITLES = {
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "vtw": "VTW",
    "sparsevlm": "SparseVLM",
    "visionzip": "VisionZip",
    "divprune": "DivPrune",
    "cdpruner": "CDPruner",
    "ivc-prune": "IVC-Prune",
    "novelty": "neighbour novelty (ours)",
}
