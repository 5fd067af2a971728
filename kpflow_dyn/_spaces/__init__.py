"""Spaces with named axes, and the operators between them."""
