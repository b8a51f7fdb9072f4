"""Floor 2: what differs between model families, and the one function that turns references into tensors."""

from pointillist.families.base import Expansion, Family, ForwardPolicy, ImageLayout, describe_image
from pointillist.families.image_cache import LoadedImage
from pointillist.families.joining import PatchJoiner
from pointillist.families.layout_record import write_layout_record
from pointillist.families.materializer import ImageBatch, RawImageMaterializer
from pointillist.families.model_files import ModelFiles, resolve_model_dir
from pointillist.families.registry import load_family

__all__ = [
    "Expansion",
    "Family",
    "ForwardPolicy",
    "ImageBatch",
    "ImageLayout",
    "LoadedImage",
    "ModelFiles",
    "PatchJoiner",
    "RawImageMaterializer",
    "describe_image",
    "load_family",
    "resolve_model_dir",
    "write_layout_record",
]
