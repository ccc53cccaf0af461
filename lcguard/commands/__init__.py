"""What the command line and the scripts share; composes core, agents and attacks."""
