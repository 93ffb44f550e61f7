"""What the properties are tried on, one file per kind of input."""
