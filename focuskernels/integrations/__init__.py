"""Losses with the signatures and the numbers of other packages, which need not be installed."""
