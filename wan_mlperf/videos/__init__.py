"""Folders of videos that know what made them."""
