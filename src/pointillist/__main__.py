"""`python -m pointillist` is the same door as the `pointillist` command."""

from pointillist.cli import main

if __name__ == "__main__":
    main()
