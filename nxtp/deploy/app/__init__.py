"""`nxtp app`: a page to try a model in a browser.

`command.py` reads the options and serves, `page.py` is what one sees, `guard.py` keeps uploads within limits.
"""

from __future__ import annotations
