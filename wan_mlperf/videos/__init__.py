"""Folders of videos that record what made each video."""
