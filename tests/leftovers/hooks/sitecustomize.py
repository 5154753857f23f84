"""For the tests of what is left behind: a file system without O_TMPFILE (NFS, overlay), where every temporary file has a name."""

from __future__ import annotations

import os

os.O_TMPFILE = 0  # type: ignore[misc]
