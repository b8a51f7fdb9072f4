"""A run's folder: what lies where, the one resolution of its image folder, its records, its lock, its heartbeats."""

from pointillist.runs.image_dir import own_image_dir, resolve_image_dir, writer_image_dir
from pointillist.runs.paths import RunPaths

__all__ = ["RunPaths", "own_image_dir", "resolve_image_dir", "writer_image_dir"]
