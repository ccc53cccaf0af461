"""The trail of what agents and operators did, in which an altered row shows."""
