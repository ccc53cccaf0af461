"""What an operator sees of a running proxy: one page made on the server."""
