"""The only code that touches a running model. Knows no reducer and no family by name."""
