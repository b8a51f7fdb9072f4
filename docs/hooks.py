"""Of the site: the benchmarks' pages have a picture beside them, which lies outside `docs`."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the picture beside `performance.md`, which includes the page that shows it."""
    files.append(File.generated(config, "memory.png", abs_src_path="benchmarks/results/memory.png"))
    return files
