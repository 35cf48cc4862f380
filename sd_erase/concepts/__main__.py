"""Bring the stored inflections of the packaged cards up to date."""

from sd_erase.concepts.cards import write_numbers
from sd_erase.concepts.inflection import NUMBERS_FILE
from sd_erase.terminal import echo

echo(f"{NUMBERS_FILE}: {len(write_numbers())} phrases")
