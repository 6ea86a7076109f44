# SPDX-License-Identifier: Apache-2.0
"""Lets the CUDA builds of torchvision, torchaudio and torchcodec stand beside CPU torch.

torchvision registers fake kernels for `torchvision::nms` at import. Its operator library, which would
declare that operator, needs CUDA libraries and is skipped, so the import raises "operator
torchvision::nms does not exist". Declaring the two schemas first is enough: vLLM and transformers use
only the transforms, which are plain torch. torchaudio and torchcodec cannot be loaded at all; transformers
and vLLM import them wherever they are installed: they are hidden, and audio and video go without them.
Every interpreter start runs this file, so it imports next to nothing.
"""

import os
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # torch drops a library's schemas when its object is collected


class TorchvisionSchemas:
    """Meta path finder: declares the schemas on the first look-up of torchvision, finds nothing."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision" and TorchvisionSchemas in sys.meta_path:
            sys.meta_path.remove(TorchvisionSchemas)
            declare_schemas()


def declare_schemas() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` unless this torch is a CUDA build."""
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in SCHEMAS:
        library.define(schema)


def is_cuda_build(package: str) -> bool:
    """Whether the copy of `package` beside this file was built for CUDA, by its own version file."""
    try:
        with open(os.path.join(os.path.dirname(__file__), package, "version.py")) as version_file:
            return "+cu" in version_file.read()
    except OSError:
        return False


def install() -> None:
    """Called by the `.pth` file at interpreter start, possibly twice (a venv inside a venv)."""
    if TorchvisionSchemas not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionSchemas)
    for package in ("torchaudio", "torchcodec"):
        if is_cuda_build(package):
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # "not found", to any importer
