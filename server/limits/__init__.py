"""How much may be asked for: by one key, at a time, and in one answer."""
