"""Families of stock networks, one file each: a declaration (`FAMILY`) and the functions that it names."""
