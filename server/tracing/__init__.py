"""Traces of requests, where the environment asks for them."""
