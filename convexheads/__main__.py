"""Runs the command `convexheads` as `python -m convexheads`."""

from convexheads.cli.command import main

if __name__ == "__main__":
    main()
