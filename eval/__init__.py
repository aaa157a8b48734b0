"""Honest measurement of speed and accuracy (installed as ``vtc.eval``). Uses vtc's public API only."""
