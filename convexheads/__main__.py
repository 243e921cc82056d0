"""Runs the command `convexheads` as `python -m convexheads`."""

from convexheads_cli import main

if __name__ == "__main__":
    main()
