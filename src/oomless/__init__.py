"""Train language models on the GPU you have, and do not run out of memory.

Importing this package loads no torch, touches no GPU and sets no variable: public names load when used.
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"
