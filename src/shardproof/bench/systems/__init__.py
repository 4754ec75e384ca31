"""The systems, one file for each library."""
