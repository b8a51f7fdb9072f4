"""Tests against processors that need torchvision, which the project itself does not.

torchvision's only build in the registries belongs to a CUDA torch; beside a CPU torch its operators can not load and
its import fails for want of their schemas. Declaring the schemas is enough for resizing and normalising. `make test`
installs it into a folder of its own and runs these tests in a process of their own: nothing else ever sees it.
"""

import torch

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
_library = torch.library.Library("torchvision", "DEF")
for _schema in _OPERATORS.strip().splitlines():
    _library.define(_schema)
