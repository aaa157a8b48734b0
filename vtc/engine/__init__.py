"""The only code that touches a running model. Knows no reducer and no family by name."""

from vtc import _window

_window.warn("transformers")  # once per process: here every way to patch a model passes, and `vtc --help` does not
