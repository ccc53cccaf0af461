"""Frameworks that agents are written in: an edge's guard of text where one agent hands over."""
