"""``python -m sd_erase``."""

from sd_erase.cli import main

if __name__ == "__main__":
    main(prog_name="sd-erase")
