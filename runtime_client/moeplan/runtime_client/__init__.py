"""The part on a training rank: counts of what routers choose, layers that execute layouts, the line to the planner.

The names are those of `__init__.pyi`, each imported at its first use. Needs torch: ``pip install moeplan[torch]``.
"""

from importlib.util import find_spec

import lazy_loader

if find_spec("torch") is None:
    raise ModuleNotFoundError("moeplan.runtime_client needs torch; install it with `pip install 'moeplan[torch]'`")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
