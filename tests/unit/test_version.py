"""The version has one home, the package: what is installed says the same."""

from importlib.metadata import version

import convexheads


def test_the_version_is_that_of_the_installed_package():
    assert convexheads.__version__ == version("convexheads")
