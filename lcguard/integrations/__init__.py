"""Frameworks that agents are written in: an edge's guard where one agent hands over."""
