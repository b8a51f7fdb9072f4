"""Tests against processors that need torchvision, which the project itself does not.

`make test` installs it into a folder of its own and runs these tests in a process of their own: nothing else sees it.
"""

from tests.torchvision_operators import declare

declare()
