"""The parts of rehman_friesecke.py."""
