"""Who asks: API keys, and what their roles may call."""
