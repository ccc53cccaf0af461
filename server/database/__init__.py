"""The one SQLite file of the audit and the ledger, and the thread that writes it."""
