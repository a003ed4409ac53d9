"""Searches over networks, each trained by the ordinary trainer."""
