"""What canaries found, as the loop reads it: from the proxy's database, a file or a server."""

from __future__ import annotations

from pathlib import Path

from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.place import is_server, place_of, reading
from lcguard.server.leakage.edge_state import EdgeLeakage, EdgeName, LeakageError, all_edges

_WAIT_S = 5.0


def screened_edges(database: str | Path) -> dict[EdgeName, EdgeLeakage]:
    """Every edge that was screened, by name.

    Raises ``ValueError`` for a database that is not there or cannot be read, and for rows that were
    altered: no news is not good news.
    """
    if not is_server(database) and not Path(database).exists():
        raise ValueError(f"{database} does not exist: give the database of the proxy's state")
    try:
        with reading(place_of(database, _WAIT_S)) as connection:
            return all_edges(connection)
    except (DatabaseError, LeakageError) as error:
        raise ValueError(str(error)) from None
