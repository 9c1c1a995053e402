"""The commands of ``fastode``, one file each: ``add(commands)`` declares it, and its ``run`` does the work.

``COMMANDS`` lists them in the order of the help. A command imports what it needs when it runs: ``fastode --help`` loads
no torch.
"""

from __future__ import annotations

from fastode.commands import bench, compare, convert, demo, describe, info, likelihood, sample, solvers, train

COMMANDS = (sample, compare, solvers, describe, likelihood, train, convert, bench, demo, info)
