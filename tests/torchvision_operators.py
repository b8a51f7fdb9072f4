"""Lets torchvision be imported beside a CPU torch.

torchvision's only build in the registries belongs to a CUDA torch; beside a CPU torch its operators can not load and
its import fails for want of their schemas. Declaring the schemas is enough for resizing and normalising.

`install` does it when torchvision is first imported: a `.pth` file in the environment of the vLLM tests calls it, so
that every process there has it and none pays for it before.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_OPERATORS = """
nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
roi_align(Tensor input, Tensor rois, float spatial_scale, int h, int w, int sampling_ratio, bool aligned) -> Tensor
qroi_align(Tensor input, Tensor rois, float spatial_scale, int h, int w, int sampling_ratio, bool aligned) -> Tensor
roi_pool(Tensor input, Tensor rois, float spatial_scale, int h, int w) -> (Tensor, Tensor)
ps_roi_align(Tensor input, Tensor rois, float spatial_scale, int h, int w, int sampling_ratio) -> (Tensor, Tensor)
ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, int h, int w) -> (Tensor, Tensor)
_roi_align_backward(Tensor grad) -> Tensor
_roi_pool_backward(Tensor grad) -> Tensor
_ps_roi_align_backward(Tensor grad) -> Tensor
_ps_roi_pool_backward(Tensor grad) -> Tensor
deform_conv2d(Tensor input) -> Tensor
_deform_conv2d_backward(Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
"""

_libraries: list[Any] = []


def declare() -> None:
    """Declares the operators' schemas, once a process."""
    import torch

    if _libraries:
        return

    _libraries.append(torch.library.Library("torchvision", "DEF"))  # kept: the schemas are gone with it
    for schema in _OPERATORS.strip().splitlines():
        _libraries[0].define(schema)


def install() -> None:
    """Declares them as soon as torchvision is imported."""
    sys.meta_path.insert(0, _BeforeTorchvision())


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()
