"""The API as Python: our own types over the wire, jobs, and the client of a planner's daemon.

from moeplan.api import Client

with Client("127.0.0.1:7433") as client:
    plans = client.solve([problem])

The names are those of `__init__.pyi`, each imported at its first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
