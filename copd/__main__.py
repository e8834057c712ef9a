"""`python -m copd` is the `copd` command."""

from copd.cli import main

if __name__ == "__main__":
    main()
