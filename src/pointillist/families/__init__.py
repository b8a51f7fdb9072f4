"""What differs between model families: one adapter a family, made from the model folder's own files."""

from pointillist.families.base import Expansion, Family, ForwardArgs, ImageLayout, place_image
from pointillist.families.layout_record import write_layout_record
from pointillist.families.model_files import ModelFiles, resolve_model_dir
from pointillist.families.registry import load_family

__all__ = [
    "Expansion",
    "Family",
    "ForwardArgs",
    "ImageLayout",
    "ModelFiles",
    "load_family",
    "place_image",
    "resolve_model_dir",
    "write_layout_record",
]
