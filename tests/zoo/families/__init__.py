"""The members, a module for each kind of package."""
