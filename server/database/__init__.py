"""The one database of the audit and the ledger, and the thread that writes it."""
