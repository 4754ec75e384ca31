"""The works, one file for each kind."""
