"""The type checker that the import hook puts on every function of the library, see `conftest.py`."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is welcome where a float is asked for, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
