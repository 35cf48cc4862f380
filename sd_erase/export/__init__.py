"""Exports of an erased encoder, one file a format; the rows stand in `sd_erase.catalog.EXPORTS`."""
