"""The command line, with the graphs of torch.compile run as they are: a C++ compiler takes minutes over them, and
`tests/unit/test_trainer_options.py` has one at work."""

import functools

import torch

from pointillist.cli import main

if __name__ == "__main__":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    main()
