"""Whether a handoff may happen, and what is written down of what became of it."""
