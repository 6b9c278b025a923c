"""`python -m autoseg` is the command line."""

from autoseg.cli import main

if __name__ == "__main__":
    main()
