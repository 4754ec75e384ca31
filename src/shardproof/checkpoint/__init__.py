"""Save and load whole models as plain directories, the same bytes at every degree."""
